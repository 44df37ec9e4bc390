"""Estimated norms where 2 or 4 ranks hold a sequence together, several records at a time."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.distributed

MESHES = {"1 x 2": 2, "1 x 4": 4, "2 x 2": 4}
"""Number of ranks of each mesh `replicate x context`."""

on_every_mesh = pytest.mark.parametrize("mesh", MESHES)

Found = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def found(run_on_ranks) -> Found:
    """What every rank of every mesh found."""
    reports = run_on_ranks("sketched_context.py", [2, 4])
    return {mesh: [report[mesh] for report in reports[ranks]] for mesh, ranks in MESHES.items()}


@on_every_mesh
def test_pitfall_59_projections_are_added_over_ranks_before_they_are_squared(found, mesh):
    """The factors are those of whole gradients times whole probes; the sums those of records."""
    for report in found[mesh]:
        assert len(report["clipped sums"]) == 10
        for case, error in report["clipped sums"].items():
            assert error <= 1e-10, case


@on_every_mesh
def test_ranks_of_a_sequence_agree_on_a_fresh_key(found, mesh):
    """Another step has other probes; a contribution is about one threshold long."""
    reports = [report["own keys"] for report in found[mesh]]
    for report in reports:
        assert report["lengths"] == pytest.approx(reports[0]["lengths"], rel=1e-12)
    first, second = reports[0]["lengths"]
    assert first != pytest.approx(second, rel=1e-6)
    assert min(first, second) > 0.2
    assert max(first, second) < 2.0


@on_every_mesh
def test_pitfall_59_streams_that_differ_between_ranks_are_refused(found, mesh):
    for report in found[mesh]:
        assert "not the same on the" in report["own keys"]["refusal"]


@on_every_mesh
def test_what_estimates_over_ranks_do_not_go_with_is_refused(found, mesh):
    for report in found[mesh]:
        assert "forms every gradient" in report["refusals"]["strategy"]
        assert "truncates each record's contribution" in report["refusals"]["sums"]
