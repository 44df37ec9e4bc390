import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veilspan.parallel import Layout

kinds = st.sampled_from(["contiguous", "zigzag"])


@st.composite
def layouts(draw) -> Layout:
    ranks, kind = draw(st.integers(1, 9)), draw(kinds)
    length = Layout.padded_length(draw(st.integers(1, 300)), ranks, kind)
    return Layout(length=length, ranks=ranks, kind=kind)


@given(layouts())
def test_every_position_belongs_to_exactly_one_rank(layout):
    held = torch.cat([layout.positions(rank) for rank in range(layout.ranks)])
    assert held.sort().values.tolist() == list(range(layout.length))


@given(layouts())
def test_every_rank_holds_the_same_number_of_tokens(layout):
    held = {len(layout.positions(rank)) for rank in range(layout.ranks)}
    assert held == {layout.tokens_per_rank}


@given(layouts())
def test_taking_the_parts_gives_the_positions(layout):
    whole = torch.arange(layout.length).repeat(2, 1)
    for rank in range(layout.ranks):
        part = layout.take(whole, rank, dim=1)
        assert torch.equal(part, layout.positions(rank).expand(2, -1))


@given(layouts())
def test_global_order_undoes_rank_major_order(layout):
    held = torch.cat([layout.positions(rank) for rank in range(layout.ranks)])
    assert torch.equal(layout.to_global(held, 0), torch.arange(layout.length))
    assert torch.equal(layout.to_rank_major(torch.arange(layout.length), 0), held)


@given(st.integers(1, 8), st.integers(1, 20))
def test_zigzag_gives_every_rank_the_same_number_of_causal_pairs(ranks, chunk):
    layout = Layout(length=2 * ranks * chunk, ranks=ranks, kind="zigzag")
    assert len({int((layout.positions(rank) + 1).sum()) for rank in range(ranks)}) == 1


@given(st.integers(1, 5000), st.integers(1, 9), kinds)
def test_padded_length_is_the_smallest_that_fits(length, ranks, kind):
    padded = Layout.padded_length(length, ranks, kind)
    Layout(length=padded, ranks=ranks, kind=kind)
    for shorter in range(length, padded):
        with pytest.raises(ValueError, match="multiple of"):
            Layout(length=shorter, ranks=ranks, kind=kind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 10, "ranks": 4}, "length is 10.*multiple of 4: pad to 12"),
        ({"length": 12, "ranks": 4, "kind": "zigzag"}, "multiple of 8: pad to 16"),
        ({"length": 0, "ranks": 1}, "length is 0"),
        ({"length": 4, "ranks": 0}, "ranks is 0"),
        ({"length": 4, "ranks": 2, "kind": "ring"}, "kind is 'ring'.*contiguous.*zigzag"),
    ],
)
def test_an_impossible_layout_names_the_value_and_the_way_out(options, message):
    with pytest.raises(ValueError, match=message):
        Layout(**options)


def test_an_unknown_rank_is_refused():
    with pytest.raises(ValueError, match=r"rank is 2.*0 to 1"):
        Layout(length=4, ranks=2).positions(2)
