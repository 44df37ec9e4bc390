"""Estimated norms of real private steps keep their law; probes that are drawn wrongly do not.

The gradient is an outer product, far longer than the threshold: none makes longer contributions.
What is broken is built from outside, through the stream of probes.
"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from veilspan.accounting import SketchedClip
from veilspan.accounting.audit import NormRatioAudit, audit_norm_ratios
from veilspan.core import Flat, GaussianNoise, PerLayer, PrivateStep, Release, Sketch

KEY = bytes(range(32))  # the same probes in every run of these tests: none of them fails by chance
WIDTH, REPETITIONS = 48, 600


class OneMap(nn.Module):
    """A record's gradient has rank one; with `tied` the map is used twice, with one direction.

    With `weighted` its rank is the number of tokens.
    """

    def __init__(self, tied: bool = False, *, weighted: bool = False) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied, self.weighted = tied, weighted

    def forward(self, x_BTI: Tensor) -> Tensor:
        total = self.map(x_BTI)
        if self.tied:
            total = total + self.map(2 * x_BTI)
        if self.weighted:
            total = total * torch.eye(x_BTI.shape[1], WIDTH)
        return total.sum((1, 2))


class Reused:
    """Probes that do not change from one micro-batch to the next."""

    def __init__(self, key: bytes) -> None:
        self._noise = GaussianNoise(key)

    def add_(self, tensor: Tensor, *, stddev: float, step: int, name: str, offset: int) -> None:
        self._noise.add_(tensor, stddev=stddev, step=0, name=name, offset=offset)


class Signs:
    """Rademacher probes: as many estimates are far too small as signs cancel."""

    def __init__(self) -> None:
        self._noise = GaussianNoise(KEY)

    def add_(self, tensor: Tensor, *, stddev: float, step: int, name: str, offset: int) -> None:
        self._noise.add_(tensor, stddev=stddev, step=step, name=name, offset=offset)
        tensor.sign_()


class Alike:
    """Every probe of a record is the same one."""

    def __init__(self) -> None:
        self._noise = GaussianNoise(KEY)

    def add_(self, tensor: Tensor, *, stddev: float, step: int, name: str, offset: int) -> None:
        self._noise.add_(tensor, stddev=stddev, step=step, name=name, offset=offset)
        tensor.copy_(tensor[..., :1].expand_as(tensor))


def audit(
    sketch: Sketch,
    record: Tensor,
    *,
    tied: bool = False,
    backward: str = "two_pass",
    weighted: bool = False,
    repetitions: int = REPETITIONS,
) -> NormRatioAudit:
    """Clip one record many times, alone in its logical batch, and audit what the step claims."""
    torch.manual_seed(0)
    releases: list[Release] = []
    clipping = (PerLayer if backward == "per_layer" else Flat)(clip_norm=1.0)
    step = PrivateStep(
        OneMap(tied, weighted=weighted),
        clipping=clipping,
        noise_multiplier=0.0,
        expected_batch_size=1,
        norms=sketch,
        backward=backward,
        on_release=releases.append,
    )
    ratios = []
    for _ in range(repetitions):
        with step:
            step.backward(step.model(record))
        (weight,) = step.parameters.values()
        assert weight.grad is not None
        ratios.append(float(weight.grad.double().norm()))
        weight.grad = None
    step.detach()
    assert releases[-1].norms is not None
    claim = SketchedClip(**asdict(releases[-1].norms))
    return audit_norm_ratios(np.array(ratios), claim=claim, confidence=0.999)


def rank_one(length: int = 200) -> Tensor:
    """A record of `length` equal tokens, for which an estimate takes less time than the norm."""
    direction = torch.linspace(-1, 1, WIDTH)
    return 1e3 * direction.expand(1, length, WIDTH)


@pytest.fixture(autouse=True)
def _always_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veilspan.core.plan.StrategyPlan.sketch_pays", lambda self, *shape: True)
    monkeypatch.setattr("veilspan.core.measures.common_key", lambda shards, device: KEY)


@pytest.mark.parametrize(("probes", "blocks"), [(8, 1), (16, 4)])
@pytest.mark.parametrize(
    ("backward", "tied"),
    [("two_pass", False), ("two_pass", True), ("bookkeeping", True), ("per_layer", False)],
)
def test_the_longest_contributions_keep_the_law(
    backward: str, tied: bool, probes: int, blocks: int
) -> None:
    sketch = Sketch(probes=probes, blocks=blocks, stream=GaussianNoise(KEY))
    found = audit(sketch, rank_one(), tied=tied, backward=backward)
    assert found.verdict == "consistent", found
    assert found.claim.exceeds(1.0) > 0.1  # it is not empty: contributions exceed the threshold


@pytest.mark.parametrize("rank", [3, 12])
def test_a_basis_keeps_the_law(rank: int) -> None:
    """Directions beyond the basis are all that an estimate can miss."""
    torch.manual_seed(1)
    record = 1e3 * torch.randn(1, rank, WIDTH)
    sketch = Sketch(probes=4, blocks=1, basis=2, stream=GaussianNoise(KEY))
    assert audit(sketch, record, weighted=True).verdict == "consistent"


def test_the_law_is_tight_for_a_gradient_of_rank_one() -> None:
    """Estimates from half of the probes that are claimed are found."""
    sketch = Sketch(probes=8, blocks=1, stream=GaussianNoise(KEY))
    honest = audit(sketch, rank_one(), repetitions=1500)
    assert honest.verdict == "consistent"
    assert honest.measured > 0.85 * honest.allowed


def test_pitfall_58_signs_in_place_of_normals_are_found() -> None:
    """On a gradient with two equal coordinates, two signs cancel half of the time."""
    record = torch.zeros(1, 200, WIDTH)
    record[..., :2] = 1e3
    honest = Sketch(probes=2, blocks=1, stream=GaussianNoise(KEY))
    assert audit(honest, record).verdict == "consistent"
    found = audit(Sketch(probes=2, blocks=1, stream=Signs()), record)
    assert found.ratio > 10  # both probes miss the gradient: nothing bounds the contribution
    assert found.verdict == "contradicted", found


def test_pitfall_58_probes_that_are_used_again_are_found() -> None:
    """One draw in about two is too low, and then it is too low every time."""
    verdicts = [
        audit(
            Sketch(probes=8, blocks=1, stream=Reused(bytes([seed, *range(1, 32)]))),
            rank_one(),
            repetitions=40,
        ).verdict
        for seed in range(6)
    ]
    assert verdicts.count("contradicted") >= 2, verdicts


def test_pitfall_58_probes_that_are_all_alike_are_found() -> None:
    found = audit(Sketch(probes=8, blocks=1, stream=Alike()), rank_one())
    assert found.verdict == "contradicted", found
