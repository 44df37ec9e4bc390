"""Clipped sums of weight gradients, formed from operands without per-sample gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veilspan.kernels import clipped_sum, direct_norm, per_sample_grad
from veilspan.kernels.ops import clipped_sum as module
from veilspan.kernels.testing import DEVICE, Fence, random, sparse

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [(1, 1, 1, 1), (2, 37, 45, 51), (3, 5, 130, 33), (1, 70, 70, 65), (4, 1, 3, 128)]
CALLS = ["kernel", "blocks"]


def operands(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, fence: Fence
) -> tuple[Tensor, Tensor, Tensor]:
    samples, tokens, inputs, outputs = sizes
    act_BTI = fence(random(samples, tokens, inputs, dtype=dtype, seed=1))
    grad_BTO = fence(random(samples, tokens, outputs, dtype=dtype, seed=2))
    return act_BTI, grad_BTO, fence(random(samples, seed=3).abs())


def exact(act_BTI: Tensor, grad_BTO: Tensor, factor_B: Tensor) -> Tensor:
    grad_BOI = torch.bmm(grad_BTO.double().mT, act_BTI.double())
    return (grad_BOI * factor_B.double()[:, None, None]).sum(0)


def called(call: str, act_BTI: Tensor, grad_BTO: Tensor, factor_B: Tensor, total: Tensor) -> Tensor:
    if call == "kernel":
        return clipped_sum(act_BTI, grad_BTO, factor_B, total=total)
    module._in_blocks(act_BTI, grad_BTO, factor_B, total, True)
    return total


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("old", [False, True])
def test_sums_equal_fp64(
    old: bool, sizes: tuple[int, int, int, int], dtype: torch.dtype, fence: Fence
) -> None:
    act_BTI, grad_BTO, factor_B = operands(sizes, dtype, fence)
    right = exact(act_BTI, grad_BTO, factor_B)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = fence(random(sizes[3], sizes[2], seed=7).to(wide)) if old else None
    right = right + total if total is not None else right
    found = clipped_sum(act_BTI, grad_BTO, factor_B, total=total)
    assert found.dtype == wide
    assert total is None or found is total
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("scratch", [1, 70, 1 << 22])
def test_blocks_in_pytorch_equal_fp64(
    scratch: int,
    old: bool,
    wide: torch.dtype,
    dtype: torch.dtype,
    fence: Fence,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("veilspan.kernels.tiles.SCRATCH", scratch)
    act_BTI, grad_BTO, factor_B = operands((2, 9, 17, 6), dtype, fence)
    total = fence(random(6, 17, seed=7).to(wide))
    right = exact(act_BTI, grad_BTO, factor_B)
    right = right + total if old else right
    if not old:
        total.fill_(float("nan"))
    module._in_blocks(act_BTI, grad_BTO, factor_B.to(wide), total, old)
    torch.testing.assert_close(total.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_a_contribution_never_exceeds_the_clip_norm(
    seed: int, dtype: torch.dtype, call: str, device: torch.device
) -> None:
    act_BTI, grad_BTO = (random(1, 64, n, dtype=dtype, seed=seed + n) for n in (20, 12))
    act_BTI[:, 1::2], grad_BTO[:, 1::2] = act_BTI[:, ::2], -grad_BTO[:, ::2]  # pairs that cancel
    act_BTI[:, 1::2] *= 1 + 2.0**-6
    norm_B = direct_norm(act_BTI, grad_BTO).sqrt()
    factor_B = (1 - 2.0**-12) * 0.5 / norm_B
    found = called(call, act_BTI, grad_BTO, factor_B.float(), torch.zeros(12, 20, device=device))
    assert 0.499 < float(found.double().norm()) <= 0.5


def test_factor_one_leaves_the_bits_of_the_gradient(fence: Fence) -> None:
    if DEVICE.type != "cpu":
        pytest.skip("tables may give the two ops different tiles there")
    act_BTI, grad_BTO, _ = operands((1, 70, 45, 51), torch.bfloat16, fence)
    grad_BOI, sq_norm_B = per_sample_grad(act_BTI, grad_BTO, out_dtype=torch.float32)
    assert torch.equal(clipped_sum(act_BTI, grad_BTO, torch.ones(1)), grad_BOI[0])
    assert torch.equal(sq_norm_B, direct_norm(act_BTI, grad_BTO))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("waits", [False, True])
def test_a_zero_factor_drops_operands_that_are_not_finite(
    waits: bool, call: str, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not waits:  # as on a GPU, where nobody asks which factors are 0
        monkeypatch.setattr(module, "used_samples", lambda factor_B: range(len(factor_B)))
    act_BTI, grad_BTO, factor_B = operands((3, 5, 6, 7), torch.bfloat16, fence)
    act_BTI[1], grad_BTO[1, 2], factor_B[1] = float("nan"), float("inf"), 0.0
    total = fence(random(7, 6))
    right = exact(act_BTI[::2], grad_BTO[::2], factor_B[::2]) + total
    found = called(call, act_BTI, grad_BTO, factor_B, total)
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("call", CALLS)
def test_factors_that_are_all_zero_leave_the_total_alone(call: str, fence: Fence) -> None:
    act_BTI, grad_BTO, factor_B = operands((3, 5, 6, 7), torch.bfloat16, fence)
    act_BTI.fill_(float("nan"))
    total = fence(random(7, 6))
    found = called(call, act_BTI, grad_BTO, torch.zeros_like(factor_B), total.clone())
    assert torch.equal(found, total)


@pytest.mark.parametrize("call", CALLS)
def test_operands_may_differ_in_dtype_and_have_any_strides(call: str) -> None:
    act_BTI = random(11, 3, 2 * 20, dtype=torch.bfloat16).transpose(0, 1)[:, :, ::2]
    grad_BTO, factor_B = random(3, 6, 22).mT[:, ::2], random(6)[::2]
    total = torch.zeros_like(act_BTI[0, 0, 0].float()).expand(6, 20).contiguous()
    right = exact(act_BTI, grad_BTO, factor_B)
    found = called(call, act_BTI, grad_BTO, factor_B, total)
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("sizes", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_nothing_sums_to_zero(call: str, sizes: tuple[int, int, int, int], fence: Fence) -> None:
    pair = operands(sizes, torch.float32, fence)
    total = random(sizes[3], sizes[2])
    assert torch.equal(called(call, *pair, total.clone()), total)
    assert torch.equal(clipped_sum(*pair), torch.zeros_like(total))
    module._in_blocks(*pair, total, False)
    assert not total.any()


def test_results_are_the_same_in_two_runs(fence: Fence) -> None:
    pair = operands((2, 40, 70, 40), torch.bfloat16, fence)
    assert torch.equal(clipped_sum(*pair), clipped_sum(*pair))


def test_indices_reach_beyond_32_bits(device: torch.device) -> None:
    far = sparse((2, 2, 3), (2**31 + 6, 3, 1), torch.bfloat16)
    far[-1, -1] = 2.0
    near = torch.ones(2, 2, 5, dtype=torch.bfloat16, device=device)
    factor_B = torch.tensor([1.0, 0.5], device=device)
    assert torch.equal(clipped_sum(far, near, factor_B), torch.ones(5, 3, device=device))
    assert torch.equal(clipped_sum(near, far, factor_B), torch.ones(3, 5, device=device))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_BTI": torch.ones(4, 5)}, r"act_BTI has shape \[4, 5\]; it must be \[B, T, I\]"),
        ({"grad_BTO": torch.ones(2, 4, 5)}, r"grad_BTO has shape \[2, 4, 5\]; .* \[2, 3, O\]"),
        ({"factor_B": torch.ones(3)}, r"factor_B has shape \[3\]; it must be \[2\]"),
        ({"factor_B": torch.ones(2, dtype=torch.bfloat16)}, "factor_B is torch.bfloat16"),
        ({"factor_B": torch.ones(2, device="meta")}, "factor_B is on meta"),
        ({"factor_B": torch.tensor([1.0, float("inf")])}, "factor_B must be finite"),
        ({"total": torch.zeros(4, 5)}, r"total has shape \[4, 5\]; it must be \[5, 4\]"),
        ({"total": torch.zeros(4, 5).mT}, "total is not contiguous"),
        ({"total": torch.zeros(5, 4, dtype=torch.bfloat16)}, "total is torch.bfloat16"),
        ({"total": torch.zeros(5, 4, device="meta")}, "total is on meta"),
    ],
)
def test_bad_input_is_named(change: dict, message: str, device: torch.device) -> None:
    if device.type != "cpu" and "must be finite" in message:
        pytest.skip("on a GPU a device-side assertion reports it, which ends the process")
    arguments = {
        "act_BTI": torch.ones(2, 3, 4),
        "grad_BTO": torch.ones(2, 3, 5),
        "factor_B": torch.ones(2),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        clipped_sum(**arguments)


def test_torch_compile_sees_the_op_without_graph_breaks(fence: Fence) -> None:
    pair = operands((2, 3, 4, 5), torch.float32, fence)

    def summed(total: Tensor) -> Tensor:
        torch.ops.veilspan.clipped_sum(*pair, total, True)
        return total * 2.0

    compiled = torch.compile(summed, backend="eager", fullgraph=True)
    total = random(5, 4)
    assert torch.equal(compiled(total.clone()), summed(total.clone()))
    torch.library.opcheck(torch.ops.veilspan.clipped_sum.default, (*pair, total, True))
