"""TritonKernel at the seam of veilspan.core: its conformance suite, its norms, whole steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from veilspan.kernels import TritonKernel
from veilspan.kernels.testing import random

core = pytest.importorskip("veilspan.core")
conformance = pytest.importorskip("veilspan.core.testing.conformance")
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_conformance_suite_of_core_passes(dtype: torch.dtype, device: torch.device) -> None:
    conformance.assert_kernel_conforms(TritonKernel(), dtype=dtype, device=device)


def test_it_fits_the_seam() -> None:
    from veilspan.core.protocols import NormKernel

    assert isinstance(TritonKernel(), NormKernel)


@pytest.mark.parametrize("form", ["sq_norm_direct", "sq_norm_gram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [1e-1, 1e-3, 1e-5, 0.0])
def test_a_norm_that_cancellation_hides_is_never_too_small(
    form: str, dtype: torch.dtype, share: float, device: torch.device
) -> None:
    """Pairs of tokens cancel but for a share of them."""
    half, grad = random(1, 8, 12, dtype=dtype), random(1, 8, 5, dtype=dtype, seed=1)
    noise = (share * random(1, 8, 12, seed=2)).to(dtype)
    act_BTI = torch.cat([half, half + noise], dim=1)
    grad_BTO = torch.cat([grad, -grad], dim=1)
    exact = torch.einsum("bto,bti->boi", grad_BTO.double(), act_BTI.double())
    true = exact.square().sum((1, 2))
    found, _ = getattr(TritonKernel(), form)(act_BTI, grad_BTO)
    assert bool((found >= true * (1 - 2.0**-18)).all()), (found, true)
    size = (act_BTI.double().norm(dim=-1) * grad_BTO.double().norm(dim=-1)).sum()
    assert float(found - true) <= 1e-4 * float(true) + (1e-5 * float(size)) ** 2


def on_tensor_cores(left_KM: Tensor, right_KN: Tensor) -> Tensor:
    """Return leftᵀ·right as an A100 sums it: terms are aligned to the largest and cut, 8 at a time.

    Source: Fasi, Higham, Mikaitis, Pranesh (2021), https://doi.org/10.7717/peerj-cs.330.
    """

    def cut(terms: Tensor, largest: Tensor, bits: int) -> Tensor:
        unit = torch.exp2(largest.abs().clamp(min=1e-30).log2().floor() - bits)
        return (terms / unit).trunc() * unit

    total = left_KM.new_zeros((1, left_KM.shape[1], right_KN.shape[1]))
    for left, right in zip(left_KM.split(8), right_KN.split(8), strict=True):
        terms = torch.cat([total, left[:, :, None] * right[:, None, :]])
        found = cut(terms, terms.abs().amax(0), 24).sum(0, keepdim=True)
        total = cut(found, found, 23)
    return total[0]


@pytest.mark.parametrize("form", ["direct", "gram"])
def test_a_norm_covers_what_tensor_cores_cut_off(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They never round up, so in long sums of terms that agree the loss grows with the length."""
    length = 8192
    tokens, width = (length, 2) if form == "direct" else (2, length)
    act_BTI = (1.0 + 0.3 * random(1, tokens, width)).bfloat16()
    grad_BTO = (1.0 + 0.3 * random(1, tokens, width, seed=1)).bfloat16()
    act, grad = act_BTI[0].double(), grad_BTO[0].double()
    if form == "direct":
        cut = on_tensor_cores(grad, act).square().sum()
    else:
        cut = (on_tensor_cores(act.mT, act.mT) * on_tensor_cores(grad.mT, grad.mT)).sum()
    true = (grad.mT @ act).square().sum()
    assert float(cut) < (1 - 2.0**-18) * float(true)
    monkeypatch.setattr(f"veilspan.kernels.kernel.{form}_norm", lambda *_, **__: cut[None])
    found, _ = getattr(TritonKernel(), f"sq_norm_{form}")(act_BTI, grad_BTO)
    assert float(true) * (1 - 2.0**-18) <= float(found) <= 1.004 * float(true)


@pytest.mark.parametrize("backward", ["per_sample", "bookkeeping", "two_pass", "per_layer"])
@pytest.mark.parametrize("norms", ["direct", "gram"])
def test_a_private_step_equals_that_of_the_default_kernel(
    backward: str, norms: str, device: torch.device
) -> None:
    def clipped(kernel: object) -> list[Tensor]:
        torch.manual_seed(0)
        norms_between = nn.Sequential(nn.LayerNorm(9), nn.RMSNorm(9, eps=1e-5))
        model = nn.Sequential(nn.Linear(6, 9), norms_between, nn.Tanh(), nn.Linear(9, 4)).to(device)
        step = core.PrivateStep(
            model,
            clipping=core.PerLayer(clip_norm=0.5),
            noise_multiplier=0.0,
            expected_batch_size=3.0,
            backward=backward,
            norms=norms,
            kernel=kernel,
        )
        inputs = random(3, 5, 6)
        with step:
            step.backward(model(inputs).square().sum((1, 2)))
        return [p.grad for p in model.parameters() if p.grad is not None]

    for ours, default in zip(clipped(TritonKernel()), clipped(None), strict=True):
        torch.testing.assert_close(ours, default, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: k.sq_norm_direct(torch.ones(2, 3), torch.ones(2, 3, 1)), "act_BTI has shape"),
        (lambda k: k.sq_norm_gram(torch.ones(2, 3, 1), torch.ones(2, 4, 1)), "grad_BTO has shape"),
        (
            lambda k: k.add_outer_products_(
                torch.ones(1, 1), *torch.ones(2, 2, 3, 1), torch.ones(3), clip_norm=1.0
            ),
            "factor_B has shape",
        ),
        (
            lambda k: k.add_outer_products_(
                torch.ones(1, 1), *torch.ones(2, 2, 3, 1), torch.ones(2), clip_norm=0.0
            ),
            "clip_norm is 0.0",
        ),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(TritonKernel())
