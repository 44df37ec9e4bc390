"""Protected units: each one becomes a fixed number of token sequences, mostly one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from veilspan.trainer.data.rows import Rows

MAX_CHARACTERS_PER_TOKEN = 32
"""Bounds the work on one huge row: text is cut to this many characters per wanted token first.

Where a vocabulary has longer tokens, as for long runs of blanks, a sequence may so end early.
"""


@final
@dataclass(frozen=True, kw_only=True)
class Units:
    """Which rows belong to which unit, in constant memory where every row is a unit.

    Attributes:
        rows: Row numbers, unit after unit.
        starts: Where each unit starts in `rows`, and one more entry for the end of the last.
    """

    rows: Sequence[int] | NDArray[np.int64]
    starts: Sequence[int] | NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def rows_of(self, unit: int) -> Sequence[int] | NDArray[np.int64]:
        """Return the row numbers of one unit."""
        return self.rows[int(self.starts[unit]) : int(self.starts[unit + 1])]

    def first(self, count: int | None) -> Units:
        """Return the first `count` units, or all of them."""
        return self if count is None else Units(rows=self.rows, starts=self.starts[: count + 1])


@final
class Records:
    """Sequences of the units of privacy, tokenized when they are asked for.

    The k sequences of unit u have the numbers u·k to u·k + k - 1: one after the other, they are the
    first k · `sequence_length` tokens of the unit.

    Guarantee:
        A row belongs to exactly one unit and a unit yields exactly k sequences, so clipping each of
        them bounds everything their unit can contribute. What lies beyond is not used. A sequence
        that its unit's text does not reach is empty and contributes exactly zero; it still counts,
        so that the number of sequences says nothing but the number of units N, which is treated as
        public.

    Args:
        rows: Texts on disk.
        tokenizer: Hugging Face tokenizer.
        sequence_length: Most tokens of one sequence.
        units: Which rows belong to which unit.
        sequences_per_unit: Sequences k of each unit.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sequence_length: int,
        units: Units,
        sequences_per_unit: int = 1,
    ) -> None:
        self._rows = rows
        self._tokenizer = tokenizer
        self._units = units
        self.sequence_length, self._each = sequence_length, sequences_per_unit
        self._characters = self._each * sequence_length * _characters_per_token(tokenizer)
        self._prefix, self._end = _ends(tokenizer)

    def __len__(self) -> int:
        return self.num_units * self._each

    @property
    def num_units(self) -> int:
        """Return the public number of units N."""
        return len(self._units)

    def __getitem__(self, number: int) -> NDArray[np.int32]:
        """Return the tokens of one sequence, at most `sequence_length`, as int32 `[T]`."""
        if not 0 <= number < len(self):
            raise IndexError(f"number is {number}; there are {len(self)} sequences.")
        unit, place = divmod(number, self._each)
        rows = self._units.rows_of(unit)
        texts = (self._rows.text(int(row), self._characters) for row in rows)
        start, end = (self.sequence_length * edge for edge in (place, place + 1))
        return np.asarray(self._tokens(texts, end)[start:], dtype=np.int32)

    def _tokens(self, texts: Iterable[str], most: int) -> list[int]:
        """Join texts as prefix, text, end, text, end, … and cut them to length."""
        tokens: list[int] = []
        for text in filter(None, texts):
            tokens += [] if tokens else self._prefix
            tokens += self._tokenizer(
                text,
                add_special_tokens=False,
                split_special_tokens=True,  # text that spells a special token stays text
                verbose=False,  # no note that a text is long: its length is private
            )["input_ids"]
            if len(tokens) >= most:
                break
            tokens += self._end
        return tokens[:most]


def one_unit_per_row(rows: Sequence[int]) -> Units:
    """Return a unit for each of the given rows."""
    return Units(rows=rows, starts=range(len(rows) + 1))


def one_unit_per_user(users: Sequence[str]) -> Units:
    """Return one unit per user, in the order of the users' names; rows keep their order."""
    names = np.asarray(users, dtype=object)
    order = np.argsort(names, kind="stable").astype(np.int64)
    new = np.flatnonzero(names[order][1:] != names[order][:-1]) + 1
    edges = [[0], new, [len(users)]] if users else [[0]]
    return Units(rows=order, starts=np.concatenate(edges).astype(np.int64))


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return what stands before a unit (where the tokenizer's template has it) and after a text."""
    template: Any = tokenizer("")["input_ids"]
    begin: Any = [tokenizer.bos_token_id]
    end: Any = [tokenizer.eos_token_id]
    return begin if template[:1] == begin else [], [] if end == [None] else end


def _characters_per_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the length of the longest token, bounded."""
    special = set(tokenizer.all_special_tokens)
    lengths = (len(token) for token in tokenizer.get_vocab() if token not in special)
    return min(MAX_CHARACTERS_PER_TOKEN, max(lengths, default=1))
