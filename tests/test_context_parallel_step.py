"""The private step over 1, 2 and 4 processes: sums, noise, replicas, pitfalls."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
from torch.distributed.fsdp import FSDPModule

pytestmark = pytest.mark.distributed

MESHES = {"1x1": 1, "1x2": 2, "2x1": 2, "1x4": 4, "2x2": 4}
"""Number of ranks of each mesh `replicate x context`."""

on_every_mesh = pytest.mark.parametrize("mesh", MESHES)

Found = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def found(run_on_ranks) -> Found:
    """What every rank of every mesh found."""
    reports = run_on_ranks("private_step.py", sorted(set(MESHES.values())))
    return {mesh: [report[mesh] for report in reports[ranks]] for mesh, ranks in MESHES.items()}


def values(found: Found, *path: str) -> Iterator[Any]:
    """Yield one finding of every rank of every mesh."""
    for ranks in found.values():
        for report in ranks:
            value: Any = report
            for name in path:
                value = value[name]
            yield value


@on_every_mesh
def test_clipped_sums_equal_the_per_sample_loop(found, mesh):
    for report in found[mesh]:
        errors = report["clipped sums"]
        words = [enumerate(case.split()) for case in errors]
        pairs = {pair for case in words for pair in combinations(case, 2)}
        assert len(pairs) == 24  # four choices of two values each
        for case, error in errors.items():
            assert error <= (1e-10 if case.endswith("float64") else 1e-5), case


@on_every_mesh
def test_groups_are_clipped_alike_on_every_mesh(found, mesh):
    for report in found[mesh]:
        assert max(report["choices"]["errors"].values()) <= 1e-10


def test_exact_sums_are_bitwise_the_same_for_one_replica_and_for_two(found):
    """With whole sequences on a rank, a record's gradient has the same bits wherever it is made."""
    digests = {r["choices"]["exact digest"] for mesh in ("1x1", "2x1") for r in found[mesh]}
    assert len(digests) == 1


def test_pitfall_18_adaptive_thresholds_are_equal_on_every_rank_and_mesh(found):
    first, *others = values(found, "choices", "thresholds")
    assert len(set(first.values())) > 1
    assert all(other == first for other in others)


@on_every_mesh
def test_pitfall_34_norms_of_aligned_parts_are_those_of_the_whole_record(found, mesh):
    """One token repeated: every rank's part of the gradient points the same way."""
    for report in found[mesh]:
        assert report["uneven"]["aligned parts"] == pytest.approx(1.0, abs=1e-10)
        naive = report["naive norm"]
        assert naive == pytest.approx(1.0) if mesh in ("1x1", "2x1") else abs(naive - 1) > 0.05


@pytest.mark.parametrize("mesh", ["2x1", "2x2"])
def test_pitfall_33_replicas_may_run_different_numbers_of_micro_batches(found, mesh):
    for report in found[mesh]:
        assert report["uneven"]["four and one"] <= 1e-10
        assert report["uneven"]["two and none"] <= 1e-10


@on_every_mesh
def test_pitfall_22_a_record_not_finite_on_one_rank_adds_nothing_on_any(found, mesh):
    assert all(report["uneven"]["not finite"] <= 1e-10 for report in found[mesh])


def test_pitfall_05_noise_is_bitwise_the_same_on_every_mesh(found):
    assert len(set(values(found, "noise", "digest"))) == 1


def test_pitfall_05_the_standard_deviation_of_the_noise_is_sigma_times_clip_norm(found):
    assert min(values(found, "noise", "draws")) >= 10**6
    for ratio in values(found, "noise", "std over sigma C"):
        assert ratio == pytest.approx(1.0, abs=0.01)


def test_pitfall_04_noise_of_shards_and_tensors_is_uncorrelated(found):
    """In units of one over the root of the sample size."""
    assert max(values(found, "noise", "correlation")) < 4


@pytest.mark.parametrize("mesh", ["2x1", "2x2"])
def test_pitfall_32_replicas_are_bitwise_equal_after_twenty_steps(found, mesh):
    digests: dict[int, set[str]] = {}
    for report in found[mesh]:
        context_rank = report["rank"][1]
        digests.setdefault(context_rank, set()).add(report["twenty steps"]["digest"])
    assert all(len(of_replicas) == 1 for of_replicas in digests.values())
    assert len(set().union(*digests.values())) == len(digests)


