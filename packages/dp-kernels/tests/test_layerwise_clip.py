"""Norm, clip and sum of one layer: on the chip where it fits, through a scratch elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from veilspan.kernels import layerwise_clip_
from veilspan.kernels.ops import layerwise_clip as module
from veilspan.kernels.testing import Fence, random, sparse

NARROW = [torch.float32, torch.bfloat16, torch.float16]
# The first fit into a tile of the interpreter; the others go through a scratch.
SIZES = [(1, 1, 1, 1), (2, 37, 45, 31), (3, 5, 64, 32), (2, 33, 65, 5), (1, 70, 70, 65)]
Sizes = tuple[int, int, int, int]


def operands(sizes: Sizes, dtype: torch.dtype, fence: Fence) -> tuple[Tensor, Tensor]:
    samples, tokens, inputs, outputs = sizes
    act_BTI = fence(random(samples, tokens, inputs, dtype=dtype, seed=1))
    return act_BTI, fence(random(samples, tokens, outputs, dtype=dtype, seed=2))


def exact(act_BTI: Tensor, grad_BTO: Tensor, clip_norm: float) -> tuple[Tensor, Tensor]:
    grad_BOI = torch.bmm(grad_BTO.double().mT, act_BTI.double())
    norm_B = grad_BOI.square().sum((1, 2)).sqrt()
    factor_B = (clip_norm * (1 - module.MARGIN) / norm_B).clamp(max=1.0)
    return torch.einsum("b,boi->oi", factor_B, grad_BOI), factor_B


def through_scratch(total: Tensor, act: Tensor, grad: Tensor, *, clip_norm: float) -> Tensor:
    limit = torch.tensor(clip_norm * (1 - module.MARGIN), dtype=torch.float64, device=act.device)
    return module._through_scratch(total, act, grad, limit)


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("clip_norm", [0.5, 1e6])
def test_clipped_sums_equal_fp64(
    sizes: Sizes, dtype: torch.dtype, clip_norm: float, fence: Fence
) -> None:
    act_BTI, grad_BTO = operands(sizes, dtype, fence)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    before = random(sizes[3], sizes[2], seed=3).to(wide)
    total = fence(before)
    factor_B = layerwise_clip_(total, act_BTI, grad_BTO, clip_norm=clip_norm)
    sums, factors = exact(act_BTI, grad_BTO, clip_norm)
    torch.testing.assert_close(factor_B, factors, rtol=1e-6, atol=0.0)
    torch.testing.assert_close((total - before).double(), sums, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("call", [layerwise_clip_, through_scratch])
def test_a_contribution_is_never_longer_than_the_threshold(call, device: torch.device) -> None:
    for exponent in range(-20, 19, 3):
        for seed in range(3):
            act = random(1, 3, 7, seed=seed) * 10.0**exponent
            total = torch.zeros(5, 7, device=device)
            call(total, act, random(1, 3, 5, seed=seed + 9), clip_norm=0.7)
            norm = float(total.double().norm())
            assert norm <= 0.7
            assert exponent < 3 or norm >= 0.7 * (1 - 2 * module.MARGIN)


@pytest.mark.parametrize("call", [layerwise_clip_, through_scratch])
def test_a_factor_that_would_round_up_in_fp32_drops_its_sample(call, device: torch.device) -> None:
    """2e38 · 2⁻¹⁴⁹ exceeds the threshold; the exact factor is below half of 2⁻¹⁴⁹ or just above."""
    for clip_norm in (1e-7, 1.6e-7, 3e-7):
        total = torch.zeros(1, 1, device=device)
        act = torch.full((1, 1, 1), 2e38, device=device)
        found = call(total, act, torch.ones(1, 1, 1, device=device), clip_norm=clip_norm)
        assert float(total) <= clip_norm
        assert float(found) == 0.0


@pytest.mark.parametrize("call", [layerwise_clip_, through_scratch])
def test_a_sample_that_is_not_finite_adds_nothing(call, fence: Fence) -> None:
    act_BTI, grad_BTO = operands((3, 5, 4, 6), torch.float32, fence)
    act_BTI[1, 2, 3] = math.nan
    total = fence(torch.zeros(6, 4, device=act_BTI.device))
    factor_B = call(total, act_BTI, grad_BTO, clip_norm=1.0)
    assert float(factor_B[1]) == 0.0
    sums, _ = exact(act_BTI[::2], grad_BTO[::2], 1.0)
    torch.testing.assert_close(total.double(), sums, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("call", [layerwise_clip_, through_scratch])
def test_a_gradient_of_zero_has_factor_one(call, device: torch.device) -> None:
    total = torch.zeros(2, 3, device=device)
    zeros = torch.zeros(2, 4, 3, device=device)
    found = call(total, zeros, random(2, 4, 2), clip_norm=1.0)
    assert found.tolist() == [1.0, 1.0]
    assert not bool(total.any())


@pytest.mark.parametrize("call", [layerwise_clip_, through_scratch])
@pytest.mark.parametrize("sizes", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_nothing_adds_nothing(call, sizes: Sizes, fence: Fence) -> None:
    act_BTI, grad_BTO = operands(sizes, torch.bfloat16, fence)
    total = fence(torch.ones(sizes[3], sizes[2], device=act_BTI.device))
    found = call(total, act_BTI, grad_BTO, clip_norm=1.0)
    assert found.shape == sizes[:1]
    assert bool((total == 1.0).all())


def test_results_are_the_same_in_two_runs(fence: Fence) -> None:
    for sizes in ((3, 40, 64, 32), (2, 9, 70, 40)):
        act_BTI, grad_BTO = operands(sizes, torch.bfloat16, fence)
        totals = [torch.zeros(sizes[3], sizes[2], device=act_BTI.device) for _ in range(2)]
        factors = [layerwise_clip_(total, act_BTI, grad_BTO, clip_norm=0.5) for total in totals]
        assert torch.equal(totals[0], totals[1])
        assert torch.equal(factors[0], factors[1])


def test_indices_reach_beyond_32_bits() -> None:
    far = sparse((2, 2, 3), (2**31 + 6, 3, 1), torch.bfloat16)
    far[-1, -1] = 2.0
    near = torch.ones(2, 2, 5, dtype=torch.bfloat16, device=far.device)
    total = torch.zeros(5, 3, device=far.device)
    layerwise_clip_(total, far, near, clip_norm=1e3)
    assert bool((total == 2.0).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_norm": 0.0}, "clip_norm is 0.0; it must be finite and above 0"),
        ({"clip_norm": math.inf}, "clip_norm is inf"),
        ({"total_OI": torch.zeros(4, 5)}, r"total has shape \[4, 5\]; it must be \[5, 4\]"),
        ({"total_OI": torch.zeros(5, 4).bfloat16()}, "total is torch.bfloat16"),
        ({"act_BTI": torch.ones(4, 5)}, r"act_BTI has shape \[4, 5\]; it must be \[B, T, I\]"),
        ({"grad_BTO": torch.ones(2, 4, 5)}, r"grad_BTO has shape \[2, 4, 5\]"),
        ({"grad_BTO": torch.ones(2, 3, 5, device="meta")}, "grad_BTO is on meta"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = {
        "total_OI": torch.zeros(5, 4),
        "act_BTI": torch.ones(2, 3, 4),
        "grad_BTO": torch.ones(2, 3, 5),
        "clip_norm": 1.0,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        layerwise_clip_(**arguments)


def test_torch_compile_sees_the_op_without_graph_breaks(device: torch.device) -> None:
    act_BTI, grad_BTO = random(2, 3, 4), random(2, 3, 5)
    total = torch.zeros(5, 4, device=device)
    compiled = torch.compile(
        lambda t, a, g: torch.ops.veilspan.layerwise_clip_(t, a, g, 0.5),
        backend="eager",
        fullgraph=True,
    )
    right = layerwise_clip_(torch.zeros_like(total), act_BTI, grad_BTO, clip_norm=0.5)
    assert torch.equal(compiled(total, act_BTI, grad_BTO), right)
    torch.library.opcheck(
        torch.ops.veilspan.layerwise_clip_.default, (total, act_BTI, grad_BTO, 0.5)
    )
