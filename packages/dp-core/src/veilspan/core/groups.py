"""Who shares a clipping threshold, and which part of the total each group may use.

A clipping says how parameters are grouped; `resolve` applies it to a model and returns `Groups`,
the thresholds in numbers. B samples, M groups.
"""

from __future__ import annotations

import fnmatch
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor

from veilspan.core.adaptive import PrivateQuantile
from veilspan.core.clipping import Automatic, Clip, Rule
from veilspan.core.names import block_of, layer_of, nearest, require_same_names

Budgets = Literal["equal", "dimension"] | Mapping[str, float]

_SMALLEST_FACTOR = torch.finfo(torch.float32).tiny
_SMALLEST_SQUARE = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups of one model: their thresholds, and the group of each parameter.

    Args:
        names: Name of each group, in the order of the parameters.
        clip_norms: Threshold C_m of each group.
        index: Position of a parameter's group, by parameter name.
        rule: How a norm becomes a factor.

    Guarantee:
        Adding or removing one record changes the clipped sum by at most `sensitivity` in L2 norm.
    """

    names: tuple[str, ...]
    clip_norms: tuple[float, ...]
    index: Mapping[str, int]
    rule: Rule

    def __len__(self) -> int:
        """Return the number of groups, M."""
        return len(self.names)

    @property
    def sensitivity(self) -> float:
        """√ΣC_m², the L2 sensitivity of the clipped sum under adding or removing one record."""
        return math.hypot(*self.clip_norms)

    @property
    def thresholds(self) -> dict[str, float]:
        """Threshold C_m of each group by its name."""
        return dict(zip(self.names, self.clip_norms, strict=True))

    def members(self, group: int) -> list[str]:
        """Return the names of the parameters of one group."""
        return [name for name, position in self.index.items() if position == group]

    def factors(self, group: int, sq_norm_B: Tensor, *, slack: float) -> Tensor:
        """Return the factor of each sample for one group, `[B]` fp64, rounded toward smaller.

        Args:
            group: Position of the group.
            sq_norm_B: Squared norms of the samples' gradients within the group, `[B]`, fp64.
            slack: Relative bound on the error of the norm against the numbers that are summed.

        Returns:
            Factors with `factor · true norm ≤ C_m`; 0 for a norm that is not finite, and for one so
            large that fp32 holds no normal factor for it: such factors could round up.
        """
        sq_norm_B = sq_norm_B.to(torch.float64)
        # Below the normal numbers a square has lost digits, and its root could be too small.
        norm_B = torch.where(sq_norm_B > 0, sq_norm_B.clamp(min=_SMALLEST_SQUARE), sq_norm_B).sqrt()
        clip_norm = self.clip_norms[group]
        if math.isinf(clip_norm):
            factor_B = torch.ones_like(norm_B)
        else:
            factor_B = self.rule.factors(norm_B, clip_norm * (1.0 - slack))
        usable_B = norm_B.isfinite() & (factor_B >= _SMALLEST_FACTOR)
        return torch.where(usable_B, factor_B, 0.0)


@dataclass(frozen=True, kw_only=True)
class Clipping(ABC):
    """Groups times rule times budgets.

    Args:
        clip_norm: Total threshold C = √ΣC_m², the L2 sensitivity; positive. Infinity clips nothing
            and is allowed only where the noise multiplier is 0.
        rule: How a norm becomes a factor.
        budgets: How C is divided among M groups: `equal`, C/√M each; `dimension`, in proportion to
            the square root of a group's number of elements; or a number for every group by name,
            to which the C_m are proportional (the C_m themselves where √ΣC_m² is `clip_norm`).
        adaptive: Moves each threshold toward a private quantile of its norms from one logical batch
            to the next; the thresholds above are then those of the first.

    Raises:
        ValueError: If a number is outside of its range.

    Guarantee:
        Adding or removing one record changes the clipped sum by at most the sensitivity of the
        resolved groups, which is `clip_norm` until a private quantile moves it.
    """

    clip_norm: float
    rule: Rule = field(default_factory=Clip)
    budgets: Budgets = "equal"
    adaptive: PrivateQuantile | None = None

    def __post_init__(self) -> None:
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm is {self.clip_norm}; it must be a positive number.")
        if isinstance(self.budgets, str) and self.budgets not in ("equal", "dimension"):
            raise ValueError(
                f"budgets is {self.budgets!r}; it must be 'equal', 'dimension' or a positive "
                "number for every group by name."
            )
        if self.adaptive is not None and isinstance(self.rule, Automatic):
            raise ValueError(
                "adaptive is given with rule=Automatic(...), which has no threshold that norms "
                "stay below. Use rule=Clip(), or no adaptive."
            )
        if self.adaptive is not None and math.isinf(self.clip_norm):
            raise ValueError("adaptive needs a finite clip_norm to start from.")

    @abstractmethod
    def group_of(self, parameter: str) -> str | None:
        """Return the name of a parameter's group; None if the parameter is in no group."""

    def resolve(self, sizes: Mapping[str, int]) -> Groups:
        """Return the groups of a model.

        Args:
            sizes: Number of elements of each trainable parameter, by name.

        Raises:
            ValueError: If a parameter is in no group, or the budgets do not fit the groups.
        """
        found = {name: self.group_of(name) for name in sizes}
        outside = [name for name, group in found.items() if group is None]
        if outside:
            raise ValueError(
                f"Parameter '{outside[0]}' is in no group ({len(outside)} of {len(sizes)} are "
                "not), so nothing would bound its gradient. Add a pattern that covers it, such "
                "as {'rest': '*'} at the end, or freeze it."
            )
        names = tuple(dict.fromkeys(group for group in found.values() if group is not None))
        index = {name: names.index(group) for name, group in found.items() if group is not None}
        shares = self._shares(names, index, sizes)
        total = math.hypot(*shares)
        return Groups(
            names=names,
            clip_norms=tuple(self.clip_norm * share / total for share in shares),
            index=index,
            rule=self.rule,
        )

    def _shares(
        self, names: Sequence[str], index: Mapping[str, int], sizes: Mapping[str, int]
    ) -> list[float]:
        if self.budgets == "equal":
            return [1.0] * len(names)
        if self.budgets == "dimension":
            elements = [0] * len(names)
            for name, group in index.items():
                elements[group] += sizes[name]
            return [math.sqrt(count) for count in elements]
        assert not isinstance(self.budgets, str)
        require_same_names(self.budgets, names)
        wrong = [n for n in names if not 0 < self.budgets[n] < math.inf]
        if wrong:
            raise ValueError(
                f"budgets[{wrong[0]!r}] is {self.budgets[wrong[0]]}; it must be a positive number."
            )
        return [float(self.budgets[name]) for name in names]


