"""Protected units: each one becomes exactly one token sequence."""

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
    """Units of privacy, numbered 0 to N-1, tokenized when they are asked for.

    Guarantee:
        A row belongs to exactly one unit and a unit yields exactly one sequence, so clipping one
        sequence bounds everything its unit can contribute. What lies beyond `sequence_length`
        tokens is not used. A unit without any text yields an empty sequence, which contributes
        exactly zero; it still counts in N, which is treated as public.

    Args:
        rows: Texts on disk.
        tokenizer: Hugging Face tokenizer.
        sequence_length: Most tokens of one unit.
        units: Which rows belong to which unit.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sequence_length: int,
        units: Units,
    ) -> None:
        self._rows = rows
        self._tokenizer = tokenizer
        self._units = units
        self.sequence_length = sequence_length
        self._characters = sequence_length * _characters_per_token(tokenizer)
        self._prefix, self._end = _ends(tokenizer)

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, unit: int) -> NDArray[np.int32]:
        """Return the tokens of one unit, at most `sequence_length`, as int32 `[T]`."""
        if not 0 <= unit < len(self):
            raise IndexError(f"unit is {unit}; there are {len(self)}.")
        rows = self._units.rows_of(unit)
        texts = (self._rows.text(int(row), self._characters) for row in rows)
        return np.asarray(self._tokens(texts), dtype=np.int32)

    def _tokens(self, texts: Iterable[str]) -> list[int]:
        """Join texts as prefix, text, end, text, end, … and cut them to length."""
        tokens: list[int] = []
        for text in filter(None, texts):
            tokens += [] if tokens else self._prefix
            tokens += self._tokenizer(
                text,
                add_special_tokens=False,
                split_special_tokens=True,  # text that spells a special token stays text
                truncation=True,
                max_length=self.sequence_length,
            )["input_ids"]
            if len(tokens) >= self.sequence_length:
                break
            tokens += self._end
        return tokens[: self.sequence_length]


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
