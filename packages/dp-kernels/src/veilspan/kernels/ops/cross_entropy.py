"""Cross entropy of logits, which turn into their gradient in place.

Shape letters: N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import no_type_check

import torch
from torch import Tensor

from veilspan.kernels.checks import require_dtype, require_ids, require_shape, require_together
from veilspan.kernels.compat import jit, runs_kernels, tl
from veilspan.kernels.launch import Compilation, configuration, configurations
from veilspan.kernels.operands import wide_dtype
from veilspan.kernels.roofline import Work

__all__ = ["cross_entropy_"]

_COMPILED_VOCABULARY = 128256  # of Llama 3


def cross_entropy_(
    logits_NV: Tensor, labels_N: Tensor, scale: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """Return the cross entropy of each token, and write `(softmax - one-hot) · scale` in its place.

    Args:
        logits_NV: `[N, V]`, contiguous; holds the gradient of the logits afterwards.
        labels_N: `[N]`, the token that each row is scored on, or `ignore_index`; int64 or int32.
        scale: What the gradient is multiplied by, a scalar on the device of the logits, fp32 (fp64
            for fp64 logits): 1 over the number of counted tokens of the sample, for a mean.
        ignore_index: Label of rows that do not count; they are not read, and set to zero.

    Returns:
        Losses in nats without the scale, `[N]`, fp32 (fp64 for fp64 logits); 0 for rows that do not
        count.

    Raises:
        ValueError: If a shape, a dtype, a device or a label does not fit.

    Guarantee:
        Logits are read twice and written once, in fp32 arithmetic. In fp16 a gradient below 2⁻²⁵
        rounds to 0.

    Examples:
        >>> logits = torch.zeros(2, 2)
        >>> cross_entropy_(logits, torch.tensor([1, -100]), torch.tensor(1.0))
        tensor([0.6931, 0.0000])
        >>> logits
        tensor([[ 0.5000, -0.5000],
                [ 0.0000,  0.0000]])
    """
    require_together(logits_NV=logits_NV, labels_N=labels_N, scale=scale)
    require_dtype("logits_NV", logits_NV)
    require_shape("logits_NV", logits_NV, ("N", "V"))
    require_shape("labels_N", labels_N, logits_NV.shape[:1])
    require_dtype("scale", scale, [wide_dtype(logits_NV)])
    require_shape("scale", scale, ())
    require_ids("labels_N", labels_N, logits_NV.shape[1], ignore=ignore_index)
    if not logits_NV.is_contiguous():
        raise ValueError("logits_NV is not contiguous; pass .contiguous() memory.")
    target_N = labels_N.long().masked_fill(labels_N == ignore_index, -1)
    return torch.ops.veilspan.cross_entropy_(logits_NV.detach(), target_N, scale.detach())


def work(tokens: int, vocabulary: int, *, element_bytes: int = 2) -> Work:
    """Return what one call moves: logits are read twice and written once."""
    return Work(bytes=3.0 * tokens * vocabulary * element_bytes)


@jit
@no_type_check
def _entropy_kernel(
    logits,
    targets,
    scale,
    losses,
    vocabulary,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One program turns the logits of one token into their gradient, in place.

    The first sweep keeps the highest logit and the sum below it for each lane; the second, which
    finds the row in the cache, writes the gradient.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    # Logits of a token that does not count are not read.
    reach = tl.where(target >= 0, vocabulary, 0)
    factor = tl.where(target >= 0, tl.load(scale), 0.0)
    column = tl.arange(0, BLOCK)
    at = logits + row * vocabulary + column
    highest = tl.full((BLOCK,), -3.0e38, tl.float32)  # finite: ∞ - ∞ would be NaN
    sums = tl.zeros((BLOCK,), tl.float32)
    scored = tl.zeros((BLOCK,), tl.float32)
    for _ in range(STEPS):
        x = tl.load(at, mask=column < reach, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, x)
        sums = sums * tl.exp(highest - higher) + tl.exp(x - higher)
        scored += tl.where(column == target, x, 0.0)
        highest = higher
        column += BLOCK
        at += BLOCK
    top = tl.max(highest)
    total = tl.sum(sums * tl.exp(highest - top))
    total = tl.where(target >= 0, total, 1.0)
    loss = (top - tl.sum(scored)) + tl.log(total)
    tl.store(losses + row, tl.where(target >= 0, loss, 0.0))
    share = factor / total  # the highest logit and the sum stay apart: no digits are lost
    column = tl.arange(0, BLOCK)
    at = logits + row * vocabulary + column
    for _ in range(STEPS):
        x = tl.load(at, mask=column < reach, other=float("-inf")).to(tl.float32)
        slope = tl.exp(x - top) * share
        slope = tl.where(column == target, slope - factor, slope)
        tl.store(at, slope.to(logits.dtype.element_ty), mask=column < vocabulary)
        column += BLOCK
        at += BLOCK


@torch.library.custom_op("veilspan::cross_entropy_", mutates_args=("logits_NV",))
def _cross_entropy(logits_NV: Tensor, target_N: Tensor, scale: Tensor) -> Tensor:
    if not logits_NV.numel():
        return scale.new_zeros(len(logits_NV))
    if not runs_kernels(logits_NV):
        return _in_pytorch_(logits_NV, target_N, scale)
    tokens, vocabulary = logits_NV.shape
    losses_N = scale.new_empty(tokens)
    chosen = configuration("cross_entropy", logits_NV.device)
    chosen.launch(
        _entropy_kernel,
        (tokens,),
        logits_NV,
        target_N.contiguous(),
        scale,
        losses_N,
        vocabulary,
        STEPS=-(-vocabulary // chosen.blocks["BLOCK"]),
    )
    return losses_N


@_cross_entropy.register_fake
def _(logits_NV: Tensor, target_N: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty(len(logits_NV))


def _in_pytorch_(logits_NV: Tensor, target_N: Tensor, scale: Tensor) -> Tensor:
    """Do what the kernel does; logits of fp32 and fp64 without a copy."""
    wide_NV = logits_NV.to(wide_dtype(logits_NV))
    counted_N, place_N1 = target_N >= 0, target_N.clamp(min=0)[:, None]
    wide_NV.sub_(wide_NV.amax(1, keepdim=True))
    scored_N = wide_NV.gather(1, place_N1)[:, 0]
    total_N = wide_NV.exp_().sum(1)
    losses_N = (total_N.log() - scored_N).masked_fill(~counted_N, 0.0)
    wide_NV.mul_((scale / total_N)[:, None])
    wide_NV.scatter_(1, place_N1, wide_NV.gather(1, place_N1) - scale)
    wide_NV.masked_fill_(~counted_N[:, None], 0.0)
    if wide_NV.dtype != logits_NV.dtype:
        logits_NV.copy_(wide_NV)
    return losses_N


def compilations(table: str) -> Iterator[Compilation]:
    """Yield what to compile ahead of time for the GPUs of a table."""
    for chosen in configurations("cross_entropy", table):
        for logits in ("bf16", "fp32"):
            yield Compilation(
                name=f"cross_entropy {logits}",
                kernel=_entropy_kernel,
                signature={
                    "logits": f"*{logits}",
                    "targets": "*i64",
                    **dict.fromkeys(("scale", "losses"), "*fp32"),
                    **dict.fromkeys(("vocabulary",), "i32"),
                },
                constants={
                    "STEPS": -(-_COMPILED_VOCABULARY // chosen.blocks["BLOCK"]),
                    **chosen.blocks,
                },
                chosen=chosen,
            )
