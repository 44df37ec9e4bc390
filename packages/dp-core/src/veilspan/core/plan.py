"""Which strategy and norm method run, decided per shape of micro-batch, with the reasons."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from veilspan.core.backward import STRATEGIES
from veilspan.core.choice import Choice, choose
from veilspan.core.cost import (
    ModelShape,
    NormCost,
    best_microbatch,
    cheaper_norm,
    forecast_all,
    keeping_pays,
    norm_cost,
    ordinary_seconds,
)
from veilspan.core.errors import UnsupportedModelError
from veilspan.core.groups import Groups
from veilspan.core.measures import Measure
from veilspan.core.model_shape import shape_of
from veilspan.core.protocols import NormKernel, SequenceShards, SplitModel, split_by_record
from veilspan.core.rates import DeviceRates, RatesWhenNeeded, usable_bytes
from veilspan.core.rules import RecordsAlone, obstacle_to_taps
from veilspan.core.sketch import Sketch
from veilspan.core.survey import OwnedModule

_log = logging.getLogger("veilspan.core")

NORM_METHODS = ("direct", "gram")
_IN_PARTS = ("bookkeeping", "per_layer")
_ESTIMATING = ("two_pass", "bookkeeping", "per_layer")


@dataclass(kw_only=True)
class StrategyPlan:
    """Choices for a model: fixed by the user, or made per shape by the cost model.

    Args:
        backward: `auto` or the name of a strategy.
        norms: `auto`, `direct` or `gram`, or how norms are estimated.
        modules: Modules that own trainable parameters, with their rules.
        degree: Ranks that hold one sequence together.
        shape: The model, as the cost model sees it.
        rates: Returns the device, as the cost model sees it.
        memory: Bytes that a strategy may use beyond an ordinary backward pass.
        memory_is_given: Whether the caller set that limit; else it is what seemed to be free.
        split: Whether ranks with other records split the model.
        in_parts: Whether the ranks of `shards` can add up clipped sums, each keeping its part.
    """

    backward: str
    norms: str | Sketch
    modules: Sequence[OwnedModule]
    degree: int
    shape: ModelShape
    rates: Callable[[], DeviceRates]
    memory: float
    memory_is_given: bool = False
    split: bool = False
    in_parts: bool = False
    chosen: dict[tuple[int, int], Choice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        allowed = ("auto", *STRATEGIES)
        if self.backward not in allowed:
            raise ValueError(f"backward is {self.backward!r}; it must be one of {allowed}.")
        allowed = ("auto", *NORM_METHODS)
        if not isinstance(self.norms, Sketch) and self.norms not in allowed:
            raise ValueError(f"norms is {self.norms!r}; it must be one of {allowed} or a Sketch.")
        if self.probes and self.backward not in ("auto", *_ESTIMATING):
            raise ValueError(
                f"backward is {self.backward!r}, which forms every gradient, but norms is "
                f"{self.norms!r}. Use one of {_ESTIMATING}, 'auto', or exact norms."
            )
        if self.adds_in_parts:
            self._require_sums_in_parts()
        if (
            self.split
            or self.probes
            or (self.backward != "auto" and STRATEGIES[self.backward].tapped)
        ):
            self._require_taps()
        if self.backward == "per_layer" and not self.shape.layered:
            raise ValueError(
                "backward='per_layer' clips a layer before the next one has its gradient, so every "
                "group must end within a layer. Use clipping=PerLayer(...) or PerParameter(...), "
                "or backward='bookkeeping'."
            )

    @property
    def probes(self) -> int:
        """Thin products that an estimate takes; 0 where norms are exact."""
        return self.norms.products if isinstance(self.norms, Sketch) else 0

    @property
    def adds_in_parts(self) -> bool:
        """Whether the ranks add up clipped sums in every micro-batch, parameter by parameter."""
        return self.split or (self.degree > 1 and self.probes > 0)

    @property
    def may_tap(self) -> bool:
        """Whether any shape of micro-batch may go through taps."""
        if self.backward == "auto":
            return self._obstacle() is None
        return STRATEGIES[self.backward].tapped

    def tapped(self, size: int, length: int) -> str | None:
        """Return the tapped strategy for `size` records of `length` tokens; None for no taps."""
        name = self.choice(size, length).name
        return name if STRATEGIES[name].tapped else None

    def choice(self, size: int, length: int) -> Choice:
        """Return the strategy for `size` records of `length` tokens, with its reason.

        Decided at the first sight of a shape.
        """
        key = (size, length)
        if key not in self.chosen:
            choice = self._decide(size, length)
            if choice.name not in {known.name for known in self.chosen.values()}:
                _log.info("backward: %s (%s)", choice.name, choice.reason)
            if STRATEGIES[choice.name].tapped:
                self.rates()  # here, in the forward pass: the backward pass knows no autocast
            self.chosen[key] = choice
        return self.chosen[key]

    def best_microbatch(self, length: int, most: int) -> int:
        """Return the smallest micro-batch that takes about the least time per record."""
        if self.backward == "single_sample" or self._obstacle() is not None:
            return 1
        return best_microbatch(length, most, self.shape, self.rates(), self._norm_cost)

    def norm_method(self, length: int, inputs: int, outputs: int) -> str:
        """Return `direct` or `gram` for one exact norm; the cheaper one unless the caller chose."""
        if isinstance(self.norms, str) and self.norms != "auto":
            return self.norms
        return cheaper_norm((length, inputs, outputs), self.rates())

    def sketch_pays(self, length: int, inputs: int, outputs: int) -> bool:
        """Return whether an estimate takes less time than the exact norm."""
        return cheaper_norm((length, inputs, outputs), self.rates(), probes=self.probes) == "sketch"

    def keeping_pays(self, length: int, inputs: int, outputs: int) -> bool:
        """Return whether a layer's factors cost less than each sample's gradient of it."""
        shape = (length, inputs, outputs)
        if self.norms not in ("auto", "gram"):
            return False
        return keeping_pays(shape, self.rates(), self.shape.gradient_bytes)

    def measure(self, owned: Mapping[str, nn.Parameter], shards: SequenceShards) -> Measure:
        """Return what takes squared norms of parameters, given by name."""
        return Measure(
            choose=self.norm_method,
            owned=owned,
            shards=shards,
            sketch=self.norms if isinstance(self.norms, Sketch) else None,
            pays=self.sketch_pays,
            keeping_pays=self.keeping_pays,
        )

    @property
    def _norm_cost(self) -> NormCost:
        norms = self.norms if isinstance(self.norms, str) else "auto"
        return norm_cost(norms, self.rates(), probes=self.probes)

    def path_of(self, parameter: nn.Parameter) -> str:
        """Return the rules that produce a parameter's norm, or the strategy that needs none."""
        if not self.may_tap:
            return "single_sample"
        owners = [m for m in self.modules if any(p is parameter for p in m.parameters.values())]
        kinds = dict.fromkeys(m.rule.name for m in owners if m.rule is not None)
        return " + ".join(kinds)

    def _decide(self, size: int, length: int) -> Choice:
        if self.backward != "auto":
            return Choice(name=self.backward, reason="chosen by the caller")
        if self.adds_in_parts and not self.split:
            return Choice(name="two_pass", reason="ranks add up clipped sums, layer by layer")
        if self.split:  # one choice for every shape, so that ranks cannot differ
            name = "per_layer" if self.shape.layered else "bookkeeping"
            return Choice(name=name, reason="the model is split over ranks with other records")
        obstacle = self._obstacle()
        if obstacle is not None:
            return Choice(name="single_sample", reason=obstacle)
        forecasts = forecast_all(size, length, self.shape, self.rates(), self._norm_cost)
        ordinary = ordinary_seconds(size, length, self.shape, self.rates())
        choice = choose(forecasts, self.memory, ordinary=ordinary)
        if choice is not None:
            return choice
        least = min(forecasts, key=lambda forecast: forecast.bytes)
        if self.memory_is_given:
            raise ValueError(
                f"memory_budget is {self.memory:,.0f} bytes, but no backward strategy serves a "
                f"micro-batch of {size} records with less than {least.bytes:,.0f} ({least.name}): "
                "tied parameters, and modules whose records run alone, keep a gradient per record. "
                "Give memory_budget at least that, or use smaller micro-batches."
            )
        reason = f"takes least memory; {self.memory / 2**20:.0f} MiB were thought to be free"
        return Choice(name=least.name, reason=reason, forecasts=tuple(forecasts))

    def _obstacle(self) -> str | None:
        """Return why taps cannot be used on this model, or None."""
        if self.degree > 1 and not self.probes:
            return f"{self.degree} ranks share each sequence"
        bare = next((m for m in self.modules if m.rule is None), None)
        if bare is not None:
            return f"'{bare.name}' {obstacle_to_taps(bare.module)}"
        return None

    def _require_sums_in_parts(self) -> None:
        """Refuse what cannot add up clipped sums parameter by parameter.

        Raises:
            UnsupportedModelError: Naming the strategy or the module, and the way out.
        """
        if self.split and self.backward not in ("auto", *_IN_PARTS):
            raise UnsupportedModelError(
                f"backward is {self.backward!r}, but the model is split over ranks with other "
                f"records. Use one of {_IN_PARTS}, which add up clipped sums in parts, or 'auto'."
            )
        for owned in self.modules:
            if isinstance(owned.rule, RecordsAlone):
                raise UnsupportedModelError(
                    f"Module '{owned.name}' ({type(owned.module).__name__}) runs its records one "
                    "at a time, but ranks add up clipped sums of its parameters. Freeze it, "
                    "register_rule for its type, or keep model and sequences whole on each rank."
                )

    def _require_taps(self) -> None:
        """Refuse a tapped strategy on a model that has an untappable module.

        Raises:
            UnsupportedModelError: Naming the module, the rule that is missing, and one way out.
        """
        wish, way_out = f"backward={self.backward!r}", "backward='single_sample'"
        if self.probes:
            wish, way_out = f"norms={self.norms!r}", f"exact norms and {way_out}"
        if self.degree > 1 and not (self.probes and self.in_parts):
            raise UnsupportedModelError(
                f"{wish} needs whole sequences on each rank, but {self.degree} ranks share each "
                f"sequence. Use {way_out}."
            )
        for owned in self.modules:
            if owned.rule is None:
                raise UnsupportedModelError(
                    f"Module '{owned.name}' ({type(owned.module).__name__}) "
                    f"{obstacle_to_taps(owned.module)}, so {wish} could not tell records apart. "
                    f"Use {way_out} with micro-batches of one record, or build it with "
                    "batch_first=True if it has that option."
                )


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the caller asks of a plan.

    Args:
        backward: `auto` or the name of a strategy.
        norms: `auto`, `direct` or `gram`, or how norms are estimated.
        memory_budget: Bytes that `auto` may use beyond an ordinary backward pass; None for half of
            what is free.
    """

    backward: str
    norms: str | Sketch
    memory_budget: float | None

    def __post_init__(self) -> None:
        if self.memory_budget is not None and not self.memory_budget >= 0:
            raise ValueError(
                f"memory_budget is {self.memory_budget}; it must be a number of bytes, at least 0."
            )


def plan_for(
    model: nn.Module,
    modules: Sequence[OwnedModule],
    groups: Groups,
    wishes: Wishes,
    shards: SequenceShards,
    kernel: NormKernel,
) -> StrategyPlan:
    """Return the plan of `model` on the device that holds its parameters."""
    sketch = wishes.norms if isinstance(wishes.norms, Sketch) else None
    largest = max(model.parameters(), key=nn.Parameter.numel)
    device, given = largest.device, wishes.memory_budget
    return StrategyPlan(
        backward=wishes.backward,
        norms=wishes.norms,
        modules=modules,
        degree=shards.degree,
        split=split_by_record(shards),
        in_parts=isinstance(shards, SplitModel),
        shape=shape_of(model, modules, groups, sketch),
        rates=RatesWhenNeeded(device=device, dtype=largest.dtype, kernel=kernel),
        memory=usable_bytes(device) if given is None else given,
        memory_is_given=given is not None,
    )
