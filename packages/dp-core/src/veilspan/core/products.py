"""Products of each sample that are summed in fp32 or wider, at the speed of the device."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over `dtype` values are formed: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def multiplies_wide(left: Tensor, right: Tensor) -> bool:
    """Return whether the device multiplies these 16-bit operands into fp32 as they are.

    An NVIDIA GPU does; converted to fp32 they would take many times as long.
    """
    narrow = left.dtype == right.dtype and left.dtype.itemsize == 2
    filled = left.numel() > 0 and right.numel() > 0
    return narrow and filled and left.device.type == "cuda" and torch.version.hip is None


def operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what `products` multiplies best, where it is asked several times: converted once."""
    return tensor if multiplies_wide(tensor, tensor) else tensor.to(dtype)


def products(left_Bxn: Tensor, right_Bny: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the product of each sample, `[B, x, y]`, summed and returned in fp32 or fp64."""
    if dtype == torch.float32 and multiplies_wide(left_Bxn, right_Bny):
        return torch.bmm(left_Bxn, right_Bny, out_dtype=dtype)
    return torch.bmm(left_Bxn.to(dtype), right_Bny.to(dtype))


def cut_off(length: int, left: Tensor, right: Tensor) -> float:
    """Return how much shorter, relatively, tensor cores make a sum of `length` products.

    They cut off what lies below 24 bits of the largest of some terms, toward zero: less than 2⁻²⁴
    of a sum for each term.

    Source: Fasi, Higham, Mikaitis, Pranesh (2021), https://doi.org/10.7717/peerj-cs.330.
    """
    return length * 2.0**-24 if multiplies_wide(left, right) else 0.0
