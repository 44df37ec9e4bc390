"""What backward passes do with the two factors that a tap hands over.

B samples, M groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import torch
from torch import Tensor

from veilspan.core.backward.base import Workspace
from veilspan.core.backward.samples import Samples
from veilspan.core.contributions import Contribution
from veilspan.core.measures import Squares
from veilspan.core.micro_batch import MicroBatch, Use
from veilspan.core.norms import sq_norms
from veilspan.core.products import compute_dtype
from veilspan.core.projection import Projection

_TOGETHER = 1 << 22
"""Elements, at most, of per-sample gradients that are formed at once where none should be kept."""


class Estimates:
    """Squared norms of the parameters of one group, `[B]`, as the step's measure takes them.

    Block means are added over parameters before the largest of them is taken, projections over the
    uses of a parameter, and over the ranks of a sequence, before they are squared.
    """

    def __init__(self, work: Workspace, batch: MicroBatch, group: int) -> None:
        self._measure, self._size = work.measure, batch.size
        self._ranks = work.shards if work.shards.degree > 1 else None
        self._names = work.groups.members(group)
        shape = (batch.size, work.measure.blocks)
        self._sq_norm_Bb = torch.zeros(shape, dtype=torch.float64, device=batch.device)
        self._rounding_B = self._sq_norm_Bb.new_zeros(batch.size)
        self._projections: dict[str, Projection] = {}

    def add(self, name: str, part: Contribution) -> None:
        """Add the one use of a parameter."""
        if self._ranks is None:
            self._add(self._measure.sq_norms(name, part))
        else:
            self.add_use(name, part)

    def add_use(self, name: str, part: Contribution) -> None:
        """Add one of several uses of a parameter, or this rank's part of one."""
        found, known = self._measure.projection(name, part), self._projections.get(name)
        self._projections[name] = found if known is None else known.plus(found)

    def add_formed(self, sq_norm_B: Tensor) -> None:
        """Add exact squared norms, `[B]`."""
        self._sq_norm_Bb += sq_norm_B[:, None]

    def sq_norms(self) -> Tensor:
        """Return the squared norms, `[B]` fp64; no more can be added."""
        for name in self._names:
            projection = self._projections.pop(name, None)
            if self._ranks is not None:  # also where the loss reached nothing here
                projection = projection or self._measure.nothing(name, self._size)
                projection = projection.over(self._ranks)
            if projection is not None:
                self._add(self._measure.of_projection(name, projection))
        sq_norm_B = self._sq_norm_Bb.amax(1)
        if self._measure.exact:
            return sq_norm_B
        return (sq_norm_B.sqrt() + self._rounding_B.sqrt()).square()

    def _add(self, found: Squares) -> None:
        self._sq_norm_Bb += found.values_Bb
        if found.rounding_B is not None:
            self._rounding_B += found.rounding_B


class NormPass:
    """Adds up the squared norms of each group.

    Args:
        work: The step's parts.
        batch: The micro-batch.
    """

    keeps = False

    def __init__(self, work: Workspace, batch: MicroBatch) -> None:
        self._estimates = [Estimates(work, batch, group) for group in range(len(work.groups))]
        self.shared = Samples(work, batch.size)
        self._work, self._batch = work, batch

    def receive(self, use: Use) -> None:
        """Add this use's squared norms, or keep its gradients where other uses will join."""
        for name, part in use.parts():
            estimates = self._estimates[self._work.groups.index[name]]
            if self._batch.uses[name] == 1:
                estimates.add(name, part)
            elif self._work.measure.adds_uses(name):
                estimates.add_use(name, part)
            else:
                self.shared.add(name, part)

    def sq_norms(self) -> Tensor:
        """Return the squared norms of each group, `[M, B]` fp64; ask once, after the pass."""
        for name in self.shared.names():
            estimates = self._estimates[self._work.groups.index[name]]
            estimates.add_formed(self.shared.sq_norms(name))
        return torch.stack([estimates.sq_norms() for estimates in self._estimates])


class SumPass:
    """Adds each layer's weighted gradient to the clipped sum.

    Args:
        work: The step's parts.
        batch: The micro-batch.
        factor_MB: Factors of each group.
        kept: Parameters to leave out, as their per-sample gradients were kept.
    """

    keeps = False

    def __init__(
        self, work: Workspace, batch: MicroBatch, factor_MB: Tensor, kept: Collection[str]
    ) -> None:
        self._work, self._factor_MB, self._kept = work, factor_MB, kept
        self._awaited = Counter(batch.uses)

    def receive(self, use: Use) -> None:
        """Add Σ_b factor_b · gradient_b of this use; settle what no other use will add to."""
        work = self._work
        for name, part in use.parts():
            if name not in self._kept:
                part.add_to(work.sums, name, self._factor_MB[work.groups.index[name]])
            self._awaited[name] -= 1
            if not self._awaited[name]:
                del self._awaited[name]
                work.sums.settle(name)

    def settle_all(self) -> None:
        """Settle the parameters whose last use the loss did not reach."""
        for name in self._work.owned:
            if name in self._awaited:
                self._work.sums.settle(name)


