"""The secret key that decides which units take part in which step."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from veilspan.trainer.errors import TrainerError

KEY_BYTES = 32


def load_or_create_key(path: Path) -> bytes:
    """Return the sampling key in `path`, drawing it from the operating system if it is missing.

    Args:
        path: File with 32 bytes, readable by its owner only.

    Returns:
        The key, 32 bytes.

    Raises:
        TrainerError: If the file cannot be read or written, has another length, or may be read by
            other users.

    Guarantee:
        Privacy amplification by sampling holds only while the key is unknown to whoever sees the
        model. The key is therefore never logged, never part of a checkpoint, and lies outside the
        run folder. Noise never depends on it.
    """
    try:
        if not path.exists():
            _create(path)
        if path.stat().st_mode & 0o077:
            raise TrainerError(
                f"The key file {path} may be read by other users of this machine; "
                f"run: chmod 600 {path}"
            )
        key = path.read_bytes()
    except OSError as error:
        raise TrainerError(
            f"Cannot use the key file {path}: {error.strerror}. Free disk space, make the folder "
            "writable, or set privacy.key_file."
        ) from error
    if len(key) != KEY_BYTES:
        raise TrainerError(
            f"The key file {path} holds {len(key)} bytes; a key has {KEY_BYTES}. Remove the file "
            "to have a new key made, or restore the one this run began with."
        )
    return key


def key_fingerprint(key: bytes) -> str:
    """Return a text that tells two keys apart without revealing either (SHA-256, 16 digits)."""
    return hashlib.sha256(b"veilspan sampling key\0" + key).hexdigest()[:16]


def key_of_start(key: bytes, ledger_head: str) -> bytes:
    """Return the key from which one start of a run draws its batches.

    Args:
        key: The sampling key, 32 bytes.
        ledger_head: Hash of the last line that the ledger holds at this start.

    Returns:
        32 bytes.

    Guarantee:
        No two releases take their batches from the same draw: every release changes the head, and
        no two ledgers have one in common, unless one is a copy. So a step that is repeated after a
        crash, and the same step of another run with the same key file, draw independently. ε counts
        on that: two releases of one draw cost more than two of independent draws. Of a run folder
        that was copied with its key, continue one only.
    """
    return hashlib.sha256(b"veilspan batches of a start\0" + key + ledger_head.encode()).digest()


def _create(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(os.urandom(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink()  # an empty key would stop the next start, which may have room for one
        raise
