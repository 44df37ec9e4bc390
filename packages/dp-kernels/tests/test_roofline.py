"""The forecast: every op is in it, and the documentation shows what the code counts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from veilspan.kernels.roofline import DEVICES, Work

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "roofline.py"
PAGE = Path(__file__).parents[3] / "docs" / "kernels.md"


@pytest.fixture(scope="module")
def roofline() -> ModuleType:
    if not SCRIPT.exists():
        pytest.skip("benchmarks are not part of the wheel")
    spec = importlib.util.spec_from_file_location("roofline", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_longest_limit_decides() -> None:
    device = DEVICES["H100"]
    parts = [Work(flops=1e15), Work(bytes=1e13), Work(integers=1e14)]
    for part in parts:
        assert part.seconds(device) > 0
    whole = Work(flops=1e15, bytes=1e13, integers=1e14)
    assert whole.seconds(device) == max(part.seconds(device) for part in parts)


def test_every_op_has_a_forecast(roofline: ModuleType) -> None:
    assert set(roofline.op_names()) == set(roofline.FORECASTS)


def test_the_documentation_shows_the_forecast_of_this_code(roofline: ModuleType) -> None:
    if not PAGE.exists():
        pytest.skip("the documentation is not here")
    assert roofline.text() in PAGE.read_text("utf-8"), "run roofline.py --markdown docs/kernels.md"


def test_an_op_without_an_entry_is_named(
    roofline: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(roofline.FORECASTS, "accumulate")
    with pytest.raises(KeyError, match="op 'accumulate' has no entry"):
        roofline.table()


def test_a_page_without_marks_is_refused(roofline: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Nothing\n")
    with pytest.raises(ValueError, match="has no lines"):
        roofline.insert(page, "x")
    page.write_text(f"a\n{roofline.MARKS[0]}\nold\n{roofline.MARKS[1]}\nb\n")
    roofline.insert(page, "new")
    assert page.read_text() == f"a\n{roofline.MARKS[0]}\n\nnew\n\n{roofline.MARKS[1]}\nb\n"
