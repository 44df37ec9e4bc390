"""What a model holds: its trainable parameters, who owns them, and what must be refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from veilspan.core.errors import UnsupportedModelError
from veilspan.core.protocols import NormKernel
from veilspan.core.rules import RecordsAlone, Rule, find_rule, makes_one_prompt

_WRAPPERS = re.compile(r"(_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module)\.")


@dataclass(frozen=True, kw_only=True)
class OwnedModule:
    """A module that owns trainable parameters itself, with the rule found for it, if any."""

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    rule: Rule | RecordsAlone | None


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return each trainable parameter once, by a name that wrappers do not change.

    Raises:
        UnsupportedModelError: If nothing is trainable, a parameter is complex, or a raw gradient
            would reach a hook, or a tensor that is no parameter.
    """
    owned = {_WRAPPERS.sub("", n): p for n, p in model.named_parameters() if p.requires_grad}
    if not owned:
        raise UnsupportedModelError(
            "The model has no trainable parameter (requires_grad=True). Unfreeze what is to be "
            "trained before PrivateStep is built."
        )
    _refuse_other_leaves(model, {id(parameter) for parameter in owned.values()})
    for name, parameter in owned.items():
        if parameter.is_complex():
            raise UnsupportedModelError(
                f"Parameter '{name}' is {parameter.dtype}; norms and noise are those of real "
                "numbers. Train its real and imaginary part, as torch.view_as_real gives them."
            )
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise UnsupportedModelError(
                f"Parameter '{name}' has a post-accumulate-grad hook, which would see its gradient "
                "before clipping and noise (an optimizer fused into the backward pass, say). "
                "Remove the hook and step the optimizer after the `with step:` block."
            )
        if parameter._backward_hooks:
            raise UnsupportedModelError(
                f"Parameter '{name}' has a gradient hook (register_hook), which would see its "
                "gradient before clipping and noise. Remove the hook; read parameter.grad after "
                "the `with step:` block."
            )
    return owned


def _refuse_other_leaves(model: nn.Module, owned: set[int]) -> None:
    """Refuse tensors of a module that would get a raw gradient, since they are no parameters."""
    for path, module in model.named_modules():
        for name, value in (*vars(module).items(), *module._buffers.items()):
            leaf = isinstance(value, Tensor) and value.requires_grad and value.is_leaf
            if leaf and id(value) not in owned:
                raise UnsupportedModelError(
                    f"Tensor '{f'{path}.{name}'.lstrip('.')}' requires a gradient but is no "
                    "parameter, so its gradient would be neither clipped nor noised. Make it an "
                    "nn.Parameter, or call requires_grad_(False) on it."
                )


def refuse_cross_sample_layers(model: nn.Module) -> None:
    """Refuse layers that mix records or keep raw statistics of them.

    Raises:
        UnsupportedModelError: For BatchNorm in any form and norms that track running statistics.
    """
    for name, module in model.named_modules():
        tracks = isinstance(module, _NormBase) and module.track_running_stats
        if isinstance(module, _BatchNorm) or tracks:
            raise UnsupportedModelError(
                f"Module '{name}' is {type(module).__name__}: it mixes the records of a batch or "
                "keeps their statistics without noise, so no record's influence is bounded. "
                "Replace it by LayerNorm, RMSNorm or GroupNorm."
            )


def owned_modules(model: nn.Module, kernel: NormKernel | None) -> Iterator[OwnedModule]:
    """Yield every module that owns trainable parameters, with its rule or None.

    A module that cannot be tapped part by part stands for all that it contains.

    Args:
        model: The model.
        kernel: Arithmetic for the rules; None looks for no rule, where no tap can be used.
    """
    whole: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(outer) for outer in whole):
            continue
        rule = None if kernel is None else find_rule(name, module, kernel)
        contains = isinstance(rule, RecordsAlone) or makes_one_prompt(module)
        own = {n: p for n, p in module.named_parameters(recurse=contains) if p.requires_grad}
        if not own:
            continue
        if contains:
            whole.append(f"{name}." if name else "")
        yield OwnedModule(
            name=_WRAPPERS.sub("", f"{name}.").removesuffix("."),
            module=module,
            parameters=own,
            rule=rule,
        )
