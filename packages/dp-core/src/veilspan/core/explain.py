"""A plan in words: which strategy and norm method run, and why."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from veilspan.core.plan import StrategyPlan
from veilspan.core.rules.linear import LinearRule
from veilspan.core.sketch import Sketch
from veilspan.core.survey import OwnedModule


def explain(plan: StrategyPlan, lengths: Mapping[str, int]) -> str:
    """Return the choices of a plan: a line per strategy, then a line per module.

    Args:
        plan: The plan, after some micro-batches.
        lengths: Tokens of the last input of each tapped module, by module name.
    """
    # one line a strategy, for its largest shape: how full the last micro-batch was is private
    largest = {plan.chosen[shape].name: shape for shape in sorted(plan.chosen)}
    lines = [
        f"micro-batch of {size} x {length} tokens: {name} ({plan.chosen[size, length].reason})"
        for name, (size, length) in largest.items()
    ] or [f"backward: {plan.backward}; decided at the first micro-batch"]
    for shape in largest.values():
        if len(plan.chosen[shape].forecasts) > 1:
            lines += [f"  forecast for {shape[0]} x {shape[1]}, beyond an ordinary backward:"]
            lines += [f"    {forecast}" for forecast in plan.chosen[shape].forecasts]
    width = max(len(module.name) for module in plan.modules)
    for module in plan.modules:
        lines.append(f"  {module.name:<{width}}  {_path(plan, module, lengths)}")
    return "\n".join(lines)


def _path(plan: StrategyPlan, module: OwnedModule, lengths: Mapping[str, int]) -> str:
    kind = module.rule.name if module.rule else type(module.module).__name__
    numel = sum(p.numel() for p in module.parameters.values())
    text = f"{kind:<20} {numel:>12,} elements"
    strategies = {choice.name for choice in plan.chosen.values()}
    if strategies & {"two_pass", "bookkeeping"} and isinstance(module.rule, LinearRule):
        weight: torch.Tensor = module.module.weight  # pyright: ignore[reportAssignmentType]
        text += f"  norm {_method(plan, weight, lengths.get(module.name, 0))}"
    return text


def _method(plan: StrategyPlan, weight: torch.Tensor, length: int) -> str:
    shape = (length, weight.shape[1], weight.shape[0])
    everywhere = plan.degree > 1 and isinstance(plan.norms, Sketch) and plan.norms.projects(weight)
    return "sketch" if everywhere or plan.sketch_pays(*shape) else plan.norm_method(*shape)
