"""Random words addressed by (secret key, purpose, step, name, block), never by call order.

Every address has one value, so ranks, restarts and chunkings that ask for the same address agree,
and no generator state is ever saved. One block is 16 bytes: two 64-bit words.
"""

from __future__ import annotations

import hashlib
import operator
import os
from dataclasses import dataclass
from typing import Protocol, final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

KEY_BYTES = 32
BLOCK_BYTES = 16
_FEWEST_DISTINCT_BYTES = 8  # 32 random bytes hold fewer distinct values with probability < 1e-40
_PERSONAL = b"veilspan.core/1"  # domain separation from every other use of the key


def new_key() -> bytes:
    """Return a fresh secret key, 32 bytes from the operating system's generator.

    Keep it out of logs and out of checkpoints that leave the machine: who knows the key can
    subtract the noise. Use a new key for every attempt at a run: noise that is drawn twice for one
    step can be cancelled by subtracting the two results.
    """
    return os.urandom(KEY_BYTES)


def check_key(key: bytes) -> bytes:
    """Return `key` as given.

    Args:
        key: The secret key.

    Raises:
        ValueError: If `key` is not 32 bytes, or has so few distinct bytes that it is a placeholder.
    """
    advice = "Use veilspan.core.noise.new_key()."
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        size = f" of length {len(key)}" if isinstance(key, bytes | bytearray | str) else ""
        raise ValueError(
            f"key is a {type(key).__name__}{size}; it must be {KEY_BYTES} secret bytes. {advice}"
        )
    if len(set(key)) < _FEWEST_DISTINCT_BYTES:
        raise ValueError(
            f"key has only {len(set(key))} distinct byte values, so it was not drawn at random; "
            f"a key that can be guessed protects nobody. {advice}"
        )
    return key


def check_count(argument: str, value: object, *, least: int, below: int = 2**63) -> int:
    """Return `value` as an int.

    Args:
        argument: Name to use in the error message.
        value: The user's number; any integer type.
        least: Smallest allowed value.
        below: First value that is too large.

    Raises:
        ValueError: If `value` is no integer in `least … below - 1`.
    """
    try:
        number = operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not least <= number < below:
        shown = value if isinstance(value, int | float | str) else f"a {type(value).__name__}"
        raise ValueError(
            f"{argument} is {shown}; it must be a whole number, {least} … {below - 1}."
        )
    return number


def derive(key: bytes, purpose: str, step: int, name: str = "") -> bytes:
    """Return the 32-byte subkey of one address, by keyed BLAKE2b.

    Args:
        key: The secret key, 32 bytes.
        purpose: What the words are for, including the generator that will use the subkey.
        step: Step of the run, 0 … 2⁶³ - 1.
        name: Further part of the address, such as the name of a tensor.

    Guarantee:
        Different (purpose, step, name) give computationally independent subkeys.
    """
    label = purpose.encode()
    message = len(label).to_bytes(8, "little") + label + step.to_bytes(8, "little") + name.encode()
    return hashlib.blake2b(message, digest_size=KEY_BYTES, key=key, person=_PERSONAL).digest()


class WordStream(Protocol):
    """The words of one subkey, from any block on; for one thread at a time."""

    def fill(self, blocks_N2: NDArray[np.int64], first_block: int) -> None:
        """Write blocks `first_block …` to all rows but the last, which is scratch space."""
        ...


class WordSource(Protocol):
    """A generator of uniform 64-bit words."""

    @property
    def name(self) -> str:
        """Name for privacy statements."""
        ...

    def stream(self, subkey: bytes) -> WordStream:
        """Return the words of `subkey`, 32 bytes."""
        ...


@final
class AesCtr:
    """AES-256 in counter mode: cryptographically strong, several GB/s where the CPU has AES.

    Source: NIST SP 800-38A (2001), section 6.5; block n is AES(subkey, n).
    """

    name = "aes-256-ctr"

    def stream(self, subkey: bytes) -> WordStream:
        """Return the key stream of `subkey`, 32 bytes."""
        return _AesStream(subkey)


_ZEROS = bytes(2**16)  # the plain text whose encryption is the key stream, one piece at a time


@final
class _AesStream:
    def __init__(self, subkey: bytes) -> None:
        counter = modes.CTR(bytes(BLOCK_BYTES))
        self._encryptor = Cipher(algorithms.AES(subkey), counter).encryptor()

    def fill(self, blocks_N2: NDArray[np.int64], first_block: int) -> None:
        self._encryptor.reset_nonce(first_block.to_bytes(BLOCK_BYTES, "big"))
        target = blocks_N2.data.cast("B")
        size = len(target) - BLOCK_BYTES  # update_into asks for room for almost one block more
        for start in range(0, size, len(_ZEROS)):
            self._encryptor.update_into(memoryview(_ZEROS)[: size - start], target[start:])


@final
class Philox4x64:
    """Philox4x64-10: passes statistical tests, but is not cryptographic.

    Source: Salmon, Moraes, Dror, Shaw (2011), https://doi.org/10.1145/2063384.2063405.
    """

    name = "philox-4x64-10"

    def stream(self, subkey: bytes) -> WordStream:
        """Return the words of `subkey`, of which Philox takes the first 16 bytes."""
        return _PhiloxStream(int.from_bytes(subkey[:16], "little"))


@final
@dataclass(frozen=True)
class _PhiloxStream:
    key: int

    def fill(self, blocks_N2: NDArray[np.int64], first_block: int) -> None:
        counter, second_half = divmod(first_block, 2)  # four words per counter
        generator = np.random.Philox(key=self.key, counter=counter)
        generator.random_raw(2 * second_half, output=False)
        count = len(blocks_N2) - 1
        blocks_N2[:count] = generator.random_raw(2 * count).view(np.int64).reshape(count, 2)


def read_words(stream: WordStream, first_block: int, count: int) -> NDArray[np.int64]:
    """Return blocks `first_block …` as a new array, `[count, 2]`."""
    blocks_N2 = np.empty((count + 1, 2), np.int64)
    stream.fill(blocks_N2, first_block)
    return blocks_N2[:count]
