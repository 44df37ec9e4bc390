import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veilspan.parallel import Layout, shard_batch

layouts = st.builds(
    lambda ranks, chunk, kind: Layout(length=2 * ranks * chunk, ranks=ranks, kind=kind),
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from(["contiguous", "zigzag"]),
)


def parts_of(input_ids, labels, layout, **options):
    return [shard_batch(input_ids, labels, layout, rank, **options) for rank in range(layout.ranks)]


@given(layouts, st.randoms(use_true_random=False))
def test_labels_are_those_of_the_next_token_of_the_whole_sequence(layout, random):
    length = random.randint(1, layout.length)
    ids = torch.tensor([[random.randint(1, 99) for _ in range(length)] for _ in range(2)])
    for part in parts_of(ids, ids, layout):
        for column, position in enumerate(part.position_ids[0].tolist()):
            follows = ids[:, position + 1] if position + 1 < length else torch.full((2,), -100)
            assert torch.equal(part.labels[:, column], follows)


@given(layouts)
def test_shifting_after_sharding_would_lose_one_label_per_cut(layout):
    ids = torch.arange(1, layout.length + 1)[None]
    trained = sum(int((part.labels != -100).sum()) for part in parts_of(ids, ids, layout))
    late = sum(len(layout.positions(rank)) - 1 for rank in range(layout.ranks))
    assert trained == layout.length - 1
    assert late == trained - (layout.ranks - 1)


@given(layouts, st.integers(0, 5))
def test_every_rank_knows_the_number_of_trained_tokens_of_the_whole_record(layout, masked):
    ids = torch.ones(3, layout.length, dtype=torch.int64)
    labels = ids.clone()
    labels[1, :masked] = -100
    labels[2] = -100
    parts = parts_of(ids, labels, layout)
    trained_B = torch.stack([(part.labels != -100).sum(1) for part in parts]).sum(0)
    for part in parts:
        assert torch.equal(part.num_tokens_B, trained_B.clamp_min(1))


def test_filling_on_the_right_changes_nothing_but_the_filling():
    ids = torch.arange(1, 6)[None]
    layout = Layout(length=8, ranks=2)
    whole = [shard_batch(ids, ids, layout, rank, pad_id=7) for rank in (0, 1)]
    assert torch.cat([part.input_ids for part in whole], 1).tolist() == [[1, 2, 3, 4, 5, 7, 7, 7]]
    assert torch.cat([part.labels for part in whole], 1).tolist() == [
        [2, 3, 4, 5, -100, -100, -100, -100]
    ]
    assert [part.num_tokens_B.item() for part in whole] == [4, 4]


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        (torch.zeros(9).long()[None], torch.zeros(9).long()[None], "9 tokens.*length is 8"),
        (torch.zeros(2, 8).long(), torch.zeros(1, 8).long(), r"\(2, 8\) and labels \(1, 8\)"),
        (torch.zeros(8).long(), torch.zeros(8).long(), "must be .records, tokens."),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(ids, labels, message):
    with pytest.raises(ValueError, match=message):
        shard_batch(ids, labels, Layout(length=8, ranks=2), 0)
