"""The statement and the report say what the ledger says, and need no other file."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from veilspan.accounting import Ledger, LedgerError, PrivacyPlan
from veilspan.accounting.bounds import round_up
from veilspan.trainer.checkpoint import Progress
from veilspan.trainer.odds import detection_bounds
from veilspan.trainer.plots import draw_plots, plot_epsilon
from veilspan.trainer.progress import Status
from veilspan.trainer.prose import Block, parse
from veilspan.trainer.recipe import Recipe
from veilspan.trainer.report import epsilon_curve, write_report, write_statement
from veilspan.trainer.run_folder import (
    RunFolder,
    RunFolderError,
    ledger_head,
    open_run,
    recipe_digest,
)
from veilspan.trainer.run_info import RunInfo, Start

PLAN = PrivacyPlan.calibrate(
    target_epsilon=8.0,
    delta=1 / 999,
    sampling_probability=4 / 24,
    steps=6,
    expected_batch_size=4.0,
    unit="document",
)


def _make_run(recipe: Recipe, entries: list[tuple[int, int]], rows: list[dict] | None) -> Path:
    """Make a run folder with these ledger entries and metrics, without training."""
    folder = RunFolder(recipe.run.folder)
    info = RunInfo(
        recipe_digest=recipe_digest(recipe),
        key_fingerprint="a" * 16,
        num_records=24,
        num_heldout=3,
        model_type="llama",
        parameters=35168,
        trainable=35168,
        starts=(Start(releases=0, processes=2, device="<b>CPU</b>", versions={"torch": "2.13"}),),
    )
    with open_run(folder, recipe, PLAN, info) as ledger:
        for step, attempt in entries:
            ledger.append(step=step, attempt=attempt)
    rows = [{"step": 0, "heldout_loss": 5.5}] if rows is None else rows
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder.root


@pytest.fixture
def run_of(tmp_path: Path, recipe_in: Callable) -> Callable[..., Path]:
    """Make a run folder with the given ledger entries, without training."""

    def make(*entries: tuple[int, int], metrics: list[dict] | None = None) -> Path:
        return _make_run(recipe_in(tmp_path), list(entries), metrics)

    return make


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory, recipe_in: Callable) -> Path:
    """A complete run with its report, for reading only."""
    root = _make_run(recipe_in(tmp_path_factory.mktemp("complete")), _all(PLAN.steps), None)
    assert write_report(root) == root / "report.html"
    return root


@pytest.fixture(scope="module")
def page_of_a_repeated_step(tmp_path_factory: pytest.TempPathFactory, recipe_in: Callable) -> str:
    """The report of a run that took one of its two steps twice, with single blanks."""
    rows = [{"step": 0, "heldout_loss": 5.5}, {"step": 2, "heldout_loss": 3.25}]
    recipe = recipe_in(tmp_path_factory.mktemp("repeated"))
    page = write_report(_make_run(recipe, [(0, 0), (1, 0), (1, 1)], rows)).read_text()
    return re.sub(r"\s+", " ", page)


def _all(steps: int) -> list[tuple[int, int]]:
    return [(step, 0) for step in range(steps)]


class References(HTMLParser):
    """Collects everything a page loads from elsewhere, and its images."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.others: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if tag == "img" and name == "src":
                self.images.append(value or "")
            elif name in ("src", "href", "srcset", "data") or tag in ("script", "link", "iframe"):
                self.others.append(f"{tag} {name}={value}")


def test_a_complete_run_states_the_epsilon_of_its_plan(complete: Path) -> None:
    page = (complete / "report.html").read_text()
    upper = PLAN.epsilon().upper
    assert f"ε ≤ {round_up(upper)}" in page
    assert "within its budget" in page
    numbers = json.loads((complete / "privacy_statement.json").read_text())
    assert numbers["epsilon"]["upper"] == upper
    assert f"ε ≤ {round_up(upper)}" in (complete / "privacy_statement.md").read_text()


