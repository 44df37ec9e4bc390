"""Differentiable exchanges of attention operands between the ranks of the context axis.

Shape letters: B records, H heads, h heads per rank, T tokens of the sequence, t tokens per rank,
D head width, N ranks. Tensors with all T tokens are in global order.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from veilspan.parallel.layout import Layout


def heads_from_tokens(x_BHtD: Tensor, layout: Layout, group: dist.ProcessGroup) -> Tensor:
    """Trade tokens for heads: from all heads of my tokens to all tokens of my heads.

    Args:
        x_BHtD: All H heads of the tokens held here; H divisible by N.
        layout: Who holds which tokens.
        group: The N ranks.

    Returns:
        `[B, h, T, D]`, heads `rank·h … (rank+1)·h - 1`, tokens in global order.
    """
    return cast(Tensor, _Exchange.apply(x_BHtD, layout, group, True))


def tokens_from_heads(x_BhTD: Tensor, layout: Layout, group: dist.ProcessGroup) -> Tensor:
    """Trade heads for tokens: the inverse of `heads_from_tokens`."""
    return cast(Tensor, _Exchange.apply(x_BhTD, layout, group, False))


def gather_tokens(x_BHtD: Tensor, layout: Layout, group: dist.ProcessGroup) -> Tensor:
    """Collect the tokens of all ranks, `[B, H, T, D]` in global order.

    The backward pass adds up the ranks' gradients and keeps the tokens held here.
    """
    return cast(Tensor, _Gather.apply(x_BHtD, layout, group))


class _Exchange(torch.autograd.Function):
    """All-to-all between tokens and heads: a permutation, so its transpose is its inverse."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layout: Layout, group: dist.ProcessGroup, to_heads: bool
    ) -> Tensor:
        ctx.args = (layout, group, to_heads)
        return _to_heads(x, layout, group) if to_heads else _to_tokens(x, layout, group)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None, None]:
        layout, group, to_heads = ctx.args
        back = _to_tokens if to_heads else _to_heads
        return back(grads[0], layout, group), None, None, None


class _Gather(torch.autograd.Function):
    """All-gather of tokens; the transpose is a reduce-scatter with plain sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, group: dist.ProcessGroup) -> Tensor:
        ctx.args = (layout, group)
        return layout.to_global(_join_tokens(_all_gather(x, group)), dim=2)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None]:
        layout, group = ctx.args
        parts = _split_tokens(layout.to_rank_major(grads[0], dim=2), layout.ranks)
        # Half-precision partial sums would lose bits in every addition over the ranks.
        wide = parts.float() if parts.element_size() < 4 else parts
        return _reduce_scatter(wide, group).to(grads[0].dtype), None, None


def _to_heads(x: Tensor, layout: Layout, group: dist.ProcessGroup) -> Tensor:
    batch, heads, tokens, width = x.shape
    n = layout.ranks
    parts = x.reshape(batch, n, heads // n, tokens, width).transpose(0, 1)
    return layout.to_global(_join_tokens(_all_to_all(parts, group)), dim=2)


def _to_tokens(x: Tensor, layout: Layout, group: dist.ProcessGroup) -> Tensor:
    parts = _all_to_all(_split_tokens(layout.to_rank_major(x, dim=2), layout.ranks), group)
    return parts.transpose(0, 1).flatten(1, 2)


def _join_tokens(parts: Tensor) -> Tensor:
    """`[N, B, h, t, D]` to `[B, h, N·t, D]` in rank-major order."""
    return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _split_tokens(x: Tensor, ranks: int) -> Tensor:
    """`[B, h, N·t, D]` in rank-major order to `[N, B, h, t, D]`."""
    return x.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4)


def _all_to_all(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    gathered = x.new_empty((dist.get_world_size(group), *x.shape))
    # torch 2.13 deprecates the longer name; 2.11 knows no other.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered.flatten(0, 1), x.contiguous(), group=group)
    return gathered


def _reduce_scatter(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    mine = parts.new_empty(parts.shape[1:])
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(mine, parts.contiguous().flatten(0, 1), group=group)
    return mine
