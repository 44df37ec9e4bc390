import pytest

from veilspan.parallel.support import TESTED_MODEL_TYPES

pytestmark = pytest.mark.distributed

FAMILIES = (
    "gemma",
    "gemma3",
    "gpt2",
    "llama",
    "llama tied",
    "mistral",
    "phi",
    "phi3",
    "qwen2",
    "qwen2 window",
    "qwen3",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_on_two_ranks_equal_one_process(reports, family):
    for errors in (report["families"] for report in reports[2]):
        mine = {case: error for case, error in errors.items() if case.startswith(f"{family}:")}
        assert len(mine) == (8 if family == "llama tied" else 4)
        assert max(mine.values()) <= 1e-10, mine


@pytest.mark.parametrize("family", ["llama tied", "mistral", "gpt2"])
def test_losses_and_gradients_on_four_ranks_equal_one_process(reports, family):
    for errors in (report["families"] for report in reports[4]):
        mine = {case: error for case, error in errors.items() if case.startswith(f"{family}:")}
        assert max(mine.values()) <= 1e-10, mine


def test_a_mistake_in_labels_positions_or_counts_would_be_seen(reports):
    errors = reports[2][0]["families"]
    controls = {k.removeprefix("control: "): v for k, v in errors.items() if k.startswith("contr")}
    assert controls.pop("nothing") <= 1e-10
    assert len(controls) == 3
    assert min(controls.values()) > 1e-4, controls


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_part_taken_for_a_whole_sequence_is_refused(reports, ranks):
    for said in (report["local views"] for report in reports[ranks]):
        assert "called outside of context_parallel" in said["outside"]
        assert "position_ids is missing" in said["positions"]
        assert "shifts them after the cut" in said["labels"]
        assert said["evaluation"] == said["right"] == "nothing was raised"
        assert said["evaluation with positions"] == "nothing was raised"


@pytest.mark.parametrize("ranks", [2, 4])
def test_documents_that_are_packed_into_a_row_are_refused(reports, ranks):
    """Hugging Face keeps them apart by their positions; the registered attention would not."""
    for said in (report["local views"] for report in reports[ranks]):
        assert "documents that are packed into a row" in said["packed"]
        assert "documents that are packed into a row" in said["packed evaluation"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_parameters_are_gathered_as_often_as_fsdp_alone_would(reports, ranks):
    """Each of two blocks for either pass, the embedding and head once for both."""
    assert {report["gathers"] for report in reports[ranks]} == {5}


def test_every_family_called_tested_is_tested():
    named = {family.split()[0] for family in FAMILIES} - {"gemma3"} | {"gemma3_text"}
    assert named == set(TESTED_MODEL_TYPES)
