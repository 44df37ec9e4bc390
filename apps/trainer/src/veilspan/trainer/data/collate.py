"""Units padded to a common length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from veilspan.trainer.data.records import Records

IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token ids and labels of some units; labels are not yet shifted.

    Attributes:
        input_ids: Tokens, padded at the end, `[B, T]` int64.
        labels: The same tokens; -100 where there is padding, `[B, T]` int64.
    """

    input_ids: Tensor
    labels: Tensor


def collate(
    records: Records, units: Iterable[int], *, pad_token_id: int = 0, multiple_of: int = 1
) -> Batch:
    """Return units in the given order, padded to the longest of them.

    Units are never sorted or grouped by length: which units meet in a batch is decided by the
    sampler alone.

    Guarantee:
        Padding has no label and stands after every token, so a causal model computes the same
        losses whatever `pad_token_id` is.

    Args:
        records: Source of the units.
        units: Numbers of the units, each below `len(records)`; at least one.
        pad_token_id: Token to pad with; any token the model knows.
        multiple_of: Round the length up to a multiple of this.

    Raises:
        ValueError: If `units` is empty.
    """
    sequences = [records[int(unit)] for unit in units]
    if not sequences:
        raise ValueError("units is empty; a batch needs at least one unit.")
    longest = max(1, *(len(sequence) for sequence in sequences))
    length = -(-longest // multiple_of) * multiple_of
    input_ids = torch.full((len(sequences), length), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(sequences), length), IGNORE_INDEX, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        tokens = torch.from_numpy(sequence).long()
        input_ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = tokens
    return Batch(input_ids=input_ids, labels=labels)
