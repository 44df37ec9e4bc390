"""One start of several processes serves all tests that ask about it, on all pytest workers."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from veilspan.parallel.testing import run_ranks

SCRIPT = Path(__file__).parent / "ranks" / "everything.py"
WORLDS = (2, 4)

collect_ignore = ["ranks"]  # run by their own processes

Reports = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What every rank found, by number of ranks."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if own.name.startswith("popen-") else own  # of all pytest-xdist workers
    found = shared / "reports.json"
    with (shared / "reports.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            try:
                found.write_text(json.dumps(run_ranks(SCRIPT, WORLDS)))
            except RuntimeError as error:
                found.write_text(json.dumps(str(error)))
    content = json.loads(found.read_text())
    if isinstance(content, str):
        raise RuntimeError(content)
    return {int(ranks): reports for ranks, reports in content.items()}