class BookPass:
    """Keeps both factors of a group's layers until the last of them has its gradient, then clips.

    Norms are taken at once, while the factors are in the cache.
    The book of a group closes inside the backward pass, as soon as every use that the forward pass
    counted has come back, so a group's tensors are gone before the next group's are needed.

    Args:
        work: The step's parts.
        batch: The micro-batch.
        slack: Relative error, at most, of a norm against what is summed.
        formed: Form each sample's gradient once, and take its norm before adding it, in groups that
            one use of one module completes.
    """

    keeps = True

    def __init__(
        self,
        work: Workspace,
        batch: MicroBatch,
        *,
        slack: float,
        formed: bool,
    ) -> None:
        self._work, self._batch = work, batch
        self._slack, self._formed = slack, formed
        self._shared = Samples(work, batch.size)
        self._open: dict[int, dict[str, list[Contribution]]] = {}
        self._estimates: dict[int, Estimates] = {}
        self._closed: set[int] = set()
        self._awaited: Counter[int] = Counter()
        for name, count in batch.uses.items():
            self._awaited[work.groups.index[name]] += count

    def receive(self, use: Use) -> None:
        """Enter this use in the books of its groups, and close those that are complete."""
        here: dict[int, list[tuple[str, Contribution]]] = {}
        for name, part in use.parts():
            here.setdefault(self._work.groups.index[name], []).append((name, part))
        for group, entries in here.items():
            self._awaited[group] -= len(entries)
            complete = self._awaited[group] == 0
            alone = group not in self._open and all(self._batch.uses[n] == 1 for n, _ in entries)
            if self._formed and complete and alone:
                self._clip_formed(group, entries, use.dtype)
            else:
                self._enter(group, entries)
                if complete:
                    self._close(group)

    def close_all(self) -> None:
        """Close the books of groups that the loss did not reach completely."""
        for group in range(len(self._work.groups)):
            if group not in self._closed:
                self._close(group)

    def _enter(self, group: int, entries: list[tuple[str, Contribution]]) -> None:
        book, estimates = self._open.setdefault(group, {}), self._estimates_of(group)
        for name, part in entries:
            alone = self._batch.uses[name] == 1
            if alone or self._work.measure.adds_uses(name):
                (estimates.add if alone else estimates.add_use)(name, part)
                book.setdefault(name, []).append(part)
            else:
                self._shared.add(name, part)

    def _estimates_of(self, group: int) -> Estimates:
        if group not in self._estimates:
            self._estimates[group] = Estimates(self._work, self._batch, group)
        return self._estimates[group]

    def _close(self, group: int) -> None:
        book = self._open.pop(group, {})
        shared = [n for n in self._shared.names() if self._work.groups.index[n] == group]
        estimates = self._estimates_of(group)
        del self._estimates[group]
        for name in shared:
            estimates.add_formed(self._shared.sq_norms(name))
        factor_B = self._work.factors(group, estimates.sq_norms(), slack=self._slack)
        for name in self._work.groups.members(group):  # in one order on every rank
            for part in book.pop(name, ()):
                part.add_to(self._work.sums, name, factor_B)
            if name in shared:
                self._shared.flush(name, factor_B)
            self._work.sums.settle(name)
        self._closed.add(group)

    def _clip_formed(
        self, group: int, entries: list[tuple[str, Contribution]], dtype: torch.dtype
    ) -> None:
        elements = self._batch.size * sum(self._work.owned[name].numel() for name, _ in entries)
        factored = all(part.factored for _, part in entries)
        if factored and elements <= _TOGETHER and dtype == compute_dtype(dtype):
            self._clip_together(group, entries)
        else:
            self._clip_each(group, entries)
        for name in self._work.groups.members(group):
            self._work.sums.settle(name)
        self._closed.add(group)

    def _clip_together(self, group: int, entries: list[tuple[str, Contribution]]) -> None:
        formed = [(name, part.per_sample()) for name, part in entries]
        sq_norm_B = sum((sq_norms(grad_Bx) for _, grad_Bx in formed), start=self._zeros())
        factor_B = self._work.factors(group, sq_norm_B, slack=self._slack)
        for name, grad_Bx in formed:
            self._work.sums.add_samples_(name, grad_Bx, factor_B)

    def _clip_each(self, group: int, entries: list[tuple[str, Contribution]]) -> None:
        for b in range(self._batch.size):
            formed = [(name, part.sample(b)) for name, part in entries]
            sq_norm = sum((g.sq_norm() for _, g in formed), start=self._zeros()[0])
            factor_B = self._work.factors(group, sq_norm[None], slack=self._slack, first=b)
            for name, gradient in formed:
                gradient.add_to(self._work.sums, name, factor_B[0])

    def _zeros(self) -> Tensor:
        return torch.zeros(self._batch.size, dtype=torch.float64, device=self._batch.device)
