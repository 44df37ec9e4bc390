"""The one interface of attention over a sequence that several ranks hold."""

from __future__ import annotations

from typing import Literal, Protocol, get_args

from torch import Tensor

AttentionName = Literal["auto", "ulysses", "allgather"]


class Attention(Protocol):
    """Causal attention whose queries, keys and values are spread over the context axis.

    Shape letters: B records, H query heads, K key heads, t tokens held here, D head width. Every
    rank of the axis calls it in the same order. The backward pass communicates too, and gives each
    rank the exact gradient of its own operands.
    """

    def __call__(
        self,
        query_BHtD: Tensor,
        key_BKtD: Tensor,
        value_BKtD: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Return the attention output of the tokens held here, `[B, H, t, D]`.

        Args:
            query_BHtD: Queries, positions already encoded.
            key_BKtD: Keys, positions already encoded; H is a multiple of K.
            value_BKtD: Values.
            scale: Factor of the scores; None means 1/√D.
            window: Number of positions a query sees, itself included; None means all.
        """
        ...


def choose(name: AttentionName, *, heads: int, key_heads: int, ranks: int) -> AttentionName:
    """Return the attention that `name` stands for, given the number of heads.

    `"auto"` exchanges heads (Ulysses) where the key heads divide evenly among the ranks: one
    ordinary causal call then does all the work, equally much on every rank. Otherwise it gathers
    keys and values, which has no condition on heads.

    Args:
        name: `"auto"`, `"ulysses"` or `"allgather"`.
        heads: Number of query heads H.
        key_heads: Number of key heads K.
        ranks: Number of ranks N of the context axis.

    Returns:
        `"ulysses"` or `"allgather"`.

    Raises:
        ValueError: If `name` is unknown, or `"ulysses"` and `heads` is not divisible by `ranks`.

    Examples:
        >>> choose("auto", heads=32, key_heads=8, ranks=16)
        'allgather'
    """
    if name not in get_args(AttentionName):
        raise ValueError(
            f"attention is {name!r}; it must be one of {list(get_args(AttentionName))}."
        )
    if name == "ulysses" and heads % ranks:
        raise ValueError(
            f"attention is 'ulysses' but {heads} attention heads do not divide among {ranks} "
            "context ranks; use attention='allgather' or a context degree that divides the heads."
        )
    if name != "auto":
        return name
    return "ulysses" if heads % ranks == 0 and key_heads % ranks == 0 else "allgather"
