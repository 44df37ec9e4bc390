"""Durable, locked, append-only files: what the ledger asks of the operating system."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from veilspan.accounting.chain import LedgerError

_MODE = 0o600  # the ledger is nobody else's business until its owner publishes it


def create(path: Path, first_line: bytes) -> int:
    """Create a locked file with one line, flushed to disk, and return its descriptor.

    Raises:
        LedgerError: If the file exists, or cannot be locked or written; then none is left behind.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND
    try:
        descriptor = os.open(path, flags, _MODE)
    except FileExistsError as error:
        raise LedgerError(
            f"{path} exists already. Continue that run with Ledger.open, or give the new run a "
            "folder of its own; a ledger is never overwritten."
        ) from error
    except OSError as error:
        raise LedgerError(f"{path} could not be created: {error}.") from error
    try:
        _lock(descriptor, path)
        write_all(descriptor, first_line)
        os.fsync(descriptor)
        _sync_folder(path.parent)
    except BaseException as error:  # also an interrupt: nobody would hold the lock it leaves behind
        os.close(descriptor)
        with contextlib.suppress(OSError):
            os.unlink(path)
        if not isinstance(error, OSError):
            raise
        raise LedgerError(
            f"{path} could not be written: {error}. Free some space or choose another folder."
        ) from error
    return descriptor


def reopen(path: Path, *, read_only: bool) -> int:
    """Open an existing file, for appending under a lock unless `read_only`.

    Raises:
        LedgerError: If it is missing, unreadable, or locked by another writer.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY if read_only else os.O_RDWR | os.O_APPEND)
    except FileNotFoundError as error:
        raise LedgerError(
            f"{path} does not exist. Start a run with Ledger.create; if the run has a checkpoint, "
            "its ledger was lost and the run cannot go on."
        ) from error
    except OSError as error:
        raise LedgerError(f"{path} could not be opened: {error}.") from error
    if not read_only:
        try:
            _lock(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor


def read_all(descriptor: int, path: Path) -> bytes:
    """Return the whole file, wherever its position is.

    Raises:
        LedgerError: If it cannot be read.
    """
    parts, offset = [], 0
    try:
        while part := os.pread(descriptor, 1 << 20, offset):
            parts.append(part)
            offset += len(part)
    except OSError as error:
        raise LedgerError(
            f"{path} could not be read: {error}. Repair the disk or restore the file from a "
            "backup; without the true count no ε can be stated."
        ) from error
    return b"".join(parts)


def lies_at(path: str, descriptor: int) -> bool:
    """Return whether the file still lies at its path: not moved, removed or replaced."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def append(descriptor: int, line: bytes, size: int) -> None:
    """Write at the end and flush to disk; where writing fails, cut back to `size` if possible.

    Raises:
        OSError: If the line is not known to be on disk.
    """
    try:
        write_all(descriptor, line)
    except OSError:
        # The release will not happen, so the part that was written need not count; if it cannot be
        # removed it counts as a torn line.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
        raise
    os.fsync(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`, however many calls it takes."""
    while data:
        data = data[os.write(descriptor, data) :]


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise LedgerError(
            f"{path} is in use by another run, or by a Ledger of this process that was not closed. "
            "Two writers would each count only their own releases."
        ) from error
    except OSError as error:
        raise LedgerError(
            f"{path} could not be locked: {error}. Keep the ledger on a file system that has locks "
            "(flock): without them two writers would each count only their own releases."
        ) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
