"""How the squared norms of a micro-batch are taken: exactly, or estimated from Gaussian probes.

Shape letters: B samples, b block means, N columns of a weight, R its rows, k probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor, nn

from veilspan.core.contributions import Contribution, Lookups, NormChoice, OuterProducts
from veilspan.core.cost import table_pays
from veilspan.core.errors import PrivacyError
from veilspan.core.noise import GaussianNoise
from veilspan.core.norms import magnitudes, rounding_guard
from veilspan.core.products import compute_dtype
from veilspan.core.projection import ProbeRows, Projection
from veilspan.core.protocols import NoiseSource, SequenceShards
from veilspan.core.reduction import common_key
from veilspan.core.sketch import Sketch


@dataclass(frozen=True, kw_only=True)
class Squares:
    """Squared norms of one parameter.

    Args:
        values_Bb: Block means of an estimate, `[B, b]`, or one exact number each, `[B, 1]`; fp64.
        rounding_B: Square of a bound on the error of the root of an estimate, fp64; None where
            `values_Bb` holds it.
    """

    values_Bb: Tensor
    rounding_B: Tensor | None = None


@final
@dataclass(kw_only=True)
class Measure:
    """Exact norms; with a sketch, estimates of large weights from Gaussian probes.

    Guarantee:
        The probes of a record are standard normals that no other record, micro-batch or parameter
        has, and that all uses of a parameter, and all ranks of its sequence, share. Projections are
        added over uses and ranks before they are squared, and block sums over parameters before the
        largest is taken. A bound on the rounding is added to the root of the estimate.

    Args:
        choose: Exact norm method of a linear map.
        owned: Trainable parameters by name.
        shards: Who holds the rest of each sequence.
        sketch: Numbers of probes and blocks; None for exact norms.
        pays: Whether an estimate of a linear map is cheaper than its exact norm.
        keeping_pays: Whether its two factors are worth keeping, in place of each sample's gradient.

    Raises:
        PrivacyError: If ranks that hold a sequence together were given different probes.
    """

    choose: NormChoice
    owned: Mapping[str, nn.Parameter]
    shards: SequenceShards
    sketch: Sketch | None = None
    pays: Callable[[int, int, int], bool] = lambda *_: False
    keeping_pays: Callable[[int, int, int], bool] = lambda *_: False
    _stream: NoiseSource | None = field(init=False, repr=False, default=None)
    _salt: str = field(init=False, repr=False, default="")
    _micro_batch: int = field(init=False, default=-1)

    def __post_init__(self) -> None:
        if self.sketch is None:
            return
        device, stream = next(iter(self.owned.values())).device, self.sketch.stream
        # Replicas, or two steps one after the other, may well have been given one stream.
        self._salt = common_key(self.shards, device).hex()
        self._stream = GaussianNoise(common_key(self.shards, device)) if stream is None else stream
        if stream is not None and self.shards.degree > 1:
            _require_common(stream, self.shards, device)

    @property
    def exact(self) -> bool:
        """Return whether no norm is estimated."""
        return self.sketch is None

    @property
    def blocks(self) -> int:
        """Return the block means of an estimate; the largest sum over parameters is the norm."""
        return 1 if self.sketch is None else self.sketch.blocks

    def begin(self) -> None:
        """Begin a micro-batch: nobody has had its probes before."""
        self._micro_batch += 1

    def sq_norms(self, name: str, part: Contribution) -> Squares:
        """Return the estimates, or exact squared norms where those are cheap."""
        if not (self._projects(name) and part.worth_projecting(self.pays)):
            return Squares(values_Bb=part.sq_norms(self.choose)[:, None])
        if not isinstance(part, OuterProducts):
            return self.of_projection(name, self.projection(name, part))
        assert self.sketch is not None
        if self.sketch.basis:
            return self._with_basis(name, part)
        return self._of_rows(name, part, self._probes("probes", name, part.size).rows)

    def worth_keeping(self, part: Contribution) -> bool:
        """Return whether norm and sum from two factors cost less than each sample's gradient."""
        if isinstance(part, Lookups):
            return table_pays(part.grad_BTD.shape[1], part.rows, part.grad_BTD.shape[2])
        return isinstance(part, OuterProducts) and part.worth_projecting(self.keeping_pays)

    def adds_uses(self, name: str) -> bool:
        """Return whether uses of a parameter are added up as projections, not as gradients."""
        return self._projects(name) or self.shards.degree > 1

    def projection(self, name: str, part: Contribution) -> Projection:
        """Return gradient times probes, `[B, R, k]`; the gradient itself, `[B, R, N]`, if exact."""
        if self._projects(name):
            return part.project(self._probes("probes", name, part.size).all())
        whole, parameter = self.nothing(name, part.size), self.owned[name]
        for b, values_RN in enumerate(whole.values_BRk):
            part.sample(b).write(values_RN.view(parameter.shape))
        columns = whole.values_BRk.shape[2]
        rounding = part.project(whole.values_BRk.new_zeros((part.size, columns, 0)))
        return replace(rounding, values_BRk=whole.values_BRk)

    def nothing(self, name: str, size: int) -> Projection:
        """Return the projection of gradients of zero."""
        parameter = self.owned[name]
        kept = parameter.numel() // max(1, len(parameter))
        if self.sketch is not None and self._projects(name):
            kept = self.sketch.probes
        dtype, device = compute_dtype(parameter.dtype), parameter.device
        return Projection(
            values_BRk=torch.zeros((size, len(parameter), kept), dtype=dtype, device=device),
            size_B=torch.zeros(size, dtype=torch.float64, device=device),
            terms=0,
        )

    def of_projection(self, name: str, projection: Projection) -> Squares:
        """Return the block means of ‖G z‖², or ‖G‖²."""
        sq_Bk = _columns(projection.values_BRk)
        return self._squares(name, sq_Bk, projection.size_B, projection.terms)

    def _projects(self, name: str) -> bool:
        return self.sketch is not None and self.sketch.projects(self.owned[name])

    def _of_rows(self, name: str, part: OuterProducts, probes: ProbeRows) -> Squares:
        """Return the block means of ‖G z‖² from a few rows of G z at a time."""
        assert self.sketch is not None
        count, device = self.sketch.probes, self.owned[name].device
        size_B = magnitudes(part.act_BTI, part.grad_BTO)
        sq_Bk = torch.zeros((part.size, count), dtype=torch.float64, device=device)
        for rows_Brk in part.project_rows(count, probes):
            sq_Bk += torch.linalg.vector_norm(rows_Brk, dim=1).double().square()
        return self._squares(name, sq_Bk, size_B, part.terms)

    def _squares(self, name: str, sq_Bk: Tensor, size_B: Tensor, terms: int) -> Squares:
        """Return block means of the squares of projected columns, or their sum if exact."""
        if self._projects(name):
            sq_Bb = sq_Bk.unflatten(1, (self.blocks, -1)).mean(2)
        else:
            sq_Bb = sq_Bk.sum(1, keepdim=True)
        guard = rounding_guard(terms, self.owned[name].dtype)
        return Squares(values_Bb=sq_Bb, rounding_B=(guard * size_B).square())

    def _with_basis(self, name: str, part: OuterProducts) -> Squares:
        """Return ‖G Q‖² plus the block means of ‖G (I - QQᵀ) z‖².

        Q spans Gᵀ(G S) for probes S of its own. Given Q, that is an exact part and an estimate of
        the rest by independent probes.
        """
        start = part.project(self._probes("basis", name, part.size).all()).values_BRk
        # A record that is not finite has any basis; its norm will not be finite either.
        span_BNs = part.transposed().project(start).values_BRk.double().nan_to_num(0.0, 0.0, 0.0)
        basis_BNs = torch.linalg.qr(span_BNs).Q
        probes_BNk = self._probes("probes", name, part.size).all()
        rest_BNk = probes_BNk.double() - basis_BNs @ (basis_BNs.mT @ probes_BNk.double())
        head = part.project(basis_BNs.to(probes_BNk.dtype))
        found = self._of_rows(name, part, lambda first, last, _: rest_BNk[:, first:last])
        assert found.rounding_B is not None
        return Squares(
            values_Bb=_columns(head.values_BRk).sum(1, keepdim=True) + found.values_Bb,
            rounding_B=(1 + basis_BNs.shape[2]) * found.rounding_B,  # each direction errs alike
        )

    def _probes(self, purpose: str, name: str, size: int) -> _Probes:
        """Return what the records of this micro-batch have for one parameter."""
        assert self.sketch is not None
        assert self._stream is not None
        return _Probes(
            source=self._stream,
            step=self._micro_batch,
            # it has a slash, which no parameter's name has
            name=f"{purpose}/{self._salt}/{name}",
            size=size,
            count=self.sketch.probes if purpose == "probes" else self.sketch.basis,
            parameter=self.owned[name],
        )


