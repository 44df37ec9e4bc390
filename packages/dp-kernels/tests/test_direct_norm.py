"""Squared norms of per-sample weight gradients, formed tile by tile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veilspan.kernels import direct_norm
from veilspan.kernels.ops import direct_norm as module
from veilspan.kernels.testing import Fence, random, sparse
from veilspan.kernels.tiles import product_blocks, sq_norms

NARROW = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1, 1), (2, 37, 45, 51), (3, 5, 130, 33), (1, 70, 70, 65), (4, 1, 3, 128)]


def operands(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, fence: Fence
) -> tuple[Tensor, Tensor]:
    samples, tokens, inputs, outputs = sizes
    act_BTI = fence(random(samples, tokens, inputs, dtype=dtype, seed=1))
    return act_BTI, fence(random(samples, tokens, outputs, dtype=dtype, seed=2))


def exact(act_BTI: Tensor, grad_BTO: Tensor) -> Tensor:
    return torch.bmm(grad_BTO.double().mT, act_BTI.double()).square().sum((1, 2))


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
@pytest.mark.parametrize("sizes", SIZES)
def test_norms_equal_fp64(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, fence: Fence
) -> None:
    act_BTI, grad_BTO = operands(sizes, dtype, fence)
    found = direct_norm(act_BTI, grad_BTO)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, exact(act_BTI, grad_BTO), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
@pytest.mark.parametrize("scratch", [1, 300, 1 << 22])
def test_blocks_in_pytorch_equal_fp64(
    scratch: int, dtype: torch.dtype, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veilspan.kernels.tiles.SCRATCH", scratch)
    act_BTI, grad_BTO = operands((3, 21, 17, 6), dtype, fence)
    found = module._in_blocks(act_BTI, grad_BTO)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found, exact(act_BTI, grad_BTO), rtol=tolerance, atol=0.0)
    sizes = [block.numel() for _, _, block in product_blocks(act_BTI, grad_BTO)]
    assert max(sizes) <= max(scratch, 17)


def test_long_sums_of_squares_keep_their_digits() -> None:
    values = torch.full((2, (1 << 20) + 77), 1.0 + 2.0**-12)
    right = values.double().square().sum(1)
    torch.testing.assert_close(sq_norms(values), right, rtol=1e-6, atol=0.0)


def test_autocast_does_not_round_operands(device: torch.device) -> None:
    act_BTI, grad_BTO = random(2, 9, 8), random(2, 9, 5)
    alone = module._in_blocks(act_BTI, grad_BTO)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(module._in_blocks(act_BTI, grad_BTO), alone)


@pytest.mark.parametrize("call", [direct_norm, module._in_blocks])
def test_operands_of_two_dtypes_lose_no_digits(call) -> None:
    act_BTI, grad_BTO = random(2, 9, 8, dtype=torch.bfloat16), random(2, 9, 5)
    torch.testing.assert_close(
        call(act_BTI, grad_BTO), exact(act_BTI, grad_BTO), rtol=1e-6, atol=0.0
    )


def test_operands_may_have_any_strides() -> None:
    act_BTI = random(11, 3, 2 * 20).transpose(0, 1)[:, :, ::2]
    grad_BTO = random(4, 3, 22)[:1].mT.expand(1, 22, 3).expand(3, -1, -1)[:, ::2]
    torch.testing.assert_close(
        direct_norm(act_BTI, grad_BTO), exact(act_BTI, grad_BTO), rtol=1e-6, atol=0.0
    )


@pytest.mark.parametrize("call", [direct_norm, module._in_blocks])
@pytest.mark.parametrize("sizes", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_nothing_has_norm_zero(call, sizes: tuple[int, int, int, int], fence: Fence) -> None:
    found = call(*operands(sizes, torch.bfloat16, fence))
    assert torch.equal(found, torch.zeros_like(found))
    assert found.shape == sizes[:1]


def test_a_sample_that_is_not_finite_spoils_no_other(fence: Fence) -> None:
    act_BTI, grad_BTO = operands((3, 5, 4, 6), torch.float32, fence)
    alone = direct_norm(act_BTI, grad_BTO)
    act_BTI[1, 2, 3] = float("nan")
    found = direct_norm(act_BTI, grad_BTO)
    assert found.isnan().tolist() == [False, True, False]
    assert torch.equal(found[::2], alone[::2])


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
@pytest.mark.parametrize("wanted", [(True, False, True), (False,) * 3, (True,) * 3])
def test_norms_that_are_not_wanted_are_zero(
    wanted: tuple[bool, ...], dtype: torch.dtype, fence: Fence
) -> None:
    act_BTI, grad_BTO = operands((3, 37, 45, 51), dtype, fence)
    wanted_B = fence(torch.tensor(wanted))
    right = torch.where(wanted_B, direct_norm(act_BTI, grad_BTO), 0.0)
    act_BTI[~wanted_B] = float("nan")  # their operands are not read
    found = direct_norm(act_BTI, grad_BTO, wanted_B=wanted_B)
    # In fp64 the library multiplies fewer samples, which a GPU may do in another order.
    torch.testing.assert_close(found, right, rtol=1e-13 if dtype == torch.float64 else 0, atol=0)


def test_results_are_the_same_in_two_runs(fence: Fence) -> None:
    act_BTI, grad_BTO = operands((2, 40, 70, 40), torch.bfloat16, fence)
    assert torch.equal(direct_norm(act_BTI, grad_BTO), direct_norm(act_BTI, grad_BTO))


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((4, 2, 3), (2**30, 3, 1)), ((1, 2, 3), (1, 2**31 + 6, 1)), ((1, 70, 3), (1, 2**26, 1))],
)
def test_indices_reach_beyond_32_bits(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    far = sparse(shape, strides, torch.bfloat16)
    far[-1, -1] = 2.0
    near = torch.ones(*shape[:2], 5, dtype=torch.bfloat16, device=far.device)
    right = [0.0] * (shape[0] - 1) + [5 * 3 * 4.0]
    assert direct_norm(far, near).tolist() == right
    assert direct_norm(near, far).tolist() == right


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_BTI": torch.ones(4, 5)}, r"act_BTI has shape \[4, 5\]; it must be \[B, T, I\]"),
        ({"grad_BTO": torch.ones(2, 4, 5)}, r"grad_BTO has shape \[2, 4, 5\]; .* \[2, 3, O\]"),
        ({"act_BTI": torch.ones(2, 3, 4, dtype=torch.int32)}, "act_BTI is torch.int32"),
        ({"grad_BTO": torch.ones(2, 3, 5, device="meta")}, "grad_BTO is on meta"),
        ({"wanted_B": torch.ones(2)}, "wanted_B is torch.float32; it must be one of bool"),
        ({"wanted_B": torch.ones(3, dtype=torch.bool)}, r"wanted_B has shape \[3\]; .* \[2\]"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        direct_norm(**{"act_BTI": torch.ones(2, 3, 4), "grad_BTO": torch.ones(2, 3, 5), **change})


def test_tf32_is_refused(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("the CPU has no TF32")
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ValueError, match="fp32 operands and TF32 products"):
            module._in_blocks(random(1, 2, 3), random(1, 2, 3))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_torch_compile_sees_the_op_without_graph_breaks() -> None:
    act_BTI, grad_BTO = random(2, 3, 4), random(2, 3, 5)
    compiled = torch.compile(
        lambda a, g: torch.ops.veilspan.direct_norm(a, g).sqrt(), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(act_BTI, grad_BTO), direct_norm(act_BTI, grad_BTO).sqrt())
    torch.library.opcheck(torch.ops.veilspan.direct_norm.default, (act_BTI, grad_BTO))
