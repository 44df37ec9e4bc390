"""Poisson batches: their law, their addresses, and what they refuse."""

import itertools
import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, WeightedRandomSampler

from veilspan.core.noise import GaussianNoise
from veilspan.core.sampling import (
    Draw,
    _digit_thresholds,
    fixed_size_batches,
    poisson_batches,
    poisson_draw,
)
from veilspan.core.streams import AesCtr, derive, read_words

KEY = derive(bytes(range(32)), "tests of sampling", 0)
OTHER_KEY = derive(bytes(range(32)), "tests of sampling", 1)


def draws(num_records, probability, steps, *, key=KEY, first_step=0):
    return list(poisson_batches(num_records, probability, steps, key=key, first_step=first_step))


@cache
def membership(num_records, probability, steps, *, key=KEY):
    """Return who is in which draw, `[steps, num_records]` of 0 and 1."""
    table = np.zeros((steps, num_records), np.int64)
    for row, draw in zip(table, draws(num_records, probability, steps, key=key), strict=True):
        row[draw.records] = 1
    return table


RECORDS, STEPS = 32, 5000
PROBABILITIES = [0.02, 0.1, 0.5, 0.97]


@pytest.mark.parametrize("probability", PROBABILITIES)
def test_each_record_is_drawn_with_the_stated_probability(probability):
    counts = membership(RECORDS, probability, STEPS).sum(0)
    variance = STEPS * probability * (1 - probability)
    statistic = ((counts - STEPS * probability) ** 2).sum() / variance
    assert 1e-4 < stats.chi2.sf(statistic, df=RECORDS) < 1 - 1e-4


@pytest.mark.parametrize("probability", PROBABILITIES)
def test_pitfall_03_each_pair_of_records_is_drawn_together_as_if_independent(probability):
    table = membership(RECORDS, probability, STEPS)
    joint = (table.T @ table)[np.triu_indices(RECORDS, k=1)]
    p = probability**2
    score = (joint - STEPS * p) / (STEPS * p * (1 - p)) ** 0.5
    assert np.abs(score).max() < 4.5
    correlations = np.atleast_2d(np.corrcoef(table.T))[np.triu_indices(RECORDS, k=1)]
    assert abs((correlations**2).mean() * STEPS - 1) < 4.5 * (2 / len(joint)) ** 0.5


@pytest.mark.parametrize(
    ("num_records", "probability"), [*((RECORDS, p) for p in PROBABILITIES), (1000, 0.004)]
)
def test_batch_sizes_follow_the_binomial_law(num_records, probability):
    sizes = membership(num_records, probability, STEPS).sum(1)
    seen = np.bincount(sizes, minlength=num_records + 1)
    expected = STEPS * stats.binom.pmf(np.arange(num_records + 1), num_records, probability)
    usual = expected > 5  # the rest goes to one bin
    seen = np.array([*seen[usual], seen[~usual].sum()])
    expected = np.array([*expected[usual], expected[~usual].sum()])
    statistic = ((seen - expected) ** 2 / expected).sum()
    assert stats.chi2.sf(statistic, df=len(seen) - 1) > 1e-4


def test_steps_and_keys_give_independent_draws():
    table = membership(2000, 0.2, 40)
    other = membership(2000, 0.2, 40, key=OTHER_KEY)
    rows = np.corrcoef(np.concatenate([table, other])) - np.eye(80)
    assert np.abs(rows).max() < 5 / 2000**0.5


@settings(max_examples=60, deadline=None)
@given(
    probability=st.one_of(
        st.floats(1e-6, 0.999), st.sampled_from([1e-12, 0.5, 1 - 1e-12, 2.0**-1074])
    ),
    num_records=st.integers(1, 2**40 - 1),
)
def test_the_digits_of_a_gap_have_the_probabilities_of_the_geometric_law(probability, num_records):
    thresholds = [int(t) for t in _digit_thresholds(Fraction(probability), num_records)]
    stays = 1 - Fraction(probability)
    # P(gap = 0) is the product of P(digit = 0): it must be q, up to gaps beyond all records.
    zero = math.prod((Fraction(2**64 - t, 2**64) for t in thresholds), start=Fraction(1))
    assert abs(zero - Fraction(probability)) <= Fraction(len(thresholds) + 1, 2**64)
    assert len(thresholds) <= 41
    for digit, threshold in enumerate(thresholds[:6]):
        if digit == len(thresholds) - 1 and 2**digit >= num_records:
            break  # the last one stands for all longer gaps
        miss = stays ** (2**digit)
        assert abs(Fraction(threshold, 2**64) - miss / (1 + miss)) <= Fraction(1, 2**64)


