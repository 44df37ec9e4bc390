"""The plan: checked fields, calibration, serialisation, and the statement."""

import dataclasses
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veilspan.accounting import PrivacyPlan
from veilspan.accounting.bounds import EpsilonBounds, at_least, at_most, round_up
from veilspan.accounting.calibration import calibrate_noise
from veilspan.accounting.engines import CertifiedEngine, SampledGaussian

SETTINGS = {"noise_multiplier": 1.0, "sampling_probability": 0.01, "steps": 1000, "delta": 1e-5}


@pytest.mark.parametrize(
    ("target", "known"),
    [(8.0, None), (0.5, 2.7035), (0.1, 11.57), (0.05, 22.06), (0.01, 105.51), (0.005, None)],
)
def test_pitfall_48_calibration_finds_the_smallest_certified_noise_within_a_thousandth(
    target, known
):
    plan = PrivacyPlan.calibrate(
        target_epsilon=target, delta=1e-6, sampling_probability=0.01, steps=1000
    )
    assert target * 0.998 <= plan.epsilon().upper <= target
    if known is not None:  # best value of other accountants, which are loose at small ε
        assert plan.noise_multiplier <= known * 1.001
    slightly_less = dataclasses.replace(plan, noise_multiplier=plan.noise_multiplier * 0.999)
    assert slightly_less.epsilon().lower > target


@pytest.mark.parametrize(
    ("q", "steps", "delta", "target"),
    [
        (1 / 512, 4000, 1e-7, 8.0),
        (1.0, 100, 1e-6, 1.0),
        (0.04, 2000, 1e-5, 8.0),
        (0.5, 1, 1e-6, 50.0),
        (1e-4, 100, 1e-9, 1.0),
    ],
)
def test_calibration_is_a_rigorous_bracket(q, steps, delta, target):
    bracket = calibrate_noise(
        target_epsilon=target, delta=delta, sampling_probability=q, steps=steps
    )
    assert bracket.epsilon <= target
    assert bracket.too_small < bracket.noise_multiplier <= bracket.too_small * 1.001
    mechanism = SampledGaussian(
        noise_multiplier=bracket.noise_multiplier, sampling_probability=q, steps=steps
    )
    assert CertifiedEngine().epsilon(mechanism, delta).upper <= target


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(("q", "steps"), [(1.0, 10), (0.01, 1), (0.01, 100)])
def test_calibration_to_the_epsilon_of_a_plan_finds_its_noise(sigma, q, steps):
    wanted = {"sampling_probability": q, "steps": steps, "delta": 1e-5}
    plan = PrivacyPlan(noise_multiplier=sigma, **wanted)
    again = PrivacyPlan.calibrate(target_epsilon=plan.epsilon().upper, **wanted)
    assert again.noise_multiplier == pytest.approx(sigma, rel=1e-3)
    assert again.epsilon().upper <= plan.epsilon().upper


@pytest.mark.parametrize("target", [1e-13, 1e-12, 1e-9])
@pytest.mark.parametrize(("q", "steps", "delta"), [(1.0, 1, 1e-5), (0.01, 99, 1e-5), (0.5, 1, 0.4)])
def test_calibration_keeps_targets_of_next_to_nothing(target, q, steps, delta):
    plan = PrivacyPlan.calibrate(
        target_epsilon=target, delta=delta, sampling_probability=q, steps=steps
    )
    assert plan.epsilon().upper <= target


def test_calibration_at_q_of_four_percent_beats_published_noise():
    # Opacus finds 1.2915 with its PRV accountant and 1.3562 with its Rényi accountant.
    plan = PrivacyPlan.calibrate(
        target_epsilon=8.0, delta=1e-5, sampling_probability=0.04, steps=2000
    )
    assert 1.28 < plan.noise_multiplier < 1.2915


