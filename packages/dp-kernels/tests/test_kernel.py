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
