"""The audits of veilspan.accounting on the step of veilspan.core: right ones pass, broken fail.

What is broken is built from outside, through the step's public seams.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from veilspan.accounting import PrivacyPlan
from veilspan.accounting.audit import (
    WhiteBoxAudit,
    audit_one_run,
    audit_white_box,
    audit_whole_runs,
)
from veilspan.core import Flat, GaussianNoise, PrivateStep, poisson_batches
from veilspan.core.norms import BlockedKernel

KEY = bytes(range(32))  # the same noise in every run of these tests: none of them fails by chance
CLIP_NORM, EXPECTED, SIGMA = 0.5, 4.0, 1.0
WIDTH = 8


class TwoLayers(nn.Module):
    """A record's gradient is the record itself, once per layer."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(width, 1, bias=False) for _ in range(2))

    def forward(self, x_BD: Tensor) -> Tensor:
        return (self.first(x_BD) + self.second(x_BD)).sum(1)


CANARY = torch.full((1, WIDTH), 1e4)  # clipped: the unit vector whose elements are all equal
OTHERS = torch.linspace(-0.1, 0.1, 2 * WIDTH).view(2, WIDTH)


class Scaled:
    """A noise source with `scale` times the noise that it is asked for, and none for some names."""

    def __init__(self, scale: float = 1.0, silent: str | None = None) -> None:
        self._noise, self._scale, self._silent = GaussianNoise(KEY), scale, silent

    def add_(self, tensor: Tensor, *, stddev: float, step: int, name: str, offset: int) -> None:
        scale = 0.0 if name == self._silent else self._scale
        self._noise.add_(tensor, stddev=scale * stddev, step=step, name=name, offset=offset)


class ForgetsTheCrossTerm(BlockedKernel):
    """Norms of half the true square, as of two equal uses of one weight whose product is left out.

    The gradient of a weight used twice is g + g, of square 4‖g‖², not ‖g‖² + ‖g‖².
    """

    def sq_norm_direct(self, act_BTI: Tensor, grad_BTO: Tensor) -> tuple[Tensor, Tensor]:
        sq_norm_B, size_B = super().sq_norm_direct(act_BTI, grad_BTO)
        return sq_norm_B / 2, size_B

    def sq_norm_gram(self, act_BTI: Tensor, grad_BTO: Tensor) -> tuple[Tensor, Tensor]:
        sq_norm_B, size_B = super().sq_norm_gram(act_BTI, grad_BTO)
        return sq_norm_B / 2, size_B


def private_step(
    model: nn.Module, *, noise_multiplier: float = SIGMA, **options: Any
) -> PrivateStep:
    return PrivateStep(
        model,
        clipping=Flat(clip_norm=CLIP_NORM),
        noise_multiplier=noise_multiplier,
        expected_batch_size=EXPECTED,
        **({"noise": GaussianNoise(KEY)} | options),
    )


def release(step: PrivateStep, *batches: Tensor) -> dict[str, Tensor]:
    """Return the noisy sum, in clip norms, of one logical batch."""
    with step:
        for x in batches:
            step.backward(step.model(x))
    found = {
        name: parameter.grad.double().flatten() * EXPECTED / CLIP_NORM
        for name, parameter in step.parameters.items()
    }
    step.model.zero_grad()
    return found


def along_canary(released: dict[str, Tensor]) -> float:
    """Return ⟨release, u⟩ for u, the direction of the canary in all parameters together."""
    flat = torch.cat(list(released.values()))
    return float(flat.sum() / math.sqrt(len(flat)))


def repetitions(
    n: int, canary: tuple[Tensor, ...] = (CANARY,), **options: Any
) -> tuple[list[float], list[float]]:
    """Statistics of n repetitions of one step with the canary and of n without it."""
    torch.manual_seed(0)
    step = private_step(TwoLayers(), **({"backward": "per_sample"} | options))
    inside = [along_canary(release(step, OTHERS, *canary)) for _ in range(n)]
    outside = [along_canary(release(step, OTHERS)) for _ in range(n)]
    step.detach()
    return inside, outside


