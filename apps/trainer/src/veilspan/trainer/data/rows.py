"""Rows of text files, JSON lines, Parquet files and datasets folders, read one at a time."""

from __future__ import annotations

import json
import unicodedata
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, final

from veilspan.trainer.errors import DataError


class Rows(Protocol):
    """A fixed number of texts that stay on disk until one is asked for."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def text(self, row: int, limit: int) -> str:
        """Return the first `limit` characters of a row."""
        ...

    def users(self, column: str) -> list[str]:
        """Return the user of every row."""
        ...


@final
class TextFiles:
    """Each file is one row, in UTF-8; other bytes become U+FFFD, a byte order mark is no text."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def text(self, row: int, limit: int) -> str:
        """Return the first `limit` characters of file number `row`."""
        path = self._files[row]
        try:
            with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
                return file.read(limit)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error

    def users(self, column: str) -> list[str]:
        """Refuse: a text file has no columns."""
        raise DataError(
            f'data.user_column is "{column}", but text files have no columns; use jsonl, parquet '
            "or dataset."
        )


@final
class JsonLines:
    """Each line is one row; only the position of each line is kept in memory.

    Raises:
        DataError: If a line is no JSON object or lacks a column, naming file and line.
    """

    def __init__(self, files: Sequence[Path], text_column: str) -> None:
        self._files = files
        self._column = text_column
        self._offsets = [array("q") for _ in files]
        for number, (offset, _) in self._scan(text_column):
            self._offsets[number].append(offset)
        self._ends = list(accumulate(map(len, self._offsets)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def text(self, row: int, limit: int) -> str:
        """Return the first `limit` characters of row `row`, counted over all files."""
        number, inner = _locate(self._ends, row)
        path, start = self._files[number], self._offsets[number][inner]
        try:
            with path.open("rb") as file:
                file.seek(start)
                line = file.readline()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        # A file that has changed since it was opened is refused like one that was wrong before.
        value = _field(line, self._column, f"{path}, byte {start}", text=True)
        text = (value or "")[:limit]
        # JSON may spell halves of a pair of surrogates, which are no characters.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    def users(self, column: str) -> list[str]:
        """Return the user of every row."""
        return [_user(value, column) for _, (_, value) in self._scan(column, text=False)]

    def _scan(self, column: str, *, text: bool = True) -> Iterator[tuple[int, tuple[int, Any]]]:
        """Yield (file number, (byte offset, value of the column)) of every row."""
        for number, path in enumerate(self._files):
            with path.open("rb") as file:
                offset = 0
                for index, line in enumerate(file, start=1):
                    if line.strip():
                        value = _field(line, column, f"{path}, line {index}", text=text)
                        yield number, (offset, value)
                    offset += len(line)


@final
class ParquetFiles:
    """Each table row is one row; the row group read last stays in memory.

    Raises:
        DataError: If a file is no Parquet file or lacks the text column.
    """

    def __init__(self, files: Sequence[Path], text_column: str) -> None:
        import pyarrow.parquet as parquet

        self._files = files
        self._groups: list[tuple[int, int]] = []
        sizes: list[int] = []
        for number, path in enumerate(files):
            with _opened(path) as file:
                _check_columns(file.schema_arrow.names, text_column, path)
                _check_text(file.schema_arrow.field(text_column).type, text_column, path)
                self._groups += [(number, group) for group in range(file.num_row_groups)]
                sizes += [
                    file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)
                ]
        self._ends = list(accumulate(sizes))

        @lru_cache(maxsize=2)
        def read(number: int, group: int) -> Any:
            with parquet.ParquetFile(files[number]) as file:
                return file.read_row_group(group, columns=[text_column]).column(0)

        self._read = read

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def text(self, row: int, limit: int) -> str:
        """Return the first `limit` characters of row `row`, counted over all files."""
        group, inner = _locate(self._ends, row)
        number, part = self._groups[group]
        try:
            return _cell(self._read(number, part)[inner])[:limit]
        except (OSError, ValueError) as error:
            raise DataError(f"{self._files[number]} cannot be read: {error}.") from error

    def users(self, column: str) -> list[str]:
        """Return the user of every row."""
        users: list[str] = []
        for path in self._files:
            with _opened(path) as file:
                _check_columns(file.schema_arrow.names, column, path)
                values = file.read(columns=[column]).column(0).to_pylist()
            users += [_user(value, column) for value in values]
        return users


@final
class DatasetFolder:
    """Each row of a folder written by `datasets.Dataset.save_to_disk` is one row.

    Raises:
        DataError: If the folder is no such data set or lacks the text column.
    """

    def __init__(self, folder: Path, text_column: str) -> None:
        from datasets import Dataset, load_from_disk

        try:
            dataset = load_from_disk(str(folder))
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} does not load as a datasets folder: {error}") from error
        if not isinstance(dataset, Dataset):
            splits = ", ".join(map(str, dataset))
            raise DataError(f"{folder} holds the splits {splits}; name one, as {folder}/SPLIT.")
        _check_columns(dataset.column_names, text_column, folder)
        _check_text(dataset.data.schema.field(text_column).type, text_column, folder)
        self._folder, self._all = folder, dataset.with_format(None)
        self._texts = dataset.select_columns([text_column]).with_format("arrow")

    def __len__(self) -> int:
        return len(self._texts)

    def text(self, row: int, limit: int) -> str:
        """Return the first `limit` characters of row `row`."""
        table: Any = self._texts[row]
        return _cell(table.column(0)[0])[:limit]

    def users(self, column: str) -> list[str]:
        """Return the user of every row."""
        _check_columns(self._all.column_names, column, self._folder)
        return [_user(value, column) for value in self._all[column]]


