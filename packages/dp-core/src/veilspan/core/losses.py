"""Per-record losses of causal language models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 2**20  # logits worked on at a time


def causal_lm_losses(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    shifted: bool = False,
    num_tokens_B: Tensor | None = None,
) -> Tensor:
    """Return the cross entropy of each record over its own tokens.

    Args:
        logits: `[B, T, V]`, floating point.
        labels: `[B, T]`, token ids in 0 … V-1 or `ignore_index`. By default the model's own input:
            the logits at t are scored on the label at t+1.
        ignore_index: Label of tokens that do not count, such as padding.
        reduction: `mean` over the record's tokens (nats per token), or their `sum` (nats).
        shifted: The labels are shifted already: the logits at t are scored on the label at t.
            Needed where a sequence is split over ranks: the next label may lie on another rank.
        num_tokens_B: `[B]`, counted tokens of each whole record, where this rank holds only a part
            of its sequence: the result is then this rank's share of the mean.

    Returns:
        Losses in nats, `[B]`, fp32 (fp64 for fp64 logits). A record without a counted token has
        loss 0 and gradient 0.

    Raises:
        ValueError: If shapes, dtypes or options do not fit, or (labels on the CPU) a label is
            outside of the vocabulary.

    Guarantee:
        A loss depends on its own record alone: not on other records, on how many there are, or on
        the content of tokens that do not count, even if that is not finite.

    Examples:
        >>> logits, labels = torch.zeros(2, 3, 4), torch.tensor([[1, 2, 3], [1, -100, -100]])
        >>> causal_lm_losses(logits, labels)
        tensor([1.3863, 0.0000])
    """
    if not isinstance(logits, Tensor) or logits.ndim != 3 or not logits.is_floating_point():
        raise ValueError(
            f"logits is {describe(logits)}; it must be floating point, [B, T, V]. Pass the "
            "model's `.logits`, with the batch dimension kept: a flattened batch has no records."
        )
    check_labels(labels, logits, "logits")
    check_options(reduction, shifted, num_tokens_B, len(logits))
    targets_BT, counted_BT = scored_tokens(labels, ignore_index, shifted, logits.shape[-1])
    losses_BT = _TokenLosses.apply(logits, targets_BT, counted_BT)
    return reduce_tokens(losses_BT, counted_BT, reduction, num_tokens_B)


def scored_tokens(
    labels: Tensor, ignore_index: int, shifted: bool, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Return the target of each position, a valid id everywhere, and whether it counts, `[B, T]`.

    Raises:
        ValueError: If (labels on the CPU) a label is outside of the vocabulary.
    """
    targets_BT = labels.long()
    if not shifted:
        next_BT = targets_BT[:, 1:]
        targets_BT = torch.full_like(targets_BT, ignore_index)
        targets_BT[:, :-1] = next_BT
    counted_BT = targets_BT != ignore_index
    _check_range(targets_BT, counted_BT, vocabulary)
    return targets_BT.masked_fill(~counted_BT, 0), counted_BT


def reduce_tokens(
    losses_BT: Tensor, counted_BT: Tensor, reduction: str, num_tokens_B: Tensor | None
) -> Tensor:
    """Return the loss of each record, `[B]`: the sum over its tokens, or their mean."""
    losses_B = losses_BT.sum(1)
    if reduction == "sum":
        return losses_B
    here_B = counted_BT.sum(1)
    if num_tokens_B is None:
        return losses_B / here_B.clamp(min=1)
    _check_counts(num_tokens_B, here_B)
    return losses_B / num_tokens_B.to(losses_B.device).clamp(min=1)


