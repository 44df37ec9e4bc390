"""Inside of a step the host waits for a GPU no more often than is documented."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_host_waits_no_more_often_than_is_documented():
    """In a process of its own: torch does not forget the pretended device that stands for a GPU."""
    tests = Path(__file__).parent / "alone" / "waits.py"
    # No part of a session that several workers share.
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
