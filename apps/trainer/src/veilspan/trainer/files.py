"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_whole(path: Path, content: str | bytes, *, mode: int = 0o644) -> None:
    """Write a file so that a crash leaves either the old content or the new one.

    Args:
        path: File to create or replace.
        content: Text (written as UTF-8) or bytes.
        mode: Permissions of a new file.

    Raises:
        OSError: If the disk is full or the folder cannot be written, with the name of the file;
            `path` is then unchanged.
    """
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f".partial-{path.name}")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync_folder(path.parent)


def replace_folder(partial: Path, final: Path) -> None:
    """Give a finished folder its final name, after everything in it reached the disk.

    A folder that already has that name is removed first; callers whose readers must always find
    one of the two use a new name each time.
    """
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    sync_folder(partial)
    remove_folder(final)
    partial.replace(final)
    sync_folder(final.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that a crash never leaves a damaged one under its real name.

    What a crash left of it under another name goes as well, also where the folder is not there.
    """
    doomed = folder.with_name(f".removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        folder.replace(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove folders that a crash left half written or half removed inside of `folder`."""
    for pattern in (".partial-*", ".removed-*"):
        for left in folder.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make the names inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
