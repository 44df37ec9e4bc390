"""Ratios of estimated clipping: rarely a false alarm, an alarm where the probes are wrong."""

import math
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, ksone, kstest

from veilspan.accounting.audit import audit_norm_ratios
from veilspan.accounting.sketched import SketchedClip

rng_of = np.random.default_rng
CLAIMS = [
    SketchedClip(probes=1),
    SketchedClip(probes=8),
    SketchedClip(probes=64, blocks=4),
    SketchedClip(probes=16, blocks=8, probes_shared=True),
]


def ratios(rng, claim, n, *, weights=(1.0,), length=1e6):
    """Clip a gradient of singular values √weights · length by n fresh estimates; C = 1."""
    shape = n, claim.blocks, claim.probes // claim.blocks, len(weights)
    means = (np.square(rng.standard_normal(shape)) @ np.asarray(weights)).mean(axis=2)
    estimate = length * np.sqrt(means.max(axis=1))
    return length * math.sqrt(sum(weights)) * np.minimum(1.0, 1 / estimate)


def alarms(draw, claim, tries, confidence=0.9, n=200):
    """Return how many of several audits contradict the claim."""
    found = [
        audit_norm_ratios(draw(rng_of([7, i]), claim, n), claim=claim, confidence=confidence)
        for i in range(tries)
    ]
    return sum(audit.verdict == "contradicted" for audit in found)


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("confidence", [0.9, 0.99])
def test_honest_clipper_is_contradicted_at_most_at_the_stated_rate(claim, confidence):
    found = alarms(ratios, claim, 600, confidence)
    assert binom.sf(found - 1, 600, 1 - confidence) > 1e-5


def test_false_alarms_are_as_many_as_stated_where_all_ratios_count():
    """Uniform chances through the law's inverse; below one threshold the claim is one of 1."""

    claim = SketchedClip(probes=2)
    steps = np.geomspace(1.0, 1e4, 20001)
    reached = -claim.exceeds(steps)

    def exact(rng, claim, n):
        return np.interp(-rng.random(n), reached, steps, left=0.5)

    assert claim.exceeds(1.0) > 0.6
    found = alarms(exact, claim, 1000, n=100)
    assert binom.sf(found - 1, 1000, 0.1) > 1e-5
    assert found > 0.05 * 1000  # the test does not waste its level


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.1), (0.1,) * 10])
@pytest.mark.parametrize("length", [0.5, 1.2, 1e6])
def test_gradients_of_any_rank_and_length_keep_the_claim(weights, length):
    def draw(rng, claim, n):
        return ratios(rng, claim, n, weights=weights, length=length)

    assert binom.sf(alarms(draw, SketchedClip(probes=8), 100) - 1, 100, 0.1) > 1e-5


def test_norms_of_exactly_one_threshold_are_not_above_it():
    for rounding in (-1e-7, 0.0, 1e-7):
        audit = audit_norm_ratios([1 + rounding] * 2000, claim=CLAIMS[2])
        assert (audit.verdict, audit.p_value, audit.excess) == ("consistent", 1.0, 0.0)
    assert audit_norm_ratios([1 + 1e-5] * 2000, claim=CLAIMS[2]).verdict == "contradicted"