def _locate(ends: Sequence[int], row: int) -> tuple[int, int]:
    """Return the part that holds a row, and the row's number inside it."""
    part = bisect_right(ends, row)
    return part, row - (ends[part - 1] if part else 0)


def _field(line: bytes, column: str, where: str, *, text: bool) -> Any:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: no valid JSON ({error}); write one object per line.") from error
    if not isinstance(fields, dict):
        raise DataError(f'{where}: each line must be an object such as {{"{column}": …}}.')
    _check_columns(list(fields), column, where)
    if text and not isinstance(fields[column], str | None):
        raise DataError(f"{where}: column {column!r} must hold text or null.")
    return fields[column]


def _check_columns(names: Sequence[str], column: str, where: object) -> None:
    if column not in names:
        raise DataError(f"{where}: no column {column!r}; its columns are {', '.join(names)}.")


def _check_text(kind: Any, column: str, where: object) -> None:
    import pyarrow

    values = kind.value_type if isinstance(kind, pyarrow.DictionaryType) else kind
    if str(values) not in ("string", "large_string", "string_view", "null"):
        raise DataError(f"{where}: column {column!r} holds {kind}; it must hold text.")


def _cell(scalar: Any) -> str:
    """Return one cell of an Arrow column of texts; bytes that are not UTF-8 become U+FFFD."""
    try:
        return scalar.as_py() or ""
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes().decode("utf-8", "replace")


def _user(value: object, column: str) -> str:
    """Return one text for all spellings of a user, so that 7 and 7.0 are one user.

    Blanks around a name do not count, nor how Unicode composes an accent (NFC): a user taken for
    two would be protected less, two users taken for one are protected together.
    """
    if isinstance(value, Mapping | list):
        raise DataError(f"Column {column!r} must hold texts or numbers; some row has {{…}} or […].")
    if isinstance(value, float | Decimal) and value == value and value % 1 == 0:
        value = int(value)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    name = "" if value is None or value != value else str(value)  # NaN is not itself
    name = unicodedata.normalize("NFC", name).strip()
    if not name:
        raise DataError(
            f"Column {column!r} names no user in some row; every row needs one, because a row "
            "without a user would be protected as nobody's."
        )
    return name


def _opened(path: Path) -> Any:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        return parquet.ParquetFile(path)
    except arrow.ArrowInvalid as error:
        raise DataError(f"{path} is no Parquet file: {error}") from error