@final
@dataclass(frozen=True, kw_only=True)
class Flat(Clipping):
    """One threshold for the whole gradient of a sample.

    Args:
        clip_norm: The threshold C, and the L2 sensitivity of the sum; positive.
        rule: How a norm becomes a factor: `Clip()`, or `Automatic()` without a threshold to tune.
        budgets: Without effect: one group has all of C.
        adaptive: A `PrivateQuantile` of the norms that the threshold follows; by default fixed.

    Examples:
        >>> Flat(clip_norm=1.0).resolve({"up.weight": 12, "down.weight": 12}).clip_norms
        (1.0,)
    """

    def group_of(self, parameter: str) -> str:
        """Return `all` for every parameter."""
        return "all"


@final
@dataclass(frozen=True, kw_only=True)
class PerBlock(Clipping):
    """One threshold for each numbered block, such as `model.layers.3`; other layers on their own.

    Args:
        clip_norm: Total C = √ΣC_m², the L2 sensitivity; positive.
        budgets: Part of each block: `equal`, `dimension`, or numbers by name, as for `Clipping`.
        rule: As for `Flat`.
        adaptive: As for `Flat`.

    Source: Bu et al. (2023), https://arxiv.org/abs/2310.19215.

    Examples:
        >>> sizes = {"embed.weight": 8, "layers.0.up.weight": 8, "layers.0.down.weight": 8}
        >>> PerBlock(clip_norm=1.0).resolve(sizes).names
        ('embed', 'layers.0')
    """

    def group_of(self, parameter: str) -> str:
        """Return the path up to the first number, or the layer of a parameter outside of blocks."""
        return block_of(parameter)


