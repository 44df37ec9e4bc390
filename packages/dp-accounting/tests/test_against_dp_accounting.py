"""Bounds agree with those of Google's dp_accounting, measured once and, if installed, again."""

import json
import math
import pathlib

import pytest
from scipy.special import ndtr

from veilspan.accounting.engines import CertifiedEngine, SampledGaussian

GOLDEN = json.loads((pathlib.Path(__file__).parent / "dp_accounting_golden.json").read_text())
ROWS = GOLDEN["rows"]
# dp_accounting's transforms round in doubles, about 1e-16 of the total mass per point and step, and
# do not count that in their bounds: at δ = 1e-12 they are some percent off, in either direction.
SMALLEST_DELTA = 1e-8
ROUNDING = 0.02


def name(row):
    return f"{row['relation']}-{row['q']:g}-{row['sigma']:g}-{row['steps']}-{row['delta']:g}"


def ours(row):
    mechanism = SampledGaussian(
        noise_multiplier=row["sigma"],
        sampling_probability=row["q"],
        steps=row["steps"],
        relation=row["relation"],
    )
    return CertifiedEngine().epsilon(mechanism, row["delta"])


def enclosed(bounds, optimistic, pessimistic, row):
    """Two intervals that hold the same ε must meet."""
    slack = 0.0 if row["delta"] >= SMALLEST_DELTA else ROUNDING
    meets = bounds.upper >= optimistic or disproved(optimistic, row)
    return meets and bounds.lower <= pessimistic * (1 + slack)


def disproved(optimistic, row):
    """Whether the exact δ of one release at this "lower bound" is below the given one."""
    q, sigma = row["q"], row["sigma"]
    if row["relation"] != "add_remove" or row["steps"] != 1 or q == 1:
        return False
    x = sigma**2 * math.log1p(math.expm1(optimistic) / q) + 0.5  # where the loss is ε
    without, shifted = ndtr(-x / sigma), ndtr((1 - x) / sigma)
    exact = q * shifted - (math.expm1(optimistic) + q) * without
    return exact < row["delta"] * (1 - 1e-6)


def test_only_one_lower_bound_of_dp_accounting_is_disproved():
    found = [row for row in ROWS if disproved(row["optimistic"], row)]
    assert [name(row) for row in found] == ["add_remove-1e-06-0.3-1-1e-12"]


def test_grid_covers_the_range():
    assert len(ROWS) >= 60
    assert len({name(row) for row in ROWS}) == len(ROWS)
    assert {row["relation"] for row in ROWS} == {"add_remove", "replace"}
    for key, low, high in (("sigma", 0.3, 50), ("q", 1e-6, 1), ("steps", 1, 10**6)):
        values = {row[key] for row in ROWS}
        assert min(values) == low
        assert max(values) == high
    assert {row["delta"] for row in ROWS} == {1e-5, 1e-8, 1e-12}


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_bounds_meet_those_measured_with_dp_accounting(row):
    bounds = ours(row)
    assert enclosed(bounds, row["optimistic"], row["pessimistic"], row)
    if row["delta"] >= SMALLEST_DELTA:  # ours may not be much looser either
        assert bounds.upper <= row["pessimistic"] * 1.002


@pytest.mark.parametrize("row", ROWS[::4], ids=name)
def test_bounds_meet_those_of_the_installed_dp_accounting(row):
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    neighbours = pytest.importorskip("dp_accounting").NeighboringRelation
    relation = {
        "add_remove": neighbours.ADD_OR_REMOVE_ONE,
        "replace": neighbours.REPLACE_ONE,
    }[row["relation"]]
    optimistic, pessimistic = (
        pld.from_gaussian_mechanism(
            row["sigma"],
            pessimistic_estimate=pessimistic,
            value_discretization_interval=row["interval"],
            sampling_prob=row["q"],
            use_connect_dots=pessimistic,
            neighboring_relation=relation,
        )
        .self_compose(row["steps"])
        .get_epsilon_for_delta(row["delta"])
        for pessimistic in (False, True)
    )
    assert enclosed(ours(row), optimistic, pessimistic, row)
    if row["delta"] >= SMALLEST_DELTA:
        assert pessimistic == pytest.approx(row["pessimistic"], rel=1e-4)
