"""Fixtures of the tests that join packages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from veilspan.parallel.testing import run_ranks_once

RunOnRanks = Callable[[str, Sequence[int]], dict[int, list[dict[str, Any]]]]


@pytest.fixture(scope="session")
def run_on_ranks(tmp_path_factory: pytest.TempPathFactory) -> RunOnRanks:
    """Run a script of `tests/ranks` on worlds of processes; return what each rank found."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if own.name.startswith("popen-") else own  # of all pytest-xdist workers

    def run(script: str, worlds: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
        return run_ranks_once(shared, Path(__file__).parent / "ranks" / script, worlds)

    return run
