"""The folder of one run: which files it has, and whether it belongs to this recipe."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veilspan.accounting import Ledger, LedgerError, PrivacyPlan
from veilspan.trainer.errors import RecipeError, TrainerError
from veilspan.trainer.files import write_whole
from veilspan.trainer.recipe import Recipe, load_recipe
from veilspan.trainer.run_info import RunInfo


class RunFolderError(TrainerError):
    """A run folder that cannot be used: another run's, damaged, or no run folder at all."""


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder; see the guide "The run folder" for what each is.

    Args:
        root: The folder.
    """

    root: Path

    @property
    def recipe(self) -> Path:
        """The recipe with every default filled in."""
        return self.root / "recipe.toml"

    @property
    def info(self) -> Path:
        """Public facts; written last, so a folder that has it is a complete run folder."""
        return self.root / "run.json"

    @property
    def ledger(self) -> Path:
        """One line per release."""
        return self.root / "ledger.jsonl"

    @property
    def metrics(self) -> Path:
        """Public quantities over time."""
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The same for TensorBoard."""
        return self.root / "tensorboard"

    @property
    def statement(self) -> Path:
        """The guarantee in words."""
        return self.root / "privacy_statement.md"

    @property
    def statement_json(self) -> Path:
        """The guarantee in numbers."""
        return self.root / "privacy_statement.json"

    @property
    def plots(self) -> Path:
        """Figures."""
        return self.root / "plots"

    @property
    def report(self) -> Path:
        """The report, one self-contained page."""
        return self.root / "report.html"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints, newest kept."""
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """The exported model."""
        return self.root / "model"

    def read_info(self) -> RunInfo:
        """Return the facts in `run.json`.

        Raises:
            RunFolderError: If the file is missing, damaged, or of an unknown format.
        """
        try:
            return RunInfo.from_json(self.info.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RunFolderError(
                f"{self.root} is no run folder: it holds no {self.info.name}. Give the folder that "
                "the recipe names in run.folder."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"{self.info} is damaged: {error}.") from error

    def read_recipe(self) -> Recipe:
        """Return the recipe of the run."""
        return load_recipe(self.recipe)

    def read_ledger(self) -> Ledger:
        """Return the ledger for reading; a run that is going on may keep writing it."""
        return Ledger.open(self.ledger, read_only=True)


def key_path(recipe: Recipe) -> Path:
    """Return where the secret sampling key lies: beside the run folder unless the recipe says."""
    folder = Path(os.path.abspath(recipe.run.folder))  # "." has no name; links keep theirs
    return recipe.privacy.key_file or folder.with_name(f"{folder.name}.key")


def recipe_digest(recipe: Recipe) -> str:
    """Return a SHA-256 of everything in a recipe that decides what is learned.

    How the work is spread (`parallel`, `compute`), how often results are shown or saved, and where
    run folder and key lie may change when a run continues; model, data, privacy and optimizer may
    not, nor may the paths of model and data.
    """
    settings: dict[str, Any] = recipe.model_dump(mode="json", exclude={"parallel", "compute"})
    settings["privacy"].pop("key_file")
    if recipe.privacy.norm_probes is None:  # digests of runs with exact norms do not change
        del settings["privacy"]["norm_probes"], settings["privacy"]["norm_blocks"]
    settings["run"] = {"seed": recipe.run.seed}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def open_run(folder: RunFolder, recipe: Recipe, plan: PrivacyPlan, info: RunInfo) -> Ledger:
    """Create a run folder, or continue in the one that exists.

    Args:
        folder: The folder.
        recipe: The recipe.
        plan: The privacy plan made from it.
        info: Facts about this run.

    Returns:
        Its ledger, opened for writing.

    Raises:
        RunFolderError: If the folder belongs to another run, holds something else, cannot be
            written.
        LedgerError: If the ledger is damaged, missing, in use, or of another plan.
    """
    try:
        if folder.info.is_file():
            return _continue(folder, plan, info)
        return _create(folder, recipe, plan, info)
    except OSError as error:
        raise RunFolderError(
            f"Cannot write the run folder {folder.root}: {error.strerror}. Free disk space, make "
            "the folder writable, or choose another with run.folder."
        ) from error


def ledger_head(path: Path, releases: int) -> str:
    """Return the SHA-256 of the line of a ledger that recorded its `releases`-th release.

    Together with the ledger's own chain it fixes every line up to there; 0 is the first line.

    Raises:
        LedgerError: If the ledger has fewer lines.
    """
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    if releases >= len(lines):
        raise LedgerError(f"{path} holds fewer than {releases} releases: its end was lost.")
    return hashlib.sha256(lines[releases]).hexdigest()


def _continue(folder: RunFolder, plan: PrivacyPlan, info: RunInfo) -> Ledger:
    known = folder.read_info()
    if known.recipe_digest != info.recipe_digest:
        raise RunFolderError(
            f"{folder.root} belongs to a run with another recipe (compare {folder.recipe}). Give "
            "this run a folder of its own with run.folder, or use that recipe."
        )
    if known.key_fingerprint != info.key_fingerprint:
        raise RunFolderError(
            f"{folder.root} belongs to a run with another sampling key, so its ledger would name "
            "the wrong one. Restore the key file (privacy.key_file), or start in a new folder."
        )
    if known.num_records != info.num_records:
        raise RunFolderError(
            f"{folder.root} began with {known.num_records} units of data, now there are "
            f"{info.num_records}. Restore the data, or start in a new folder."
        )
    ledger = Ledger.open(folder.ledger, plan=plan, run_id=_run_id(info))
    try:
        write_whole(folder.info, known.continued(info, ledger.releases).to_json())
    except BaseException:
        ledger.close()
        raise
    return ledger


def _create(folder: RunFolder, recipe: Recipe, plan: PrivacyPlan, info: RunInfo) -> Ledger:
    budget = recipe.privacy.target_epsilon or plan.epsilon().upper
    if budget == 0:
        raise RecipeError(
            f"privacy.noise_multiplier is {plan.noise_multiplier:g}, with which ε is 0: nothing "
            "would be learned. Set it lower."
        )
    folder.root.mkdir(parents=True, exist_ok=True)
    _clear_interrupted_start(folder)
    write_whole(folder.recipe, recipe.to_toml())
    ledger = Ledger.create(
        folder.ledger, plan, budget_epsilon=budget, run_id=_run_id(info), data=recipe.data.name
    )
    write_whole(folder.info, info.to_json())
    return ledger


def _clear_interrupted_start(folder: RunFolder) -> None:
    """Remove what a start leaves behind that crashed before its first release."""
    ours = {folder.recipe.name, folder.ledger.name}
    foreign = sorted(
        path.name
        for path in folder.root.iterdir()
        if path.name not in ours and not path.name.startswith(".partial-")
    )
    if foreign:
        raise RunFolderError(
            f"run.folder is {folder.root}, which is not empty and holds no run ({foreign[0]}); "
            "choose another folder."
        )
    if folder.ledger.exists():
        _require_unused(folder.ledger)
        folder.ledger.unlink()


def _require_unused(path: Path) -> None:
    if b"\n" not in path.read_bytes():
        return  # not even the first line is complete
    with Ledger.open(path) as ledger:  # refused while another start has just made it
        if ledger.releases:
            raise LedgerError(
                f"{path} counts {ledger.releases} releases, but the run folder lost its run.json. "
                "Restore that file; a new run needs a folder of its own."
            )


def _run_id(info: RunInfo) -> str:
    return f"{info.recipe_digest[:16]}-{info.key_fingerprint}"
