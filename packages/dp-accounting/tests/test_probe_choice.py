"""The table of probe counts weighs noise against time, and keeps ε throughout."""

from dataclasses import replace

import numpy as np
import pytest

from veilspan.accounting import PrivacyPlan, SketchedClip
from veilspan.accounting.probe_choice import ProbeChoice, norm_bias, probe_table

PLAN = PrivacyPlan(noise_multiplier=0.8136, sampling_probability=0.01, steps=1000, delta=1e-5)


@pytest.fixture(scope="module")
def table():
    return probe_table(PLAN, exact_share=0.5, share_per_probe=0.001)


@pytest.mark.parametrize(
    ("rank", "probes", "blocks", "bias"),
    [
        (100, 64, 4, 1.018),
        (100, 16, 8, 1.070),
        (300, 64, 4, 1.010),
        (300, 64, 8, 1.020),
        (300, 32, 4, 1.015),
        (1000, 16, 4, 1.011),
    ],
)
def test_bias_of_blocks_is_as_simulated_elsewhere(rank, probes, blocks, bias):
    norms = SketchedClip(probes=probes, blocks=blocks)
    assert norm_bias(norms, rank) == pytest.approx(bias, abs=6e-4)


def test_bias_agrees_with_a_simulation():
    norms, rank = SketchedClip(probes=16, blocks=4), 5
    x = np.random.default_rng(0).chisquare(4 * rank, (200_000, 4)).max(axis=1) / (4 * rank)
    assert norm_bias(norms, rank) == pytest.approx(1 / np.mean(x**-0.5), rel=2e-3)


def test_rows_are_faster_or_less_noisy_than_all_others(table):
    times, noise = (
        [f(row) for row in table] for f in (lambda r: r.time, lambda r: r.noise * r.bias)
    )
    assert times == sorted(times)
    assert noise == sorted(noise, reverse=True)
    assert len(set(noise)) == len(noise)
    assert table[-1].norms is None
    assert table[-1].noise == 1


def test_every_row_keeps_the_epsilon_of_exact_norms(table):
    target = PLAN.epsilon().upper
    for row in table:
        plan = replace(PLAN, noise_multiplier=row.noise_multiplier, norms=row.norms)
        assert plan.epsilon().upper <= target
        assert row.noise == pytest.approx(row.noise_multiplier / 0.8136, rel=1e-3)


def test_best_choice_follows_the_exchange_rate(table):
    best = min(table, key=ProbeChoice.cost)
    assert best.norms is not None
    assert best.norms.blocks > 1
    assert min(table, key=lambda row: row.cost(100)).norms is None
    assert min(table, key=lambda row: row.cost(0)) == table[0]


def test_exact_norms_win_where_probes_cost_more():
    rows = probe_table(PLAN, exact_share=0.05, share_per_probe=0.01)
    assert [row.norms for row in rows] == [None]


@pytest.mark.parametrize(
    ("plan", "changes", "message"),
    [
        (PLAN, {"exact_share": -1.0}, "exact_share"),
        (PLAN, {"effective_rank": 0.5}, "effective_rank"),
        (replace(PLAN, noise_multiplier=0.0), {}, "noise_multiplier"),
        (replace(PLAN, relation="replace"), {}, "add_remove"),
    ],
)
def test_what_has_no_table_is_refused(plan, changes, message):
    settings = {"exact_share": 0.5, "share_per_probe": 0.001, **changes}
    with pytest.raises(ValueError, match=message):
        probe_table(plan, **settings)
