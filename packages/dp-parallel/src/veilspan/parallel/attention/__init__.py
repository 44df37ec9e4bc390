"""Attention over a sequence that several ranks hold together."""

from veilspan.parallel.attention.allgather import AllGatherKV
from veilspan.parallel.attention.causal import causal_attention
from veilspan.parallel.attention.interface import Attention, AttentionName, choose
from veilspan.parallel.attention.ulysses import Ulysses

__all__ = [
    "AllGatherKV",
    "Attention",
    "AttentionName",
    "Ulysses",
    "causal_attention",
    "choose",
]
