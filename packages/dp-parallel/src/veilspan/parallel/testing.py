"""A script on several local processes, for tests of distributed code without a launcher.

A script hands its body to `rank_main`; `run_ranks` starts it once per rank, waits for a bounded time
and returns what each rank reported. Ranks meet through a file, so no port can be taken twice.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from veilspan.parallel.processes import finish

_TAIL = 4000


def run_ranks(
    script: Path,
    ranks: int,
    *,
    arguments: Sequence[str] = (),
    timeout_s: float = 180.0,
) -> list[Any]:
    """Run `script` in `ranks` processes on the CPU and return their reports, by rank.

    When one process fails, or time is up, the others are ended.

    Args:
        script: A file that calls `rank_main`.
        ranks: Number of processes.
        arguments: Passed to the body, the same on every rank.
        timeout_s: Seconds until the run is given up.

    Returns:
        What the body returned on each rank, after a trip through JSON.

    Raises:
        RuntimeError: If a process failed, with the end of its error stream, or time was up.
    """
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder, f"report-{rank}.json") for rank in range(ranks)]
        errors = [Path(folder, f"errors-{rank}.txt") for rank in range(ranks)]
        processes = []
        for rank in range(ranks):
            own = [str(rank), str(ranks), str(Path(folder, "meet")), str(reports[rank])]
            with errors[rank].open("wb") as stream:
                command = [sys.executable, str(script), *own, *arguments]
                processes.append(subprocess.Popen(command, stdout=stream, stderr=stream))
        try:
            failed = _wait(processes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed is not None:
            tails = [f"rank {r}:\n{e.read_text()[-_TAIL:]}" for r, e in enumerate(errors)]
            raise RuntimeError(f"{script.name} on {ranks} ranks {failed}\n" + "\n".join(tails))
        return [json.loads(report.read_text()) for report in reports]


def rank_main(body: Callable[[list[str]], Any], *, timeout_s: float = 60.0) -> None:
    """Run `body` as one rank that `run_ranks` started, report its result, and end the process.

    Args:
        body: Gets the arguments; called with the default process group (gloo) ready. Returns
            anything JSON can hold.
        timeout_s: Seconds after which a collective that a peer never joins fails.
    """
    rank, ranks, meet, report, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meet}",
        rank=int(rank),
        world_size=int(ranks),
        timeout=timedelta(seconds=timeout_s),
    )
    Path(report).write_text(json.dumps(body(arguments)))
    finish()


def _wait(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> str | None:
    """Return what went wrong, or None once all processes have ended well."""
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            return "failed"
        if time.monotonic() > deadline:
            return "took too long"
        time.sleep(0.05)
    return "failed" if any(process.returncode for process in processes) else None
