"""The statement and the report of a run, made from its folder alone."""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from veilspan.accounting import EpsilonBounds, LedgerEntry, PrivacyPlan
from veilspan.accounting.bounds import at_least, at_most, round_up
from veilspan.trainer.checkpoint import newest_progress, require_ledger_of
from veilspan.trainer.files import write_whole
from veilspan.trainer.metrics import PUBLIC_METRICS, read_metrics
from veilspan.trainer.odds import detection_bounds, odds_factor
from veilspan.trainer.plots import Point, draw_plots, series
from veilspan.trainer.prose import Block, parse
from veilspan.trainer.recipe import Recipe
from veilspan.trainer.run_folder import RunFolder, ledger_head
from veilspan.trainer.run_info import RunInfo, used_versions

_CURVE_POINTS = 16
_STREAMS = {
    "aes-ctr": "AES-256 in counter mode (cryptographic)",
    "chacha20": "ChaCha20 (cryptographic)",
    "philox": "Philox (fast)",
}


@dataclass(frozen=True, kw_only=True)
class Account:
    """What a run has spent, read from its ledger.

    Args:
        plan: Numbers of the mechanism.
        budget: ε that the run may not exceed.
        entries: One per release.
        spent: Bounds on ε for all of them.
        head: Hash of the ledger's last line.
    """

    plan: PrivacyPlan
    budget: float
    entries: tuple[LedgerEntry, ...]
    spent: EpsilonBounds
    head: str

    @property
    def releases(self) -> int:
        """Number of releases."""
        return len(self.entries)

    @property
    def steps(self) -> int:
        """Number of different steps among them."""
        return len({entry.step for entry in self.entries if not entry.torn})

    @property
    def as_run(self) -> PrivacyPlan:
        """The plan with the releases that really happened in place of the planned steps."""
        return replace(self.plan, steps=self.releases)


def read_account(folder: RunFolder) -> Account:
    """Read a run's ledger, checking its chain and that it covers the newest checkpoint.

    Raises:
        LedgerError: If the ledger is missing, was altered, or counts less than the model has seen.
        CheckpointError: If the newest checkpoint is damaged.
    """
    progress = newest_progress(folder)  # before the ledger, which may grow meanwhile
    with folder.read_ledger() as ledger:
        if progress is not None:
            require_ledger_of(progress, ledger, folder)
        return Account(
            plan=ledger.plan,
            budget=ledger.budget_epsilon or math.inf,
            entries=ledger.entries,
            spent=ledger.spent(),
            head=ledger_head(folder.ledger, ledger.releases),
        )


def write_statement(root: Path) -> str:
    """Write `privacy_statement.md` and `.json` of a run folder and return the former.

    Raises:
        TrainerError: If it is no run folder.
        LedgerError: If the ledger is missing or was altered.
    """
    folder = RunFolder(root)
    info, account = folder.read_info(), read_account(folder)
    unit, each = account.plan.unit, account.plan.records_per_unit
    cut = f"The trainer cut each {unit} into {each} sequences, its records.\n\n" if each > 1 else ""
    text = (
        f"# Privacy statement\n\n{account.as_run.statement().strip()}\n\n{cut}"
        f"The ledger of this run counts {account.releases} releases for {account.steps} steps; "
        f"the SHA-256 of its last line is {account.head}.\n"
    )
    numbers = {
        "epsilon": account.spent.to_dict(),
        "budget_epsilon": account.budget,
        "plan": account.plan.to_dict(),
        "plan_digest": account.plan.digest,
        "releases": account.releases,
        "steps": account.steps,
        "num_records": info.num_records,
        "ledger_head": account.head,
        "versions": used_versions(info.worked(account.releases)),
    }
    write_whole(folder.statement, text)
    write_whole(folder.statement_json, json.dumps(numbers, indent=2, ensure_ascii=False) + "\n")
    return text


def write_report(root: Path) -> Path:
    """Write statement, plots and `report.html` of a run folder; nothing is trained.

    Returns:
        The report, one page without references to other files.

    Raises:
        TrainerError: If it is no run folder.
        LedgerError: If the ledger is missing or was altered.
    """
    folder = RunFolder(root)
    write_statement(root)
    info, recipe, account = folder.read_info(), folder.read_recipe(), read_account(folder)
    rows = read_metrics(folder.metrics)
    figures = draw_plots(
        folder.plots,
        rows,
        epsilon=epsilon_curve(account.plan),
        budget=account.budget,
        spent=(account.releases, account.spent.upper),
    )
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            name=root.resolve().name,
            account=account,
            verdict=_verdict(account),
            plain=_plain_words(account),
            odds=detection_bounds(account.spent.upper, account.spent.delta),
            trained=_trained_rows(recipe, info, account.releases, rows),
            mechanism=_mechanism_rows(account, recipe, info),
            ledger=_ledger_rows(account),
            figures={title: _embed(path) for title, path in figures.items()},
            statement=list(_assumptions(account)),
            public=PUBLIC_METRICS,
            versions=used_versions(info.worked(account.releases)),
            recipe=folder.recipe.read_text(encoding="utf-8"),
        )
    )
    write_whole(folder.report, page)
    return folder.report


def epsilon_curve(plan: PrivacyPlan) -> list[Point]:
    """Return (releases, upper bound on ε) over the whole plan, at most a few dozen points."""
    points = min(plan.steps, _CURVE_POINTS)
    # Denser at the start, where ε grows fastest.
    counts = sorted({max(1, round(plan.steps * (i / points) ** 2)) for i in range(1, points + 1)})
    return [(0.0, 0.0), *((float(n), plan.epsilon_after(n).upper) for n in counts)]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("veilspan.trainer", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"round_up": round_up, "at_least": at_least}
    return environment