def audit(n: int, **options: Any) -> WhiteBoxAudit:
    rows = repetitions(n, **options)
    return audit_white_box(*rows, noise_multiplier=SIGMA, confidence=0.9999)


# Repetitions of one step


def test_the_step_keeps_its_noise_multiplier() -> None:
    found = audit(1000)
    assert found.verdict == "consistent", found.contradictions
    assert found.noise_multiplier == pytest.approx(SIGMA, rel=0.08)
    assert found.contribution == pytest.approx(1.0, abs=0.25)
    assert found.epsilon_lower(1e-5) > 1.5


@pytest.mark.parametrize("backward", ["single_sample", "bookkeeping", "two_pass"])
def test_every_strategy_lets_a_canary_contribute_one_clip_norm(backward: str) -> None:
    step = private_step(TwoLayers(), noise_multiplier=0.0, backward=backward)
    empty, canary = release(step), release(step, CANARY)
    assert along_canary(empty) == 0.0
    assert along_canary(canary) == pytest.approx(1.0, rel=1e-4)


def test_eight_percent_too_little_noise_is_found() -> None:
    found = audit_white_box(
        *repetitions(1000, noise=Scaled(0.92)), noise_multiplier=SIGMA, confidence=0.95
    )
    assert found.verdict == "contradicted"
    assert found.noise_multiplier_upper < SIGMA


