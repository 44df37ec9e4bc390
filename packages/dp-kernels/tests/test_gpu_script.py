"""The one command for GPUs, with the programs that it starts replaced."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks are not in the wheel")

CASE = {
    "sizes": {"B": 1},
    "forecast_seconds": {"H100": 1e-3, "H200": 1e-3},
    "rows": {"veilspan": {"seconds": 2e-3}},
}


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_script"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def commands(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Pretend that there is an H100, and that every program does its work."""
    started: list[list[str]] = []

    def run(command: list[str], *, timeout: float, **_: Any) -> subprocess.CompletedProcess[str]:
        started.append(command)
        assert 0 < timeout <= 9 * 60
        if "--seconds" in command:
            written = Path(command[command.index("--output") + 1])
            machine = {"gpu": "NVIDIA H100 80GB HBM3"}
            written.write_text(json.dumps({"machine": machine, "cases": [CASE]}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(script.subprocess, "run", run)
    return started


def test_without_a_gpu_it_says_so(script: ModuleType, capsys: pytest.CaptureFixture) -> None:
    if script.torch.cuda.is_available():
        pytest.skip("there is one")
    assert script.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out


def test_tests_every_op_and_whole_steps_run_and_are_recorded(
    script: ModuleType, commands: list[list[str]], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    assert script.main(["--output", str(tmp_path)]) == 0
    ops = {path.stem.removeprefix("bench_") for path in SCRIPT.parent.glob("bench_*.py")}
    result = json.loads((tmp_path / "gpu_kernels.json").read_text())
    assert set(result["ops"]) == ops
    assert result["parts"] == dict.fromkeys(["tests", *ops, "steps"], "ok")
    assert result["machine"] == {"gpu": "NVIDIA H100 80GB HBM3"}
    assert script.reached(result["ops"]["direct_norm"][0], "NVIDIA H100 80GB HBM3") == 0.5
    assert script.reached(result["ops"]["direct_norm"][0], "some other GPU") is None
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_kernels.json", "gpu_kernels.svg"}
    assert "pytest" in commands[0]
    assert "cuda" in commands[-1]


def test_a_failing_test_is_a_failing_run_but_the_rest_is_measured(
    script: ModuleType, commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    stand_in = script.subprocess.run

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        ended = stand_in(command, **options)
        ended.returncode = int("pytest" in command)
        return ended

    monkeypatch.setattr(script.subprocess, "run", run)
    assert script.main(["--output", str(tmp_path)]) == 1
    result = json.loads((tmp_path / "gpu_kernels.json").read_text())
    assert result["parts"]["tests"] == "exit status 1"
    assert result["parts"]["steps"] == "ok"


def test_what_takes_too_long_is_stopped_and_what_has_no_time_is_not_begun(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], *, timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(script.subprocess, "run", run)
    slow = script.Run(script.time.monotonic() + 100.0)
    slow.start("tests", ["never"], 0.5)
    assert slow.parts["tests"] == "stopped after 50 s"
    late = script.Run(script.time.monotonic() + 1.0)
    late.start("steps", ["never"], 1.0)
    assert late.parts["steps"].startswith("not begun")
