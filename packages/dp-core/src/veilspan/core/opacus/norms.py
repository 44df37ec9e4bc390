"""Our per-sample norms at work in one engine of Opacus' ghost clipping."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any, Self, final

from veilspan.core.errors import UnsupportedModelError
from veilspan.core.norms import BlockedKernel
from veilspan.core.opacus.installed import opacus
from veilspan.core.opacus.samplers import REGISTRIES, Samplers, find_rules
from veilspan.core.plan import NORM_METHODS
from veilspan.core.protocols import NormKernel
from veilspan.core.rules.norm import NormRule


def use_veilspan_norms(
    engine: object, *, norms: str = "auto", kernel: NormKernel | None = None
) -> OpacusNorms:
    r"""Give one Opacus ghost-clipping engine our per-sample norms, until `remove()`.

    Opacus squares the norm of a linear layer through two $T \times T$ Gram matrices per sample;
    ours works in blocks, directly or by Gram tiles, whichever the cost model finds cheaper for the
    layer. Linear, Conv1D, Embedding and every elementwise-affine norm, those of Hugging Face
    included, are recognised by what they compute; every other layer keeps Opacus' rule, as does a
    class for which you registered a sampler of your own.

    Args:
        engine: A `GradSampleModuleFastGradientClipping`, which `PrivacyEngine.make_private` returns
            with `grad_sample_mode="ghost"`, or its variant that does not wrap the model.
        norms: `auto`, `direct` or `gram`: norm method of linear maps.
        kernel: Per-sample arithmetic of linear maps; blocked PyTorch by default.

    Returns:
        A handle that tells which layers took our rules and gives the engine its own back.

    Raises:
        TypeError: If `engine` is not a ghost-clipping engine on one device.
        ValueError: If an option is outside of its range, or the engine does no ghost clipping.
        UnsupportedModelError: If no layer has a rule of ours, or an embedding has an option that
            breaks clipping per record.
        ImportError: If Opacus is missing or older than 1.6.

    Guarantee:
        The norm of each layer that took our rule is rounded up and guarded against tokens that
        cancel, so it is not below that of the gradient which Opacus sums in fp32; an empty batch is
        a step. In bf16 and fp16 norms are fp32, but Opacus' own sum rounds in the model's dtype.
        Noise, sampling, accounting and all that is not a layer's norm stay Opacus' own.

    Examples:
        >>> from torch import nn
        >>> from opacus.grad_sample import GradSampleModuleFastGradientClipping
        >>> from veilspan.core.opacus import use_veilspan_norms
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3))
        >>> engine = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0)
        >>> with use_veilspan_norms(engine) as bridge:
        ...     print(bridge.explain())
        0  embedding
        1  linear
    """
    ghost = _require_ghost(engine)
    if norms not in ("auto", *NORM_METHODS):
        raise ValueError(f"norms is {norms!r}; it must be one of {('auto', *NORM_METHODS)}.")
    if not isinstance(kernel, NormKernel | None):
        raise TypeError(
            f"kernel is {type(kernel).__name__}; it must have the methods of "
            "veilspan.core.protocols.NormKernel. Leave it out for blocked PyTorch."
        )
    return OpacusNorms(ghost, norms=norms, kernel=kernel or BlockedKernel())


@final
class OpacusNorms:
    """Our rules at work in one Opacus engine; a context manager that removes them at its end.

    Built by `use_veilspan_norms`.

    Args:
        engine: The ghost-clipping engine.
        norms: `auto`, `direct` or `gram`.
        kernel: Per-sample arithmetic of linear maps.
    """

    def __init__(self, engine: Any, *, norms: str, kernel: NormKernel) -> None:
        names = {module: name for name, module in engine._module.named_modules()}
        hooked = {module: names[module] for module in engine.iterate_submodules(engine._module)}
        found = find_rules(engine, hooked, kernel)
        if not found:
            raise UnsupportedModelError(
                "No trainable layer of the engine's model is a Linear, Conv1D, Embedding or "
                "elementwise-affine norm that Opacus hooks, so there is no norm to replace. Use "
                "Opacus without the bridge."
            )
        self._layers = {name: found.get(module) for module, name in hooked.items()}
        self._engine = engine
        samplers = Samplers(rules=found, method=norms, kernel=kernel)
        ours: dict[str, dict[type, Callable[..., Any]]] = {name: {} for name in REGISTRIES}
        for module, rule in found.items():
            kind = type(module)
            # Opacus refuses a second use of a layer that has a norm sampler, and forms the gradient
            # of one that has none: a vector is small, so a norm that is used twice keeps working.
            if isinstance(rule, NormRule) and kind not in engine.NORM_SAMPLERS:
                ours["GRAD_SAMPLERS"][kind] = samplers.gradients
            else:
                ours["NORM_SAMPLERS"][kind] = samplers.norms
        self._before = {name: vars(engine).get(name) for name in REGISTRIES}
        for name in REGISTRIES:  # found before the class's own, which stays as it is
            setattr(engine, name, _Overlay(ours[name], getattr(engine, name)))

    def __enter__(self) -> Self:
        """Return the handle."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the engine its own rules back."""
        self.remove()

    @property
    def layers(self) -> Mapping[str, str]:
        """Rule in charge of each trainable module, by its path: a family of ours, or `opacus`."""
        return {name: rule.name if rule else "opacus" for name, rule in self._layers.items()}

    def explain(self) -> str:
        """Return one line per trainable module: its path, then the rule in charge of it."""
        width = max(len(name) for name in self.layers)
        return "\n".join(f"{name:<{width}}  {rule}" for name, rule in self.layers.items())

    def remove(self) -> None:
        """Give the engine its own rules back; a second call changes nothing."""
        for name, before in self._before.items():
            if before is None:
                delattr(self._engine, name)
            else:
                setattr(self._engine, name, before)
        self._before = {}


class _Overlay(ChainMap[type, Callable[..., Any]]):
    """A registry of one engine: ours before Opacus' own, in which later entries still show."""


def _require_ghost(engine: object) -> Any:
    """Return `engine` if it clips by ghost norms on one device.

    Raises:
        TypeError: Naming what was given and how to get an engine.
        ValueError: If it was built to form per-sample gradients, or is bridged already.
    """
    grad_sample = opacus("grad_sample")
    made_by = (
        "GradSampleModuleFastGradientClipping, which PrivacyEngine.make_private(..., "
        'grad_sample_mode="ghost") returns first'
    )
    sharded = (
        grad_sample.GradSampleHooksFastGradientClippingFSDP,
        grad_sample.GradSampleHooksFastGradientClippingTP,
    )
    if isinstance(engine, sharded):
        raise TypeError(
            f"engine is {type(engine).__name__}, whose parameters are sharded; it must be a "
            f"{made_by}. For sharded models use PrivateStep with shards=..."
        )
    if not isinstance(engine, grad_sample.GradSampleHooksFastGradientClipping):
        raise TypeError(f"engine is {type(engine).__name__}; it must be a {made_by}.")
    ghost: Any = engine
    if not ghost.use_ghost_clipping or ghost.force_functorch:
        raise ValueError(
            f"engine has use_ghost_clipping={ghost.use_ghost_clipping} and force_functorch="
            f"{ghost.force_functorch}, so it never asks for norms. Build it with "
            "use_ghost_clipping=True and force_functorch=False, Opacus' defaults."
        )
    if isinstance(vars(ghost).get(REGISTRIES[0]), _Overlay):
        raise ValueError(
            "engine already uses Veilspan's norms. Call remove() on the handle that the first "
            "use_veilspan_norms returned."
        )
    return ghost
