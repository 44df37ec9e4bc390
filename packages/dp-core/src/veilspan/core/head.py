"""Per-record losses of causal language models without their logits.

The head's linear map and the cross entropy run together, chunk by chunk within a record, so neither
`[B, T, V]` logits nor their gradient ever exist. Shape letters: B records, T tokens, D features, V
vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veilspan.core.errors import UnsupportedModelError
from veilspan.core.headless import head_of, losses_without_logits, require_plain_linear
from veilspan.core.losses import (
    check_labels,
    check_options,
    describe,
    reduce_tokens,
    scored_tokens,
)
from veilspan.core.rules.head import HeadRule, LogitMap
from veilspan.core.taps import FactorSite

_CHUNK_ELEMENTS_HOST = 2**23
_CHUNK_ELEMENTS_DEVICE = 2**27  # every chunk adds to a [V, D] sum: more tokens, less traffic


def fused_causal_lm_losses(  # noqa: PLR0913 - causal_lm_losses, plus what replaces the logits
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    shifted: bool = False,
    num_tokens_B: Tensor | None = None,
    chunk: int | None = None,
    **inputs: Any,
) -> Tensor:
    """Return what `causal_lm_losses(model(input_ids).logits, labels)` returns, without the logits.

    Runs the model with its head left out, and `head_losses` on the hidden states that reached the
    head. Works with every backward strategy of `PrivateStep`, tied heads included, and without one;
    also where `fully_shard(model)` has split the head's weight over ranks.

    Args:
        model: A Hugging Face decoder whose head is an `nn.Linear`. What follows the head must be
            nothing, a scale, or a cap by tanh; this is observed on every call, not looked up. After
            a head that is split, it must be nothing.
        input_ids: `[B, T]`, token ids.
        labels: `[B, T]`, token ids or `ignore_index`; by default `input_ids`.
        ignore_index: Label of tokens that do not count, such as padding.
        reduction: `mean` over the record's tokens (nats per token), or their `sum` (nats).
        shifted: The labels are shifted already: position t is scored on the label at t.
        num_tokens_B: `[B]`, counted tokens of each whole record, where this rank holds a part.
        chunk: Tokens whose logits exist at the same time; by default as many as keep a chunk of
            logits at 32 MiB on the CPU, 512 MiB elsewhere (in fp32).
        **inputs: Further inputs of the model, such as `attention_mask`.

    Returns:
        Losses in nats, `[B]`, fp32 (fp64 for fp64 models).

    Raises:
        ValueError: If shapes, dtypes or options do not fit.
        UnsupportedModelError: If the head is not a plain linear map, or something else follows it.

    Guarantee:
        As of `causal_lm_losses`, with the hidden states in place of the logits.

    Examples:
        >>> losses_B = fused_causal_lm_losses(model, input_ids, labels)  # doctest: +SKIP
        >>> step.backward(losses_B)  # doctest: +SKIP
    """
    if labels is None and shifted:
        raise ValueError("labels is None with shifted=True; pass the labels that were shifted.")
    head = head_of(model)

    def score(hidden_BTD: Tensor, logit_map: LogitMap) -> Tensor:
        return head_losses(
            hidden_BTD,
            head,
            input_ids if labels is None else labels,
            ignore_index=ignore_index,
            reduction=reduction,
            shifted=shifted,
            num_tokens_B=num_tokens_B,
            chunk=chunk,
            logit_map=logit_map,
        )

    return losses_without_logits(model, head, {"input_ids": input_ids, **inputs}, score)


def head_losses(  # noqa: PLR0913 - causal_lm_losses, plus what replaces the logits
    hidden_BTD: Tensor,
    head: nn.Linear,
    labels_BT: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    shifted: bool = False,
    num_tokens_B: Tensor | None = None,
    chunk: int | None = None,
    logit_map: LogitMap | None = None,
) -> Tensor:
    """Return the cross entropy of each record from the input of a linear head.

    Args:
        hidden_BTD: `[B, T, D]`, input of the head.
        head: The head, plain or tapped by a `PrivateStep`; its forward is not called.
        labels_BT: `[B, T]`, token ids or `ignore_index`.
        ignore_index: As in `causal_lm_losses`.
        reduction: As in `causal_lm_losses`.
        shifted: As in `causal_lm_losses`.
        num_tokens_B: As in `causal_lm_losses`.
        chunk: Tokens whose logits exist at the same time.
        logit_map: What follows the head; by default nothing.

    Returns:
        Losses in nats, `[B]`, fp32 (fp64 for an fp64 head).

    Raises:
        ValueError: If shapes, dtypes or options do not fit.
        UnsupportedModelError: If the head is not a plain linear map.

    Examples:
        >>> head = nn.Linear(8, 4, bias=False)
        >>> head_losses(torch.zeros(2, 3, 8), head, torch.tensor([[1, 2, 3], [1, -100, -100]]))
        tensor([1.3863, 0.0000], grad_fn=<DivBackward0>)
    """
    require_plain_linear(head)
    _require_whole(head)
    _check_hidden(hidden_BTD, head)
    check_labels(labels_BT, hidden_BTD, "hidden_BTD")
    check_options(reduction, shifted, num_tokens_B, len(hidden_BTD))
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1 token, or None.")
    targets_BT, counted_BT = scored_tokens(labels_BT, ignore_index, shifted, head.out_features)
    rule = HeadRule(
        targets_BT=targets_BT,
        counted_BT=counted_BT,
        chunk=chunk or _default_chunk(head),
        logit_map=logit_map or LogitMap(),
    )
    # The dtype of the product, which autocast may lower.
    dtype = F.linear(hidden_BTD[:0], head.weight[:1]).dtype
    losses_BT = _token_losses(rule, head, hidden_BTD.to(dtype))
    return reduce_tokens(losses_BT, counted_BT, reduction, num_tokens_B)


def _token_losses(rule: HeadRule, head: nn.Linear, hidden_BTD: Tensor) -> Tensor:
    """Run the rule in place of the head's own, through the head's site where there is one."""
    site = head.__dict__.get("forward")
    if not isinstance(site, FactorSite) or not torch.is_grad_enabled():
        return rule.token_losses(head, hidden_BTD)
    site.last_shape = tuple(hidden_BTD.shape)

    def forward(inputs: Tensor) -> Tensor:
        return rule.token_losses(head, inputs)

    return replace(site, rule=rule, forward=forward)(hidden_BTD)


def _require_whole(head: nn.Linear) -> None:
    if hasattr(head.weight, "placements"):
        raise UnsupportedModelError(
            "The head's weight is sharded (DTensor) outside of the model's forward pass; the fused "
            "losses need it whole. Call fused_causal_lm_losses, which runs the model, keep the "
            "head out of fully_shard, or use causal_lm_losses(model(input_ids).logits, labels)."
        )


def _check_hidden(hidden_BTD: Tensor, head: nn.Linear) -> None:
    fits = isinstance(hidden_BTD, Tensor) and hidden_BTD.is_floating_point()
    if not fits or hidden_BTD.ndim != 3 or hidden_BTD.shape[2] != head.in_features:
        raise ValueError(
            f"hidden_BTD is {describe(hidden_BTD)}; it must be floating point, "
            f"[B, T, {head.in_features}], with the batch dimension kept: a flattened batch has no "
            "records."
        )


def chunk_elements(device: torch.device) -> int:
    """Return how many logits exist at the same time unless the caller says how many tokens."""
    return _CHUNK_ELEMENTS_HOST if device.type == "cpu" else _CHUNK_ELEMENTS_DEVICE


def _default_chunk(head: nn.Linear) -> int:
    return max(1, chunk_elements(head.weight.device) // max(1, head.out_features))
