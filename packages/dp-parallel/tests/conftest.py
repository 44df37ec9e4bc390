"""One start of several processes serves all tests that ask about it, on all pytest workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from veilspan.parallel.testing import run_ranks_once

collect_ignore = ["ranks"]  # run by processes of their own

Reports = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What every rank found, by number of ranks."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if own.name.startswith("popen-") else own  # of all pytest-xdist workers
    return run_ranks_once(shared, Path(__file__).parent / "ranks" / "everything.py", (2, 4))
