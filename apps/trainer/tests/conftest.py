"""Fixtures shared by the trainer's tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

WORKERS = Path(__file__).parent / "workers"

RunWorkers = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_workers() -> RunWorkers:
    """Run a script of `tests/workers` in one plain process or under torchrun."""

    def run(
        script: str,
        *arguments: object,
        processes: int = 1,
        restarts: int = 0,
        check: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable]
        if processes > 1 or restarts:
            command += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
            command += [f"--max-restarts={restarts}", "--rdzv-backend=c10d"]
            command += ["--rdzv-endpoint=localhost:0"]
        done = subprocess.run(
            [*command, str(WORKERS / script), *map(str, arguments)],
            # Without the second variable, gloo of a restarted worker reads the addresses of the
            # dead one from the launcher's store.
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                **(environment or {}),
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if check and done.returncode != 0:
            pytest.fail(f"{script} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run
