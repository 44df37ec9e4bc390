"""Sums over samples of stored gradients times factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veilspan.kernels import weighted_sum
from veilspan.kernels.ops import weighted_sum as module
from veilspan.kernels.testing import Fence, random, sparse

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [(1, 1, 1), (3, 7, 65), (2, 130, 3), (5, 1, 128), (1, 33, 29)]


def factors(samples: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return random(samples, seed=3).abs().to(dtype)


def in_order(grad_BOI: Tensor, factor_B: Tensor, dtype: torch.dtype) -> Tensor:
    found = torch.zeros_like(grad_BOI[0], dtype=dtype)
    for gradient, factor in zip(grad_BOI, factor_B, strict=True):
        found = found + gradient.to(dtype) * factor.to(dtype)
    return found


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("old", [False, True])
def test_sums_are_added_in_the_order_of_the_samples(
    old: bool, sizes: tuple[int, int, int], dtype: torch.dtype, fence: Fence
) -> None:
    grad_BOI, factor_B = fence(random(*sizes, dtype=dtype)), fence(factors(sizes[0]))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    right = in_order(grad_BOI, factor_B, wide)
    total = fence(random(*sizes[1:], seed=7).to(wide)) if old else None
    right = right + total if total is not None else right
    found = weighted_sum(grad_BOI, factor_B, total=total)
    assert found.dtype == wide
    assert torch.equal(found, right)
    assert total is None or found is total


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("scratch", [1, 70, 1 << 22])
def test_blocks_in_pytorch_add_in_the_same_order(
    scratch: int,
    old: bool,
    wide: torch.dtype,
    dtype: torch.dtype,
    fence: Fence,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("veilspan.kernels.tiles.SCRATCH", scratch)
    grad_BOI, factor_B = fence(random(3, 5, 33, dtype=dtype)), factors(3).to(wide)
    total = fence(random(5, 33, seed=7).to(wide))
    right = in_order(grad_BOI, factor_B, wide)
    right = total + right if old else right
    if not old:
        total.fill_(float("nan"))
    module._in_blocks(grad_BOI, factor_B, total, old)
    assert torch.equal(total, right)


def test_fp64_totals_keep_their_digits(fence: Fence) -> None:
    grad_BOI, factor_B = fence(random(2, 3, 4)), fence(factors(2, torch.float64))
    total = fence(torch.zeros_like(grad_BOI[0], dtype=torch.float64))
    weighted_sum(grad_BOI, factor_B, total=total)
    assert torch.equal(total, in_order(grad_BOI, factor_B, torch.float64))


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_factor_drops_a_gradient_that_is_not_finite(
    dtype: torch.dtype, waits: bool, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not waits:  # as on a GPU, where nobody asks which factors are 0
        monkeypatch.setattr(module, "used_samples", lambda factor_B: range(len(factor_B)))
    grad_BOI, factor_B = random(3, 4, 5, dtype=dtype), factors(3)
    grad_BOI[1] = float("nan")
    grad_BOI[1, 2] = float("inf")
    factor_B[1] = 0.0
    total = random(4, 5)
    right = in_order(grad_BOI[::2], factor_B[::2], torch.float32) + total
    if blocks:
        module._in_blocks(grad_BOI, factor_B, total, True)
    else:
        weighted_sum(grad_BOI, factor_B, total=total)
    assert torch.equal(total, right)


def test_gradients_may_have_any_strides() -> None:
    grad_BOI, factor_B = random(9, 3, 14).permute(1, 2, 0)[:, ::2], factors(6)[::2]
    found = weighted_sum(grad_BOI, factor_B)
    assert torch.equal(found, in_order(grad_BOI, factor_B, torch.float32))
    flat = random(3, 100)
    grad_BOI = flat[:, 11:46].unflatten(1, (5, 7))
    found = weighted_sum(grad_BOI, factor_B)
    assert torch.equal(found, in_order(grad_BOI, factor_B, torch.float32))


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_sums_to_zero(sizes: tuple[int, int, int]) -> None:
    found = weighted_sum(random(*sizes), factors(sizes[0]))
    assert torch.equal(found, torch.zeros_like(found))
    assert found.shape == sizes[1:]
    total = random(*sizes[1:])
    assert torch.equal(weighted_sum(random(*sizes), factors(sizes[0]), total=total.clone()), total)


def test_results_are_the_same_in_two_runs() -> None:
    grad_BOI, factor_B = random(5, 20, 30, dtype=torch.bfloat16), factors(5)
    assert torch.equal(weighted_sum(grad_BOI, factor_B), weighted_sum(grad_BOI, factor_B))


def test_indices_reach_beyond_32_bits() -> None:
    grad_BOI = sparse((2, 3, 4), (2**31 + 6, 4, 1), torch.bfloat16)
    grad_BOI[1] = 3.0
    found = weighted_sum(grad_BOI, torch.tensor([1.0, 0.5], device=grad_BOI.device))
    assert torch.equal(found, torch.full_like(found, 1.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_BOI": torch.ones(4, 5)}, r"grad_BOI has shape \[4, 5\]; it must be \[B, O, I\]"),
        ({"grad_BOI": torch.ones(2, 5, 4, dtype=torch.int8)}, "grad_BOI is torch.int8"),
        ({"factor_B": torch.ones(3)}, r"factor_B has shape \[3\]; it must be \[2\]"),
        ({"factor_B": torch.ones(2, dtype=torch.bfloat16)}, "factor_B is torch.bfloat16"),
        ({"factor_B": torch.ones(2, device="meta")}, "factor_B is on meta"),
        ({"factor_B": torch.tensor([1.0, float("nan")])}, "factor_B must be finite"),
        ({"total": torch.zeros(4, 5)}, r"total has shape \[4, 5\]; it must be \[5, 4\]"),
        ({"total": torch.zeros(4, 5).mT}, "total is not contiguous"),
        ({"total": torch.zeros(5, 4, dtype=torch.bfloat16)}, "total is torch.bfloat16"),
        ({"total": torch.zeros(5, 4, device="meta")}, "total is on meta"),
    ],
)
def test_bad_input_is_named(change: dict, message: str, device: torch.device) -> None:
    if device.type != "cpu" and "must be finite" in message:
        pytest.skip("on a GPU a device-side assertion reports it, which ends the process")
    arguments = {"grad_BOI": torch.ones(2, 5, 4), "factor_B": torch.ones(2), **change}
    with pytest.raises(ValueError, match=message):
        weighted_sum(**arguments)


def test_torch_compile_sees_the_op_without_graph_breaks() -> None:
    grad_BOI, factor_B = random(2, 3, 4), factors(2)

    def summed(total: Tensor) -> Tensor:
        torch.ops.veilspan.weighted_sum(grad_BOI, factor_B, total, True)
        return total * 2.0

    compiled = torch.compile(summed, backend="eager", fullgraph=True)
    total = random(3, 4)
    assert torch.equal(compiled(total.clone()), summed(total.clone()))
    torch.library.opcheck(
        torch.ops.veilspan.weighted_sum.default, (grad_BOI, factor_B, total, True)
    )