@final
@dataclass(frozen=True, kw_only=True)
class PerLayer(Clipping):
    """One threshold for each layer: weight and bias of one module together.

    Args:
        clip_norm: Total C = √ΣC_m², the L2 sensitivity; positive.
        budgets: Part of each layer: `equal`, `dimension`, or numbers by name, as for `Clipping`.
        rule: As for `Flat`.
        adaptive: As for `Flat`.

    Source: He et al. (2022), https://arxiv.org/abs/2212.01539.

    Examples:
        >>> sizes = {"up.weight": 12, "up.bias": 4, "down.weight": 8}
        >>> groups = PerLayer(clip_norm=1.0).resolve(sizes)
        >>> groups.names, round(groups.clip_norms[0], 4)
        (('up', 'down'), 0.7071)
    """

    def group_of(self, parameter: str) -> str:
        """Return the path of the module that owns the parameter."""
        return layer_of(parameter)


@final
@dataclass(frozen=True, kw_only=True)
class PerParameter(Clipping):
    """One threshold for each parameter tensor.

    Args:
        clip_norm: Total C = √ΣC_m², the L2 sensitivity; positive.
        budgets: Part of each tensor: `equal`, `dimension`, or numbers by name, as for `Clipping`.
        rule: As for `Flat`.
        adaptive: As for `Flat`.
    """

    def group_of(self, parameter: str) -> str:
        """Return the parameter's own name."""
        return parameter


@final
@dataclass(frozen=True, kw_only=True)
class ByPattern(Clipping):
    """Groups of your own, by shell patterns on parameter names; the first that matches wins.

    Args:
        patterns: Patterns of each group, by group name; together they must cover every trainable
            parameter, and each must match one.
        clip_norm: As for `PerLayer`.
        budgets: As for `PerLayer`.
        rule: As for `PerLayer`.
        adaptive: As for `PerLayer`.

    Examples:
        >>> clipping = ByPattern(clip_norm=1.0, patterns={"mlp": "*.mlp.*", "rest": "*"})
        >>> clipping.group_of("layers.0.mlp.up_proj.weight")
        'mlp'
    """

    patterns: Mapping[str, str | Sequence[str]]

    def group_of(self, parameter: str) -> str | None:
        """Return the first group one of whose patterns matches; None if there is none."""
        for group, patterns in self.patterns.items():
            if any(fnmatch.fnmatchcase(parameter, pattern) for pattern in _listed(patterns)):
                return group
        return None

    def resolve(self, sizes: Mapping[str, int]) -> Groups:
        """Return the groups of a model.

        Raises:
            ValueError: If a pattern matches no parameter, a parameter is in no group, or the
                budgets do not fit the groups.
        """
        # Overrides, since only here can a name be wrong and match nothing.
        for group, patterns in self.patterns.items():
            for pattern in _listed(patterns):
                if not fnmatch.filter(sizes, pattern):
                    raise ValueError(
                        f"Pattern {pattern!r} of group {group!r} matches no trainable parameter."
                        f"{nearest(pattern, sizes)}"
                    )
        return super().resolve(sizes)


def _listed(patterns: str | Sequence[str]) -> Sequence[str]:
    return [patterns] if isinstance(patterns, str) else patterns
