"""Norms and clipped sums: blocked, accurate, and never below the truth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from veilspan.core import Automatic, Clip, Flat, products
from veilspan.core.contributions import OuterProducts
from veilspan.core.norms import BlockedKernel, sq_norm
from veilspan.core.testing import assert_kernel_conforms


@pytest.mark.parametrize("block_elements", [1, 64, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kernel_is_exact_whatever_the_size_of_its_blocks(block_elements, dtype):
    assert_kernel_conforms(BlockedKernel(block_elements=block_elements), dtype=dtype)


def test_norm_buffers_stay_within_the_budget(largest):
    act, grad = torch.randn(2, 300, 128), torch.randn(2, 300, 200)
    kernel = BlockedKernel(block_elements=16384)
    with largest:
        kernel.sq_norm_direct(act, grad)
        kernel.sq_norm_gram(act, grad)
    assert largest.elements <= 16384  # neither a token-by-token buffer nor a gradient


def test_maps_with_one_input_share_its_products_and_nobody_else_does():
    torch.manual_seed(0)
    kernel, fresh = BlockedKernel(), lambda *factors: BlockedKernel().sq_norm_gram(*factors)[0]
    act, other = torch.randn(2, 70, 5), torch.randn(2, 70, 5)
    grads = [torch.randn(2, 70, width) for width in (3, 4)]
    for grad in grads:
        assert torch.equal(kernel.sq_norm_gram(act.view(2, 70, 5), grad)[0], fresh(act, grad))
        assert torch.equal(kernel.sq_norm_gram(act, grad)[0], fresh(act, grad))
        assert torch.equal(kernel.sq_norm_gram(other, grad)[0], fresh(other, grad))
    kernel.sq_norm_gram(act, grads[0])
    wide = grads[0].double()  # whose products must not be those of fp32
    assert torch.equal(kernel.sq_norm_gram(act, wide)[0], fresh(act, wide))
    kernel.sq_norm_gram(act, grads[0])
    act.mul_(2.0)  # the same tensor, with other numbers
    assert torch.equal(kernel.sq_norm_gram(act, grads[0])[0], fresh(act, grads[0]))
    half = act[:, :64]  # other tokens at the same address
    assert torch.equal(
        kernel.sq_norm_gram(half, grads[0][:, :64])[0], fresh(half, grads[0][:, :64])
    )
    for seed in range(4):  # memory that is used again, with other numbers
        torch.manual_seed(seed)
        again = torch.randn(2, 70, 5)
        assert torch.equal(kernel.sq_norm_gram(again, grads[0])[0], fresh(again, grads[0]))
        del again


def test_maps_with_one_input_take_its_products_once(monkeypatch):
    calls, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *operands: calls.append(1) or bmm(*operands))
    kernel, act = BlockedKernel(), torch.randn(2, 70, 5)
    kernel.sq_norm_gram(act, torch.randn(2, 70, 3))
    first = len(calls)
    kernel.sq_norm_gram(act.view(2, 70, 5), torch.randn(2, 70, 3))
    assert first == 4  # two rows of tiles, of the input and of the gradient
    assert len(calls) - first == 2


@pytest.mark.parametrize(("batch", "length"), [(8, 128), (4, 100), (2, 1024)])
def test_each_record_rounds_the_sum_it_is_added_to_once_at_most(batch, length):
    # A library that added each of its products to the sum, or few at a time, would round it often.
    torch.manual_seed(0)
    act, grad = torch.randn(batch, length, 48), torch.randn(batch, length, 160)
    factor_B, total = torch.rand(batch), 1e5 * (1.0 + torch.rand(160, 48))
    added = torch.einsum("b,bto,bti->oi", factor_B.double(), grad.double(), act.double())
    exact = total.double() + added
    BlockedKernel().add_outer_products_(total, act, grad, factor_B, clip_norm=1e9)
    half_a_unit = torch.finfo(torch.float32).eps / 2 * total.abs()
    assert bool(((total.double() - exact).abs() <= 1.01 * batch * half_a_unit).all())


@pytest.mark.parametrize("elements", [1, 1023, 1024, 1025, 3_000_001])
def test_sum_of_squares_in_fp32_keeps_six_digits(elements):
    torch.manual_seed(0)
    values = torch.rand(elements) + 1.0
    exact = values.double().square().sum()
    assert abs(sq_norm(values) / exact - 1) < 2e-7


@pytest.mark.parametrize("rule", [Clip(), Automatic(), Automatic(gamma=0.0)])
@given(
    norm=st.floats(0, 1e30),
    clip_norm=st.floats(1e-6, 1e6),
    slack=st.sampled_from([0.0, 2.0**-19, 2.0**-18]),
)
@example(norm=2.2189404842472765e-159, clip_norm=1.0, slack=0.0)  # its square is subnormal
@settings(deadline=None)
def test_factor_times_norm_never_exceeds_the_clip_norm(norm, clip_norm, slack, rule):
    groups = Flat(clip_norm=clip_norm, rule=rule).resolve({"w": 1})
    factor = groups.factors(0, torch.tensor([norm], dtype=torch.float64).square(), slack=slack)
    assert 0 <= float(factor) * norm * (1 - slack) <= clip_norm * (1 + 1e-12)
    assert float(factor) * norm <= clip_norm * (1 - slack) * (1 + 1e-12)


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_has_factor_zero(norm):
    for clip_norm in (1.0, float("inf")):
        groups = Flat(clip_norm=clip_norm).resolve({"w": 1})
        factor = groups.factors(0, torch.tensor([norm]), slack=0.0)
        assert float(factor) == 0.0


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, float("nan")])
def test_a_clip_norm_that_is_not_positive_is_refused(clip_norm):
    with pytest.raises(ValueError, match="clip_norm is"):
        Flat(clip_norm=clip_norm)


@pytest.mark.parametrize("gamma", [-1.0, float("nan"), float("inf")])
def test_a_gamma_out_of_range_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma is"):
        Automatic(gamma=gamma)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [33, 300])
def test_operands_of_16_bits_are_multiplied_as_they_are_where_the_device_can(
    dtype, length, monkeypatch
):
    asked, bmm = [], torch.bmm

    def widening(left, right, *, out_dtype=None):
        asked.append((left.dtype, right.dtype, out_dtype))
        return (
            bmm(left, right) if out_dtype is None else bmm(left.to(out_dtype), right.to(out_dtype))
        )

    act, grad = torch.randn(2, length, 9).to(dtype), torch.randn(2, length, 5).to(dtype)
    exact = torch.bmm(grad.double().mT, act.double()).square().sum((1, 2))
    kernel = BlockedKernel(block_elements=1 << 12)
    plain = [kernel.sq_norm_direct(act, grad)[0], kernel.sq_norm_gram(act, grad)[0]]
    monkeypatch.setattr(torch, "bmm", widening)
    monkeypatch.setattr(products, "multiplies_wide", lambda left, right: left.dtype == right.dtype)
    found = [kernel.sq_norm_direct(act, grad)[0], kernel.sq_norm_gram(act, grad)[0]]
    part = OuterProducts(act_BTI=act, grad_BTO=grad, kernel=kernel)
    found.append(torch.stack([part.sample(b).sq_norm() for b in range(2)]))
    assert set(asked) == {(dtype, dtype, torch.float32)}
    for sq_norm_B, less in zip(found, [*plain, exact * (1 - 1e-6)], strict=True):
        torch.testing.assert_close(sq_norm_B, exact, rtol=1e-4, atol=0.0)
        assert (sq_norm_B >= less).all()  # and what tensor cores cut off is covered
