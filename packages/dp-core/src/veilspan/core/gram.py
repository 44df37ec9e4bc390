"""⟨AAᵀ, GGᵀ⟩ per sample, the Gram form of a squared norm, over half of the pairs of tokens.

Shape letters: B samples, T tokens, n pairs of tokens on the diagonal tiles and below.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from veilspan.core.products import cut_off, operand, products

_SMALL_TILE, _TILE, _LARGE_TILE = 64, 128, 256  # tokens of a side of a tile
_AT_ONCE = 1 << 18  # pairs of tokens of one sample that are held together


def gram_tile(length: int) -> int:
    """Return the tokens of a side of a tile: small enough that half of them can be skipped."""
    return min(max(length // 4, _SMALL_TILE), _TILE)


class GramForm:
    """Squared norms by products of tokens, with those of the last input kept while it lives.

    Several maps may have one input, as queries, keys and values have, or both halves of a gated
    MLP. Only short sequences keep anything: what is kept grows with T².

    Args:
        block_elements: Most elements of any scratch tensor.
    """

    def __init__(self, block_elements: int) -> None:
        self._block_elements = block_elements
        self._input: weakref.ref[Tensor] | None = None
        self._key: tuple[object, ...] = ()
        self._products: tuple[Tensor, Tensor] | None = None

    def __reduce__(self) -> tuple[type[GramForm], tuple[int]]:
        return type(self), (self._block_elements,)

    def sums(self, act_BTI: Tensor, grad_BTO: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return ⟨AAᵀ, GGᵀ⟩ and Σ_t ‖a_t‖‖g_t‖, `[B]` fp64: the diagonals hold the squares.

        Args:
            act_BTI: Inputs.
            grad_BTO: Output gradients.
            dtype: In which products are summed.
        """
        batch, length = act_BTI.shape[:2]
        # A GPU would rather start fewer products than skip some of their work.
        best = gram_tile(length) if act_BTI.device.type == "cpu" else _LARGE_TILE
        room = self._block_elements // max(1, batch)  # of each sample
        side = max(1, min(best, math.isqrt(room)))
        if _pairs(length, side) > min(room, _AT_ONCE):
            sq_B, size_B = _in_pieces(act_BTI, grad_BTO, dtype, side, room)
        else:
            acts_Bn, root_of_act_BT = self._of_input(act_BTI, side, dtype)
            grads_Bn, root_of_grad_BT = _products(grad_BTO, dtype, side)
            weight_n = _layout(length, side, act_BTI.device)[0]
            sq_B = torch.mv(grads_Bn.mul_(acts_Bn).double(), weight_n)
            size_B = torch.linalg.vecdot(root_of_act_BT, root_of_grad_BT)
        shortening = cut_off(act_BTI.shape[2], act_BTI, act_BTI)
        shortening += cut_off(grad_BTO.shape[2], grad_BTO, grad_BTO)
        return sq_B * (1.0 + shortening), size_B

    def _of_input(self, act_BTI: Tensor, side: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return `_products` of this very input, formed anew unless it is the last one."""
        place = act_BTI.data_ptr(), act_BTI.shape, act_BTI.stride(), act_BTI.dtype
        key = (*place, act_BTI._version, side, dtype)
        known = self._input is not None and self._input() is not None and self._key == key
        if self._products is None or not known:
            self._products = _products(act_BTI, dtype, side)
        self._input, self._key = weakref.ref(act_BTI), key
        return self._products


def _rows(length: int, side: int) -> Iterator[tuple[slice, slice]]:
    """Yield rows of tiles: their tokens, and all tokens up to the end of the diagonal tile."""
    for i in range(0, length, side):
        yield slice(i, i + side), slice(0, min(i + side, length))


def _pairs(length: int, side: int) -> int:
    """Return the number of pairs of tokens on the diagonal tiles and below."""
    whole, rest = divmod(length, side)
    return side * side * whole * (whole + 1) // 2 + rest * length


def _products(rows_BTx: Tensor, dtype: torch.dtype, side: int) -> tuple[Tensor, Tensor]:
    """Return products of tokens, `[B, n]`, row by row of tiles, and norms of tokens, `[B, T]`."""
    length, rows_BTx = rows_BTx.shape[1], operand(rows_BTx, dtype)
    parts = [
        products(rows_BTx[:, rows], rows_BTx[:, columns].mT, dtype).flatten(1)
        for rows, columns in _rows(length, side)
    ]
    nothing = rows_BTx.new_zeros((len(rows_BTx), 0), dtype=dtype)
    products_Bn = torch.cat(parts, 1) if parts else nothing
    diagonal_T = _layout(length, side, rows_BTx.device)[1]
    return products_Bn, products_Bn.index_select(1, diagonal_T).double().sqrt()


@lru_cache(maxsize=16)
def _layout(length: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return how often each pair counts, `[n]` fp64, and the place of each token with itself."""
    weights, diagonal = [], []
    place = 0
    for rows, columns in _rows(length, side):
        height, width = len(range(length)[rows]), columns.stop
        weight = torch.full((height, width), 2.0, dtype=torch.float64)
        weight[:, rows] = 1.0
        weights.append(weight.flatten())
        diagonal += [place + row * width + rows.start + row for row in range(height)]
        place += height * width
    found = torch.cat(weights) if weights else torch.zeros(0, dtype=torch.float64)
    return found.to(device), torch.tensor(diagonal, dtype=torch.int64, device=device)


def _in_pieces(
    act_BTI: Tensor, grad_BTO: Tensor, dtype: torch.dtype, side: int, room: int
) -> tuple[Tensor, Tensor]:
    """Return both sums of long sequences: row by row of tiles, at most `room` pairs at a time."""
    batch, length = act_BTI.shape[:2]
    act_BTI, grad_BTO = operand(act_BTI, dtype), operand(grad_BTO, dtype)
    sq_B, size_B = grad_BTO.new_zeros((2, batch), dtype=torch.float64)
    most = max(1, min(room, _LARGE_TILE**2) // side**2) * side
    for rows, columns in _rows(length, side):
        for j in range(0, columns.stop, most):
            some = slice(j, min(j + most, columns.stop))
            of_acts = products(act_BTI[:, rows], act_BTI[:, some].mT, dtype)
            of_grads = products(grad_BTO[:, rows], grad_BTO[:, some].mT, dtype)
            diagonal = slice(rows.start - j, None)  # nothing, before the last columns
            roots = _diagonal_roots(of_acts[:, :, diagonal])
            size_B += torch.linalg.vecdot(roots, _diagonal_roots(of_grads[:, :, diagonal]))
            tiles = of_grads.mul_(of_acts)
            sq_B += 2.0 * tiles.sum((1, 2), dtype=torch.float64)
            sq_B -= tiles[:, :, diagonal].sum((1, 2), dtype=torch.float64)
    return sq_B, size_B


def _diagonal_roots(gram_Btt: Tensor) -> Tensor:
    """Return the norms of the rows that a Gram matrix was made of, `[B, t]` fp64."""
    return gram_Btt.diagonal(dim1=1, dim2=2).double().sqrt()