def half_as_many(rng, claim, n):
    return ratios(rng, SketchedClip(probes=claim.probes // 2, blocks=claim.blocks), n)


def signs(rng, claim, n):
    """A gradient on two coordinates: the estimate is 0 with probability 2⁻ᵏ."""
    probes = rng.choice([-1.0, 1.0], size=(n, claim.probes, 2))
    estimate = 1e6 * np.sqrt(np.square(probes.sum(axis=2) / math.sqrt(2)).mean(axis=1))
    with np.errstate(divide="ignore"):
        return 1e6 * np.minimum(1.0, 1 / estimate)


def probes_per_rank(rng, claim, n):
    """Two ranks hold equal halves, and each has probes of its own."""
    probes = rng.standard_normal((n, claim.blocks, claim.probes // claim.blocks, 2))
    means = np.square(probes.mean(axis=3)).mean(axis=2)
    return 1e6 * np.minimum(1.0, 1 / (1e6 * np.sqrt(means.max(axis=1))))


def one_block(rng, claim, n):
    return ratios(rng, SketchedClip(probes=claim.probes), n)


def after_a_step(rng, claim, n, *, fresh):
    """Gradients that are orthogonal to the probes of the step before."""
    old = rng.standard_normal((n, claim.probes, claim.probes + 1))
    direction = np.linalg.svd(old)[2][:, -1, :, None]
    probes = rng.standard_normal(old.shape) if fresh else old
    estimate = 1e6 * np.sqrt(np.square(probes @ direction).mean(axis=(1, 2)))
    return 1e6 * np.minimum(1.0, 1 / estimate)


def reused(rng, claim, n):
    return after_a_step(rng, claim, n, fresh=False)


def test_fresh_probes_do_not_care_for_those_of_the_step_before():
    def draw(rng, claim, n):
        return after_a_step(rng, claim, n, fresh=True)

    assert binom.sf(alarms(draw, SketchedClip(probes=8), 100) - 1, 100, 0.1) > 1e-5


@pytest.mark.parametrize(
    ("draw", "claim"),
    [
        (half_as_many, SketchedClip(probes=8)),
        (half_as_many, SketchedClip(probes=64)),
        (reused, SketchedClip(probes=4)),
        (signs, SketchedClip(probes=2)),
        (signs, SketchedClip(probes=4)),
        (probes_per_rank, SketchedClip(probes=8)),
        (probes_per_rank, SketchedClip(probes=64)),
        (probes_per_rank, SketchedClip(probes=64, blocks=4)),
        (one_block, SketchedClip(probes=64, blocks=4)),
    ],
)
def test_broken_probes_are_found_at_two_thousand_repetitions(draw, claim):
    assert alarms(draw, claim, 50, confidence=0.95, n=2000) >= 49


def test_statistic_and_p_value_are_those_of_the_one_sided_test():
    claim = SketchedClip(probes=4)
    values = ratios(rng_of(5), SketchedClip(probes=3), 300)
    audit = audit_norm_ratios(values, claim=claim)
    steps = np.append(values[values > 1], 1.0)
    gaps = [(values >= s).mean() - float(claim.exceeds(s)) for s in steps]
    assert audit.excess == pytest.approx(max(gaps), abs=1e-5)
    assert audit.excess == pytest.approx(audit.measured - audit.allowed)
    assert audit.p_value == pytest.approx(ksone.sf(audit.excess, 300), rel=1e-9)
    assert audit.p_value <= math.exp(-2 * 300 * audit.excess**2)
    peer = kstest(values, lambda s: 1 - claim.exceeds(s), alternative="less")
    assert audit.p_value == pytest.approx(peer.pvalue, rel=1e-3)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), factor=st.floats(1.0, 3.0))
def test_longer_contributions_are_never_less_suspicious(seed, factor):
    values = ratios(rng_of(seed), SketchedClip(probes=4), 60)
    one, other = (
        audit_norm_ratios(v, claim=SketchedClip(probes=4)) for v in (values, factor * values)
    )
    assert other.p_value <= one.p_value
    assert 0 <= one.p_value <= 1
    assert (one.verdict == "contradicted") == (one.p_value <= 0.05)


def test_contradiction_says_where_and_by_how_much():
    audit = audit_norm_ratios(half_as_many(rng_of(0), CLAIMS[1], 2000), claim=CLAIMS[1])
    (text,) = audit.contradictions
    measured, _, reached, allowed, _ = map(float, re.findall(r"\d[\d.e-]*", text))
    assert reached == pytest.approx(audit.ratio, rel=1e-3)
    assert allowed == pytest.approx(float(audit.claim.exceeds(audit.ratio)), rel=1e-3)
    assert measured == pytest.approx(audit.measured, rel=1e-3)
    assert measured > allowed + 0.027


def test_a_hundred_thousand_ratios_take_a_second():
    values = ratios(rng_of(1), SketchedClip(probes=2), 10**5)
    begin = time.perf_counter()
    audit = audit_norm_ratios(values, claim=SketchedClip(probes=2), confidence=0.9999)
    assert audit.verdict == "consistent"
    assert time.perf_counter() - begin < 10


GOOD = [0.5, 1.5] * 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": GOOD[:-1]}, "ratios has shape (29,)"),
        ({"ratios": [GOOD, GOOD]}, "ratios has shape (2, 30)"),
        ({"ratios": ["a"] * 30}, "dtype <U1"),
        ({"ratios": [True] * 30}, "dtype bool"),
        ({"ratios": [math.nan, math.inf, -0.1, *GOOD]}, "ratios holds 3 numbers that are negative"),
        ({"claim": 8}, "claim is 8; it must be a SketchedClip"),
        ({"claim": SketchedClip(probes=8, groups=2)}, "claim has groups = 2; it must have 1"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"confidence": 0.5}, "confidence is 0.5"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    arguments = {"ratios": GOOD, "claim": SketchedClip(probes=8)} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        audit_norm_ratios(arguments.pop("ratios"), **arguments)