class _TokenLosses(torch.autograd.Function):
    """Cross entropy per token without keeping a second `[B, T, V]` for the backward.

    Autograd's own would keep the log-probabilities. This keeps two numbers per token, and works in
    chunks that stay in the cache. N is B·T.
    """

    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, targets_BT: Tensor, counted_BT: Tensor) -> Tensor:
        wide = torch.promote_types(logits_BTV.dtype, torch.float32)
        logits_NV = logits_BTV.reshape(-1, logits_BTV.shape[-1])
        targets_N = targets_BT.reshape(-1)
        highest_N, sums_N, losses_N = logits_NV.new_empty(3, len(logits_NV), dtype=wide)
        for rows in _row_chunks(logits_NV):
            chunk = logits_NV[rows].to(wide)
            torch.amax(chunk, 1, out=highest_N[rows])
            chunk = chunk - highest_N[rows, None]
            target = chunk.gather(1, targets_N[rows, None]).squeeze(1)
            torch.sum(chunk.exp_(), 1, out=sums_N[rows])
            torch.sub(sums_N[rows].log(), target, out=losses_N[rows])
        ctx.save_for_backward(logits_NV, targets_N, counted_BT, highest_N, sums_N)
        return losses_N.view(targets_BT.shape).masked_fill(~counted_BT, 0.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "causal_lm_losses has no second derivative: call backward without "
                "create_graph=True, or use torch.nn.functional.cross_entropy."
            )
        logits_NV, targets_N, counted_BT, highest_N, sums_N = ctx.saved_tensors
        weight_N = grad_outputs[0].reshape(-1)
        ignored_N1 = ~counted_BT.reshape(-1, 1)
        grad_NV = torch.empty_like(logits_NV)
        for rows in _row_chunks(logits_NV):
            weight = weight_N[rows, None]
            chunk = (logits_NV[rows] - highest_N[rows, None]).exp_()
            chunk.mul_(weight / sums_N[rows, None])
            chunk.scatter_add_(1, targets_N[rows, None], -weight)
            # Not a product with 0: logits of tokens that do not count may be infinite or NaN.
            grad_NV[rows] = chunk.masked_fill_(ignored_N1[rows], 0.0)
        return grad_NV.view(*counted_BT.shape, grad_NV.shape[1]), None, None


def _row_chunks(logits_NV: Tensor) -> Iterator[slice]:
    rows, vocabulary = logits_NV.shape
    size = max(1, _CHUNK_ELEMENTS // max(1, vocabulary))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def check_labels(labels: Tensor, scored: Tensor, name: str) -> None:
    """Refuse labels that are not one token id for each position of `scored`, `[B, T, …]`.

    Raises:
        ValueError: Naming the argument, what it is, what is allowed, and the way out.
    """
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels is {describe(labels)}; it must be int64 token ids, [B, T].")
    if labels.shape != scored.shape[:2]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, but {name} has {tuple(scored.shape)}; labels "
            f"must be {tuple(scored.shape[:2])}. Cut neither: the shift by one happens here, or "
            "pass shifted=True with labels that are shifted and padded with ignore_index."
        )


def check_options(reduction: str, shifted: bool, num_tokens_B: Tensor | None, size: int) -> None:
    """Refuse a reduction that is not a record's own, or counts that do not fit it.

    Raises:
        ValueError: Naming the argument, its value, what is allowed, and the way out.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"reduction is {reduction!r}; it must be 'mean' or 'sum', each over a record's own "
            "tokens. A mean over the batch would couple the records."
        )
    if num_tokens_B is None:
        return
    if reduction == "sum" or not shifted:
        raise ValueError(
            f"num_tokens_B is given with reduction={reduction!r}, shifted={shifted}; it is for "
            "reduction='mean' of sequences that were shifted first and then split (shifted=True)."
        )
    if num_tokens_B.shape != (size,) or num_tokens_B.is_floating_point():
        raise ValueError(
            f"num_tokens_B is {describe(num_tokens_B)}; it must be one whole number per record, "
            f"[{size}]."
        )


def _check_range(targets_BT: Tensor, counted_BT: Tensor, vocabulary: int) -> None:
    if targets_BT.device.type != "cpu":
        return  # would wait for the device, whose own bounds check stops the run as well
    wrong_BT = counted_BT & ((targets_BT < 0) | (targets_BT >= vocabulary))
    if bool(wrong_BT.any()):
        raise ValueError(
            f"labels holds {int(targets_BT[wrong_BT][0])}, outside of the vocabulary 0 … "
            f"{vocabulary - 1}. Is the tokenizer the model's own, and padding labelled "
            "ignore_index?"
        )


def _check_counts(num_tokens_B: Tensor, here_B: Tensor) -> None:
    if num_tokens_B.device.type == here_B.device.type == "cpu" and bool(
        (num_tokens_B < here_B).any()
    ):
        raise ValueError(
            "num_tokens_B is smaller than the number of counted tokens held here; it must count "
            "the tokens of the whole record over all ranks, after the shift."
        )


def describe(value: Any) -> str:
    """Return what `value` is, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"a {type(value).__name__}"
