"""What a run may publish while it trains: a closed list of quantities."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard.writer import SummaryWriter

from veilspan.trainer.errors import TrainerError


@dataclass(frozen=True, kw_only=True)
class PublicMetric:
    """One quantity that may be published, and why it reveals nothing beyond the guarantee."""

    unit: str
    reason: str


PUBLIC_METRICS: Mapping[str, PublicMetric] = {
    "step": PublicMetric(unit="steps", reason="Counts releases; the plan is public."),
    "epsilon": PublicMetric(unit="ε", reason="Computed from the public plan and the ledger."),
    "learning_rate": PublicMetric(unit="1", reason="A function of the step number only."),
    "heldout_loss": PublicMetric(
        unit="nats per token",
        reason="The released model applied to records that the recipe declares public.",
    ),
    # Wall-clock time of a whole step grows with the number of drawn units, which is private. The
    # published rate is put together from the time per token of a micro-batch of full shape and the
    # time of a release, both independent of the draw, and the expected batch size, which is public.
    "tokens_per_second": PublicMetric(
        unit="tokens/s",
        reason="Expected batch over expected duration; it does not use the size of a draw.",
    ),
    "memory_gib": PublicMetric(
        unit="GiB",
        reason="Peak of tensors on one GPU: one micro-batch of full shape, however many are drawn.",
    ),
}


class MetricsLog:
    """Append public quantities to `metrics.jsonl` and to TensorBoard.

    Args:
        path: JSON-lines file; opened for appending.
        tensorboard: Folder of the event files.
        first_step: Steps that were finished before; later ones are forgotten, being lost.

    Guarantee:
        A quantity that `PUBLIC_METRICS` does not declare is refused, so training losses, gradient
        norms, clipping rates and anything else that depends on private records without noise
        cannot get here by mistake.
    """

    def __init__(self, path: Path, tensorboard: Path, *, first_step: int = 0) -> None:
        self._file = path.open("a", encoding="utf-8")
        if not _ends_with_newline(path):
            self._file.write("\n")  # a crash tore the last line; readers skip it
        self._events = SummaryWriter(log_dir=str(tensorboard), purge_step=first_step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # `write` has told already what could not be written
            self._file.close()
        self._events.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Publish quantities of one step.

        Args:
            step: Number of finished steps.
            values: Declared names and their values; names left out are simply not written.

        Raises:
            TrainerError: If a name is not declared public.
            OSError: If the disk is full, with the name of the file.
        """
        undeclared = sorted(set(values) - set(PUBLIC_METRICS))
        if undeclared:
            raise TrainerError(
                f"{', '.join(undeclared)} is not declared public and was not logged; "
                f"public quantities are {', '.join(PUBLIC_METRICS)}."
            )
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error
        for name, value in values.items():
            # TensorBoard stores the time of each event. The real one would reveal how long the
            # steps before it took, hence how many units were drawn.
            self._events.add_scalar(name, value, global_step=step, walltime=float(step))
        self._events.flush()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return one row per step, in the order of steps, of the model that there is.

    After a crash a run goes back to its newest checkpoint. Rows of the steps that were lost speak
    of a model that no longer exists: a row takes the place of all that stand before it in the file
    and belong to its own or a later step.

    Args:
        path: `metrics.jsonl` of a run folder; a missing file is an empty list.
    """
    rows: dict[int, dict[str, float]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line that a crash tore
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows = {step: kept for step, kept in rows.items() if step < row["step"]}
            rows[row["step"]] = row
    return list(rows.values())


def _ends_with_newline(path: Path) -> bool:
    content = path.read_bytes()
    return not content or content.endswith(b"\n")
