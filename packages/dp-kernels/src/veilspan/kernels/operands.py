"""What launchers make of their operands before a kernel or a PyTorch formulation sees them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 22
"""Most elements of any scratch tensor of a PyTorch formulation."""


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of sums over these operands: fp64 where one of them is fp64, else fp32."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def dense_rows(tensor: Tensor) -> Tensor:
    """Return the tensor, copied unless its last dimension is contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def spans(length: int, elements: int) -> Iterator[slice]:
    """Yield slices that cover `length`, as long as `elements` for each place allow."""
    step = max(1, BLOCK_ELEMENTS // max(1, elements))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
