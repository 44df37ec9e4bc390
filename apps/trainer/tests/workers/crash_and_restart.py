"""Train with two processes, killing one at chosen moments and starting again, like a launcher.

Processes are forked after everything is imported, so that an attempt takes seconds.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch.distributed as dist

from veilspan.core import Draw
from veilspan.trainer import loop
from veilspan.trainer.recipe import load_recipe

CRASHED = 17


class Crash:
    """An observer that ends its process without any clean-up at one moment.

    Only the first process finishes a save, so that is where a save is interrupted; at every other
    moment the second process dies and the first has to notice. At a moment "asked" the second is
    sent a signal, in a step after its release.
    """

    def __init__(self, moment: str | None, step: int, log: Path) -> None:
        self._moment, self._step, self._log = moment, step, log

    def at(self, moment: str, step: int) -> None:
        """Note the moment, on the first process; crash if it is the chosen one."""
        if dist.get_rank() == 0:
            _append(self._log, {"moment": moment, "step": step})
        asked = (self._moment, step, moment) == ("asked", self._step, "after_ledger")
        if asked and dist.get_rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        victim = 0 if moment == "during_save" else 1
        if dist.get_rank() == victim and (moment, step) == (self._moment, self._step):
            os._exit(CRASHED)


def main() -> None:
    """Run every scenario of the JSON file and print what is left of each."""
    for scenario in json.loads(Path(sys.argv[1]).read_text()):
        for attempt in range(len(scenario["crashes"]) + 1):
            crash = (scenario["crashes"] + [None])[attempt]
            code = _attempt(scenario, crash)
            if (code == 0) != (crash is None):
                raise SystemExit(f"{scenario}: attempt {attempt} ended with {code}")


def _attempt(scenario: dict, crash: str | None) -> int:
    """Start two processes and return 0 if both ended well."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = [_fork(scenario, crash, rank, port) for rank in (0, 1)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return max(codes)


def _fork(scenario: dict, crash: str | None, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
        dist.init_process_group("gloo", rank=rank, world_size=2)
        moment, _, step = (crash or "").partition("@")
        _train(scenario, Crash(moment or None, int(step or 0), Path(scenario["log"])))
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _train(scenario: dict, observer: Crash) -> None:
    sampler = loop.poisson_batches

    def noted(*args: object, **kwargs: object) -> object:
        for draw in sampler(*args, **kwargs):  # pyright: ignore
            if dist.get_rank() == 0:
                _append(Path(scenario["log"]), _membership(draw))
            yield draw

    loop.poisson_batches = noted  # pyright: ignore
    loop.train(load_recipe(scenario["recipe"]), observer=observer)  # pyright: ignore


def _membership(draw: Draw) -> dict:
    return {"moment": "draw", "step": draw.step, "records": draw.records.tolist()}


def _append(path: Path, entry: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
