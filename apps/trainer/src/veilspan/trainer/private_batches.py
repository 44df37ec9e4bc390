"""Logical batches for a training loop of your own: drawn, cut, released and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from torch import Tensor

from veilspan.accounting import EpsilonBounds, Ledger, PrivacyPlan
from veilspan.core import Draw, PrivacyError, PrivateStep, poisson_batches
from veilspan.trainer.microbatch import Microbatch
from veilspan.trainer.releases import ReleaseGate


class Records(Protocol):
    """A map-style dataset; each item is one protected unit, such as a dict of tensors."""

    def __len__(self) -> int:
        """Return the number of records, which is treated as public."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Return one record."""
        ...


@dataclass(kw_only=True, eq=False)
class PrivateTraining:
    """A training run with differential privacy; made by `make_private`.

    Attributes:
        plan: Every number that the guarantee depends on.
        ledger: Releases so far, on disk.
        step: The private mechanism, attached to the model until `close`.
        microbatch: Records per forward and backward, with the reason.
        dataset: The records.
        collate: Makes a micro-batch of a list of records.
        key: Secret key of the sampler.
    """

    plan: PrivacyPlan
    ledger: Ledger
    step: PrivateStep
    gate: ReleaseGate
    microbatch: Microbatch
    dataset: Records = field(repr=False)  # a list would show every record
    collate: Callable[[list[Any]], Any]
    key: bytes = field(repr=False)
    # Records of the micro-batch whose losses have not come yet.
    _unanswered: int = field(default=0, repr=False)

    def batches(self) -> Iterator[PrivateBatch]:
        """Yield the logical batches that remain, empty ones included; none once all are released.

        Raises:
            PrivacyError: If the loop goes on after a batch that was not released.
            BudgetExceeded: If a continued ledger does not allow another release.
        """
        draws = poisson_batches(
            len(self.dataset),
            self.plan.sampling_probability,
            max(self.plan.steps, self.step.next_step),
            key=self.key,
            first_step=self.step.next_step,
        )
        for draw in draws:
            yield PrivateBatch(self, draw)
            if self.step.next_step == draw.step:
                raise PrivacyError(
                    f"The batch of step {draw.step} was not released. Work on each batch inside "
                    "`with batch:`; after an error inside, batches() begins with it again."
                )

    def backward(self, losses_B: Tensor) -> None:
        """Add the clipped gradients of the current micro-batch.

        Args:
            losses_B: One loss per record of the micro-batch, in any order, `[B]`.

        Raises:
            PrivacyError: If it is not one loss per record of the micro-batch, or a second call for
                the same one: its records would count twice. See also `PrivateStep.backward`.
        """
        expected, self._unanswered = self._unanswered, 0
        if losses_B.ndim == 1 and len(losses_B) != expected:
            raise PrivacyError(
                f"losses_B holds {len(losses_B)} losses for a micro-batch with {expected} records "
                "left to answer for. Call backward once for each of batch.microbatches(), with one "
                "loss per record."
            )
        self.step.backward(losses_B)

    def epsilon(self) -> EpsilonBounds:
        """Return bounds on the ε of everything that the ledger counts, at the plan's δ."""
        return self.ledger.spent()

    def close(self) -> None:
        """Give the model and the ledger's file back; `epsilon` still answers."""
        self.step.detach()
        self.ledger.close()


class PrivateBatch:
    """One logical batch: inside `with batch:` its micro-batches, on leaving its one release.

    An exception inside discards the batch: nothing is noised, recorded or left in `.grad`.
    """

    def __init__(self, training: PrivateTraining, draw: Draw) -> None:
        self._training, self._draw = training, draw
        self._open = self._taken = False

    def __enter__(self) -> Self:
        self._training.gate.require_budget()
        self._training.step.__enter__()
        self._open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open, self._training._unanswered = False, 0
        self._training.step.__exit__(kind, error, trace)

    def microbatches(self) -> Iterator[Any]:
        """Yield the drawn records, collated, a micro-batch at a time; nothing for an empty draw.

        Raises:
            PrivacyError: If asked a second time: every record would count twice; or outside of this
                batch's `with batch:`, where a record of two draws would count twice in one.
        """
        if self._taken:
            raise PrivacyError(
                "batch.microbatches() was already taken: a second pass would count every record of "
                "the batch twice. Take the next batch from batches()."
            )
        self._taken = True
        training = self._training
        for rows in self._draw.microbatches(training.microbatch.size):
            if not self._open:
                raise PrivacyError(
                    f"batch.microbatches() of step {self._draw.step} was read outside of its `with "
                    "batch:`. Work on the records of a batch inside of its own block."
                )
            records = [training.dataset[int(row)] for row in rows]
            training._unanswered = len(records)
            yield training.collate(records)
