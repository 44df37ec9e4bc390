"""Train a recipe under torchrun; the first time, every process dies after a given step."""

from __future__ import annotations

import os
import sys

from veilspan.trainer.loop import train
from veilspan.trainer.processes import leave_processes
from veilspan.trainer.recipe import load_recipe


class CrashOnce:
    """An observer that ends its process unless the launcher has restarted it."""

    def __init__(self, step: int) -> None:
        self._step = step

    def at(self, moment: str, step: int) -> None:
        """Crash after the optimizer of the chosen step, the first time."""
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if first and (moment, step) == ("after_optimizer", self._step):
            os._exit(17)


if __name__ == "__main__":
    train(load_recipe(sys.argv[1]), observer=CrashOnce(int(sys.argv[2])))
    leave_processes()