@dataclass(frozen=True, kw_only=True)
class _Probes:
    """Probes of all records for one parameter, drawn where they are needed, `[N, B, k]` of them.

    Args:
        source: The stream.
        step: Micro-batch.
        name: Under which they are drawn.
        size: Records B.
        count: Probes k of each.
        parameter: Weight with N columns.
    """

    source: NoiseSource
    step: int
    name: str
    size: int
    count: int
    parameter: nn.Parameter

    def rows(self, first: int, last: int, room: Tensor | None = None) -> Tensor:
        """Return elements `first … last - 1` of each probe, `[B, last - first, k]`, in `room`."""
        shape = (last - first, self.size, self.count)
        if room is None:
            room = torch.empty(
                math.prod(shape),
                dtype=compute_dtype(self.parameter.dtype),
                device=self.parameter.device,
            )
        values_nBk = room.zero_().view(shape)
        offset = first * self.size * self.count
        self.source.add_(values_nBk, stddev=1.0, step=self.step, name=self.name, offset=offset)
        return values_nBk.transpose(0, 1)

    def all(self) -> Tensor:
        """Return whole probes, `[B, N, k]`."""
        return self.rows(0, self.parameter.numel() // len(self.parameter))


def _columns(values_BRk: Tensor) -> Tensor:
    """Return the sum of squares of each column, `[B, k]` fp64."""
    return torch.linalg.vector_norm(values_BRk, dim=1, dtype=torch.float64).square()


def _require_common(stream: NoiseSource, shards: SequenceShards, device: torch.device) -> None:
    """Refuse streams that differ: their estimates would miss what ranks have in common.

    Raises:
        PrivacyError: On every rank.
    """
    seen = torch.zeros(16, dtype=torch.float64, device=device)
    stream.add_(seen, stddev=1.0, step=0, name="probes/", offset=0)
    apart = (shards.sum_scalars(seen) - shards.degree * seen).abs().max()
    if shards.sum_scalars(apart[None]) > 1e-9:
        raise PrivacyError(
            f"The stream of norms=Sketch(...) is not the same on the {shards.degree} ranks that "
            "hold a sequence together, so estimates would be too small. Give them streams with one "
            "key, or none: the step then draws a key that they share."
        )