def test_nothing_to_release_needs_no_noise():
    plan = PrivacyPlan.calibrate(target_epsilon=1.0, delta=1e-6, sampling_probability=0.1, steps=0)
    assert plan.noise_multiplier == 0.0
    assert plan.epsilon().upper == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_epsilon": 0.0}, "target_epsilon is 0.0"),
        ({"target_epsilon": -1.0}, "target_epsilon is -1.0"),
        ({"target_epsilon": math.inf}, "target_epsilon is inf"),
        ({"target_epsilon": math.nan}, "target_epsilon is nan"),
        (
            {"target_epsilon": 1e-6, "steps": 10**9, "sampling_probability": 1.0},
            r"the closest ε is 0\.1\d+\. Raise target_eps",
        ),
        ({"target_epsilon": 1e6, "steps": 1}, "protects nothing"),
        ({"delta": 0.0}, "delta is 0.0"),
        ({"sampling_probability": 1.5}, "sampling_probability is 1.5"),
        ({"steps": 10.5}, "steps is 10.5"),
        ({"clip_norm": 10**400}, "clip_norm is beyond the range of a double"),
        ({"relation": "replace_one"}, "relation is 'replace_one'"),
    ],
)
def test_unreachable_or_senseless_targets_are_refused_by_name(change, message):
    wanted = {"target_epsilon": 1.0, "delta": 1e-6, "sampling_probability": 0.01, "steps": 100}
    with pytest.raises(ValueError, match=message):
        PrivacyPlan.calibrate(**{**wanted, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier is -1.0"),
        ({"noise_multiplier": math.inf}, "noise_multiplier is infinite"),
        ({"noise_multiplier": math.nan}, "noise_multiplier is nan"),
        ({"noise_multiplier": "1"}, "noise_multiplier is '1'"),
        ({"noise_multiplier": True}, "noise_multiplier is True"),
        ({"noise_multiplier": 10**400}, "noise_multiplier is beyond the range of a double"),
        ({"noise_multiplier": 1e-160}, "noise_multiplier is 1e-160; .* from 1e-60"),
        ({"noise_multiplier": 1e200}, r"noise_multiplier is 1e\+200; .* to 1e\+60"),
        ({"sampling_probability": -0.1}, "sampling_probability is -0.1"),
        ({"delta": 10**400}, "delta is beyond the range of a double"),
        ({"steps": -1}, "steps is -1"),
        ({"steps": 10**400}, r"steps is above 10\^15"),
        (
            {"sampling": "truncated_poisson", "batch_cap": 5, "most_records": 10**400},
            r"most_records is above 10\^15",
        ),
        ({"steps": True}, "steps is True"),
        ({"delta": 1.0}, "delta is 1.0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"clip_norm": math.inf}, "clip_norm is infinite"),
        ({"expected_batch_size": 0}, "expected_batch_size is 0"),
        ({"unit": " "}, "unit is ' '"),
        ({"sampling": "shuffle"}, "sampling is 'shuffle'; supported is 'poisson'"),
        ({"relation": "replace_one"}, "relation is 'replace_one'; supported is 'add_remove'"),
        (
            {"noise_stream": "torch"},
            "noise_stream is 'torch'; supported is 'aes-ctr' or 'chacha20' or 'philox'",
        ),
    ],
)
def test_every_bad_field_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        PrivacyPlan(**{**SETTINGS, **change})


@given(n=st.integers(2, 5000))
def test_pitfall_28_sampling_probability_and_steps_are_taken_as_given(n):
    plan = PrivacyPlan(noise_multiplier=1.0, sampling_probability=1 / n, steps=n, delta=1e-6)
    assert plan.sampling_probability == 1 / n
    assert plan.steps == n  # never int(1 / (1 / n)), which is not n for many n
    assert PrivacyPlan.from_json(plan.to_json()) == plan


@given(
    sigma=st.just(0.0) | st.floats(1e-60, 1e60),
    q=st.floats(0.0, 1.0),
    steps=st.integers(0, 10**9),
    delta=st.floats(1e-30, 0.99),
    batch=st.none() | st.floats(0.5, 1e9),
    unit=st.text(min_size=1).filter(str.strip),
    stream=st.sampled_from(["aes-ctr", "chacha20", "philox"]),
)
def test_serialisation_returns_the_same_plan_and_digest(
    sigma, q, steps, delta, batch, unit, stream
):
    plan = PrivacyPlan(
        noise_multiplier=sigma,
        sampling_probability=q,
        steps=steps,
        delta=delta,
        expected_batch_size=batch,
        unit=unit,
        noise_stream=stream,
    )
    again = PrivacyPlan.from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest
    assert PrivacyPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_infinite_clip_norm_survives_serialisation_as_valid_json():
    plan = PrivacyPlan(**{**SETTINGS, "noise_multiplier": 0.0}, clip_norm=math.inf)
    assert "Infinity" not in plan.to_json()
    assert PrivacyPlan.from_json(plan.to_json()) == plan


def test_whole_and_real_numbers_make_one_plan():
    first = PrivacyPlan(**SETTINGS, expected_batch_size=64, clip_norm=1)
    assert first.digest == PrivacyPlan(**SETTINGS, expected_batch_size=64.0).digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "schema of the privacy plan"),
        ('{"schema": "veilspan.accounting.plan/99"}', "this version reads"),
        ('{"schema": "veilspan.accounting.plan/1"}', "lacks"),
        (
            PrivacyPlan(**SETTINGS).to_json().replace('"unit"', '"unnit"'),
            r"unknown fields \['unnit'\]",
        ),
    ],
)
def test_damaged_plans_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        PrivacyPlan.from_json(text)


