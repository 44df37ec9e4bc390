"""Causal attention of one contiguous range of queries over its prefix, on one rank.

Shape letters: B records, H query heads, K key heads, D head width, R queries, S keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS = 512
"""Queries per call where a mask is needed; bounds the mask at `BLOCK_ROWS` × keys."""


def causal_attention(
    query_BHRD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attend from the last R of S positions to themselves and everything before them.

    No R × S mask is made. Where R = S and the window does not bite, PyTorch's own causal kernel
    runs in one call; otherwise queries go in blocks of `BLOCK_ROWS`, which share one mask of one
    block.

    Args:
        query_BHRD: Queries of the positions `S - R … S - 1`; H a multiple of K.
        key_BKSD: Keys of the positions `0 … S - 1`.
        value_BKSD: Values of the same positions; D may differ from the keys' width.
        scale: Factor of the scores; None means 1/√D.
        window: Number of positions a query sees, itself included; None means all.

    Returns:
        `[B, H, R, D]`.
    """
    rows, keys = query_BHRD.shape[2], key_BKSD.shape[2]
    bites = window is not None and window < keys
    if rows == keys and not bites:
        return _sdpa(query_BHRD, key_BKSD, value_BKSD, scale=scale, is_causal=True)
    block = min(rows, BLOCK_ROWS)
    before = keys - rows + (rows - 1) // block * block  # keys in front of the last block
    if window is not None and bites:
        before = min(before, window - 1)
    bias = _band(block, before, window, query_BHRD)
    outputs = []
    for first in range(0, rows, block):
        last = min(first + block, rows)
        position = keys - rows + first
        start, stop = max(0, position - before), keys - rows + last
        outputs.append(
            _sdpa(
                query_BHRD[:, :, first:last],
                key_BKSD[:, :, start:stop],
                value_BKSD[:, :, start:stop],
                scale=scale,
                bias=bias[: last - first, before - position + start : before + last - first],
            )
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _band(rows: int, before: int, window: int | None, like: Tensor) -> Tensor:
    """Return the additive mask `[rows, before + rows]` of the queries `before … before + rows - 1`.

    It depends on distances only, so one band serves every block of queries, and autograd saves
    views of it rather than one mask per block.
    """
    row = torch.arange(before, before + rows, device=like.device)[:, None]
    column = torch.arange(before + rows, device=like.device)[None, :]
    hidden = column > row
    if window is not None:
        hidden |= row - column >= window
    return like.new_zeros(rows, before + rows).masked_fill_(hidden, float("-inf"))


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None,
    bias: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    grouped = groups > 1 and bias is None
    if groups > 1 and not grouped:
        # On CUDA only the unfused kernel takes grouped heads together with a mask.
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )
