"""Norms of per-sample gradients from inner products of tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from veilspan.kernels import gram_inner, gram_norm
from veilspan.kernels.ops import gram_norm as module
from veilspan.kernels.testing import Fence, random, sparse

NARROW = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1, 1), (2, 37, 45, 51), (3, 5, 130, 33), (1, 70, 70, 65), (2, 33, 3, 128)]
Sizes = tuple[int, int, int, int]


def operands(sizes: Sizes, dtype: torch.dtype, fence: Fence) -> tuple[Tensor, Tensor]:
    samples, tokens, inputs, outputs = sizes
    act_BTI = fence(random(samples, tokens, inputs, dtype=dtype, seed=1))
    return act_BTI, fence(random(samples, tokens, outputs, dtype=dtype, seed=2))


def exact(act_BTI: Tensor, grad_BTO: Tensor) -> Tensor:
    return torch.bmm(grad_BTO.double().mT, act_BTI.double()).square().sum((1, 2))


def inner(act: Tensor, grad: Tensor, others: Tensor, theirs: Tensor) -> Tensor:
    first = torch.bmm(grad.double().mT, act.double())
    return (first * torch.bmm(theirs.double().mT, others.double())).sum((1, 2))


def in_torch(act_BTI: Tensor, grad_BTO: Tensor) -> Tensor:
    return module._in_tiles(act_BTI, grad_BTO, act_BTI, grad_BTO, half=True)


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
@pytest.mark.parametrize("sizes", SIZES)
def test_norms_equal_fp64(sizes: Sizes, dtype: torch.dtype, fence: Fence) -> None:
    act_BTI, grad_BTO = operands(sizes, dtype, fence)
    found = gram_norm(act_BTI, grad_BTO)
    assert found.dtype == torch.float64
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, exact(act_BTI, grad_BTO), rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
@pytest.mark.parametrize("side", [1, 4, 256])
def test_tiles_in_pytorch_equal_fp64(
    side: int, dtype: torch.dtype, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SIDE", side)
    act_BTI, grad_BTO = operands((3, 21, 17, 6), dtype, fence)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    right = exact(act_BTI, grad_BTO)
    torch.testing.assert_close(in_torch(act_BTI, grad_BTO), right, rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("lengths", [(1, 1), (37, 5), (40, 70)])
def test_inner_products_of_different_blocks_equal_fp64(
    lengths: tuple[int, int], dtype: torch.dtype, fence: Fence
) -> None:
    blocks = [
        fence(random(2, length, width, dtype=dtype, seed=10 * length + width))
        for length in lengths
        for width in (19, 35)
    ]
    size = inner(*(block.abs() for block in blocks))
    assert bool(((gram_inner(*blocks) - inner(*blocks)).abs() <= 1e-6 * size).all())
    found = module._in_tiles(*blocks, half=False)
    assert bool(((found - inner(*blocks)).abs() <= 1e-6 * size).all())


@settings(max_examples=15, deadline=None)
@given(length=st.integers(0, 40), cut=st.integers(0, 40), seed=st.integers(0, 99))
def test_the_norm_of_a_sequence_is_that_of_its_parts_and_what_they_share(
    length: int, cut: int, seed: int
) -> None:
    act, grad = random(2, length, 7, seed=seed), random(2, length, 3, seed=seed + 1)
    first, second = (act[:, :cut], grad[:, :cut]), (act[:, cut:], grad[:, cut:])
    parts = gram_norm(*first) + gram_norm(*second) + 2.0 * gram_inner(*first, *second)
    torch.testing.assert_close(gram_norm(act, grad), parts, rtol=1e-4, atol=1e-4)


def test_a_result_that_cancellation_spoils_is_not_clamped() -> None:
    """Rounding may make it negative; the caller has to see that."""
    found = []
    for seed in range(20):
        half, grad = random(1, 16, 64, seed=seed), random(1, 16, 32, seed=seed + 100)
        act = torch.cat([half, half * (1 + 1e-7)], dim=1)
        grads = torch.cat([grad, -grad], dim=1)
        size = (act.norm(dim=-1) * grads.norm(dim=-1)).sum().square()
        value = gram_norm(act, grads)
        assert float((value - exact(act, grads)).abs() / size) < 1e-6
        found.append(float(value))
    assert min(found) < 0.0


def test_operands_may_have_any_strides() -> None:
    act_BTI = random(11, 3, 2 * 20).transpose(0, 1)[:, :, ::2]
    grad_BTO = random(4, 3, 22)[:1].mT.expand(1, 22, 3).expand(3, -1, -1)[:, ::2]
    torch.testing.assert_close(
        gram_norm(act_BTI, grad_BTO), exact(act_BTI, grad_BTO), rtol=1e-5, atol=0.0
    )


def test_input_and_gradient_may_differ_in_dtype() -> None:
    act_BTI, grad_BTO = random(2, 9, 8, dtype=torch.bfloat16), random(2, 9, 5)
    right = exact(act_BTI, grad_BTO)
    torch.testing.assert_close(gram_norm(act_BTI, grad_BTO), right, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("call", [gram_norm, in_torch])
@pytest.mark.parametrize("sizes", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_nothing_has_norm_zero(call, sizes: Sizes, fence: Fence) -> None:
    found = call(*operands(sizes, torch.bfloat16, fence))
    assert torch.equal(found, torch.zeros_like(found))
    assert found.shape == sizes[:1]


def test_a_sample_that_is_not_finite_spoils_no_other(fence: Fence) -> None:
    act_BTI, grad_BTO = operands((3, 5, 4, 6), torch.float32, fence)
    alone = gram_norm(act_BTI, grad_BTO)
    act_BTI[1, 2, 3] = float("nan")
    found = gram_norm(act_BTI, grad_BTO)
    assert found.isnan().tolist() == [False, True, False]
    assert torch.equal(found[::2], alone[::2])


def test_results_are_the_same_in_two_runs(fence: Fence) -> None:
    act_BTI, grad_BTO = operands((2, 70, 40, 33), torch.bfloat16, fence)
    assert torch.equal(gram_norm(act_BTI, grad_BTO), gram_norm(act_BTI, grad_BTO))


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((2, 2, 3), (2**31 + 6, 3, 1)), ((1, 2, 3), (1, 2**31 + 6, 1)), ((1, 40, 3), (1, 2**26, 1))],
)
def test_indices_reach_beyond_32_bits(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    far = sparse(shape, strides, torch.bfloat16)
    far[-1, -1] = 2.0
    near = torch.ones(*shape[:2], 5, dtype=torch.bfloat16, device=far.device)
    right = [0.0] * (shape[0] - 1) + [5 * 3 * 4.0]
    assert gram_norm(far, near).tolist() == right
    assert gram_norm(near, far).tolist() == right


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.ones(4, 5), r"act_BSI has shape \[4, 5\]; it must be \[B, S, I\]"),
        (1, torch.ones(2, 4, 5), r"grad_BSO has shape \[2, 4, 5\]; it must be \[2, 3, O\]"),
        (2, torch.ones(2, 6, 5), r"act_BTI has shape \[2, 6, 5\]; it must be \[2, T, 4\]"),
        (3, torch.ones(2, 6, 7), r"grad_BTO has shape \[2, 6, 7\]; it must be \[2, 6, 5\]"),
        (3, torch.ones(2, 6, 5, device="meta"), "grad_BTO is on meta"),
        (0, torch.ones(2, 3, 4, dtype=torch.int32), "act_BSI is torch.int32"),
    ],
)
def test_bad_input_is_named(place: int, wrong: Tensor, message: str) -> None:
    blocks = [torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.ones(2, 6, 4), torch.ones(2, 6, 5)]
    blocks[place] = wrong
    with pytest.raises(ValueError, match=message):
        gram_inner(*blocks)
    if place < 2:
        with pytest.raises(ValueError, match=message.partition("_")[0]):
            gram_norm(*blocks[:2])


def test_torch_compile_sees_the_op_without_graph_breaks() -> None:
    act_BTI, grad_BTO = random(2, 3, 4), random(2, 3, 5)
    compiled = torch.compile(
        lambda a, g: torch.ops.veilspan.gram(a, g, a, g, True).sqrt(),
        backend="eager",
        fullgraph=True,
    )
    assert torch.equal(compiled(act_BTI, grad_BTO), gram_norm(act_BTI, grad_BTO).sqrt())
    operands = (act_BTI, grad_BTO, act_BTI, grad_BTO, True)
    torch.library.opcheck(torch.ops.veilspan.gram.default, operands)