BROKEN: dict[str, dict[str, Any]] = {
    "no noise in one layer": {"noise": Scaled(silent="second.weight")},
    "no noise": {"noise": Scaled(0.0)},
    "noise divided by the square root of the batch size": {"noise": Scaled(EXPECTED**-0.5)},
    "a record counted twice": {"canary": (CANARY, CANARY)},
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_mechanism_is_found(name: str) -> None:
    found = audit(150, **BROKEN[name])
    assert found.verdict == "contradicted", found
    assert found.epsilon_lower(1e-5) > 2.0


def test_clip_bound_of_tied_weights_without_the_cross_term_is_found() -> None:
    found = audit(500, kernel=ForgetsTheCrossTerm(), backward="two_pass")
    assert found.contribution == pytest.approx(math.sqrt(2), abs=0.3)
    assert found.verdict == "contradicted"
    assert found.noise_multiplier_upper > SIGMA  # it is the bound that is broken, not the noise


def test_a_layer_without_noise_is_found_by_looking_at_the_layer() -> None:
    """The whole direction would not show a layer in which the canary has little weight."""
    step = private_step(TwoLayers(), noise=Scaled(silent="second.weight"), backward="per_sample")
    part = math.sqrt(0.5)  # of the canary, in each of the two layers
    verdicts = {}
    for name in step.parameters:
        rows = [
            [float(release(step, *batches)[name].sum()) / math.sqrt(WIDTH) for _ in range(100)]
            for batches in ((OTHERS, CANARY), (OTHERS,))
        ]
        verdicts[name] = audit_white_box(
            *rows, noise_multiplier=SIGMA, expected_contribution=part, confidence=0.9999
        ).verdict
    assert verdicts == {"first.weight": "consistent", "second.weight": "contradicted"}


def test_a_canary_that_is_dropped_is_no_proof() -> None:
    assert audit(250, canary=()).verdict == "inconclusive"


# Whole runs


LOUD = PrivacyPlan(
    noise_multiplier=0.25, sampling_probability=0.1, steps=10, delta=1e-5, clip_norm=CLIP_NORM
)


def poisson_steps(generator: np.random.Generator) -> set[int]:
    draws = poisson_batches(1, LOUD.sampling_probability, LOUD.steps, key=generator.bytes(32))
    return {draw.step for draw in draws if len(draw)}


def shuffled_steps(generator: np.random.Generator) -> set[int]:
    """The canary's step in one pass over shuffled records."""
    return {int(generator.integers(LOUD.steps))}


def whole_run(step: PrivateStep, taken: set[int]) -> float:
    """Return how likely a run's releases are if the canary took part in one of its steps."""
    seen = [
        along_canary(release(step, *((CANARY,) if t in taken else ()))) for t in range(LOUD.steps)
    ]
    return float(np.logaddexp.reduce((np.array(seen) - 0.5) / LOUD.noise_multiplier**2))


def whole_runs(sampler: Callable[[], set[int]], *, first: int) -> list[float]:
    """Return 150 runs of which the first has the number `first`; no two share their noise."""
    options: dict[str, Any] = {"noise_multiplier": 0.25, "backward": "per_sample"}
    step = private_step(TwoLayers(), first_step=first * LOUD.steps, **options)
    return [whole_run(step, sampler()) for _ in range(150)]


@pytest.fixture(scope="module")
def runs_without() -> list[float]:
    """Runs without the canary, which no sampler makes any difference to."""
    return whole_runs(set, first=150)


@pytest.mark.parametrize(
    ("sampler", "contradicted"), [(poisson_steps, False), (shuffled_steps, True)]
)
def test_shuffled_instead_of_poisson_is_found_by_whole_runs_at_little_noise(
    sampler: Callable[[np.random.Generator], set[int]],
    contradicted: bool,
    runs_without: list[float],
) -> None:
    """Poisson sampling leaves a record out of some runs altogether; shuffling never does."""
    runs_with = whole_runs(partial(sampler, np.random.default_rng(0)), first=0)
    assert audit_whole_runs(runs_with, runs_without).contradicts(LOUD) == contradicted


# One run


PLAN = PrivacyPlan(noise_multiplier=1.0, sampling_probability=0.25, steps=32, delta=1e-5)
CANARIES = 1000
EXPECTED_CANARIES = PLAN.sampling_probability * CANARIES / 2


def one_run(noise: Scaled, generator: np.random.Generator) -> tuple[Any, Any, Any]:
    """Train once with half of the canaries, each with a weight of its own.

    Returns:
        Who is in; scores from the releases (gradient space); scores from the losses of the final
        model (input space).
    """
    members = generator.random(CANARIES) < 0.5
    ids = np.flatnonzero(members)
    model = nn.Linear(CANARIES, 1, bias=False)
    nn.init.zeros_(model.weight)
    step = PrivateStep(
        model,
        clipping=Flat(clip_norm=1.0),
        noise_multiplier=PLAN.noise_multiplier,
        expected_batch_size=EXPECTED_CANARIES,
        noise=noise,
        backward="two_pass",
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=step.expected_batch_size)
    inputs = 10.0 * torch.eye(CANARIES)
    scores = torch.zeros(CANARIES, dtype=torch.float64)
    q, sigma = PLAN.sampling_probability, PLAN.noise_multiplier
    for draw in poisson_batches(len(ids), q, PLAN.steps, key=KEY):
        with step:
            step.backward(-model(inputs[ids[draw.records]]).sum(1))
        seen = -model.weight.grad[0].double() * step.expected_batch_size
        scores += torch.log1p(q * torch.expm1((seen - 0.5) / sigma**2))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        losses = -model(inputs).sum(1)
    step.detach()
    return members, scores.numpy(), -losses.numpy()


def test_canaries_of_one_run_stay_below_the_claim() -> None:
    members, gradient_space, input_space = one_run(Scaled(), np.random.default_rng(1))
    for scores in (gradient_space, input_space):
        for family in ("any", PLAN):
            found = audit_one_run(scores, members, guesses=300, delta=PLAN.delta, family=family)
            assert 0.5 < found.epsilon_lower < PLAN.epsilon().upper
            assert not found.contradicts(PLAN)


def test_canaries_of_one_run_find_noise_divided_by_the_root_of_the_batch_size() -> None:
    members, *spaces = one_run(
        Scaled((PLAN.sampling_probability * 500) ** -0.5), np.random.default_rng(2)
    )
    for scores in spaces:
        found = audit_one_run(scores, members, guesses=800, delta=PLAN.delta)
        assert found.contradicts(PLAN), found