class ScriptedWords:
    """Plays the given words, then the largest ones, whose digits are all 0."""

    name = "scripted"

    def __init__(self, gaps, thresholds):
        digits = len(thresholds) + len(thresholds) % 2
        self.rows = np.full((len(gaps), digits), -1, np.int64)
        for row, gap in zip(self.rows, gaps, strict=True):
            for digit in range(len(thresholds)):
                if gap >> digit & 1:
                    row[digit] = 0
        self.words = self.rows.reshape(-1, 2)

    def stream(self, subkey):
        return self

    def fill(self, blocks_N2, first_block):
        blocks_N2[:] = -1
        part = self.words[first_block : first_block + len(blocks_N2) - 1]
        blocks_N2[: len(part)] = part


def test_gaps_place_the_records_they_should(monkeypatch):
    thresholds = _digit_thresholds(Fraction(1, 10), 1000)
    source = ScriptedWords([3, 0, 0, 17, 511, 400], thresholds)
    monkeypatch.setattr("veilspan.core.sampling.AesCtr", lambda: source)
    records = poisson_draw(1000, 0.1, 0, KEY).records
    assert records[:5].tolist() == [3, 4, 5, 23, 535]
    assert records[5:].tolist() == list(range(936, 1000))  # gaps of 0 after the script


@settings(max_examples=30, deadline=None)
@given(
    num_records=st.integers(1, 3000),
    probability=st.floats(1e-4, 1.0),
    step=st.integers(0, 2**63 - 1),
)
def test_a_draw_is_sorted_without_repetition_and_in_range(num_records, probability, step):
    draw = poisson_draw(num_records, probability, step, KEY)
    assert draw.step == step
    assert draw.records.dtype == np.int64
    assert (np.diff(draw.records) > 0).all()
    assert all(0 <= r < num_records for r in draw.records[[0, -1]]) if len(draw) else True


def test_a_draw_that_is_printed_shows_no_record():
    draw = Draw(step=7, records=np.array([3, 12345], dtype=np.int64))
    assert repr(draw) == "Draw(step=7)"


def test_pitfall_03_a_draw_depends_on_key_and_step_alone():
    one_run = draws(5000, 0.01, 12)
    for first in (0, 1, 7, 12):
        resumed = draws(5000, 0.01, 12, first_step=first)
        assert [d.step for d in resumed] == list(range(first, 12))
        for fresh, old in zip(resumed, one_run[first:], strict=True):
            assert np.array_equal(fresh.records, old.records)
    assert np.array_equal(poisson_draw(5000, 0.01, 9, KEY).records, one_run[9].records)


def test_values_are_pinned():
    # A change here makes a resumed run draw other batches: bump the version, never the pin.
    expected = [
        59706997,
        138229155,
        197109481,
        226119119,
        253401538,
        355527298,
        377387946,
        439489707,
        685207011,
        691907075,
        743111131,
        958164472,
        991494398,
    ]
    assert poisson_draw(10**9, 1e-8, 3, KEY).records.tolist() == expected


class CountingWords:
    name = "counting"

    def __init__(self):
        self.blocks = 0

    def stream(self, subkey):
        self.inner = AesCtr().stream(subkey)
        return self

    def fill(self, blocks_N2, first_block):
        self.blocks += len(blocks_N2) - 1
        self.inner.fill(blocks_N2, first_block)


@pytest.mark.parametrize("num_records", [10**3, 10**6, 10**9, 10**12])
def test_work_grows_with_the_records_drawn_and_not_with_all_records(num_records, monkeypatch):
    counter = CountingWords()
    monkeypatch.setattr("veilspan.core.sampling.AesCtr", lambda: counter)
    steps = 50
    drawn = sum(len(draw) for draw in draws(num_records, 10 / num_records, steps))
    assert 380 < drawn < 620
    assert counter.blocks < 21 * (drawn + 20 * steps)  # 21 blocks hold the digits of any gap


def test_how_many_words_are_fetched_at_once_changes_no_draw(monkeypatch):
    expected = poisson_draw(30_000, 0.05, 2, KEY).records
    for gaps in (1, 7, 100):
        monkeypatch.setattr("veilspan.core.sampling._GAPS_AT_A_TIME", gaps)
        assert np.array_equal(poisson_draw(30_000, 0.05, 2, KEY).records, expected)


def test_probability_one_draws_every_record_every_time():
    for draw in draws(1000, 1, 3):
        assert np.array_equal(draw.records, np.arange(1000))


def test_a_probability_that_hardly_ever_draws_anything_ends():
    assert len(poisson_draw(2**40 - 1, 2.0**-1074, 0, KEY)) == 0


