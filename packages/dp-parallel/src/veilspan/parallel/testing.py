"""A script on several local processes, for tests of distributed code without a launcher.

A script hands its body to `rank_main`; `run_ranks` runs it in worlds of several sizes, one after
the other, waits for a bounded time and returns what each rank reported. The script is imported once
and its ranks are forks, because importing torch costs more than most tests. Ranks meet through a
file, so no port can be taken twice.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import multiprocessing.connection
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from veilspan.parallel.processes import finish

_TAIL = 6000


def run_ranks(
    script: Path,
    worlds: Sequence[int],
    *,
    arguments: Sequence[str] = (),
    timeout_s: float = 300.0,
) -> dict[int, list[Any]]:
    """Run `script` on the CPU in worlds of the given sizes and return its ranks' reports.

    When one rank fails, or time is up, the others are ended.

    Args:
        script: A file that calls `rank_main`.
        worlds: Numbers of ranks; one world runs after the other.
        arguments: Passed to the body, the same on every rank.
        timeout_s: Seconds for all worlds together until the run is given up.

    Returns:
        For each size, what the body returned on each rank, after a trip through JSON.

    Raises:
        RuntimeError: If a rank failed, with the end of the error stream, or time was up.
    """
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder, "errors.txt")
        with errors.open("wb") as stream:
            command = [sys.executable, str(script), folder, ",".join(map(str, worlds)), *arguments]
            process = subprocess.Popen(
                command, stdout=stream, stderr=stream, start_new_session=True
            )
        try:
            failed = "failed" if process.wait(timeout_s) else None
        except subprocess.TimeoutExpired:
            failed = f"took longer than {timeout_s} s"
            process.terminate()
            process.wait()
        if failed is not None:
            raise RuntimeError(f"{script.name} {failed}\n{errors.read_text()[-_TAIL:]}")
        return {
            ranks: [
                json.loads(Path(folder, f"{ranks}-{rank}.json").read_text())
                for rank in range(ranks)
            ]
            for ranks in worlds
        }


def run_ranks_once(
    folder: Path, script: Path, worlds: Sequence[int], *, timeout_s: float = 600.0
) -> dict[int, list[Any]]:
    """Run `script` as `run_ranks` does, once for all processes that share `folder`.

    Workers of one pytest run call it with the folder that they have in common: the first starts the
    ranks, the others wait and read what it found, a failure included.

    Args:
        folder: An existing folder of this test run.
        script: A file that calls `rank_main`.
        worlds: Numbers of ranks.
        timeout_s: Seconds for all worlds together until the run is given up.

    Returns:
        The reports by number of ranks.

    Raises:
        RuntimeError: As `run_ranks`, in every process.
    """
    found = folder / f"{script.stem}.json"
    with (folder / f"{script.stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            try:
                reports: Any = run_ranks(script, worlds, timeout_s=timeout_s)
            except RuntimeError as error:
                reports = str(error)
            found.write_text(json.dumps(reports))
    content = json.loads(found.read_text())
    if isinstance(content, str):
        raise RuntimeError(content)
    return {int(ranks): reports for ranks, reports in content.items()}


def rank_main(body: Callable[[list[str]], Any], *, timeout_s: float = 120.0) -> None:
    """Run `body` on every rank of every world that `run_ranks` asked for.

    Args:
        body: Gets the arguments; called with the default process group (gloo) ready. Returns
            anything JSON can hold.
        timeout_s: Seconds after which a collective that a peer never joins fails.
    """
    folder, worlds, *arguments = sys.argv[1:]
    fork = multiprocessing.get_context("fork")
    for ranks in map(int, worlds.split(",")):
        world = (Path(folder), ranks, timedelta(seconds=timeout_s))
        processes = [
            fork.Process(target=_rank, args=(body, arguments, rank, *world), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        if not _all_end_well(processes):
            sys.exit(f"a rank of {ranks} failed")


def _rank(
    body: Callable[[list[str]], Any],
    arguments: list[str],
    rank: int,
    folder: Path,
    ranks: int,
    timeout: timedelta,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet-{ranks}",
        rank=rank,
        world_size=ranks,
        timeout=timeout,
    )
    report = json.dumps(body(arguments))
    Path(folder, f"{ranks}-{rank}.json").write_text(report)
    finish()


def _all_end_well(processes: Sequence[Any]) -> bool:
    """Wait for the ranks; after the first failure end the others, who may wait for it forever."""
    running = list(processes)
    while running:
        multiprocessing.connection.wait([process.sentinel for process in running])
        running = [process for process in running if process.exitcode is None]
        if any(process.exitcode for process in processes):
            for process in running:
                process.kill()
            return False
    return True
