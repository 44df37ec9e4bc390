"""Per-sample gradients that are formed and kept until their factors are known.

B samples. A parameter that one forward pass uses several times (tied or shared weights) needs its
per-sample gradient: the norm of a sum is not the sum of the norms.
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from veilspan.core.backward.base import Workspace
from veilspan.core.contributions import Contribution
from veilspan.core.micro_batch import MicroBatch, Use
from veilspan.core.norms import sq_norms


class Samples:
    """Per-sample gradients `[B, *parameter]` by name, added up over the uses of a parameter."""

    def __init__(self, work: Workspace, size: int) -> None:
        self._work, self._size = work, size
        self._grads: dict[str, Tensor] = {}

    def add(self, name: str, part: Contribution) -> None:
        """Add one use, in the parameter's own dtype."""
        parameter, known = self._work.owned[name], self._grads.get(name)
        if known is not None:
            known.add_(part.per_sample())
            return
        buffer = self._work.buffers.take(name, self._size, parameter)
        self._grads[name] = part.per_sample(buffer).to(parameter.dtype)

    def names(self) -> list[str]:
        """Return the names of the parameters seen so far."""
        return list(self._grads)

    def sq_norms(self, name: str) -> Tensor:
        """Return the squared norm of each sample's gradient of one parameter, `[B]` fp64."""
        return sq_norms(self._grads[name])

    def flush(self, name: str, factor_B: Tensor) -> None:
        """Add Σ_b factor_b · gradient_b to the clipped sum, and forget the gradients."""
        self._work.sums.add_samples_(name, self._grads.pop(name), factor_B)


class SamplePass:
    """Forms the per-sample gradient of every parameter but those whose factors cost less to keep.

    The norm is taken as soon as the last use has come back, while the gradient is in the cache.

    Args:
        work: The step's parts.
        batch: The micro-batch.
    """

    keeps = True

    def __init__(self, work: Workspace, batch: MicroBatch) -> None:
        self._samples, self._kept = Samples(work, batch.size), dict[str, Contribution]()
        self._work, self._uses = work, batch.uses
        self._awaited = Counter(batch.uses)
        self._sq_norms: dict[str, Tensor] = {}

    @property
    def formed_only(self) -> bool:
        """Whether every norm so far was taken of the very numbers that are summed."""
        return not self._kept

    def receive(self, use: Use) -> None:
        """Add this use to the per-sample gradients, or keep its factors."""
        for name, part in use.parts():
            if self._worth_keeping(name, part):
                self._kept[name] = part
                self._sq_norms[name] = part.sq_norms(self._work.measure.choose)
                continue
            self._samples.add(name, part)
            self._sq_norms.pop(name, None)  # whatever was measured before this use
            self._awaited[name] -= 1
            if self._awaited[name] <= 0:
                self._sq_norms[name] = self._samples.sq_norms(name)

    def names(self) -> list[str]:
        """Return the names of the parameters seen so far."""
        return [*self._samples.names(), *self._kept]

    def sq_norms(self, name: str) -> Tensor:
        """Return the squared norm of each sample's gradient of one parameter, `[B]` fp64."""
        known = self._sq_norms.get(name)  # missing where the loss did not reach every use
        return self._samples.sq_norms(name) if known is None else known

    def flush(self, name: str, factor_B: Tensor) -> None:
        """Add Σ_b factor_b · gradient_b to the clipped sum, and forget the parameter."""
        if name in self._kept:
            self._kept.pop(name).add_to(self._work.sums, name, factor_B)
        else:
            self._samples.flush(name, factor_B)

    def _worth_keeping(self, name: str, part: Contribution) -> bool:
        if self._uses[name] > 1 or self._work.sums.sample_by_sample:
            return False
        return self._work.measure.worth_keeping(part)
