"""A model run without its head: what reaches the head, and what the model makes of its output.

Shape letters: B records, T tokens, D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from veilspan.core.errors import UnsupportedModelError
from veilspan.core.rules.head import LogitMap
from veilspan.core.taps import FactorSite

_WAY_OUT = "Use causal_lm_losses(model(input_ids).logits, labels)."

_NEUTRAL = (None, False, 1, 1.0)
"""Values of a setting that change nothing."""

Score = Callable[[Tensor, LogitMap], Tensor]
"""Losses of the records from what enters the head, `[B, T, D]`, and what follows it."""


def head_of(model: nn.Module) -> nn.Linear:
    """Return the head of a Hugging Face decoder.

    Raises:
        UnsupportedModelError: If it names none, or one that is more than a linear map.
    """
    find = getattr(model, "get_output_embeddings", None)
    head: Any = find() if callable(find) else None
    if head is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} names no head (get_output_embeddings() gives none). Call "
            "head_losses(hidden_BTD, head, labels) with its parts. Or: " + _WAY_OUT
        )
    require_plain_linear(head)
    return head


def require_plain_linear(head: nn.Module) -> None:
    """Refuse a head whose forward is more than `x Wᵀ + b`.

    Raises:
        UnsupportedModelError: Naming its class.
    """
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


def obstacle_to_fusing(model: nn.Module, *, split: bool) -> str | None:
    """Return why losses without logits cannot serve a model, by its parts and settings, or None.

    Args:
        model: A Hugging Face decoder.
        split: Whether its weights are, or will be, split over ranks by FSDP2.
    """
    try:
        head_of(model)
    except UnsupportedModelError as error:
        return str(error)
    changed = {name: value for name, value in _suspects(model).items() if value not in _NEUTRAL}
    if split and changed:
        return f"its configuration has {changed}, which may change logits after the head"
    return None


def losses_without_logits(
    model: nn.Module, head: nn.Linear, inputs: Mapping[str, Any], score: Score
) -> Tensor:
    """Run the model with its head left out, and return what `score` makes of what reached it.

    Raises:
        UnsupportedModelError: If the head is not called once, or its output is changed in a way
            that is not known.
    """
    owner = _owner(model, head)
    if owner is None:
        hidden_BTD, logit_map, _ = _run(model, head, inputs)
        return score(hidden_BTD, logit_map)
    # Its weight is whole only while the model runs; what follows it is seen when that is over.
    _, logit_map, losses_B = _run(model, head, inputs, lambda hidden: score(hidden, LogitMap()))
    if logit_map != LogitMap():
        raise UnsupportedModelError(
            f"{type(model).__name__} scales or caps the logits after its head, and the head's "
            f"weight is split over ranks; its configuration has {_suspects(model)}. " + _WAY_OUT
        )
    assert losses_B is not None
    return losses_B


def _run(
    model: nn.Module,
    head: nn.Linear,
    inputs: Mapping[str, Any],
    inside: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, LogitMap, Tensor | None]:
    """Return what entered the head, what the model makes of its output, and what `inside` gave.

    The head's call is answered with two rows of known numbers. What the model returns for them
    tells the map that follows the head, whatever its class and configuration say.
    """
    dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
    # The second row shows a cap; neither is symmetric, which would hide a change of order.
    ramps = [torch.linspace(-x, x / 2, head.out_features, dtype=dtype) for x in (2.0, 64.0)]
    probe_12V = torch.stack(ramps)[None].to(head.weight.device)
    own, seen, found = head.__dict__.get("forward"), [], []

    def answer(input: Tensor) -> Tensor:
        seen.append(input)
        if inside is not None:
            with _forward_of(head, own):
                found.append(inside(input))
        return probe_12V.clone()  # the model may work in place

    with ExitStack() as stack:
        stack.enter_context(_forward_of(head, answer))
        if inside is not None:
            stack.enter_context(_also_returning(model, found))
        output = model(**inputs)
    if len(seen) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} called its head {len(seen)} times in one forward pass; the "
            "fused losses need one call. " + _WAY_OUT
        )
    if inside is not None:
        output, *found = output
    logits = output[0] if isinstance(output, tuple) else output.logits
    logit_map = _map_between(probe_12V[0], logits, _caps(model))
    if logit_map is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} changes the logits after its head, by more than a scale and "
            f"a cap of known size; its configuration has {_suspects(model)}. " + _WAY_OUT
        )
    return seen[0], logit_map, found[0] if found else None


def _owner(model: nn.Module, head: nn.Linear) -> nn.Module | None:
    """Return the module whose call gathers the head's weight from other ranks, if one does.

    Raises:
        UnsupportedModelError: If it is another than the model.
    """
    owners = [m for m in model.modules() if isinstance(m, FSDPModule) and head in m.modules()]
    if owners and owners[-1] is not model:
        raise UnsupportedModelError(
            "The head's weight is split over ranks, but not by fully_shard(model) of the model "
            "that was given: the fused losses need it gathered while the model runs. Leave the "
            "head to the model's own fully_shard. Or: " + _WAY_OUT
        )
    return owners[-1] if owners else None


@contextmanager
def _also_returning(model: nn.Module, found: list[Tensor]) -> Iterator[None]:
    """Let the model return what was found as well, so that FSDP2 sees its gradient coming."""
    hook = model.register_forward_hook(lambda _m, _args, output: (output, *found), prepend=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any] | None) -> Iterator[None]:
    """Let `forward` stand in for what a module has now; None for its class's."""
    before = module.__dict__.get("forward")
    _set_forward(module, forward)
    try:
        yield
    finally:
        _set_forward(module, before)


def _set_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is not None:
        module.forward = forward
    elif "forward" in module.__dict__:
        del module.forward


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
    """Return the settings that look as if they changed logits."""
    words = ("logit", "multiplier", "unpadded", "softcap")
    settings = _settings(model).items()
    return {key: value for key, value in settings if any(word in key for word in words)}
