"""How many units go through the model at once, where the recipe leaves it open."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from veilspan.accounting import PrivacyPlan
from veilspan.core.rates import free_bytes
from veilspan.trainer.recipe import Recipe

_SHARE = 1 / 3
"""Part of the memory that activations may take. The rest is for the backward strategy, which takes
up to half of what is free, and for what no forecast counts."""

PER_UNIT = ("activations", "logits")
"""Purposes in a memory forecast that grow with the micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """A size of micro-batch, with its reason.

    Args:
        size: Units per forward and backward.
        reason: Who or what decided.
    """

    size: int
    reason: str

    def __str__(self) -> str:
        """Return one line of a table."""
        return f"{self.size} at a time ({self.reason})"


def settled_microbatch(recipe: Recipe) -> Microbatch | None:
    """Return the size that follows from the recipe alone; None where it is to be chosen."""
    size = recipe.compute.microbatch_size
    if size != "auto":
        return Microbatch(size=size, reason="set by the recipe")
    if recipe.parallel.context > 1 and recipe.privacy.norm_probes is None:
        return Microbatch(size=1, reason="processes share one sequence at a time")
    if recipe.compute.backward == "single_sample":
        return Microbatch(size=1, reason='backward = "single_sample" takes one at a time')
    return None


def chosen_microbatch(
    recipe: Recipe,
    plan: PrivacyPlan,
    memory: dict[str, int],
    fastest: Callable[[int, int], int],
    device: torch.device,
) -> Microbatch:
    """Return the size that the cost model prefers among those that memory allows.

    Guarantee:
        It depends on the recipe, the number of units and the machine, never on what a unit holds.

    Args:
        recipe: The recipe.
        plan: Its privacy plan.
        memory: Forecast of one process, in bytes by purpose, for micro-batches of one unit.
        fastest: From tokens of a unit and the largest size allowed to the fastest size.
        device: Where it will run; its free memory is looked up.
    """
    per_unit = sum(memory.get(purpose, 0) for purpose in PER_UNIT)
    free = free_bytes(device) // (1 if device.type == "cuda" else recipe.processes)
    assert plan.expected_batch_size is not None  # budget.privacy_plan always sets it
    return fastest_that_fits(
        lambda most: fastest(recipe.data.sequence_length // recipe.parallel.context, most),
        bytes_free=free - (sum(memory.values()) - per_unit),
        bytes_per_unit=per_unit,
        expected=plan.expected_batch_size / recipe.parallel.replicate,
    )


def fastest_that_fits(
    fastest: Callable[[int], int], *, bytes_free: float, bytes_per_unit: int, expected: float
) -> Microbatch:
    """Return the size that `fastest` names under the limits of memory and of the expected batch.

    Args:
        fastest: From the largest size allowed to the fastest size.
        bytes_free: Memory beyond weights, gradients and optimizer.
        bytes_per_unit: Activations of one unit.
        expected: Expected units of a step on this process.
    """
    fitting = max(1, int(_SHARE * bytes_free / bytes_per_unit))
    wanted = max(1, math.ceil(expected))
    limit = f"{fitting} fit into memory" if fitting < wanted else f"a step expects {wanted}"
    size = fastest(min(fitting, wanted))
    return Microbatch(size=size, reason=f"chosen by the cost model; {limit}")