def test_epsilon_takes_another_delta_and_another_number_of_steps():
    plan = PrivacyPlan(**SETTINGS)
    assert plan.epsilon(1e-3).upper < plan.epsilon().upper < plan.epsilon(1e-9).upper
    assert plan.epsilon_after(10).upper < plan.epsilon().upper < plan.epsilon_after(2000).upper
    assert plan.epsilon_after(1000) == plan.epsilon()
    assert plan.epsilon().delta == plan.delta
    with pytest.raises(ValueError, match="delta is 0"):
        plan.epsilon(0.0)
    with pytest.raises(ValueError, match="steps is -3"):
        plan.epsilon_after(-3)


@pytest.mark.parametrize(
    ("stream", "named"),
    [("aes-ctr", "AES-256"), ("chacha20", "ChaCha20, a cryptographic"), ("philox", "Philox")],
)
def test_statement_names_where_the_noise_comes_from(stream: str, named: str):
    assert named in PrivacyPlan(**SETTINGS, noise_stream=stream).statement()


def test_statement_names_every_assumption_and_rounds_epsilon_up():
    plan = PrivacyPlan(
        **SETTINGS, unit="document", clip_norm=0.5, expected_batch_size=100, noise_stream="philox"
    )
    text = plan.statement()
    assert f"ε ≤ {round_up(plan.epsilon().upper)}" in text
    for phrase in (
        "δ = 1e-05",
        "one document",
        "Poisson sampling",
        "secret",
        "add or remove",
        "norm at most 0.5",
        "noise multiplier 1",
        "Philox",
        "public constant 100",
        "1/10,000",
        "hyper-parameters",
        "tokenizer",
        "deduplication",
        "Held-out data",
        "Floating point",
        "Every attempt",
    ):
        assert phrase in text, phrase
    assert "AES" in PrivacyPlan(**SETTINGS).statement()


def test_statement_without_noise_claims_nothing():
    text = PrivacyPlan(**{**SETTINGS, "noise_multiplier": 0.0}).statement()
    assert text.startswith("NO PRIVACY GUARANTEE")
    assert "ε ≤" not in text


@given(value=st.floats(1e-12, 1e12))
def test_printed_epsilon_is_never_below_the_bound(value):
    assert value <= float(round_up(value)) <= value * 1.0011


@given(value=st.floats(1e-12, 1e12), digits=st.integers(1, 8))
def test_printed_bounds_are_on_their_own_side(value, digits):
    over, under = at_least(value, digits), at_most(value, digits)
    assert value <= float(over) <= value * (1 + 9.99 ** (1 - digits))
    assert value * (1 - 9.99 ** (1 - digits)) <= float(under) <= value


def test_printed_delta_is_not_below_the_delta_of_the_answer():
    plan = PrivacyPlan(**{**SETTINGS, "delta": 1 / 70_000})  # 1.428571e-05
    assert "at δ = 1.42858e-5" in str(plan.epsilon())
    assert "δ = 1.42858e-5, with respect to" in plan.statement()
    assert "δ = 1.42858e-5 is small" in plan.statement()
    assert str(PrivacyPlan(**SETTINGS).epsilon()).endswith("at δ = 1e-05")
    assert str(plan.delta_at(1 / 3)).endswith("at ε = 0.333334")


def test_statement_does_not_round_the_lower_bound_up():
    plan = PrivacyPlan(noise_multiplier=0.05, sampling_probability=1, steps=1, delta=1e-5)
    printed = float(re.search(r"the exact ε is at least ([\d.]+\d)", plan.statement())[1])
    lower = plan.epsilon().lower
    assert lower * (1 - 1e-5) < printed <= lower


def test_unordered_bounds_cannot_be_built():
    with pytest.raises(ValueError, match="not ordered"):
        EpsilonBounds(
            lower=2.0, estimate=1.0, upper=3.0, delta=1e-5, direction="both", method="test"
        )
