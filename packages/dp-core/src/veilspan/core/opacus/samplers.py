"""Our layer rules in the form of Opacus' samplers.

A sampler takes a layer, the list of its inputs and the gradient of its output, both with the batch
first. Shape letters: B samples, T tokens, n elements of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veilspan.core.backward.base import FORMED_SLACK
from veilspan.core.contributions import Contribution, NormChoice, RowSums
from veilspan.core.cost import cheaper_norm
from veilspan.core.errors import UnsupportedModelError
from veilspan.core.norms import rounding_guard
from veilspan.core.opacus.installed import opacus
from veilspan.core.products import compute_dtype
from veilspan.core.protocols import NormKernel
from veilspan.core.rates import DeviceRates
from veilspan.core.rules import Rule, affine_rule
from veilspan.core.rules.probe import trains_inside

REGISTRIES = ("NORM_SAMPLERS", "GRAD_SAMPLERS")
"""Attributes of an engine that hold Opacus' samplers by class of layer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Samplers:
    """Opacus' two kinds of sampler, answered by our rules.

    Args:
        rules: The rule of each layer.
        method: Norm method of linear maps: `auto`, `direct` or `gram`.
        kernel: Per-sample arithmetic of linear maps.
    """

    rules: Mapping[nn.Module, Rule]
    method: str
    kernel: NormKernel
    _rates: dict[tuple[torch.device, torch.dtype], DeviceRates] = field(
        init=False, repr=False, default_factory=dict
    )

    def norms(
        self, layer: nn.Module, activations: list[Tensor], backprops: Tensor
    ) -> dict[nn.Parameter, Tensor]:
        """Return the norm of each sample's gradient, `[B]` fp32 or fp64, by parameter."""
        found = {}
        for parameter, part in self._parts(layer, activations, backprops):
            if part is None:
                sq_B = backprops.new_zeros(0)
            else:
                choose = self._chooser(backprops)
                sq_B = part.sq_norms(choose) + _guard(part).square()
            found[parameter] = (sq_B.sqrt() * (1 + FORMED_SLACK)).to(compute_dtype(backprops.dtype))
        return found

    def gradients(
        self, layer: nn.Module, activations: list[Tensor], backprops: Tensor
    ) -> dict[nn.Parameter, Tensor]:
        """Return what Opacus takes the norm of, `[B, n + 1]` fp32 or fp64, by parameter.

        The gradient of each sample, and in the last column the guard of its rounding. Opacus adds
        the uses of a layer before it takes the norm, and guards add up as rounding does.
        """
        found = {}
        for parameter, part in self._parts(layer, activations, backprops):
            if part is None:
                dtype = compute_dtype(backprops.dtype)
                found[parameter] = backprops.new_zeros((0, parameter.numel() + 1), dtype=dtype)
            else:
                rows_Bn = part.per_sample()
                guarded = torch.cat([rows_Bn, _guard(part)[:, None].to(rows_Bn.dtype)], dim=1)
                found[parameter] = guarded * (1 + FORMED_SLACK)
        return found

    def _parts(
        self, layer: nn.Module, activations: list[Tensor], backprops: Tensor
    ) -> Iterator[tuple[nn.Parameter, Contribution | None]]:
        """Yield each trainable parameter with its contribution; None for an empty batch."""
        rule = self.rules.get(layer)
        if rule is None:
            raise UnsupportedModelError(
                f"A {type(layer).__name__} was added to the model after use_veilspan_norms, so no "
                "rule was found for it. Call remove() and use_veilspan_norms(engine) again."
            )
        trainable = [(n, p) for n, p in layer.named_parameters(recurse=False) if p.requires_grad]
        if len(backprops) == 0:
            yield from ((parameter, None) for _, parameter in trainable)
            return
        inputs = rule.saved_input(activations[0], backprops)  # autocast: in the product's dtype
        parts = rule.backward(layer, inputs, backprops, needs_input=False)[1]
        yield from ((parameter, parts[name]) for name, parameter in trainable)

    def _chooser(self, backprops: Tensor) -> NormChoice:
        """Return what names the norm method of one linear map, for gradients like `backprops`."""
        if self.method != "auto":
            return lambda length, inputs, outputs: self.method
        key = (backprops.device, backprops.dtype)
        if key not in self._rates:
            self._rates[key] = DeviceRates.of(*key, self.kernel)
        rates = self._rates[key]
        return lambda length, inputs, outputs: cheaper_norm((length, inputs, outputs), rates)


def find_rules(
    engine: Any, hooked: Mapping[nn.Module, str], kernel: NormKernel
) -> dict[nn.Module, Rule]:
    """Return the rule of each hooked layer that takes one of ours.

    Opacus keeps one sampler per class, so a class takes our rules only if all its layers have one.
    """
    found: dict[nn.Module, Rule] = {}
    kept = {opacus("layers.dp_rnn").RNNLinear}  # one use per token; records move between uses
    for module, name in hooked.items():
        rule = None
        if type(module) not in kept and not _must_stay(engine, module):
            rule = affine_rule(name, module, kernel)
        if rule is None:
            kept.add(type(module))
        else:
            found[module] = rule
    return {module: rule for module, rule in found.items() if type(module) not in kept}


def _must_stay(engine: Any, module: nn.Module) -> bool:
    """Return whether a layer keeps its sampler: it is patched, nested, or sampled by the user."""
    nested = trains_inside(module)
    samplers = [getattr(engine, name).get(type(module)) for name in REGISTRIES]
    theirs = [getattr(sampler, "__module__", "") or "" for sampler in samplers if sampler]
    foreign = not all(place.startswith("opacus.") for place in theirs)
    return nested or foreign or "forward" in vars(module)


def _guard(part: Contribution) -> Tensor:
    """Return a bound on the rounding of each sample's sum, `[B]` or scalar fp64.

    Opacus forms the sum again in its second backward pass, in another order than our norm saw.
    Linear maps and embeddings carry this guard in their squared norms.
    """
    if not isinstance(part, RowSums):
        return torch.zeros((), dtype=torch.float64)
    rows_BTn = part.rows_BTn
    dtype = compute_dtype(rows_BTn.dtype)
    size_B = torch.linalg.vector_norm(rows_BTn, dim=2, dtype=dtype).double().sum(1)
    return rounding_guard(rows_BTn.shape[1], dtype) * size_B
