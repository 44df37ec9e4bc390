"""Train recipes under torchrun; each process reads what lies in folders of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from veilspan.trainer.errors import TrainerError
from veilspan.trainer.loop import train
from veilspan.trainer.processes import leave_processes
from veilspan.trainer.recipe import load_recipe

if __name__ == "__main__":
    for folder in sys.argv[1:]:
        os.chdir(Path(folder) / os.environ["RANK"])
        try:
            train(load_recipe("recipe.toml"))
        except TrainerError as error:
            Path("error.txt").write_text(str(error))
    leave_processes()  # every process was refused, so none waits for another
