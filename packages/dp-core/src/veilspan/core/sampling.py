"""Random batches as a function of (key, step): no sampler state, no pass over the records."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import final

import numpy as np
from numpy.typing import NDArray

from veilspan.core.streams import AesCtr, WordSource, check_count, check_key, derive, read_words

_MOST_RECORDS = 2**40
_GAPS_AT_A_TIME = 2**16
_DIGITS = 120  # decimal digits while thresholds are computed; they need 20


@dataclass(frozen=True, eq=False)
class Draw:
    """The records of one logical batch.

    Args:
        step: Step of the run, at least 0.
        records: Record ids, int64, strictly increasing; none for an empty draw, which is a step
            like any other. Kept read-only.

    Raises:
        ValueError: If `records` is not sorted, repeats an id or holds a negative one: a record that
            is in a batch twice contributes twice its clipped gradient.
    """

    step: int
    records: NDArray[np.int64] = field(repr=False)  # who takes part is secret

    def __post_init__(self) -> None:
        check_count("step", self.step, least=0)
        records = np.asarray(self.records)
        if records.ndim != 1 or records.dtype != np.int64:
            raise ValueError(
                f"records has shape {records.shape} and dtype {records.dtype}; "
                "it must be one row of int64 ids."
            )
        if records.size and (records[0] < 0 or bool(np.any(np.diff(records) <= 0))):
            raise ValueError(
                "records must be increasing ids ≥ 0 without repetition: a record takes part in a "
                "draw at most once. Take draws from poisson_batches, not from a padded sampler."
            )
        view = records.view()
        view.flags.writeable = False
        object.__setattr__(self, "records", view)

    def __len__(self) -> int:
        """Return the number of records: private, never a divisor of the gradient."""
        return len(self.records)

    def microbatches(self, size: int) -> Iterator[NDArray[np.int64]]:
        """Yield the records in order, `size` at a time, the rest last; nothing if empty."""
        size = check_count("size", size, least=1)
        return (self.records[i : i + size].copy() for i in range(0, len(self), size))

    def filled_microbatches(
        self, size: int, rank: int, ranks: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        """Yield the micro-batches of one rank: as many on every rank, each of `size` rows.

        For ranks that must run alike, as FSDP demands of those that split a model, and for
        compiled code that wants one shape.

        Args:
            size: Rows of a micro-batch.
            rank: Index of the rank, 0 … ranks - 1.
            ranks: Number of ranks; together they hold each record exactly once.

        Yields:
            Record ids, int64, `[size]`, with whether each is a record of this rank's share: rows
            where it is not hold record 0 to fill the batch. Hand the flags to
            `PrivateStep.backward`.
        """
        size = check_count("size", size, least=1)
        mine = self.share(rank, ranks).records
        longest = -(-len(self) // ranks)
        for begin in range(0, longest, size):
            part = mine[begin : begin + size]
            rows = np.zeros(size, dtype=np.int64)
            rows[: len(part)] = part
            yield rows, np.arange(size) < len(part)

    def share(self, rank: int, ranks: int) -> Draw:
        """Return the part of replica `rank`: every `ranks`-th record, sizes within one.

        Args:
            rank: Index of the replica, 0 … ranks - 1.
            ranks: Number of replicas; together they hold each record exactly once.
        """
        ranks = check_count("ranks", ranks, least=1)
        rank = check_count("rank", rank, least=0, below=ranks)
        return Draw(step=self.step, records=self.records[rank::ranks])


def poisson_batches(
    num_records: int,
    sampling_probability: float | Fraction,
    steps: int,
    *,
    key: bytes,
    first_step: int = 0,
) -> Iterator[Draw]:
    """Yield the draws `first_step … steps - 1` of a run.

    Every rank makes the same draws and takes its own part with `Draw.share`. A run that is
    restarted with the same key and `first_step` continues with the draws that it would have made.
    A step that may have been released before must not be drawn again under that key: two releases
    of one draw cost more ε than accountants count for two steps. Restart with a new key then.

    Args:
        num_records: Number of records, 1 … 2⁴⁰ - 1.
        sampling_probability: Probability q of each record in each step, in (0, 1]; a `Fraction` is
            taken exactly. At 1 every draw holds every record.
        steps: Steps of the whole plan, those before `first_step` included; never derived from the
            data.
        key: 32 secret bytes from `new_key()`. May be the key of the noise: streams are separate.
        first_step: First step to draw.

    Yields:
        One `Draw` per step, empty ones included.

    Raises:
        ValueError: At the call, if a number is out of range, the key is no random 32 bytes, or a
            data loader or sampler is passed for `num_records`.

    Guarantee:
        Each record is in each draw with probability q, independently of all else (add/remove
        adjacency: the law does not depend on which records exist). See `poisson_draw` for how
        precisely.

    Examples:
        >>> from veilspan.core.noise import new_key
        >>> draws = list(poisson_batches(10**9, 1e-8, 3, key=new_key()))
        >>> [draw.step for draw in draws]
        [0, 1, 2]
    """
    sampler = _GapSampler(num_records, sampling_probability, key)
    first_step = check_count("first_step", first_step, least=0)
    steps = check_count("steps", steps, least=first_step)
    return (sampler.draw(step) for step in range(first_step, steps))


def fixed_size_batches(
    num_records: int, batch_size: int, steps: int, *, key: bytes, first_step: int = 0
) -> Iterator[Draw]:
    """Yield the draws `first_step … steps - 1` of a run, each of `batch_size` records.

    For code that cannot take batches of varying size. At the same noise this costs more ε than
    `poisson_batches`, much more where the noise is small, and hides only a record's exchange for
    another: plan it with `sampling="without_replacement"`, `relation="replace"` and a sampling
    probability of `batch_size / num_records`.

    Args:
        num_records: Number of records, 1 … 2⁴⁰ - 1; public.
        batch_size: Records in every draw, 1 … num_records.
        steps: As for `poisson_batches`.
        key: As for `poisson_batches`.
        first_step: As for `poisson_batches`.

    Yields:
        One `Draw` per step.

    Raises:
        ValueError: As `poisson_batches`, and if `batch_size` is out of range.

    Guarantee:
        Every set of `batch_size` records is as likely as any other, independently of all other
        draws, given ideal words; these are AES-256-CTR.

    Examples:
        >>> from veilspan.core.noise import new_key
        >>> [len(draw) for draw in fixed_size_batches(10**9, 5, 3, key=new_key())]
        [5, 5, 5]
    """
    num_records = _check_num_records(num_records)
    batch_size = check_count("batch_size", batch_size, least=1, below=num_records + 1)
    first_step = check_count("first_step", first_step, least=0)
    steps = check_count("steps", steps, least=first_step)
    key = check_key(key)
    return (
        Draw(step=step, records=_uniform_set(num_records, batch_size, step, key))
        for step in range(first_step, steps)
    )


def _uniform_set(num_records: int, size: int, step: int, key: bytes) -> NDArray[np.int64]:
    """Return the first `size` different ids of a stream of uniform ones, in increasing order."""
    if 2 * size > num_records:  # far fewer ids have to be drawn for those that stay out
        out = _uniform_set(num_records, num_records - size, step, key)
        return np.delete(np.arange(num_records, dtype=np.int64), out)
    stream = AesCtr().stream(derive(key, "fixed-size sampling", step))
    unbiased = 2**64 - 2**64 % num_records  # words from here on would favour small ids
    ids = np.empty(0, dtype=np.int64)
    next_block = 0
    while len(ids) < size:
        blocks = read_words(stream, next_block, (size - len(ids)) * 3 // 4 + 8)
        next_block += len(blocks)
        words = blocks.reshape(-1).view(np.uint64)
        words = words[words <= np.uint64(unbiased - 1)] % np.uint64(num_records)
        ids = np.concatenate([ids, words.astype(np.int64)])
        ids = ids[np.sort(np.unique(ids, return_index=True)[1])]
    return np.sort(ids[:size])


def poisson_draw(
    num_records: int, sampling_probability: float | Fraction, step: int, key: bytes
) -> Draw:
    """Return the draw of one step; arguments and errors as in `poisson_batches`.

    The gap G before the next drawn record is geometric, P(G = g) = q(1-q)^g, which factors over the
    binary digits of g: digit j is 1 with probability r/(1+r), r = (1-q)^(2^j), independently of the
    other digits. Each digit compares one 64-bit word with a threshold: no floating-point number
    stands between the key and the draw, which is the same on every machine. Work and memory grow
    with the records drawn (times the digits of a gap), not with `num_records`.

    Guarantee:
        A gap's law is within total variation 2⁻⁵⁷ of the geometric law, a draw's within 2⁻⁵⁷ times
        one more than the number of records in it, given ideal words; these are AES-256-CTR.

    Source: independent digits, e.g. Bringmann and Friedrich (2013),
    https://doi.org/10.1007/978-3-642-39206-1_23.
    """
    return _GapSampler(num_records, sampling_probability, key).draw(step)


@final
class _GapSampler:
    def __init__(
        self, num_records: int, sampling_probability: float | Fraction, key: bytes
    ) -> None:
        self._num_records = _check_num_records(num_records)
        self._probability = _check_probability(sampling_probability)
        self._key = check_key(key)
        self._thresholds = _digit_thresholds(self._probability, self._num_records)
        self._source: WordSource = AesCtr()

    def draw(self, step: int) -> Draw:
        step = check_count("step", step, least=0)
        if not len(self._thresholds):
            return Draw(step=step, records=np.arange(self._num_records, dtype=np.int64))
        stream = self._source.stream(derive(self._key, "poisson sampling", step))
        blocks_per_gap = (len(self._thresholds) + 1) // 2
        parts: list[NDArray[np.int64]] = []
        next_record = next_block = 0
        while next_record < self._num_records:
            gaps = self._gaps_wanted(self._num_records - next_record)
            blocks = read_words(stream, next_block, gaps * blocks_per_gap)
            next_block += len(blocks)
            records = next_record + np.cumsum(self._gaps(blocks.reshape(gaps, -1)) + 1) - 1
            next_record = int(records[-1]) + 1
            parts.append(records[: np.searchsorted(records, self._num_records)])
        return Draw(step=step, records=np.concatenate(parts))

    def _gaps_wanted(self, records_left: int) -> int:
        """Return how many gaps most likely pass the last record; the value changes no draw."""
        expected = records_left * float(self._probability)
        return min(int(expected + 4 * math.sqrt(expected)) + 4, _GAPS_AT_A_TIME)

    def _gaps(self, words_per_gap: NDArray[np.int64]) -> NDArray[np.int64]:
        digits = words_per_gap.view(np.uint64)[:, : len(self._thresholds)] < self._thresholds
        return digits @ (np.int64(1) << np.arange(len(self._thresholds), dtype=np.int64))


def _digit_thresholds(probability: Fraction, num_records: int) -> NDArray[np.uint64]:
    """Return 2⁶⁴·P(digit j = 1), uint64, up to the last digit that can matter.

    Digits stop where their probability rounds to 0, or at the first gap that passes every record:
    there the last threshold is that of the event "this gap or a longer one".
    """
    scale = Decimal(2**64)
    thresholds: list[int] = []
    with localcontext() as context:
        context.prec = _DIGITS
        miss = 1 - Decimal(probability.numerator) / Decimal(probability.denominator)
        while int(miss * scale):
            if 1 << len(thresholds) >= num_records:
                thresholds.append(min(int(miss * scale), 2**64 - 1))
                break
            thresholds.append(int(miss / (1 + miss) * scale))
            miss *= miss
    return np.array(thresholds, dtype=np.uint64)


def _check_num_records(num_records: int) -> int:
    if hasattr(num_records, "__iter__"):
        raise ValueError(
            f"num_records is a {type(num_records).__name__}; it must be the number of records. A "
            "data loader or sampler (shuffled, weighted, distributed, drop_last) does not draw "
            "Poisson batches, and ε would be false: pass len(dataset), and read the records of "
            "each draw from the dataset by index."
        )
    return check_count("num_records", num_records, least=1, below=_MOST_RECORDS)


def _check_probability(sampling_probability: float | Fraction) -> Fraction:
    try:
        exact = Fraction(sampling_probability)
    except (TypeError, ValueError, OverflowError):
        exact = Fraction(0)
    if isinstance(sampling_probability, bool | str) or not 0 < exact <= 1:
        raise ValueError(
            f"sampling_probability is {sampling_probability!r}; it must be above 0 and at most 1. "
            "From an expected batch size it is expected_batch_size / num_records."
        )
    return exact
