"""Which tokens of a sequence each rank of the context axis holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

LayoutKind = Literal["contiguous", "zigzag"]
_CHUNKS_PER_RANK: dict[str, int] = {"contiguous": 1, "zigzag": 2}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Assignment of `length` token positions to `ranks` ranks, equally many each.

    `contiguous` gives rank r the r-th of N chunks. `zigzag` cuts 2N chunks and gives rank r the
    chunks r and 2N-1-r, so that every rank has the same number of causal query-key pairs; gathered
    keys and values need that for balance, an exchange of heads does not.

    Args:
        length: Number of tokens T of the whole sequence.
        ranks: Number of ranks N that share it.
        kind: `"contiguous"` or `"zigzag"`.

    Raises:
        ValueError: If `kind` is unknown, a number is not positive, or `length` is not divisible by
            N (contiguous) or 2N (zigzag).

    Examples:
        >>> Layout(length=8, ranks=2, kind="zigzag").positions(0)
        tensor([0, 1, 6, 7])
    """

    length: int
    ranks: int
    kind: LayoutKind = "contiguous"

    def __post_init__(self) -> None:
        unit = _unit(self.ranks, self.kind)
        if self.length < 1 or self.length % unit:
            raise ValueError(
                f"length is {self.length}; with {self.ranks} rank(s) and the {self.kind} layout it "
                f"must be a positive multiple of {unit}: pad to "
                f"{self.padded_length(max(self.length, 1), self.ranks, self.kind)} "
                "(see Layout.padded_length)."
            )

    @staticmethod
    def padded_length(length: int, ranks: int, kind: LayoutKind = "contiguous") -> int:
        """Return the smallest length that fits the layout and holds `length` tokens.

        Examples:
            >>> Layout.padded_length(2045, 2, "zigzag")
            2048
        """
        unit = _unit(ranks, kind)
        return -(-length // unit) * unit

    @property
    def tokens_per_rank(self) -> int:
        """Number of tokens t = T/N that one rank holds."""
        return self.length // self.ranks

    def segments(self, rank: int) -> tuple[tuple[int, int], ...]:
        """Return the half-open ranges of positions that `rank` holds, in the order it holds them.

        Args:
            rank: Rank on the context axis.

        Returns:
            One range (contiguous) or two (zigzag), as `(start, stop)`.

        Raises:
            ValueError: If `rank` is not in `0 … ranks - 1`.
        """
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank is {rank}; this layout has the ranks 0 to {self.ranks - 1}.")
        size = self.tokens_per_rank // _CHUNKS_PER_RANK[self.kind]
        chunks = (rank,) if self.kind == "contiguous" else (rank, 2 * self.ranks - 1 - rank)
        return tuple((chunk * size, (chunk + 1) * size) for chunk in chunks)

    def positions(self, rank: int, device: torch.device | None = None) -> Tensor:
        """Return the global positions of the tokens that `rank` holds, `[t]` int64."""
        return torch.cat([torch.arange(*range_, device=device) for range_ in self.segments(rank)])

    def take(self, tensor: Tensor, rank: int, dim: int) -> Tensor:
        """Return the part of a global tensor that `rank` holds; `dim` is the token dimension."""
        parts = [tensor.narrow(dim, a, b - a) for a, b in self.segments(rank)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def to_global(self, tensor: Tensor, dim: int) -> Tensor:
        """Put tokens in rank-major order (all of rank 0, all of rank 1, …) into global order."""
        return self._reorder(tensor, dim, inverse=True)

    def to_rank_major(self, tensor: Tensor, dim: int) -> Tensor:
        """Put tokens in global order into rank-major order; the inverse of `to_global`."""
        return self._reorder(tensor, dim, inverse=False)

    def _reorder(self, tensor: Tensor, dim: int, *, inverse: bool) -> Tensor:
        if self.kind == "contiguous" or self.ranks == 1:
            return tensor
        order = torch.cat([self.positions(r, tensor.device) for r in range(self.ranks)])
        return tensor.index_select(dim, torch.argsort(order) if inverse else order)


def _unit(ranks: int, kind: str) -> int:
    """Return the number that a length must be a multiple of."""
    if kind not in _CHUNKS_PER_RANK:
        raise ValueError(f"kind is {kind!r}; it must be one of {list(get_args(LayoutKind))}.")
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; it must be at least 1.")
    return ranks * _CHUNKS_PER_RANK[kind]