def test_pitfall_02_empty_draws_are_steps():
    # q N = 0.1
    run = draws(10, 0.01, 200)
    assert [draw.step for draw in run] == list(range(200))
    empty = [draw for draw in run if not len(draw)]
    assert 160 < len(empty) < 200
    assert all(draw.records.dtype == np.int64 for draw in empty)
    assert all(draw.share(rank, 3).records.shape == (0,) for draw in empty for rank in range(3))


def test_pitfall_31_an_empty_draw_has_no_placeholder_record():
    empty = Draw(step=0, records=np.array([], np.int64))
    assert list(empty.microbatches(4)) == []


@pytest.mark.parametrize(("records", "size"), [(5, 1), (6, 3), (5, 4), (4, 4)])
def test_every_set_of_a_fixed_size_is_as_likely_as_any_other(records, size):
    seen = {chosen: 0 for chosen in itertools.combinations(range(records), size)}
    for draw in fixed_size_batches(records, size, 4000, key=KEY):
        seen[tuple(draw.records.tolist())] += 1
    if len(seen) > 1:
        assert 1e-4 < stats.chisquare(list(seen.values())).pvalue < 1 - 1e-4


def test_fixed_size_draws_of_different_steps_and_keys_are_independent():
    table = np.zeros((80, 2000))
    for row, key in enumerate((KEY, OTHER_KEY)):
        for draw in fixed_size_batches(2000, 300, 40, key=key):
            table[row * 40 + draw.step, draw.records] = 1
    assert np.abs(np.corrcoef(table) - np.eye(80)).max() < 5 / 2000**0.5


@settings(max_examples=40, deadline=None)
@given(records=st.integers(1, 2**40 - 1), share=st.floats(0, 0.5), step=st.integers(0, 2**62))
def test_fixed_size_draws_are_the_first_different_ids_of_their_stream(records, share, step):
    size = max(1, min(int(share * records), 300))
    (draw,) = fixed_size_batches(records, size, step + 1, key=KEY, first_step=step)
    stream = AesCtr().stream(derive(KEY, "fixed-size sampling", step))
    chosen: set[int] = set()
    for block in itertools.count():  # word by word, as exact integers
        for word in read_words(stream, block, 1).reshape(-1).view(np.uint64).tolist():
            if word < 2**64 // records * records and len(chosen) < size:
                chosen.add(word % records)
        if len(chosen) == size or 2 * size > records:
            break
    if 2 * size <= records:
        assert draw.records.tolist() == sorted(chosen)
    assert len(draw) == size


def test_fixed_size_draws_continue_after_a_restart_and_may_hold_everything():
    whole = list(fixed_size_batches(50, 20, 6, key=KEY))
    rest = list(fixed_size_batches(50, 20, 6, key=KEY, first_step=4))
    assert [draw.step for draw in rest] == [4, 5]
    for old, new in zip(whole[4:], rest, strict=True):
        assert np.array_equal(old.records, new.records)
    assert not np.array_equal(whole[0].records, whole[1].records)
    for draw in fixed_size_batches(50, 50, 2, key=KEY):
        assert np.array_equal(draw.records, np.arange(50))


@pytest.mark.parametrize("size", [0, 51, 2.5, True])
def test_a_fixed_size_out_of_range_is_refused(size):
    with pytest.raises(ValueError, match="batch_size"):
        fixed_size_batches(50, size, 3, key=KEY)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_pitfall_03_shares_are_disjoint_complete_and_even_for_every_world_size(ranks):
    for draw in draws(500, 0.05, 20):
        shares = [draw.share(rank, ranks) for rank in range(ranks)]
        assert all(share.step == draw.step for share in shares)
        joined = np.sort(np.concatenate([share.records for share in shares]))
        assert np.array_equal(joined, draw.records)
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("rank", "ranks"), [(-1, 2), (2, 2), (0, 0), (0.5, 2)])
def test_a_share_that_does_not_exist_is_refused(rank, ranks):
    with pytest.raises(ValueError, match="rank"):
        Draw(step=0, records=np.arange(4)).share(rank, ranks)


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_microbatches_hold_each_record_once_in_order(size):
    draw = poisson_draw(1000, 0.03, 1, KEY)
    parts = list(draw.microbatches(size))
    assert np.array_equal(np.concatenate(parts), draw.records)
    assert all(len(part) == size for part in parts[:-1])
    torch.from_numpy(parts[0])  # torch warns of arrays that cannot be written


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 3, 50])
def test_pitfall_33_filled_microbatches_are_as_many_on_every_rank(ranks, size):
    for draw in [*draws(300, 0.03, 20), Draw(step=0, records=np.array([], np.int64))]:
        parts = [list(draw.filled_microbatches(size, rank, ranks)) for rank in range(ranks)]
        assert len({len(of_rank) for of_rank in parts}) == 1
        joined = [rows[real] for of_rank in parts for rows, real in of_rank]
        assert np.array_equal(np.sort(np.concatenate([*joined, []])), draw.records)
        assert all(rows.shape == real.shape == (size,) for p in parts for rows, real in p)
        assert (len(parts[0]) == 0) == (len(draw) == 0)


