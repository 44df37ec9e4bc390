"""Files of a data set, found by pattern in an order that no machine changes."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from veilspan.trainer.errors import DataError

ENDINGS = {
    "text": (".txt", ".md"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
}
PATTERNS = {"text": "**/*.txt", "jsonl": "**/*.jsonl", "parquet": "**/*.parquet"}


def detect_format(path: Path, key: str) -> str:
    """Return the format of a file or folder by its name and content listing.

    Raises:
        DataError: If `path` is missing or its format cannot be told.
    """
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return "dataset"
        return "text"
    require(path, key)
    for name, endings in ENDINGS.items():
        if path.suffix.lower() in endings:
            return name
    raise DataError(
        f"{key} is {str(path)!r}, whose format does not follow from its name; set data.format to "
        "text, jsonl, parquet or dataset."
    )


def require(path: Path, key: str) -> None:
    """Raise `DataError` if `path` does not exist."""
    if not path.exists():
        raise DataError(f"{key} is {str(path)!r}, which does not exist.")


def list_files(
    path: Path,
    key: str,
    *,
    pattern: str,
    exclude: Collection[str] = (),
    without: Collection[Path] = (),
) -> list[Path]:
    """Return the files of a data set, sorted by their path below `path`.

    A file with several names, through links, is there once: else one unit would count as several.

    Args:
        path: One file, which is returned alone, or a folder.
        key: Recipe key to name in errors.
        pattern: Files to take inside a folder, such as `**/*.py`.
        exclude: Patterns of files and folders to leave out.
        without: Files, whatever they are called in the folder, and folders that are left out.

    Raises:
        DataError: If `path` is missing or a pattern cannot be read.
    """
    require(path, key)
    if path.is_file():
        return [] if any(other.exists() and path.samefile(other) for other in without) else [path]
    dropped = {match for text in exclude for match in _glob(path, text, "data.exclude")}
    dropped |= {
        path / other.resolve().relative_to(path.resolve())
        for other in without
        if is_inside(other, path)
    }
    kept = (
        file
        for file in _glob(path, pattern, "data.pattern")
        if file.is_file() and dropped.isdisjoint((file, *file.parents))
    )
    elsewhere = {_place(other) for other in without if other.is_file()}
    by_place: dict[tuple[int, int], Path] = {}
    for file in sorted(kept, key=lambda file: file.relative_to(path).as_posix()):
        by_place.setdefault(_place(file), file)
    return [file for place, file in by_place.items() if place not in elsewhere]


def _place(file: Path) -> tuple[int, int]:
    """Return what all names of one file have in common."""
    found = file.stat()
    return found.st_dev, found.st_ino


def is_inside(path: Path, folder: Path) -> bool:
    """Tell whether `path` is `folder` itself or lies below it."""
    return path.resolve().is_relative_to(folder.resolve())


def _glob(folder: Path, pattern: str, key: str) -> set[Path]:
    try:
        return set(folder.glob(pattern))
    except (ValueError, NotImplementedError) as error:
        raise DataError(
            f"{key} has {pattern!r}, which is no relative pattern such as **/*.py: {error}."
        ) from error