def test_no_number_is_rounded_to_what_is_not_certified(complete: Path) -> None:
    page = (complete / "report.html").read_text()
    assert "δ = 0.0011" in page  # not 0.001, the nearest of two digits
    assert "<b>0.0011</b>" in page
    bounds = PLAN.epsilon()
    least = re.search(r"true value at least ([\d.]+)", page)
    assert least is not None
    assert float(least[1]) <= bounds.lower
    status = Status(step=1, epsilon=1.23401, heldout_loss=None, tokens_per_second=None)
    assert status.text(8.0) == "ε 1.235 of 8"
    assert status.text(1.23401) == "ε 1.235 of 1.235"  # not of 1.234, which it would exceed


def test_no_figure_shows_less_than_was_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(Axes, "legend", lambda self, **_: shown.extend(_texts(self)))
    plot_epsilon(tmp_path / "e.png", [(0, 0), (1, 1.23401)], budget=1.23401, spent=(1, 1.23401))
    assert "spent: ε ≤ 1.235" in shown
    assert "budget ε = 1.235" in shown


def _texts(axes: Axes) -> list[str]:
    labels = axes.get_legend_handles_labels()[1]
    return [*map(str, labels), *(text.get_text() for text in axes.texts)]


def test_the_statement_counts_releases_not_planned_steps(run_of: Callable) -> None:
    root = run_of((0, 0), (1, 0), (1, 1))
    write_statement(root)
    numbers = json.loads((root / "privacy_statement.json").read_text())
    assert (numbers["releases"], numbers["steps"]) == (3, 2)
    assert numbers["epsilon"]["upper"] == PLAN.epsilon_after(3).upper
    assert "After 3 noisy releases" in (root / "privacy_statement.md").read_text()


@pytest.mark.parametrize(
    ("length", "head", "message"),
    [(3, None, "the end of the ledger was lost"), (1, "b" * 64, "is not the ledger")],
)
def test_no_statement_is_made_from_a_ledger_that_counts_less_than_the_checkpoint_saw(
    run_of: Callable, length: int, head: str | None, message: str
) -> None:
    root = run_of(*_all(2))
    progress = Progress(
        step=length,
        ledger_length=length,
        ledger_head=head or ledger_head(RunFolder(root).ledger, 2),
        recipe_digest="d",
    )
    checkpoint = RunFolder(root).checkpoints / f"step-{length:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").write_text(json.dumps(asdict(progress)))
    for write in (write_statement, write_report):
        with pytest.raises(LedgerError, match=message):
            write(root)


def test_the_report_is_one_page_that_needs_no_other_file(complete: Path) -> None:
    found = References()
    found.feed((complete / "report.html").read_text())
    assert found.others == []
    assert len(found.images) == 2
    assert all(image.startswith("data:image/png;base64,") for image in found.images)


def test_the_report_escapes_what_it_shows(complete: Path) -> None:
    page = (complete / "report.html").read_text()
    assert "<b>CPU</b>" not in page
    assert "&lt;b&gt;CPU&lt;/b&gt;" in page


@pytest.mark.parametrize(
    "expected",
    [
        "one record: a row or file of the data set",
        "within its budget of ε = 8",
        "Repeated after a crash</td><td>1 (counted)",
        "1/N is 0.042 for N = 24",
        "independently (Poisson)",
        "Tokenizer</td><td>bytes; built in, trained on nothing",
        "5.500 → 3.250 nats per token on 3 records",
        "AES-256 in counter mode",
        "torch</td><td>2.13",
        "[privacy]",
        "Timing, memory and other side channels",
    ],
)
def test_the_report_answers_what_a_privacy_officer_asks(
    page_of_a_repeated_step: str, expected: str
) -> None:
    assert expected in page_of_a_repeated_step


def test_the_head_in_the_report_is_the_hash_of_the_ledgers_last_line(complete: Path) -> None:
    last = (complete / "ledger.jsonl").read_bytes().splitlines()[-1]
    assert hashlib.sha256(last).hexdigest() in (complete / "report.html").read_text()


def test_a_run_before_its_first_release_has_a_report_too(run_of: Callable) -> None:
    page = write_report(run_of(metrics=[])).read_text()
    assert "ε ≤ 0" in page