def test_pitfall_03_every_mesh_trains_on_the_same_draws_to_the_same_model(found):
    first, *others = values(found, "twenty steps")
    assert 0 in first["sizes"]
    for other in others:
        assert other["sizes"] == first["sizes"]
        assert other["parameters"] == pytest.approx(first["parameters"], rel=1e-9)


@on_every_mesh
def test_pitfall_02_an_empty_draw_is_a_step_with_noise(found, mesh):
    for report in found[mesh]:
        empty = report["empty draws"]
        assert empty["releases"]
        assert empty["empty"] > 150
        assert empty["std over sigma C"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("mesh", ["1x2", "1x4", "2x2"])
def test_pitfall_35_a_parameter_that_every_context_rank_holds_is_refused(found, mesh):
    for report in found[mesh]:
        assert "held whole by each of the" in report["refusals"]["unsharded"]
        assert "shard_model" in report["refusals"]["unsharded"]


@pytest.mark.parametrize("mesh", ["2x1", "2x2"])
def test_pitfall_32_replicas_that_would_part_are_refused(found, mesh):
    """By noise of their own, or by sums that nobody adds up."""
    for report in found[mesh]:
        assert "pass noise=GaussianNoise(key)" in report["refusals"]["own noise"]
        assert "reduction=veilspan.parallel.Replica" in report["refusals"]["no reduction"]


@pytest.mark.parametrize("mesh", ["1x2", "2x1", "1x4", "2x2"])
def test_pitfall_32_ranks_about_to_release_different_things_all_stop(found, mesh):
    for report in found[mesh]:
        assert report["parted"]["released"] == "0"
        for what, message in report["parted"].items():
            assert what == "released" or f"the same: they differ in {what}" in message


@pytest.mark.parametrize("mesh", ["2x1", "2x2"])
def test_pitfall_33_after_a_batch_that_failed_on_one_replica_alone_all_stop(found, mesh):
    """Else its next draw is released together with this one of the others: a record in both of
    them contributes twice."""
    for report in found[mesh]:
        message, released = report["failed alone"]
        assert "they differ in the batches that failed" in message
        assert released == "1"


@pytest.mark.parametrize("mesh", ["1x2", "1x4"])
def test_pitfall_18_ranks_of_a_sequence_draw_one_key_for_the_noise_on_thresholds(found, mesh):
    first, *others = (report["own thresholds"] for report in found[mesh])
    assert len(set(first)) > 1
    assert all(other == first for other in others)


def test_one_process_needs_neither_a_common_key_nor_a_reduction(found):
    for report in found["1x1"]:
        assert set(report["refusals"].values()) == {"nothing was raised"}


@pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reduce_scatter_unused_params"),
    reason="this torch reduces only the gradients that a rank has",
)
@on_every_mesh
def test_experts_that_only_some_ranks_reach_get_their_own_gradients(found, mesh):
    assert all(report["routed"] <= 1e-10 for report in found[mesh])


@pytest.mark.skipif(
    not hasattr(FSDPModule, "reset_iter_state"), reason="this torch cannot begin a pass again"
)
@on_every_mesh
def test_pitfall_17_nothing_is_left_of_a_pass_that_failed_on_all_ranks(found, mesh):
    for report in found[mesh]:
        assert max(report["after errors"].values()) <= 1e-10


@on_every_mesh
def test_a_step_may_be_built_after_a_forward_pass_alone(found, mesh):
    assert all(report["after a forward pass"]["error"] <= 1e-10 for report in found[mesh])


@on_every_mesh
def test_pitfall_11_a_parameter_that_is_frozen_later_is_called_so(found, mesh):
    for report in found[mesh]:
        assert "frozen or unfrozen after" in report["after a forward pass"]["frozen"]


@pytest.mark.parametrize("mesh", ["1x2", "1x4"])
def test_before_torch_2_13_such_experts_are_refused(found, mesh):
    for report in found[mesh]:
        assert "has a gradient on" in report["routed by an older torch"]


@on_every_mesh
def test_gradients_are_summed_record_by_record_whatever_fsdp_was_told(found, mesh):
    for report in found[mesh]:
        assert report["settings of others"]["error"] <= 1e-10
        assert report["settings of others"]["restored"]


@pytest.mark.parametrize("mesh", ["2x1", "2x2"])
def test_pitfall_35_a_model_split_over_ranks_with_other_records_is_refused(found, mesh):
    for report in found[mesh]:
        assert len(report["split over replicas"]) == 6
        for said in report["split over replicas"]:
            assert "it must be split along its first dimension over the" in said
