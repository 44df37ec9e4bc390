"""What a run shows and publishes after its steps."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

from rich.console import Console

from veilspan.accounting import BudgetExceeded, Ledger
from veilspan.trainer.assembly import Parts
from veilspan.trainer.evaluate import heldout_loss
from veilspan.trainer.metrics import MetricsLog
from veilspan.trainer.optimizer import learning_rate
from veilspan.trainer.processes import Processes
from veilspan.trainer.progress import ProgressView, Status
from veilspan.trainer.run_folder import RunFolder
from veilspan.trainer.throughput import Throughput, peak_memory_gib

_LINES = 30  # lines of a whole run, where there is no terminal


class Monitor:
    """Evaluate on public records, write public metrics, show progress.

    Args:
        console: Where to show; quiet on all processes but the first.
        parts: The run.
        processes: Who evaluates together.
        folder: Where metrics go.
        ledger: On the first process.
        first_step: Steps that were finished before.

    Attributes:
        finished: Steps finished so far.
        stop_reason: Why the run ended early, if it did.

    Guarantee:
        Nothing it is given depends on private records except through releases that are in the
        ledger: it sees the model, the ledger, the clock for the expected batch, public records.
    """

    def __init__(
        self,
        console: Console,
        parts: Parts,
        processes: Processes,
        folder: RunFolder,
        ledger: Ledger | None,
        *,
        first_step: int,
    ) -> None:
        self._parts = parts
        self._processes = processes
        self._ledger = ledger
        self._closing = ExitStack()
        self._log: MetricsLog | None = None
        self._view: ProgressView | None = None
        self._line_every = max(1, parts.plan.steps // _LINES)
        self._evaluated = -1
        self._loss: float | None = None
        self._rate: float | None = None
        self.finished = first_step
        self.stop_reason: str | None = None
        if ledger is not None:
            log = MetricsLog(folder.metrics, folder.tensorboard, first_step=first_step)
            self._log = self._closing.enter_context(log)
            view = ProgressView(
                console,
                steps=parts.plan.steps,
                first_step=first_step,
                budget=ledger.budget_epsilon or float("inf"),
                line_every=self._line_every,
            )
            self._view = self._closing.enter_context(view)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.close()

    def show(self, finished: int, clock: Throughput) -> None:
        """Show the state after a step, and evaluate and log where it is due; all processes call."""
        self.finished = finished
        due = finished % self._parts.recipe.run.heldout_every == 0
        if due or finished == self._parts.plan.steps:
            self._publish(clock)
        elif self._ledger is not None and finished % self._line_every == 0:
            self._rate = clock.rate() or self._rate
            self._present(self._ledger.spent().upper)

    def stop(self, reason: BudgetExceeded, clock: Throughput) -> None:
        """End the run before the plan does, with a last evaluation; all processes call."""
        self.stop_reason = str(reason)
        if self._evaluated != self.finished:
            self._publish(clock)

    def _publish(self, clock: Throughput) -> None:
        parts, self._evaluated = self._parts, self.finished
        if parts.heldout is not None:
            self._loss = heldout_loss(parts.model, parts.heldout, parts.losses, self._processes)
        self._rate = clock.rate() or self._rate
        memory = self._processes.largest(peak_memory_gib(self._processes.device) or 0.0)
        if self._ledger is None or self._log is None:
            return
        epsilon = self._ledger.spent().upper
        last = max(0, self.finished - 1)
        values = {
            "epsilon": epsilon,
            "learning_rate": learning_rate(parts.recipe.optimizer, last, parts.plan.steps),
            "heldout_loss": self._loss,
            "tokens_per_second": self._rate,
            "memory_gib": memory or None,
        }
        self._log.write(self.finished, {k: v for k, v in values.items() if v is not None})
        self._present(epsilon)

    def _present(self, epsilon: float) -> None:
        if self._view is not None:
            self._view.show(
                Status(
                    step=self.finished,
                    epsilon=epsilon,
                    heldout_loss=self._loss,
                    tokens_per_second=self._rate,
                )
            )
