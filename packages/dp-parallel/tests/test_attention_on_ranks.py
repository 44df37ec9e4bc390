import pytest

from veilspan.parallel.attention import choose

TOLERANCE = {"torch.float64": 1e-12, "torch.float32": 1e-5}

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("ranks", [2, 4])
def test_attention_over_ranks_equals_dense_attention_in_outputs_and_gradients(reports, ranks):
    for errors in (report["attention"] for report in reports[ranks]):
        assert len(errors) == 98
        wrong = {
            case: error
            for case, error in errors.items()
            if not error <= TOLERANCE.get(case.split()[-1], 1e-12)
        }
        assert not wrong


@pytest.mark.parametrize(
    ("heads", "key_heads", "ranks", "chosen"),
    [(8, 8, 2, "ulysses"), (32, 8, 8, "ulysses"), (32, 8, 16, "allgather"), (6, 6, 4, "allgather")],
)
def test_auto_exchanges_heads_where_the_key_heads_divide(heads, key_heads, ranks, chosen):
    assert choose("auto", heads=heads, key_heads=key_heads, ranks=ranks) == chosen


def test_an_unknown_attention_is_refused():
    with pytest.raises(ValueError, match=r"attention is 'ring'.*ulysses"):
        choose("ring", heads=8, key_heads=8, ranks=2)  # pyright: ignore[reportArgumentType]
