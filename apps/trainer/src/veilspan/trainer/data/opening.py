"""Data sections of a recipe opened as records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from veilspan.trainer.data.folders import PATTERNS, detect_format, is_inside, list_files
from veilspan.trainer.data.records import Records, one_unit_per_row, one_unit_per_user
from veilspan.trainer.data.rows import DatasetFolder, JsonLines, ParquetFiles, Rows, TextFiles
from veilspan.trainer.errors import DataError
from veilspan.trainer.recipe import Recipe
from veilspan.trainer.run_folder import key_path
from veilspan.trainer.sections import Data


def open_records(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Records:
    """Open the private training data.

    Units are ordered by file and row, or by user name: the same on every machine.

    Raises:
        DataError: If data is missing, empty, or not in the declared form.
    """
    data = recipe.data
    rows = _training_rows(data, _written(recipe))
    if data.unit == "user":
        assert data.user_column is not None  # Data refuses unit "user" without it
        units = one_unit_per_user(rows.users(data.user_column))
    else:
        units = one_unit_per_row(range(len(rows)))
    if len(units) == 0:
        raise DataError(_empty(data))
    return Records(
        rows,
        tokenizer,
        sequence_length=data.sequence_length,
        units=units.first(data.max_records),
        sequences_per_unit=data.sequences_per_unit,
    )


def open_heldout(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Records | None:
    """Open the public held-out data, one sequence per row, or return None without any.

    Of more than `data.heldout_records` rows, as many are taken at even distances.

    Raises:
        DataError: If data is missing, empty, or not in the declared form.
    """
    data = recipe.data
    if not data.has_heldout:
        return None
    rows = _heldout_rows(data, _written(recipe))
    count = min(len(rows), data.heldout_records)
    if count == 0:
        source = str(_heldout_source(data))
        raise DataError(f"The held-out data {source!r} has no rows; remove it or correct it.")
    chosen = [index * len(rows) // count for index in range(count)]
    records = Records(
        rows,
        tokenizer,
        sequence_length=data.sequence_length,
        units=one_unit_per_row(chosen),
    )
    if all(len(records[number]) < 2 for number in range(count)):
        raise DataError(
            f"No row of the held-out data, {str(_heldout_source(data))!r}, holds a token to "
            "predict; remove it or correct it."
        )
    return records


def _heldout_source(data: Data) -> Path:
    return data.heldout or data.train / (data.heldout_pattern or "")


def _written(recipe: Recipe) -> tuple[Path, ...]:
    """Return what the run itself writes, which is no data wherever it lies."""
    return recipe.run.folder, key_path(recipe)


def _training_rows(data: Data, written: tuple[Path, ...]) -> Rows:
    kind = _format(data, data.train, "data.train")
    if data.heldout is not None and is_inside(data.train, data.heldout):
        raise DataError(
            f"data.train, {str(data.train)!r}, lies inside data.heldout, {str(data.heldout)!r}; "
            "held-out data is public and must not hold the training data."
        )
    if kind == "dataset":
        if data.heldout_pattern is not None:
            raise DataError(
                "data.heldout_pattern picks files, which a dataset folder does not have; "
                "name held-out data with data.heldout."
            )
        return DatasetFolder(data.train, data.text_column)
    exclude = (*data.exclude, *([data.heldout_pattern] if data.heldout_pattern else []))
    pattern = data.pattern or PATTERNS[kind]
    without = written
    if data.heldout is not None:
        without = (*written, data.heldout, *_heldout_files(data, data.heldout, written))
    files = list_files(data.train, "data.train", pattern=pattern, exclude=exclude, without=without)
    return _rows(kind, files, data)


def _heldout_rows(data: Data, written: tuple[Path, ...]) -> Rows:
    path = data.heldout
    kind = _format(data, path or data.train, "data.heldout")
    if path is None:
        assert data.heldout_pattern is not None
        files = _held_out_files(data, data.heldout_pattern, written)
    elif kind == "dataset":
        return DatasetFolder(path, data.text_column)
    else:
        files = _heldout_files(data, path, written)
    return _rows(kind, files, data)


def _heldout_files(data: Data, path: Path, written: tuple[Path, ...]) -> list[Path]:
    """Return the files of `data.heldout`, none where it is a dataset folder."""
    kind = _format(data, path, "data.heldout")
    if kind == "dataset":
        return []
    pattern = data.pattern or PATTERNS[kind]
    return list_files(path, "data.heldout", pattern=pattern, exclude=data.exclude, without=written)


def _held_out_files(data: Data, held_out: str, written: tuple[Path, ...]) -> list[Path]:
    """Return the files of the train folder that `held_out` takes out of the training data."""
    pattern = data.pattern or PATTERNS[_format(data, data.train, "data.train")]

    def files(*exclude: str) -> list[Path]:
        excluded = (*data.exclude, *exclude)
        return list_files(
            data.train, "data.train", pattern=pattern, exclude=excluded, without=written
        )

    trained_on = set(files(held_out))
    return [file for file in files() if file not in trained_on]


def _rows(kind: str, files: Sequence[Path], data: Data) -> Rows:
    if kind == "text":
        return TextFiles(files)
    if kind == "jsonl":
        return JsonLines(files, data.text_column)
    return ParquetFiles(files, data.text_column)


def _format(data: Data, path: Path, key: str) -> str:
    return detect_format(path, key) if data.format == "auto" else data.format


def _empty(data: Data) -> str:
    where = f"data.train is {str(data.train)!r}"
    if data.train.is_dir():
        kind = _format(data, data.train, "data.train")
        wanted = data.pattern or PATTERNS.get(kind)
        others = [
            name for name in PATTERNS if name != kind and any(data.train.glob(PATTERNS[name]))
        ]
        if data.format == "auto" and data.pattern is None and others:
            return (
                f"{where}, a folder, of which format auto reads text files, {wanted}; it holds "
                f"{PATTERNS[others[0]]}: set data.format to {others[0]}."
            )
        if wanted is not None:
            return (
                f"{where}, a folder in which no row is left to train on: files {wanted} without "
                f"those excluded or held out; change data.pattern or data.exclude."
            )
    return f"{where}, which has no rows; give a file or folder with at least one."
