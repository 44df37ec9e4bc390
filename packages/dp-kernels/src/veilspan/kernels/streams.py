"""Random words addressed by (secret key, step, name, block), in NumPy and inside kernels.

A block is 16 words of 32 bits. Every address has one value, so shards, restarts and kernels of any
block size that ask for the same address agree, and no generator state is ever saved.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import no_type_check

import numpy as np
from numpy.typing import NDArray

from veilspan.kernels.compat import jit, tl

WORDS = 16
"""Words of a block."""

STREAM_NAMES: Mapping[str, str] = MappingProxyType(
    {"chacha20": "chacha20", "philox4x32": "philox-4x32-10, not cryptographic"}
)
"""Streams by argument, with their names for privacy statements."""

KEY_BYTES = 32
_FEWEST_DISTINCT_BYTES = 8  # 32 random bytes hold fewer distinct values with probability < 1e-40
_PERSONAL = b"veilspan.kernels"  # domain separation from every other use of the key


def check_key(key: bytes) -> bytes:
    """Return `key` as given.

    Raises:
        ValueError: If `key` is not 32 bytes, or has so few distinct bytes that it is a placeholder.
    """
    advice = f"Draw it with os.urandom({KEY_BYTES})."
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


def check_count(argument: str, value: object) -> int:
    """Return `value` as an int.

    Raises:
        ValueError: If it is no integer in 0 … 2⁶³ - 1.
    """
    try:
        number = operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not 0 <= number < 2**63:
        shown = value if isinstance(value, int | float | str) else f"a {type(value).__name__}"
        raise ValueError(f"{argument} is {shown}; it must be a whole number, 0 … 2⁶³ - 1.")
    return number


def check_stream(stream: str) -> str:
    """Return `stream` as given.

    Raises:
        ValueError: If there is no such stream.
    """
    if stream not in STREAM_NAMES:
        allowed = ", ".join(repr(name) for name in STREAM_NAMES)
        raise ValueError(f"stream is {stream!r}; it must be one of {allowed}.")
    return stream


def derive(key: bytes, stream: str, step: int, name: str) -> NDArray[np.uint32]:
    """Return the subkey of one address, 8 words, by keyed BLAKE2b.

    Guarantee:
        Different (stream, step, name) give computationally independent subkeys.
    """
    label = f"noise/{stream}".encode()
    message = len(label).to_bytes(8, "little") + label + step.to_bytes(8, "little") + name.encode()
    digest = hashlib.blake2b(message, digest_size=KEY_BYTES, key=key, person=_PERSONAL).digest()
    return np.frombuffer(digest, "<u4").astype(np.uint32)


def words(
    stream: str, subkey: NDArray[np.uint32], blocks_N: NDArray[np.uint64], purpose: int
) -> NDArray[np.uint32]:
    """Return the words of some blocks, `[16, N]`.

    Args:
        stream: Name of the stream.
        subkey: 8 words, of which Philox takes three.
        blocks_N: Numbers of the blocks.
        purpose: 0 or 1, two independent streams.
    """
    low, high = blocks_N.astype(np.uint32), (blocks_N >> np.uint64(32)).astype(np.uint32)
    if stream == "chacha20":
        return chacha20(subkey, low, high, purpose)
    quarters = [
        philox(low, high, np.full_like(low, 4 * purpose + quarter), subkey) for quarter in range(4)
    ]
    return np.concatenate(quarters)


def chacha20(
    key: NDArray[np.uint32], low: NDArray[np.uint32], high: NDArray[np.uint32], nonce: int
) -> NDArray[np.uint32]:
    """Return key stream blocks of ChaCha20, `[16, N]`.

    Args:
        key: 8 words.
        low: Low words of the 64-bit block counters, `[N]`.
        high: Their high words.
        nonce: Lower word of the 64-bit nonce; its upper word is 0.

    Source: RFC 8439 (2018), section 2.3, with the counter of 64 bits that Bernstein (2008) gave it.
    """
    start = np.zeros((WORDS, len(low)), np.uint32)
    start[:4] = np.array([0x61707865, 0x3320646E, 0x79622D32, 0x6B206574], np.uint32)[:, None]
    start[4:12] = key[:, None]
    start[12], start[13], start[14] = low, high, nonce
    a, b, c, d = (start[row : row + 4].copy() for row in (0, 4, 8, 12))
    for _ in range(10):
        _quarter_rounds(a, b, c, d)
        b, c, d = (np.roll(rows, -turn, 0) for turn, rows in ((1, b), (2, c), (3, d)))
        _quarter_rounds(a, b, c, d)
        b, c, d = (np.roll(rows, turn, 0) for turn, rows in ((1, b), (2, c), (3, d)))
    return np.concatenate([a, b, c, d]) + start


def _quarter_rounds(
    a: NDArray[np.uint32], b: NDArray[np.uint32], c: NDArray[np.uint32], d: NDArray[np.uint32]
) -> None:
    """Apply four quarter rounds at once, in place; each argument is `[4, N]`."""
    for one, other, last, left in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        one += other
        last ^= one
        right = last >> np.uint32(32 - left)
        last <<= np.uint32(left)
        last |= right


def philox(
    c0: NDArray[np.uint32],
    c1: NDArray[np.uint32],
    c2: NDArray[np.uint32],
    subkey: NDArray[np.uint32],
) -> NDArray[np.uint32]:
    """Return blocks of Philox4x32-10, `[4, N]`.

    Args:
        c0: First words of the counters, `[N]`.
        c1: Second words.
        c2: Third words.
        subkey: The 64-bit key, then the fourth word of all counters.

    Source: Salmon, Moraes, Dror, Shaw (2011), https://doi.org/10.1145/2063384.2063405.
    """
    c3 = np.full_like(c0, subkey[2])
    k0, k1 = int(subkey[0]), int(subkey[1])
    for _ in range(10):
        even, odd = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c2 = (
            (odd >> np.uint64(32)).astype(np.uint32) ^ c1 ^ np.uint32(k0),
            (even >> np.uint64(32)).astype(np.uint32) ^ c3 ^ np.uint32(k1),
        )
        c1, c3 = odd.astype(np.uint32), even.astype(np.uint32)
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([c0, c1, c2, c3])


@jit
@no_type_check
def chacha20_block(table, low, high, NONCE: tl.constexpr):
    """Return 16 tensors, the words of `chacha20`; `table` begins with the key, 8 integers."""
    zero = low ^ low
    k0, k1, k2, k3 = _key_words(table, zero)
    k4, k5, k6, k7 = _key_words(table + 4, zero)
    a0, a1, a2, a3 = zero + 0x61707865, zero + 0x3320646E, zero + 0x79622D32, zero + 0x6B206574
    b0, b1, b2, b3, c0, c1, c2, c3 = k0, k1, k2, k3, k4, k5, k6, k7
    d0, d1, d2, d3 = low, high, zero + NONCE, zero
    for _ in range(10):  # not unrolled: the instruction cache would not hold it
        for diagonal in tl.static_range(2):
            a0, a1, a2, a3 = a0 + b0, a1 + b1, a2 + b2, a3 + b3
            d0, d1, d2, d3 = d0 ^ a0, d1 ^ a1, d2 ^ a2, d3 ^ a3
            d0, d1 = (d0 << 16) | (d0 >> 16), (d1 << 16) | (d1 >> 16)
            d2, d3 = (d2 << 16) | (d2 >> 16), (d3 << 16) | (d3 >> 16)
            c0, c1, c2, c3 = c0 + d0, c1 + d1, c2 + d2, c3 + d3
            b0, b1, b2, b3 = b0 ^ c0, b1 ^ c1, b2 ^ c2, b3 ^ c3
            b0, b1 = (b0 << 12) | (b0 >> 20), (b1 << 12) | (b1 >> 20)
            b2, b3 = (b2 << 12) | (b2 >> 20), (b3 << 12) | (b3 >> 20)
            a0, a1, a2, a3 = a0 + b0, a1 + b1, a2 + b2, a3 + b3
            d0, d1, d2, d3 = d0 ^ a0, d1 ^ a1, d2 ^ a2, d3 ^ a3
            d0, d1 = (d0 << 8) | (d0 >> 24), (d1 << 8) | (d1 >> 24)
            d2, d3 = (d2 << 8) | (d2 >> 24), (d3 << 8) | (d3 >> 24)
            c0, c1, c2, c3 = c0 + d0, c1 + d1, c2 + d2, c3 + d3
            b0, b1, b2, b3 = b0 ^ c0, b1 ^ c1, b2 ^ c2, b3 ^ c3
            b0, b1 = (b0 << 7) | (b0 >> 25), (b1 << 7) | (b1 >> 25)
            b2, b3 = (b2 << 7) | (b2 >> 25), (b3 << 7) | (b3 >> 25)
            c0, c1, c2, c3 = c2, c3, c0, c1  # diagonals become columns, and columns diagonals
            if diagonal:
                b0, b1, b2, b3, d0, d1, d2, d3 = b3, b0, b1, b2, d1, d2, d3, d0
            else:
                b0, b1, b2, b3, d0, d1, d2, d3 = b1, b2, b3, b0, d3, d0, d1, d2
    a0, a1, a2, a3 = a0 + 0x61707865, a1 + 0x3320646E, a2 + 0x79622D32, a3 + 0x6B206574
    b0, b1, b2, b3 = b0 + k0, b1 + k1, b2 + k2, b3 + k3
    c0, c1, c2, c3 = c0 + k4, c1 + k5, c2 + k6, c3 + k7
    d0, d1, d2 = d0 + low, d1 + high, d2 + NONCE
    return a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3


@jit
@no_type_check
def _key_words(table, zero):
    first, second = tl.load(table).to(tl.uint32), tl.load(table + 1).to(tl.uint32)
    third, fourth = tl.load(table + 2).to(tl.uint32), tl.load(table + 3).to(tl.uint32)
    return zero + first, zero + second, zero + third, zero + fourth


@jit
@no_type_check
def philox_block(table, low, high, PURPOSE: tl.constexpr):
    """Return 16 tensors, the words of four counters of `philox`; `table` begins with the subkey."""
    w0, w1, w2, w3 = _philox(table, low, high, 4 * PURPOSE)
    w4, w5, w6, w7 = _philox(table, low, high, 4 * PURPOSE + 1)
    w8, w9, wa, wb = _philox(table, low, high, 4 * PURPOSE + 2)
    wc, wd, we, wf = _philox(table, low, high, 4 * PURPOSE + 3)
    return w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, wa, wb, wc, wd, we, wf


@jit
@no_type_check
def _philox(table, c0, c1, C2: tl.constexpr):
    k0 = tl.load(table).to(tl.uint32)
    k1 = tl.load(table + 1).to(tl.uint32)
    c2 = (c0 ^ c0) + C2
    c3 = (c0 ^ c0) + tl.load(table + 2).to(tl.uint32)
    for _ in tl.static_range(10):
        even = tl.umulhi(c0, 0xD2511F53) ^ c3 ^ k1
        odd = tl.umulhi(c2, 0xCD9E8D57) ^ c1 ^ k0
        c1 = c2 * 0xCD9E8D57
        c3 = c0 * 0xD2511F53
        c0 = odd
        c2 = even
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3