def _verdict(account: Account) -> dict[str, str]:
    within = account.spent.upper <= account.budget
    return {
        "class": "good" if within else "bad",
        "text": "within its budget" if within else "OVER ITS BUDGET",
    }


def _plain_words(account: Account) -> list[str]:
    unit, spent = account.plan.unit, account.spent
    return [
        f"Take any one {unit}. Train the model twice, once with it and once without it. Whatever "
        f"is published of the two runs, anything anybody may conclude from it is at most "
        f"e^ε = {odds_factor(spent.upper)} times as likely in one case as in the other, except "
        f"with probability δ = {at_least(spent.delta, 2)}.",
        "ε is a worst-case bound: it holds against somebody who knows every other "
        f"{unit}, sees every step of the training, and has unlimited computing power. Smaller is "
        "more private; 0 would mean that nothing can be learned about anybody at all.",
    ]


def _trained_rows(
    recipe: Recipe, info: RunInfo, releases: int, rows: Sequence[Mapping[str, float]]
) -> list[tuple[str, str]]:
    data, losses = recipe.data, series(rows, "heldout_loss")
    start = "from scratch" if recipe.model.path is None else f"starting from {recipe.model.path}"
    machines = dict.fromkeys(map(str, info.worked(releases)))
    adapters = "" if recipe.model.lora is None else f", adapters of rank {recipe.model.lora.rank}"
    table = [
        ("Model", f"{info.model_type}, {info.parameters:,} parameters, {start}{adapters}"),
        ("Trained parameters", f"{info.trainable:,}"),
        ("Private data", f"{data.train}, {info.num_records:,} {data.unit}s"),
        ("Unit of privacy", _unit_text(recipe)),
        ("Used of each unit", _used_text(recipe)),
        ("Tokenizer", _tokenizer_text(recipe)),
        ("Trained on", f"{', then '.join(machines)}; {recipe.model.dtype}"),
    ]
    if losses:
        first, last = losses[0][1], losses[-1][1]
        table.append(
            (
                "Held-out loss",
                f"{first:.3f} → {last:.3f} nats per token on {info.num_heldout:,} records that the "
                "recipe declares public",
            )
        )
    return table


def _unit_text(recipe: Recipe) -> str:
    data = recipe.data
    meaning = {
        "record": "one record: a row or file of the data set",
        "document": "one document: a row or file that is a whole document",
        "user": f"one user: all rows with the same {data.user_column} together",
    }
    return meaning[data.unit]


def _used_text(recipe: Recipe) -> str:
    length, each = recipe.data.sequence_length, recipe.data.sequences_per_unit
    first = f"the first {each * length:,} tokens"
    return first if each == 1 else f"{first}, as {each} sequences, each drawn and clipped by itself"


def _tokenizer_text(recipe: Recipe) -> str:
    if recipe.data.tokenizer == "bytes":
        return "bytes; built in, trained on nothing"
    source = recipe.model.path if recipe.data.tokenizer == "auto" else recipe.data.tokenizer
    return f"from {source}; assumed not to be trained on the private data"


def _mechanism_rows(account: Account, recipe: Recipe, info: RunInfo) -> list[tuple[str, str, str]]:
    plan, q = account.plan, account.plan.sampling_probability
    drawn = recipe.data.drawn
    rule = "scaled down to it" if recipe.privacy.clipping == "clip" else "normalised to it"
    if recipe.privacy.groups != "flat":
        rule += f"; shared out equally, one threshold per {recipe.privacy.groups}"
    if plan.norms is not None:
        rule += f"; norms estimated from {plan.norms.probes} probes, which the noise accounts for"
    return [
        ("Sampling", f"q = {q:.6g}", f"each {drawn} joins each step independently (Poisson)"),
        ("Expected batch", f"{plan.expected_batch_size:g}", "public divisor of every sum"),
        ("Clip norm", f"C = {plan.clip_norm:g}", f"gradient of one {drawn}, {rule}"),
        ("Noise multiplier", f"σ = {plan.noise_multiplier:.6g}", "noise over clip norm"),
        ("Noise stream", _STREAMS[plan.noise_stream], "fresh key at every start, never stored"),
        ("Planned steps", f"{plan.steps:,}", "noisy releases"),
        (
            "δ",
            at_least(plan.delta, 4),
            f"1/N is {1 / info.num_records:.2g} for N = {info.num_records:,}",
        ),
        ("Neighbouring data sets", "add or remove", f"differ by one {plan.unit}"),
        ("Accountant", account.spent.method, "upper bound, both directions"),
        ("ε", round_up(account.spent.upper), f"true value at least {at_most(account.spent.lower)}"),
    ]


def _ledger_rows(account: Account) -> list[tuple[str, str]]:
    attempts = Counter(entry.step for entry in account.entries if not entry.torn)
    repeated = sum(count - 1 for count in attempts.values())
    torn = sum(entry.torn for entry in account.entries)
    return [
        ("Releases counted", f"{account.releases:,}"),
        ("Different steps", f"{account.steps:,}"),
        ("Repeated after a crash", f"{repeated:,} (counted)"),
        ("Torn lines", f"{torn:,} (counted)"),
        ("Hash chain", "every line verified"),
        ("Hash of the last line", account.head),
        ("Digest of the plan", account.plan.digest),
    ]


def _assumptions(account: Account) -> list[Block]:
    """Return the statement without its first paragraph, which the report says in its own way."""
    return parse(account.as_run.statement())[1:]


def _embed(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
