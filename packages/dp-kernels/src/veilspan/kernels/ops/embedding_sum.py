"""Clipped sums of embedding gradients, without a table per sample.

Places of all samples are sorted by token, so every row of the sum is a run of places; see
`embedding_norm` for how runs are added.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from veilspan.kernels.checks import (
    WIDE,
    require_dtype,
    require_finite,
    require_ids,
    require_shape,
    require_together,
)
from veilspan.kernels.compat import runs_kernels
from veilspan.kernels.launch import Compilation, configurations
from veilspan.kernels.ops.embedding_norm import (
    add_runs,
    compilations_of,
    counted,
    require_lookups,
    run_sums,
)
from veilspan.kernels.roofline import Work

__all__ = ["embedding_sum_"]


def embedding_sum_(
    total_VD: Tensor,
    tokens_BT: Tensor,
    grad_BTD: Tensor,
    factor_B: Tensor,
    *,
    padding_idx: int | None = None,
) -> None:
    """Add each sample's gradient of an embedding table, times its factor, to a total, in place.

    Args:
        total_VD: `[V, D]`, contiguous, fp32 or fp64.
        tokens_BT: `[B, T]`, rows that were looked up, int64 or int32.
        grad_BTD: `[B, T, D]`, gradient of what was looked up.
        factor_B: `[B]`, clip factors, fp32 or fp64. Gradients of a sample with factor 0 are not
            read, so they need not be finite.
        padding_idx: Token whose row learns nothing.

    Raises:
        ValueError: If a shape, a dtype, a device, a token or a factor does not fit.

    Guarantee:
        What all samples add to a row is summed in fp64 in the order of samples and tokens, rounded
        once to the dtype of the total, and added. The result is the same in every run.

    Examples:
        >>> total, grad = torch.zeros(3, 1), torch.tensor([[[3.0], [1.0], [2.0]]])
        >>> embedding_sum_(total, torch.tensor([[0, 2, 0]]), grad, torch.tensor([0.5]))
        >>> total.T
        tensor([[2.5000, 0.0000, 0.5000]])
    """
    require_lookups(tokens_BT, grad_BTD)
    require_together(total_VD=total_VD, tokens_BT=tokens_BT, factor_B=factor_B)
    require_dtype("total_VD", total_VD, WIDE)
    require_shape("total_VD", total_VD, ("V", grad_BTD.shape[2]))
    require_dtype("factor_B", factor_B, WIDE)
    require_shape("factor_B", factor_B, grad_BTD.shape[:1])
    if not total_VD.is_contiguous():
        raise ValueError("total_VD is not contiguous; pass .contiguous() memory.")
    require_ids("tokens_BT", tokens_BT, len(total_VD), ignore=padding_idx)
    require_finite("factor_B", factor_B)
    torch.ops.veilspan.embedding_sum_(
        total_VD, counted(tokens_BT, padding_idx), grad_BTD.detach(), factor_B.detach()
    )


def work(tokens: int, width: int, *, rows: int, element_bytes: int = 2) -> Work:
    """Return what one call moves: it reads the gradient, and reads and writes rows of the total."""
    return Work(bytes=width * (tokens * element_bytes + 8.0 * rows))


@torch.library.custom_op("veilspan::embedding_sum_", mutates_args=("total_VD",))
def _embedding_sum(total_VD: Tensor, tokens_BT: Tensor, grad_BTD: Tensor, factor_B: Tensor) -> None:
    if not grad_BTD.numel():
        return
    ids_N, order_N = torch.sort(tokens_BT.flatten().long(), stable=True)
    if runs_kernels(grad_BTD) and runs_kernels(total_VD):
        add_runs(ids_N[None], order_N[None], grad_BTD, factor_B.double(), total_VD)
        return
    for token_R, columns, sums in run_sums(ids_N, order_N, grad_BTD, factor_B.double()):
        total_VD[:, columns].index_add_(0, token_R, sums.to(total_VD.dtype))


@_embedding_sum.register_fake
def _(total_VD: Tensor, tokens_BT: Tensor, grad_BTD: Tensor, factor_B: Tensor) -> None:
    return None


def compilations(table: str) -> Iterator[Compilation]:
    """Yield what to compile ahead of time for the GPUs of a table."""
    for chosen in configurations("embedding_norm", table):
        yield from compilations_of(chosen, "embedding_sum", add=True)
