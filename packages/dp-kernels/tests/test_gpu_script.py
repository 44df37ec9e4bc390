"""The one command for GPUs, with the programs that it starts replaced."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

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

    def run_within(command: list[str], limit: float, folder: Path) -> tuple[int | None, str]:
        started.append(command)
        assert 0 < limit <= 9 * 60
        assert folder.is_dir()
        if "--seconds" in command:
            assert float(command[command.index("--until") + 1]) < script.time.time() + limit
            written = Path(command[command.index("--output") + 1])
            machine = {"gpu": "NVIDIA H100 80GB HBM3"}
            written.write_text(json.dumps({"machine": machine, "cases": [CASE]}))
        return 0, ""

    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(script, "run_within", run_within)
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
    steps = ["steps llama-3.2-1b", "steps llama-3.1-8b"]
    assert result["parts"] == dict.fromkeys(["tests", *ops, *steps], "ok")
    assert result["said"] == result["stopped"] == {}
    assert result["machine"] == {"gpu": "NVIDIA H100 80GB HBM3"}
    assert script.reached(result["ops"]["direct_norm"][0], "NVIDIA H100 80GB HBM3") == 0.5
    assert script.reached(result["ops"]["direct_norm"][0], "some other GPU") is None
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_kernels.json", "gpu_kernels.svg"}
    assert "pytest" in commands[0]
    assert "-x" not in commands[0]
    assert "cuda" in commands[-1]


def test_results_are_found_where_a_relative_folder_says(
    script: ModuleType,
    commands: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert script.main(["--output", "here"]) == 0
    assert json.loads((tmp_path / "here" / "gpu_kernels.json").read_text())["ops"]


def test_a_failing_test_is_a_failing_run_but_the_rest_is_measured(
    script: ModuleType, commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    stand_in = script.run_within

    def run_within(command: list[str], limit: float, folder: Path) -> tuple[int | None, str]:
        ended = stand_in(command, limit, folder)
        return (1, "two tests failed") if "pytest" in command else ended

    monkeypatch.setattr(script, "run_within", run_within)
    assert script.main(["--output", str(tmp_path)]) == 1
    result = json.loads((tmp_path / "gpu_kernels.json").read_text())
    assert result["parts"]["tests"] == "exit status 1"
    assert result["said"] == {"tests": "two tests failed"}
    assert result["parts"]["steps llama-3.1-8b"] == "ok"


def test_ops_that_use_up_their_time_leave_whole_steps_theirs(
    script: ModuleType, commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    clock, limits = [0.0], dict[str, float]()

    def run_within(command: list[str], limit: float, folder: Path) -> tuple[int | None, str]:
        name = next(Path(a).stem for a in command if "bench_" in a or a.endswith("tests"))
        limits.setdefault(name, limit)
        clock[0] += limit
        return None, ""

    monkeypatch.setattr(script.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(script, "run_within", run_within)
    monkeypatch.setattr(script.torch.cuda, "get_device_name", lambda: "H100")
    assert script.main(["--output", str(tmp_path)]) == 1
    after_tests = 540.0 - script.GRACE - limits.pop("tests")
    steps = limits.pop("bench_grid") / script.MODELS["llama-3.2-1b"]
    assert steps == pytest.approx(script.SHARES["steps"] * after_tests)
    assert max(limits.values()) == pytest.approx(min(limits.values()))
    assert clock[0] <= 540.0


SLOW = """
import subprocess, sys, time
deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", deaf])
print(child.pid, flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("what was found so far", flush=True)
"""


def test_what_takes_too_long_reports_and_leaves_no_process(
    script: ModuleType, tmp_path: Path
) -> None:
    status, said = script.run_within([sys.executable, "-c", SLOW], 3.0, tmp_path)
    child, found = said.splitlines()
    assert status is None
    assert found == "what was found so far"
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # whoever adopts the child takes note of its end
            os.kill(int(child), 0)
            time.sleep(0.1)


def test_what_takes_too_long_is_stopped_and_what_has_no_time_is_not_begun(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "run_within", lambda *_: (None, "as far as it came"))
    slow = script.Run(script.time.monotonic() + 100.0 + script.GRACE)
    slow.start("tests", ["never"], 0.5, folder=tmp_path)
    assert slow.parts["tests"] == "stopped after 50 s"
    assert slow.said["tests"] == "as far as it came"
    late = script.Run(script.time.monotonic() + 1.0 + script.GRACE)
    late.start("steps", ["never"], 1.0, folder=tmp_path)
    assert late.parts["steps"].startswith("not begun")


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("harness")


def cases_of(harness: ModuleType, *calls: Callable[[], object]) -> Callable[..., Iterator[Any]]:
    def cases(device: torch.device, quick: bool) -> Iterator[Any]:
        for number, call in enumerate(calls):
            yield harness.Case(
                sizes={"number": number},
                dtype=torch.float32,
                work=harness.Work(bytes=1.0),
                contestants={"veilspan": call, "other": lambda: None},
            )
        raise MemoryError("no room for the operands of the next case")

    return cases


def measured(
    harness: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    output: Path,
    calls: Sequence[Callable[[], object]],
    *options: str,
) -> dict[str, Any]:
    arguments = ["bench", "--output", str(output), "--rounds", "1", *options]
    monkeypatch.setattr(sys, "argv", arguments)
    with contextlib.suppress(MemoryError):
        harness.main("op", cases_of(harness, *calls))
    return json.loads(output.read_text())


def test_a_kernel_that_fails_is_recorded_and_hides_nothing(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Triton's errors are Exceptions of no narrower class, and an error may say nothing."""

    out_of_resources = importlib.import_module("triton.runtime.errors").OutOfResources

    def fails() -> None:
        raise out_of_resources(200, 100, "shared memory")

    def is_silent() -> None:
        raise AssertionError

    output = tmp_path / "op.json"
    result = measured(harness, monkeypatch, output, [fails, is_silent, lambda: None])
    first, second, third = result["cases"]
    assert first["failures"]["veilspan"].startswith("OutOfResources: out of resource: shared")
    assert second["failures"]["veilspan"] == "AssertionError: "
    assert "other" in first["rows"]
    assert set(third["rows"]) == {"veilspan", "other"}
    assert result["stopped"] == "MemoryError: no room for the operands of the next case"


def test_contestants_may_be_left_out(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output, calls = tmp_path / "op.json", [lambda: None]
    result = measured(harness, monkeypatch, output, calls, "--without", "other", "another")
    assert set(result["cases"][0]["rows"]) == {"veilspan"}


def test_no_case_begins_when_time_is_over(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "op.json"
    result = measured(harness, monkeypatch, output, [lambda: None], "--until", "1")
    assert result["cases"] == []
    assert result["stopped"] == "no time was left for further cases"
