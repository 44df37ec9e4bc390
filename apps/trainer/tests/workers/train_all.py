"""Train one recipe after the other under torchrun, in the same processes."""

from __future__ import annotations

import sys

from veilspan.trainer.loop import train
from veilspan.trainer.processes import leave_processes
from veilspan.trainer.recipe import load_recipe

if __name__ == "__main__":
    for path in sys.argv[1:]:
        train(load_recipe(path))
    leave_processes()
