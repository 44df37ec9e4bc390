"""Attention that trades tokens for heads: each rank has all tokens of a share of the heads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from veilspan.parallel.attention.causal import causal_attention
from veilspan.parallel.collectives import heads_from_tokens, tokens_from_heads
from veilspan.parallel.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Ulysses:
    """Two all-to-all exchanges around one ordinary causal attention.

    The number of query heads must be divisible by the number of ranks. Where there are fewer key
    heads than ranks, or they do not divide, each is sent to every rank that needs it.

    Source: Jacobs et al. (2023), https://arxiv.org/abs/2309.14509.

    Args:
        layout: Who holds which tokens.
        group: Process group of the context axis.
    """

    layout: Layout
    group: dist.ProcessGroup

    def __call__(
        self,
        query_BHtD: Tensor,
        key_BKtD: Tensor,
        value_BKtD: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Return the attention output of the tokens held here; see `Attention`."""
        copies = self.layout.ranks // math.gcd(self.layout.ranks, key_BKtD.shape[1])
        if copies > 1:
            key_BKtD = key_BKtD.repeat_interleave(copies, dim=1)
            value_BKtD = value_BKtD.repeat_interleave(copies, dim=1)
        query, key, value = self._exchange(query_BHtD, key_BKtD, value_BKtD)
        output = causal_attention(query, key, value, scale=scale, window=window)
        return tokens_from_heads(output, self.layout, self.group)

    def _exchange(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Send the heads of every rank in one message; queries, keys and values side by side."""
        n = self.layout.ranks
        if not query.shape[-1] == key.shape[-1] == value.shape[-1]:
            operands = (query, key, value)
            return tuple(heads_from_tokens(x, self.layout, self.group) for x in operands)
        by_rank = [x.unflatten(1, (n, -1)) for x in (query, key, value)]
        packed = torch.cat(by_rank, dim=2).flatten(1, 2)
        mine = heads_from_tokens(packed, self.layout, self.group)
        return mine.split([x.shape[2] for x in by_rank], dim=1)
