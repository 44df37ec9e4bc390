"""Losses without logits where FSDP2 splits the head's weight, on 1, 2 and 4 ranks."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.distributed

MESHES = {"1x1": 1, "1x2": 2, "2x1": 2, "1x4": 4, "2x2": 4}
"""Number of ranks of each mesh `replicate x context`."""

Found = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def found(run_on_ranks) -> Found:
    """What every rank of every mesh found."""
    reports = run_on_ranks("fused_head.py", sorted(set(MESHES.values())))
    return {mesh: [report[mesh] for report in reports[ranks]] for mesh, ranks in MESHES.items()}


@pytest.mark.parametrize("mesh", MESHES)
def test_clipped_sums_and_evaluations_of_split_sequences_equal_those_of_logits(found, mesh):
    for report in found[mesh]:
        assert len(report["context"]) == 8
        for case, error in report["context"].items():
            assert error <= 1e-10, case


@pytest.mark.parametrize("mesh", ["1x2", "1x4", "2x2"])
def test_estimated_norms_equal_those_of_whole_gradients(found, mesh):
    for report in found[mesh]:
        assert len(report["sketched"]) == 4
        for case, error in report["sketched"].items():
            assert error <= 1e-10, case


def test_sums_of_a_model_split_over_ranks_with_other_records_equal_the_loop(found):
    for report in found["2x1"]:
        assert len(report["replicas"]) == 4
        for case, error in report["replicas"].items():
            assert error <= 1e-10, case


def test_a_head_that_cannot_be_served_while_it_is_split_is_refused(found):
    for report in found["2x1"]:
        assert "scales or caps the logits" in report["refusals"]["scaled"]
        assert "fully_shard(model)" in report["refusals"]["on its own"]
