"""Cross entropy whose logits become their gradient in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from veilspan.kernels import cross_entropy_
from veilspan.kernels.ops.cross_entropy import _in_pytorch_
from veilspan.kernels.testing import DEVICE, Fence, random, sparse

C = torch.float64
IGNORED = -100


def labels(count: int, vocabulary: int) -> Tensor:
    found = torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(1))
    found[2::5] = IGNORED
    return found.to(DEVICE)


def exact(logits: Tensor, wanted: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    leaf = logits.double().clone().requires_grad_()
    losses = F.cross_entropy(leaf, wanted, ignore_index=IGNORED, reduction="none")
    (slope,) = torch.autograd.grad(losses.sum() * scale, leaf)
    return losses.detach(), slope


def tolerance(dtype: torch.dtype) -> float:
    return {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2e-6}.get(dtype, 1e-12)


def scale_of(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=C if dtype == C else torch.float32, device=DEVICE)


def in_pytorch(logits: Tensor, wanted: Tensor, scale: Tensor) -> Tensor:
    return _in_pytorch_(logits, wanted.masked_fill(wanted == IGNORED, -1), scale)


@pytest.mark.parametrize("form", [cross_entropy_, in_pytorch])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, C])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (4, 64), (6, 65), (9, 130)])
def test_losses_and_slopes_equal_autograd_in_fp64(
    form: Callable[..., Tensor], shape: tuple[int, int], dtype: torch.dtype, fence: Fence
) -> None:
    logits, wanted = fence(random(*shape, dtype=dtype) * 4.0), fence(labels(*shape))
    losses, slope = exact(logits, wanted, 0.25)
    found = form(logits, wanted, scale_of(0.25, dtype))
    assert found.dtype == (C if dtype == C else torch.float32)
    near = tolerance(C if dtype == C else torch.float32)
    torch.testing.assert_close(found.double(), losses, rtol=near, atol=near)
    near = tolerance(dtype)
    torch.testing.assert_close(logits.double(), slope, rtol=near, atol=1e-7)


@pytest.mark.parametrize("form", [cross_entropy_, in_pytorch])
def test_extreme_logits_stay_finite(form: Callable[..., Tensor]) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-float("inf"), 0.0, 0.0], [1e30, 1e30, -1e30]])
    logits, wanted = logits.to(DEVICE), torch.tensor([1, 2, 0], device=DEVICE)
    losses = form(logits, wanted, scale_of(1.0, torch.float32))
    assert losses.tolist() == pytest.approx([2e4, 0.6931472, 0.6931472])
    right = [[1.0, -1.0, 0.0], [0.0, 0.5, -0.5], [-0.5, 0.5, 0.0]]
    torch.testing.assert_close(logits.cpu(), torch.tensor(right))


@pytest.mark.parametrize("form", [cross_entropy_, in_pytorch])
def test_rows_that_do_not_count_become_zero_whatever_they_held(form: Callable[..., Tensor]) -> None:
    logits = torch.full((2, 70), float("nan"), device=DEVICE)
    logits[1] = 0.0
    wanted = torch.tensor([IGNORED, 3], device=DEVICE)
    losses = form(logits, wanted, scale_of(1.0, torch.float32))
    assert float(losses[0]) == 0.0
    assert bool((logits[0] == 0.0).all())
    assert float(logits[1].sum()) == pytest.approx(0.0, abs=1e-6)


def test_a_label_may_be_the_one_to_ignore() -> None:
    logits = random(2, 4)
    before = logits.clone()
    scale = scale_of(1.0, torch.float32)
    losses = cross_entropy_(logits, torch.tensor([0, 1], device=DEVICE), scale, ignore_index=0)
    right, _ = exact(before, torch.tensor([IGNORED, 1], device=DEVICE), 1.0)
    assert losses.tolist() == pytest.approx(right.tolist())


def test_results_are_the_same_in_two_runs() -> None:
    wanted, scale = labels(9, 130), scale_of(0.5, torch.float32)
    first, second = random(9, 130), random(9, 130)
    assert torch.equal(cross_entropy_(first, wanted, scale), cross_entropy_(second, wanted, scale))
    assert torch.equal(first, second)


def test_indices_reach_beyond_32_bits(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("the interpreter would take hours for such rows; `nox -s gpu` runs it")
    logits = sparse((17001, 128256), (128256, 1), torch.bfloat16)
    wanted = torch.full((17001,), IGNORED, device=device)
    wanted[-1] = 128255
    losses = cross_entropy_(logits, wanted, scale_of(1.0, torch.float32))
    assert float(losses[-1]) == pytest.approx(11.7618, rel=1e-4)
    assert float(logits[-1, -1]) == pytest.approx(-1.0, rel=1e-2)


def test_nothing_costs_nothing(device: torch.device) -> None:
    none = torch.zeros(0, dtype=torch.int64, device=device)
    logits = torch.zeros(0, 5, device=device)
    assert cross_entropy_(logits, none, scale_of(1.0, torch.float32)).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_NV": torch.zeros(4)}, r"logits_NV has shape \[4\]; it must be \[N, V\]"),
        ({"logits_NV": torch.zeros(3, 2).mT}, "logits_NV is not contiguous"),
        ({"logits_NV": torch.zeros(2, 3).int()}, "logits_NV is torch.int32"),
        ({"labels_N": torch.zeros(3).long()}, r"labels_N has shape \[3\]; it must be \[2\]"),
        ({"labels_N": torch.tensor([3, -1])}, r"labels_N: 2 of 2 positions must be in \[0, 3\)"),
        ({"scale": torch.ones(2)}, r"scale has shape \[2\]; it must be \[\]"),
        ({"scale": torch.tensor(1.0, dtype=C)}, "scale is torch.float64; it must be one of"),
        ({"scale": torch.tensor(1.0, device="meta")}, "scale is on meta"),
    ],
)
def test_bad_input_is_named(change: dict, message: str, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("on a GPU a device-side assertion reports labels, which ends the process")
    arguments = {
        "logits_NV": torch.zeros(2, 3),
        "labels_N": torch.zeros(2, dtype=torch.int64),
        "scale": torch.tensor(1.0),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        cross_entropy_(**arguments)


def test_torch_compile_sees_the_op_without_graph_breaks() -> None:
    op = torch.ops.veilspan.cross_entropy_.default
    wanted, scale = torch.tensor([1, -1, 3], device=DEVICE), scale_of(0.5, torch.float32)

    def both(logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.clone()
        return op(logits, wanted, scale), logits

    compiled = torch.compile(both, backend="eager", fullgraph=True)
    for one, two in zip(compiled(random(3, 5)), both(random(3, 5)), strict=True):
        assert torch.equal(one, two)
    torch.library.opcheck(op, (random(3, 5), wanted, scale))
