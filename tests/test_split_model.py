"""Clipping of a model that FSDP2 splits over ranks with different records, on 1, 2 and 4 ranks."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.distributed

on_every_world = pytest.mark.parametrize("ranks", [1, 2, 4])
on_several_ranks = pytest.mark.parametrize("ranks", [2, 4])

Found = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def found(run_on_ranks) -> Found:
    """What every rank of every world found."""
    return run_on_ranks("split_model.py", [1, 2, 4])


@on_every_world
def test_clipped_sums_equal_the_per_sample_loop(found, ranks):
    for report in found[ranks]:
        assert len(report["clipped sums"]) == 12
        for case, error in report["clipped sums"].items():
            assert error <= 1e-10, case


def test_exact_sums_and_noise_have_the_same_bits_on_every_number_of_ranks(found):
    reports = [report["digests"] for ranks in found.values() for report in ranks]
    assert len({report["exact"] for report in reports}) == 1
    assert len({report["noise"] for report in reports}) == 1


def test_rows_that_fill_a_micro_batch_are_not_counted_by_a_private_quantile(found):
    first, *others = (r["digests"]["thresholds"] for ranks in found.values() for r in ranks)
    assert len(set(first.values())) > 1
    assert all(other == pytest.approx(first, rel=1e-12) for other in others)


def test_every_number_of_ranks_trains_to_the_same_model(found):
    first, *others = (r["training"] for ranks in found.values() for r in ranks)
    assert 0 in first["sizes"]
    for other in others:
        assert other["sizes"] == first["sizes"]
        assert other["norms"] == pytest.approx(first["norms"], rel=1e-9)


@on_every_world
def test_bf16_arithmetic_is_summed_in_fp32_and_each_rank_holds_its_part(found, ranks):
    held = [report["memory"] for report in found[ranks]]
    assert sum(report["share"] for report in held) == pytest.approx(1.0)
    for report in held:
        assert report["dtypes"] == ["torch.float32"]
        assert report["error"] < 0.02


@on_every_world
def test_a_model_split_by_its_user_is_clipped_alike(found, ranks):
    assert all(report["by hand"] <= 1e-10 for report in found[ranks])


@on_several_ranks
def test_pitfall_33_different_numbers_of_micro_batches_stop_every_rank(found, ranks):
    for report in found[ranks]:
        assert "do not run the same micro-batches" in report["refusals"]["uneven"]
        assert report["refusals"]["released"] == "[]"


@on_several_ranks
def test_pitfall_35_what_cannot_be_summed_in_parts_is_refused(found, ranks):
    for report in found[ranks]:
        refusals = report["refusals"]
        for backward in ("single_sample", "per_sample", "two_pass"):
            assert f"backward is '{backward}'" in refusals[backward]
            assert "per_layer" in refusals[backward]
        assert "MultiheadAttention) runs its records one at a time" in refusals["records alone"]
        assert "reduction is None" in refusals["no reduction"]
        assert "float16" in refusals["narrow"]
        assert "several ranks share a sequence" in report["context"]


@on_several_ranks
def test_a_gradient_around_the_taps_is_refused_on_every_rank(found, ranks):
    for report in found[ranks]:
        assert "from outside of its module's forward" in report["refusals"]["stray"]
