"""A batch of whole sequences cut into the part that one rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from veilspan.parallel.layout import Layout


@dataclass(frozen=True, kw_only=True)
class ShardedBatch:
    """What one rank of the context axis needs of a batch. Shapes: B records, t = T/N tokens held.

    Attributes:
        input_ids: `[B, t]` int64.
        labels: `[B, t]` int64, already shifted: the token that follows each input token in the
            whole sequence, or the ignore index.
        position_ids: `[B, t]` int64, positions in the whole sequence.
        num_tokens_B: `[B]` int64, per record the number of trained tokens in the *whole* sequence,
            at least 1. Per-sample, therefore secret.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    num_tokens_B: Tensor


def shard_batch(
    input_ids: Tensor,
    labels: Tensor,
    layout: Layout,
    rank: int,
    *,
    ignore_index: int = -100,
    pad_id: int = 0,
) -> ShardedBatch:
    """Cut whole sequences into the part that `rank` holds.

    Labels are shifted before the cut, so the last token of a chunk is trained on the first token of
    the next one, which another rank holds. Sequences shorter than `layout.length` are filled on the
    right: under causal attention no real token sees the filling, and it carries no label.

    The sum over a record's local cross-entropies divided by `num_tokens_B`, summed over the ranks,
    is the record's mean loss. So every rank calls backward on its own share, and no collective is
    needed for the loss.

    Args:
        input_ids: Whole sequences, `[B, T']` int64 with T' ≤ `layout.length`.
        labels: `[B, T']` int64, *not* shifted (as Hugging Face expects them); `ignore_index` where
            a token is not trained on.
        layout: Who holds which positions.
        rank: Rank on the context axis.
        ignore_index: Label that means "not trained on".
        pad_id: Input token of the filling; its value changes nothing.

    Returns:
        The part of `rank`.

    Raises:
        ValueError: If the shapes are not `[B, T']` and equal, or T' exceeds `layout.length`.

    Examples:
        >>> import torch
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> part = shard_batch(ids, ids, Layout(length=4, ranks=2), rank=0)
        >>> part.labels.tolist(), part.num_tokens_B.tolist()
        ([[6, 7]], [3])
    """
    if input_ids.ndim != 2 or labels.shape != input_ids.shape:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)} and labels {tuple(labels.shape)}; "
            "both must be [records, tokens] and equal."
        )
    fill = layout.length - input_ids.shape[1]
    if fill < 0:
        raise ValueError(
            f"input_ids has {input_ids.shape[1]} tokens per record but layout.length is "
            f"{layout.length}; cut the records or build a longer layout."
        )
    next_labels = F.pad(labels[:, 1:], (0, fill + 1), value=ignore_index)
    num_tokens_B = (next_labels != ignore_index).sum(dim=1).clamp_min(1)
    positions = layout.positions(rank, input_ids.device)
    return ShardedBatch(
        input_ids=layout.take(F.pad(input_ids, (0, fill), value=pad_id), rank, dim=1),
        labels=layout.take(next_labels, rank, dim=1),
        position_ids=positions.expand(input_ids.shape[0], -1),
        num_tokens_B=num_tokens_B,
    )
