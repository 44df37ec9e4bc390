"""Attention that gathers keys and values: each rank attends with its tokens to their prefixes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from veilspan.parallel.attention.causal import causal_attention
from veilspan.parallel.collectives import gather_tokens
from veilspan.parallel.layout import Layout


@dataclass(frozen=True, kw_only=True)
class AllGatherKV:
    """One all-gather of keys and values, then causal attention of the local queries.

    No condition on the number of heads. With the contiguous layout the last rank has about 2N - 1
    times the work of the first; the zigzag layout balances it.

    Source: Llama Team (2024), https://arxiv.org/abs/2407.21783, section 3.3.2.

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
        widths = [key_BKtD.shape[-1], value_BKtD.shape[-1]]
        packed = gather_tokens(torch.cat([key_BKtD, value_BKtD], -1), self.layout, self.group)
        key_BKTD, value_BKTD = packed.split(widths, dim=-1)
        segments = self.layout.segments(dist.get_rank(self.group))
        queries = query_BHtD.split([stop - start for start, stop in segments], dim=2)
        outputs = [
            causal_attention(
                query, key_BKTD[:, :, :stop], value_BKTD[:, :, :stop], scale=scale, window=window
            )
            for query, (_, stop) in zip(queries, segments, strict=True)
        ]
        return torch.cat(outputs, dim=2)
