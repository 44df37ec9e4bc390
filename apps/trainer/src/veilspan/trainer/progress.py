"""What the person at the terminal sees while a run goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from veilspan.accounting.bounds import at_least, round_up


@dataclass(frozen=True, kw_only=True)
class Status:
    """Public state of a run after a step.

    Args:
        step: Finished steps.
        epsilon: ε spent so far (upper bound).
        heldout_loss: Newest loss on public records, nats per token.
        tokens_per_second: Rate for the expected batch.
    """

    step: int
    epsilon: float
    heldout_loss: float | None
    tokens_per_second: float | None

    def text(self, budget: float) -> str:
        """Return the state as one line."""
        parts = [f"ε {round_up(self.epsilon)} of {at_least(budget, 4)}"]
        if self.heldout_loss is not None:
            parts.append(f"held-out loss {self.heldout_loss:.4f}")
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        return " · ".join(parts)


class ProgressView:
    """A live bar on a terminal, one plain line now and then elsewhere.

    Args:
        console: Where to write.
        steps: Steps of the whole run.
        first_step: Steps that were finished when this process started.
        budget: ε that the run may not exceed.
        line_every: Steps between two plain lines.
    """

    def __init__(
        self, console: Console, *, steps: int, first_step: int, budget: float, line_every: int
    ) -> None:
        self._console = console
        self._steps = steps
        self._first_step = first_step
        self._budget = budget
        self._line_every = line_every
        self._began = time.monotonic()
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            TextColumn("·"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
        )
        self._task = self._bar.add_task("train", total=steps, completed=first_step, status="")

    def __enter__(self) -> ProgressView:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def show(self, status: Status) -> None:
        """Show the state after a step."""
        text = status.text(self._budget)
        if self._console.is_terminal:
            self._bar.update(self._task, completed=status.step, status=text)
            return
        if status.step % self._line_every == 0 or status.step == self._steps:
            width = len(str(self._steps))
            self._console.print(
                f"step {status.step:>{width}}/{self._steps} · {text} · {self._left(status.step)}",
                soft_wrap=True,
                highlight=False,
            )

    def _left(self, step: int) -> str:
        done = step - self._first_step
        if done == 0 or step == self._steps:
            return f"{_duration(time.monotonic() - self._began)} passed"
        seconds = (time.monotonic() - self._began) / done * (self._steps - step)
        return f"{_duration(seconds)} left"


def settings_table(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """Return a two-column table of names and values."""
    table = Table(
        title=title, title_justify="left", title_style="bold", show_header=False, box=None
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))  # names of files are no markup
    return table


def show_summary(console: Console, title: str, rows: Mapping[str, str]) -> None:
    """Print the outcome of a run in a frame."""
    table = settings_table("", list(rows.items()))
    table.title = None
    console.print(Panel(table, title=title, title_align="left", expand=False, border_style="green"))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
