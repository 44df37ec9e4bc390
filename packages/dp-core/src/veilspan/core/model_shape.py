"""What the cost model needs to know of a model, from its modules and clipping groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from veilspan.core.cost import ModelShape
from veilspan.core.groups import Groups
from veilspan.core.rules import RecordsAlone
from veilspan.core.rules.embedding import EmbeddingRule
from veilspan.core.rules.linear import LinearRule
from veilspan.core.sketch import Sketch
from veilspan.core.survey import OwnedModule, trainable_parameters


def shape_of(
    model: nn.Module,
    modules: Sequence[OwnedModule],
    groups: Groups,
    sketch: Sketch | None,
) -> ModelShape:
    """Return what the cost model needs of a model; a tied weight counts once per use.

    Args:
        model: The model.
        modules: Modules that own trainable parameters, with their rules.
        groups: Clipping groups.
        sketch: How norms are estimated; None where they are exact.
    """
    names = {id(p): name for name, p in trainable_parameters(model).items()}
    linears, features, alone = [], [0] * len(groups), [0] * len(groups)
    uses = Counter(id(p) for module in modules for p in module.parameters.values())
    elements = {id(p): p.numel() for module in modules for p in module.parameters.values()}
    projected = {
        id(p)
        for module in modules
        for p in module.parameters.values()
        if sketch is not None and sketch.projects(p)
    }
    tables: list[tuple[int, int]] = []
    for module in modules:
        if isinstance(module.rule, RecordsAlone):
            for parameter in module.parameters.values():
                alone[groups.index[names[id(parameter)]]] += parameter.numel()
        weight = module.parameters.get("weight")
        if isinstance(module.rule, EmbeddingRule) and weight is not None:
            tables.append((len(weight), weight.shape[1]))
        if isinstance(module.rule, LinearRule) and weight is not None:
            outputs, inputs = weight.shape
            linears.append((inputs, outputs))
            features[groups.index[names[id(weight)]]] += inputs + outputs
    return ModelShape(
        linears=tuple(linears),
        parameters=sum(elements.values()),
        largest=max(_elements(m) for m in modules),
        features=max(features),
        tables=tuple(tables),
        layered=_end_within_layers(groups, modules, names),
        tied=sum(elements[p] for p, count in uses.items() if count > 1 and p not in projected),
        alone=max((_elements(m) for m in modules if isinstance(m.rule, RecordsAlone)), default=0),
        alone_in_group=max(alone),
        gradient_bytes=max(p.element_size() for m in modules for p in m.parameters.values()),
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        estimated=sketch is not None,
    )


def _elements(module: OwnedModule) -> int:
    return sum(p.numel() for p in module.parameters.values())


def _end_within_layers(
    groups: Groups, modules: Sequence[OwnedModule], names: Mapping[int, str]
) -> bool:
    """Return whether every group lies within one module, or is one parameter that modules share."""
    seats: dict[int, set[str]] = {}
    for module in modules:
        for parameter in module.parameters.values():
            seats.setdefault(groups.index[names[id(parameter)]], set()).add(module.name)
    return all(len(at) == 1 or len(groups.members(group)) == 1 for group, at in seats.items())
