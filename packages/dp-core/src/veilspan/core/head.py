"""Per-record losses of causal language models without their logits.

The head's linear map and the cross entropy run together, chunk by chunk within a record, so neither
`[B, T, V]` logits nor their gradient ever exist. Shape letters: B records, T tokens, D features, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veilspan.core.errors import UnsupportedModelError
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

_WAY_OUT = "Use causal_lm_losses(model(input_ids).logits, labels)."


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

    Runs the model with its head left out, then `head_losses` on the hidden states that reached the
    head. Works with every backward strategy of `PrivateStep`, tied heads included, and without one.

    Args:
        model: A Hugging Face decoder whose head is an `nn.Linear`. What follows the head must be
            nothing, a scale, or a cap by tanh; this is observed on every call, not looked up.
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
    head = _head_of(model)
    hidden_BTD, logit_map = _run_without_head(model, head, {"input_ids": input_ids, **inputs})
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
    _require_plain_linear(head)
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


def _head_of(model: nn.Module) -> nn.Linear:
    find = getattr(model, "get_output_embeddings", None)
    head: Any = find() if callable(find) else None
    if head is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} names no head (get_output_embeddings() gives none). Call "
            "head_losses(hidden_BTD, head, labels) with its parts. Or: " + _WAY_OUT
        )
    _require_plain_linear(head)
    return head


def _require_plain_linear(head: nn.Module) -> None:
    """Refuse a head whose forward is more than `x Wᵀ + b`, or whose weight is not whole."""
    own = head.__dict__.get("forward")
    linear = type(head).forward is nn.Linear.forward and (
        own is None or isinstance(own, FactorSite)
    )
    if not isinstance(head, nn.Linear) or not linear:
        raise UnsupportedModelError(
            f"The head is a {type(head).__name__} whose forward is not that of nn.Linear (an "
            "adapter, a quantised or a patched layer): its gradients are not those of one linear "
            "map. Leave the head out of the adapter's target modules. Or: " + _WAY_OUT
        )
    if hasattr(head.weight, "placements"):
        raise UnsupportedModelError(
            "The head's weight is sharded (DTensor) outside of the model's forward pass; the fused "
            "losses need it whole. Keep the head out of fully_shard. Or: " + _WAY_OUT
        )


def _check_hidden(hidden_BTD: Tensor, head: nn.Linear) -> None:
    fits = isinstance(hidden_BTD, Tensor) and hidden_BTD.is_floating_point()
    if not fits or hidden_BTD.ndim != 3 or hidden_BTD.shape[2] != head.in_features:
        raise ValueError(
            f"hidden_BTD is {describe(hidden_BTD)}; it must be floating point, "
            f"[B, T, {head.in_features}], with the batch dimension kept: a flattened batch has no "
            "records."
        )


def _default_chunk(head: nn.Linear) -> int:
    on_host = head.weight.device.type == "cpu"
    elements = _CHUNK_ELEMENTS_HOST if on_host else _CHUNK_ELEMENTS_DEVICE
    return max(1, elements // max(1, head.out_features))


def _run_without_head(
    model: nn.Module, head: nn.Linear, inputs: Mapping[str, Any]
) -> tuple[Tensor, LogitMap]:
    """Return the input of the head, and what the model makes of the head's output.

    The head's call is answered with two rows of known numbers. What the model returns for them
    tells the map that follows the head, whatever its class and configuration say.
    """
    dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
    # The second row shows a cap; neither is symmetric, which would hide a change of order.
    ramps = [torch.linspace(-x, x / 2, head.out_features, dtype=dtype) for x in (2.0, 64.0)]
    probe_12V = torch.stack(ramps)[None].to(head.weight.device)
    seen: list[Tensor] = []

    def answer(input: Tensor) -> Tensor:
        seen.append(input)
        return probe_12V.clone()  # the model may work in place

    with _forward_of(head, answer):
        output = model(**inputs)
    if len(seen) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} called its head {len(seen)} times in one forward pass; the "
            "fused losses need one call. " + _WAY_OUT
        )
    logits = output[0] if isinstance(output, tuple) else output.logits
    logit_map = _map_between(probe_12V[0], logits, _caps(model))
    if logit_map is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} changes the logits after its head, by more than a scale and "
            f"a cap of known size; its configuration has {_suspects(model)}. " + _WAY_OUT
        )
    return seen[0], logit_map


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `forward` stand in for a module's own, or for the site that a private step put there."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _map_between(probe_2V: Tensor, logits: Tensor, caps: list[float]) -> LogitMap | None:
    """Return the map that turns the probe into `logits`, if it is one that we know."""
    if not torch.is_tensor(logits) or logits.shape != (1, *probe_2V.shape):
        return None
    given = probe_2V.to("cpu", torch.float64)
    found = logits.detach()[0].to("cpu", torch.float64)
    grain = torch.finfo(logits.dtype).eps
    for cap in (None, *caps):
        small = found[0] if cap is None else cap * torch.atanh(found[0] / cap)
        scale = float((small * given[0]).sum() / given[0].square().sum())
        if abs(scale - 1.0) < min(8 * grain, 0.01):
            scale = 1.0
        candidate = LogitMap(scale=scale, cap=cap)
        error = (candidate.apply_(given.clone()) - found).abs().amax(1)
        if bool((error <= 8 * grain * found.abs().amax(1)).all()):
            return candidate
    return None


def _settings(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return config.to_dict() if hasattr(config, "to_dict") else {}


def _caps(model: nn.Module) -> list[float]:
    cap = _settings(model).get("final_logit_softcapping")
    return [float(cap)] if cap else []


def _suspects(model: nn.Module) -> dict[str, Any]:
    """Return the settings that look as if they changed logits, for a message."""
    words = ("logit", "multiplier", "unpadded", "softcap")
    settings = _settings(model).items()
    return {key: value for key, value in settings if any(word in key for word in words)}
