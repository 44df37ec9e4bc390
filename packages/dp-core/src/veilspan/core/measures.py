"""How the squared norms of a micro-batch are taken: exactly, or estimated from Gaussian probes.

Shape letters: B samples, b block means, N columns of a weight, R its rows, k probes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, final

import torch
from torch import Tensor, nn

from veilspan.core.contributions import Contribution, NormChoice, Projection
from veilspan.core.noise import GaussianNoise, new_key
from veilspan.core.norms import compute_dtype, rounding_guard
from veilspan.core.protocols import NoiseSource
from veilspan.core.sketch import Sketch


class Measure(Protocol):
    """Takes the squared norms of one parameter at a time."""

    @property
    def exact(self) -> bool:
        """Whether no norm is estimated."""
        ...

    @property
    def blocks(self) -> int:
        """Block means of an estimate; the largest sum over parameters of them is the norm."""
        ...

    def begin(self) -> None:
        """Begin a micro-batch, which never shares randomness with another."""
        ...

    def sq_norms(self, name: str, part: Contribution) -> Tensor:
        """Return the squared norm of each sample's gradient, `[B, 1]` or `[B, b]` fp64."""
        ...

    def projects(self, name: str) -> bool:
        """Return whether uses of a parameter are added up as projections, not as gradients."""
        ...

    def projection(self, name: str, part: Contribution) -> Projection:
        """Return what one use adds to the projection of a parameter."""
        ...

    def of_projection(self, projection: Projection) -> Tensor:
        """Return the squared norms that the projections of all uses tell, `[B, b]` fp64."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class ExactMeasure:
    """Exact norms; a parameter that is used twice needs its per-sample gradients.

    Args:
        choose: Norm method of a linear map.
    """

    choose: NormChoice

    @property
    def exact(self) -> bool:
        """Return True."""
        return True

    @property
    def blocks(self) -> int:
        """One number is the norm."""
        return 1

    def begin(self) -> None:
        """Do nothing: there is no randomness."""

    def sq_norms(self, name: str, part: Contribution) -> Tensor:
        """Return the exact squared norms, `[B, 1]` fp64."""
        return part.sq_norms(self.choose)[:, None]

    def projects(self, name: str) -> bool:
        """Return False."""
        return False

    def projection(self, name: str, part: Contribution) -> Projection:
        """Raise, as nothing is projected."""
        raise NotImplementedError

    def of_projection(self, projection: Projection) -> Tensor:
        """Raise, as nothing is projected."""
        raise NotImplementedError


@final
@dataclass(kw_only=True)
class SketchedMeasure:
    """Estimates of large weights from Gaussian probes; exact norms of everything else.

    Guarantee:
        The probes of a record are standard normals that no other record, micro-batch or parameter
        has, and that all uses of a parameter share. Block sums are added over parameters before the
        largest is taken. Rounding is guarded as in exact norms.

    Args:
        sketch: Numbers of probes and blocks.
        choose: Exact norm method of a linear map.
        pays: Whether an estimate of a linear map is cheaper than its exact norm.
        owned: Trainable parameters by name.
    """

    sketch: Sketch
    choose: NormChoice
    pays: Callable[[int, int, int], bool]
    owned: Mapping[str, nn.Parameter]
    _stream: NoiseSource = field(init=False, repr=False)
    _micro_batch: int = field(init=False, default=-1)

    def __post_init__(self) -> None:
        self._stream = self.sketch.stream or GaussianNoise(new_key())

    @property
    def exact(self) -> bool:
        """Return False."""
        return False

    @property
    def blocks(self) -> int:
        """Block means of an estimate."""
        return self.sketch.blocks

    def begin(self) -> None:
        """Begin a micro-batch: nobody has had its probes before."""
        self._micro_batch += 1

    def sq_norms(self, name: str, part: Contribution) -> Tensor:
        """Return the estimates `[B, b]`, or exact squared norms `[B, 1]` where those are cheap."""
        if self.projects(name) and part.worth_projecting(self.pays):
            return self.of_projection(self.projection(name, part))
        return part.sq_norms(self.choose)[:, None]

    def projects(self, name: str) -> bool:
        """Return whether probes are fewer than the rows and the columns of a parameter."""
        return self.sketch.projects(self.owned[name])

    def projection(self, name: str, part: Contribution) -> Projection:
        """Return gradient times probes, `[B, R, k]`, of one use."""
        parameter = self.owned[name]
        columns = parameter.numel() // len(parameter)
        probes_BNk = torch.zeros(
            (part.size, columns, self.sketch.probes),
            dtype=compute_dtype(parameter.dtype),
            device=parameter.device,
        )
        # the name has a slash, which no parameter's has
        address = {"step": self._micro_batch, "name": f"probes/{name}", "offset": 0}
        self._stream.add_(probes_BNk, stddev=1.0, **address)
        return part.project(probes_BNk)

    def of_projection(self, projection: Projection) -> Tensor:
        """Return the block means of ‖G z‖² with a guard for rounding, `[B, b]` fp64."""
        values = projection.values_BRk
        width = self.sketch.probes // self.blocks
        sq_Bk = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64).square()
        means_Bb = sq_Bk.unflatten(1, (self.blocks, width)).mean(2)
        guard = rounding_guard(projection.terms, values.dtype)
        return means_Bb + (guard * projection.size_B).square()[:, None]
