"""Estimates whose first directions are measured exactly (Hutch++)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from veilspan.core import Automatic, Flat, GaussianNoise, NormLaw, PrivateStep, Sketch
from veilspan.core.contributions import OuterProducts
from veilspan.core.measures import Measure
from veilspan.core.norms import BlockedKernel
from veilspan.core.reduction import LocalShards
from veilspan.core.testing.conformance import assert_close, clipped_sum
from veilspan.core.testing.oracle import per_sample_gradients

KEY = bytes(range(32))
PROBES, BLOCKS, BASIS = 6, 2, 3
CLIPPING = Flat(clip_norm=0.5, rule=Automatic(gamma=0.0))


def sketch(basis=BASIS, probes=PROBES, blocks=BLOCKS):
    return Sketch(probes=probes, blocks=blocks, basis=basis, stream=GaussianNoise(KEY))


@pytest.fixture(autouse=True)
def _always_estimate(monkeypatch):
    monkeypatch.setattr(
        "veilspan.core.plan.StrategyPlan.sketch_pays", lambda self, *shape: self.probes > 0
    )
    monkeypatch.setattr("veilspan.core.measures.common_key", lambda shards, device: KEY)


class Layers(nn.Module):
    """Two linear maps; the second one is used twice if `tied`."""

    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(24, 20), nn.Linear(20, 20)
        self.tied = tied

    def forward(self, x_BTI):
        hidden = torch.tanh(self.second(torch.tanh(self.first(x_BTI))))
        return self.second(hidden) if self.tied else hidden


def losses(model, batch):
    return model(batch["x"]).square().sum((1, 2))


def records(size=3, length=40):
    return {"x": torch.randn(size, length, 24, generator=torch.Generator().manual_seed(1)).double()}


def drawn(purpose, name, shape):
    size, columns, count = shape
    values = torch.zeros((columns, size, count), dtype=torch.float64)
    GaussianNoise(KEY).add_(
        values, stddev=1.0, step=0, name=f"{purpose}/{KEY.hex()}/{name}", offset=0
    )
    return values.transpose(0, 1)


def estimate(gradient, start, probes):
    """Return the estimates of one matrix in blocks, as the definition has them."""
    basis = torch.linalg.qr(gradient.mT @ (gradient @ start)).Q
    rest = probes - basis @ (basis.mT @ probes)
    sq_k = (gradient @ rest).square().sum(0)
    return (gradient @ basis).square().sum() + sq_k.view(BLOCKS, -1).mean(1)


@pytest.mark.parametrize("backward", ["two_pass", "bookkeeping"])
@pytest.mark.parametrize("tied", [False, True])
def test_factors_follow_from_formed_gradients_basis_and_probes(backward, tied):
    """A weight that is used twice does without a basis."""
    model, batch = Layers(tied).double(), records()
    gradients = per_sample_gradients(model, losses, batch)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for b, gradient in enumerate(gradients):
        squares = torch.zeros(BLOCKS, dtype=torch.float64)
        for name, grad in gradient.items():
            if grad.ndim < 2:
                squares += grad.square().sum()
                continue
            columns = grad.shape[1]
            probes = drawn("probes", name, (3, columns, PROBES))[b]
            if tied and name == "second.weight":
                squares += (grad @ probes).square().sum(0).view(BLOCKS, -1).mean(1)
            else:
                start = drawn("basis", name, (3, columns, BASIS))[b]
                squares += estimate(grad, start, probes)
        factor = 0.5 / squares.max().sqrt()
        for name, grad in gradient.items():
            total[name] += factor * grad
    got = clipped_sum(
        model, losses, batch, clipping=CLIPPING, size=3, backward=backward, norms=sketch()
    )
    assert_close(got, total, 1e-10)


def part_of(gradients, dtype=torch.float64):
    """Return a contribution with these gradients `[B, O, I]`, one row of G after the other."""
    size, rows, _ = gradients.shape
    return OuterProducts(
        act_BTI=gradients.to(dtype),
        grad_BTO=torch.eye(rows, dtype=dtype).expand(size, rows, rows),
        kernel=BlockedKernel(),
    )


def measured(gradients, wanted, *, times=1, dtype=torch.float64):
    """Return the largest block of repeated estimates, `[times, B]`."""
    part = part_of(gradients, dtype)
    owned = {"w": nn.Parameter(torch.zeros(gradients.shape[1:], dtype=dtype))}
    measure = Measure(
        choose=lambda *shape: "direct",
        owned=owned,
        shards=LocalShards(),
        sketch=wanted,
        pays=lambda *shape: True,
    )
    found = []
    for _ in range(times):
        measure.begin()
        squares = measure.sq_norms("w", part)
        assert squares.rounding_B is not None
        found.append((squares.values_Bb.amax(1).sqrt() + squares.rounding_B.sqrt()).square())
    return torch.stack(found)


def low_rank(rank, size=2, rows=40, columns=50):
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(size, rows, rank, generator=generator).double()
    return left @ torch.randn(size, rank, columns, generator=generator).double()


@pytest.mark.parametrize("rank", [0, 1, BASIS])
def test_a_gradient_of_no_more_directions_than_the_basis_is_measured_exactly(rank):
    gradients = low_rank(rank)
    exact = gradients.square().sum((1, 2))
    torch.testing.assert_close(measured(gradients, sketch())[0], exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_are_measured_in_fp32(dtype):
    gradients = low_rank(BASIS).to(dtype).double()
    exact = gradients.square().sum((1, 2))
    found = measured(gradients, sketch(), dtype=dtype)[0]
    assert (found >= exact * (1 - 1e-5)).all()
    assert (found <= exact * (1.02 if dtype == torch.bfloat16 else 1.001)).all()


def test_estimates_are_steadier_than_from_as_many_products_without_a_basis():
    spectrum = torch.tensor([2.0**-i for i in range(30)]).double()
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(40, 30, generator=generator).double() for _ in range(2))
    left, right = (torch.linalg.qr(x).Q for x in (left, right))
    gradient = ((left * spectrum) @ right.mT)[None]
    steady = measured(gradient, sketch(basis=3, probes=6, blocks=1), times=200)
    plain = measured(gradient, sketch(basis=0, probes=15, blocks=1), times=200)
    assert steady.std() < 0.3 * plain.std()
    assert abs(steady.mean() / gradient.square().sum() - 1) < 0.02


def test_a_record_that_is_not_finite_is_dropped_alone():
    gradients = low_rank(8, size=3)
    gradients[1, 2, 3] = math.nan
    found = measured(gradients, sketch())[0]
    assert found.isfinite().tolist() == [True, False, True]


def test_a_basis_changes_neither_the_law_nor_the_probes_of_the_rest():
    law = NormLaw(probes=PROBES, blocks=BLOCKS, probes_shared=False, groups=1)
    releases = []
    step = PrivateStep(
        Layers(),
        clipping=Flat(clip_norm=1.0),
        noise_multiplier=1.0,
        expected_batch_size=1,
        norms=sketch(),
        on_release=releases.append,
    )
    with step:
        pass
    assert releases[0].norms == law
    start, probes = drawn("basis", "w", (2, 9, 4)), drawn("probes", "w", (2, 9, 4))
    assert not torch.equal(start, probes)


@pytest.mark.parametrize("basis", [-1, 1.5])
def test_a_basis_that_is_no_number_of_directions_is_refused(basis):
    with pytest.raises(ValueError, match="basis"):
        Sketch(basis=basis)
