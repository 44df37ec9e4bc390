"""Layer rules: gradients by hand of the layers that a transformer is made of, and of your own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import nn
from torch.utils.hooks import RemovableHandle

from veilspan.core.protocols import NormKernel
from veilspan.core.rules.alone import (
    RecordsAlone,
    is_adapted_parameter,
    makes_one_prompt,
    obstacle_to_taps,
    whole_rule,
)
from veilspan.core.rules.base import Rule
from veilspan.core.rules.convolution import convolution_rule
from veilspan.core.rules.embedding import embedding_rule
from veilspan.core.rules.linear import linear_rule
from veilspan.core.rules.norm import norm_rule
from veilspan.core.rules.probe import differentiates_as, trains_inside, whole_parameters

__all__ = [
    "RecordsAlone",
    "Rule",
    "affine_rule",
    "find_rule",
    "is_adapted_parameter",
    "makes_one_prompt",
    "obstacle_to_taps",
    "register_rule",
]

MakeRule = Callable[[nn.Module, NormKernel], Rule | RecordsAlone | None]

_registered: OrderedDict[int, tuple[type[nn.Module], MakeRule]] = OrderedDict()


def register_rule(kind: type[nn.Module], make: MakeRule | RecordsAlone) -> RemovableHandle:
    """Say how modules of one type get their per-sample gradients; before Veilspan's own rules.

    Applies to every `PrivateStep` built afterwards, to `kind` and its subclasses; of several
    registrations the last one that gives a rule wins. A wrong rule breaks privacy without a word:
    hold it to `veilspan.core.testing.assert_rule_matches`.

    Args:
        kind: Type of the modules.
        make: `RecordsAlone()` for modules that keep records apart, whatever they compute; or a
            function of the module and the step's arithmetic of linear maps that returns a `Rule`,
            or None to pass.

    Returns:
        A handle whose `remove()` takes the registration back.

    Raises:
        TypeError: If `kind` is not a type of modules, or `make` can make no rule.

    Examples:
        >>> from torch import nn
        >>> from veilspan.core import RecordsAlone, register_rule
        >>> handle = register_rule(nn.Bilinear, RecordsAlone())
        >>> handle.remove()
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind is {kind!r}; it must be a subclass of torch.nn.Module.")
    if not (isinstance(make, RecordsAlone) or callable(make)):
        raise TypeError(
            f"make is {make!r}; it must be RecordsAlone(), or a function (module, kernel) -> Rule."
        )
    handle = RemovableHandle(_registered)
    given = make
    maker = (lambda module, kernel: given) if isinstance(given, RecordsAlone) else given
    _registered[handle.id] = (kind, maker)
    return handle


def find_rule(name: str, module: nn.Module, kernel: NormKernel) -> Rule | RecordsAlone | None:
    """Return the rule that gives per-sample gradients of `module`, or None when no rule does.

    Args:
        name: Module path, for messages.
        module: A module, with or without trainable parameters.
        kernel: Arithmetic of linear maps.

    Raises:
        UnsupportedModelError: If the module has an option that breaks per-record clipping.
    """
    for kind, make in reversed(_registered.values()):
        rule = make(module, kernel) if isinstance(module, kind) else None
        if rule is not None:
            return rule
    if obstacle_to_taps(module) is not None:
        return None
    whole = whole_rule(module)
    own = {n for n, p in module.named_parameters(recurse=False) if p.requires_grad}
    if whole is not None or not own:
        return whole
    # Patched, or with weights further inside, or with one that is computed from others: neither its
    # class nor an experiment says what it computes once those have been trained.
    if "forward" in vars(module) or not own <= {"weight", "bias"} or trains_inside(module):
        return RecordsAlone()
    with whole_parameters(module):
        return affine_rule(name, module, kernel) or convolution_rule(module) or RecordsAlone()


def affine_rule(name: str, module: nn.Module, kernel: NormKernel) -> Rule | None:
    """Return the rule of an embedding, a linear map or an elementwise-affine norm, else None."""
    table = embedding_rule(module, name, kernel)
    linear = None if table else linear_rule(module, kernel)
    if linear is not None or type(module).forward is nn.Embedding.forward:
        return linear or table
    rule = table or norm_rule(module, kernel)
    return rule if rule is not None and differentiates_as(module, rule) else None