def test_an_altered_ledger_gets_no_report(run_of: Callable) -> None:
    root = run_of(*_all(3))
    ledger = root / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"step": 1', '"step": 7'))
    with pytest.raises(LedgerError, match="was altered"):
        write_report(root)
    assert not (root / "report.html").exists()


def test_a_report_can_be_made_while_the_run_goes_on(run_of: Callable) -> None:
    root = run_of(*_all(1))
    with Ledger.open(root / "ledger.jsonl"):
        assert write_report(root).exists()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run folder"):
        write_report(tmp_path)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (1.0, 1e-5), (8.0, 1e-5), (800.0, 0.0)])
def test_detection_is_bounded_as_for_the_two_point_mechanism(epsilon: float, delta: float) -> None:
    for rate, (_, found) in zip((1e-2, 1e-3, 1e-4), detection_bounds(epsilon, delta), strict=True):
        stated = float(found.removesuffix(" %")) / 100
        # The best test against (ε, δ): both error rates at once satisfy these two lines.
        allowed = min(
            1.0,
            math.exp(min(epsilon, 500)) * rate + delta,
            1 - math.exp(-epsilon) * (1 - rate - delta),
        )
        assert allowed <= stated + 1e-12
        assert stated <= allowed + 1.01e-4


def test_the_curve_rises_to_the_plan(run_of: Callable) -> None:
    curve = epsilon_curve(PLAN)
    assert curve[0] == (0.0, 0.0)
    assert curve[-1] == (PLAN.steps, PLAN.epsilon().upper)
    assert all(a[0] < b[0] and a[1] <= b[1] for a, b in itertools.pairwise(curve))


def test_plots_exist_for_the_numbers_that_do(tmp_path: Path) -> None:
    rows = [
        {"step": step, "heldout_loss": 5.0 - step, "tokens_per_second": 100.0, "memory_gib": 0.5}
        for step in range(3)
    ]
    curve = epsilon_curve(PLAN)
    every = draw_plots(tmp_path / "a", rows, epsilon=curve, budget=8.0, spent=(3, 5.0))
    assert list(every) == ["Privacy spent", "Held-out loss", "Throughput and memory"]
    for path in every.values():
        assert path.read_bytes().startswith(b"\x89PNG")
    del rows[0]["memory_gib"], rows[1]["memory_gib"], rows[2]["memory_gib"]
    some = draw_plots(tmp_path / "b", rows, epsilon=curve, budget=8.0, spent=(3, 5.0))
    assert list(some) == ["Privacy spent", "Held-out loss", "Throughput"]
    few = draw_plots(tmp_path / "b", [], epsilon=curve, budget=8.0, spent=(0, 0.0))
    assert list(few) == ["Privacy spent"]


def test_prose_keeps_every_word_of_a_statement() -> None:
    blocks = parse("One\nline.\n\n- first\n- second\n\nEnd.\n")
    assert blocks == [
        Block(text="One line."),
        Block(items=("first", "second")),
        Block(text="End."),
    ]
    words = " ".join(f"{block.text} {' '.join(block.items)}" for block in parse(PLAN.statement()))
    assert sorted(words.split()) == sorted(PLAN.statement().replace("\n- ", "\n").split())


def test_a_report_names_the_machine_and_software_of_every_start(run_of: Callable) -> None:
    root = run_of(*_all(3))
    folder = RunFolder(root)
    info = folder.read_info()
    second = Start(releases=2, processes=1, device="H100", versions={"torch": "2.14"})
    idle = Start(releases=3, processes=4, device="laptop", versions={"torch": "2.15"})
    folder.info.write_text(replace(info, starts=(*info.starts, second, idle)).to_json())
    page = write_report(root).read_text()
    assert "&lt;b&gt;CPU&lt;/b&gt;, 2 processes, then H100, 1 process; float32" in page
    assert "2.13, then 2.14" in page
    assert "laptop" not in page
    assert "2.15" not in page
    told = json.loads(folder.statement_json.read_text())
    assert told["versions"] == {"torch": "2.13, then 2.14"}