@pytest.mark.parametrize("size", [0, -1, 2.0, None])
def test_a_microbatch_size_out_of_range_is_refused(size):
    with pytest.raises(ValueError, match="size"):
        Draw(step=0, records=np.arange(4)).microbatches(size)


def test_a_draw_cannot_be_changed():
    ids = np.arange(4)
    draw = Draw(step=0, records=ids)
    with pytest.raises(ValueError, match="read-only"):
        draw.records[0] = 9
    with pytest.raises(AttributeError):
        draw.step = 2  # pyright: ignore[reportAttributeAccessIssue]
    ids[0] = 0  # the caller's own array stays writable


@pytest.mark.parametrize("records", [[1, 1], [2, 1], [-1, 3], [[0, 1]], [0.0, 1.0], [0, 5, 5, 9]])
def test_pitfall_30_a_draw_that_repeats_a_record_is_refused(records):
    with pytest.raises(ValueError, match="records"):
        Draw(step=0, records=np.array(records))


DATA = list(range(8))


@pytest.mark.parametrize(
    "loader",
    [
        DATA,
        torch.arange(8),
        DataLoader(DATA, batch_size=2, shuffle=True),  # pyright: ignore[reportArgumentType]
        RandomSampler(DATA),
        DistributedSampler(DATA, num_replicas=2, rank=0, drop_last=True),  # pyright: ignore[reportArgumentType]
    ],
)
def test_pitfall_01_loaders_samplers_and_datasets_are_refused_in_place_of_a_count(loader):
    with pytest.raises(ValueError, match=r"num_records.*number of records"):
        poisson_batches(loader, 0.1, 3, key=KEY)


def test_pitfall_29_a_weighted_sampler_is_refused():
    sampler = WeightedRandomSampler([0.1, 0.9], num_samples=2)
    with pytest.raises(ValueError, match=r"WeightedRandomSampler.*Poisson"):
        poisson_batches(sampler, 0.1, 3, key=KEY)  # pyright: ignore[reportArgumentType]


def test_pitfall_27_a_draw_offers_no_normaliser_that_depends_on_the_data():
    draw = poisson_draw(100, 0.1, 0, KEY)
    assert {name for name in vars(draw)} == {"step", "records"}


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 2000))
def test_pitfall_28_steps_and_probability_are_taken_as_given(n):
    assert len(draws(3, 1 / n, min(n, 99))) == min(n, 99)
    assert len(draws(3, Fraction(1, n), min(n, 99))) == min(n, 99)
    exact = _digit_thresholds(Fraction(1, n), 2**40 - 1)
    miss = 1 - Fraction(1, n)
    if n > 1:
        assert int(exact[0]) == int(miss / (1 + miss) * 2**64)


@pytest.mark.parametrize("value", [0, -1, 2**40, 2.5, True, "12"])
def test_a_number_of_records_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match="num_records"):
        poisson_batches(value, 0.1, 3, key=KEY)


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.0001, 64, math.nan, math.inf, None, "0.1", True])
def test_a_probability_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match="sampling_probability"):
        poisson_batches(10, value, 3, key=KEY)


@pytest.mark.parametrize(("steps", "first_step"), [(-1, 0), (2, 3), (2.0, 0), (5, -1)])
def test_steps_out_of_range_are_refused(steps, first_step):
    with pytest.raises(ValueError, match="step"):
        poisson_batches(10, 0.1, steps, key=KEY, first_step=first_step)


@pytest.mark.parametrize("key", [b"", bytes(32), b"short", b"0" * 32, 42, bytes(range(31))])
def test_pitfall_51_weak_keys_are_refused_at_the_call(key):
    with pytest.raises(ValueError, match="key"):
        poisson_batches(10, 0.1, 3, key=key)


def test_one_key_may_serve_sampling_and_noise():
    # Records drawn and sizes of the noise of the same step must not go together.
    table = membership(400, 0.5, 500)
    noise = np.empty((500, 400))
    for step in range(500):
        row = torch.zeros(400, dtype=torch.float64)
        GaussianNoise(KEY).add_(row, stddev=1.0, step=step, name="", offset=0)
        noise[step] = row.abs().numpy()
    assert abs(np.corrcoef(table.ravel(), noise.ravel())[0, 1]) < 4.5 / 200_000**0.5


def test_draws_come_one_at_a_time():
    endless = poisson_batches(10**9, 1e-8, 2**62, key=KEY)
    assert [draw.step for draw in itertools.islice(endless, 3)] == [0, 1, 2]
