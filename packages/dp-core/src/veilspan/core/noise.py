"""Gaussian noise that is the same for every sharding of a tensor.

A tensor has a stream of words of its own, and each chunk of the tensor takes its part of the
stream. A rank therefore draws exactly the elements that it holds, ranks that hold the same elements
draw the same noise, and nothing depends on the order of the calls.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from veilspan.core.streams import (
    AesCtr,
    Philox4x64,
    WordSource,
    WordStream,
    check_count,
    check_key,
    derive,
    new_key,
)

__all__ = ["GaussianNoise", "PhiloxNoise", "new_key"]

# A chunk of pairs takes its radii from one run of words and its angles from the next. Parts of it
# that are computed begin and end at multiples of some pairs, so an element sits in the same lane of
# a vector whoever asks for it, and no library can round it differently.
_PAIRS = 2**13
_CHUNK = 2 * _PAIRS
_LANES = 2**9  # pairs
_AT_ONCE = 4  # chunks: longer arrays leave the cache; after shorter ones threads wait in turn
_WORTH_A_THREAD = 2**3  # chunks
_ON_THE_WAY = 2**20  # elements that travel to another device at once
_KEPT = 8  # rooms
_TABLE_BITS = 14


@final
class GaussianNoise:
    """Gaussian noise from AES-256 in counter mode under a secret key.

    Args:
        key: 32 secret bytes from `new_key()`. Replicas of one run need the same key.
        words: Generator of the uniform words; AES-256-CTR if not given.

    Raises:
        ValueError: If `key` is not 32 bytes drawn at random.

    Guarantee:
        The value added to an element is a function of (key, step, name, its index in the whole
        tensor, stddev): shards are disjoint parts of one draw, replicas are bitwise equal on
        machines of one kind, and different steps or names have computationally independent noise.
        Noise is computed in fp64, and the sum is rounded once to the tensor's type. The law is the
        normal law up to |z| = 9.49, where a 64-bit radius ends (probability beyond it: 2e-21).

    Source: Box and Muller (1958), https://doi.org/10.1214/aoms/1177706645.

    Examples:
        >>> noise = GaussianNoise(new_key())
        >>> whole, right = torch.zeros(10), torch.zeros(7)
        >>> noise.add_(whole, stddev=2.0, step=4, name="weight", offset=0)
        >>> noise.add_(right, stddev=2.0, step=4, name="weight", offset=3)
        >>> torch.equal(whole[3:], right)
        True
    """

    def __init__(self, key: bytes, *, words: WordSource | None = None) -> None:
        self._key = check_key(key)
        self._words = AesCtr() if words is None else words

    @property
    def stream_name(self) -> str:
        """Name of the generator, for the privacy statement."""
        return self._words.name

    def __repr__(self) -> str:
        return f"GaussianNoise({self.stream_name}, secret key)"

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError(
            "GaussianNoise holds a secret key, and a copy would draw the same noise again. "
            "Build a new one from the key where it is needed; keep it out of checkpoints."
        )

    @torch.no_grad()
    def add_(self, tensor: Tensor, *, stddev: float, step: int, name: str, offset: int) -> None:
        """Add N(0, stddev²) in place to a part of the tensor called `name`.

        Args:
            tensor: fp32 or fp64, any shape and device. Its flat elements are elements
                `offset … offset + numel - 1` of the whole tensor.
            stddev: Standard deviation, in units of the tensor; finite, at least 0. 0 adds nothing.
            step: Step of the run; never draw twice for one step under one key.
            name: Name of the whole tensor, the same on every rank.
            offset: Flat index of the first element in the whole tensor.

        Raises:
            ValueError: If `tensor` is narrower than fp32 or a DTensor, or a number is out of range.
        """
        _check(tensor, stddev)
        step = check_count("step", step, least=0)
        offset = check_count("offset", offset, least=0)
        if stddev == 0 or tensor.numel() == 0:
            return
        subkey = derive(self._key, f"noise/{self._words.name}", step, name)
        stream = partial(self._words.stream, subkey)
        flat = tensor.detach().reshape(-1)
        if flat.device.type == "cpu":
            _add(flat.numpy(), offset, stream, stddev)
        else:
            for begin in range(0, flat.numel(), _ON_THE_WAY):
                piece = flat[begin : begin + _ON_THE_WAY]
                noise = np.zeros(piece.numel())
                _add(noise, offset + begin, stream, stddev)
                piece.add_(torch.from_numpy(noise).to(piece.device))
        if not tensor.is_contiguous():
            tensor.copy_(flat.view(tensor.shape))


@final
class PhiloxNoise:
    """The same noise from Philox4x64, which is not cryptographic.

    For computers whose CPU has no AES instructions; elsewhere `GaussianNoise` is stronger and
    faster. A privacy statement must name `stream_name`: the guarantee then rests on nobody finding
    structure in Philox's output.

    Args:
        key: 32 secret bytes from `new_key()`; 16 bytes derived from it enter each stream.

    Raises:
        ValueError: If `key` is not 32 bytes drawn at random.
    """

    def __init__(self, key: bytes) -> None:
        self._noise = GaussianNoise(key, words=Philox4x64())

    @property
    def stream_name(self) -> str:
        """Name of the generator, for the privacy statement."""
        return self._noise.stream_name

    def __repr__(self) -> str:
        return f"PhiloxNoise({self.stream_name}, secret key)"

    def add_(self, tensor: Tensor, *, stddev: float, step: int, name: str, offset: int) -> None:
        """Add N(0, stddev²) in place, as `GaussianNoise.add_` does."""
        self._noise.add_(tensor, stddev=stddev, step=step, name=name, offset=offset)


class Buffers:
    """Room for a few chunks, written over and over: fresh pages cost as much as the arithmetic.

    Args:
        chunks: Number of chunks.
        pairs: Size of each in pairs of elements.
    """

    def __init__(self, chunks: int, pairs: int) -> None:
        size = chunks * pairs
        self._words = np.empty(2 * size + 2, np.int64)  # the last block is scratch space
        self._bits, self._reals = np.empty(size, np.int64), np.empty((4, size))
        self._points = np.empty((2, size), np.complex128)
        self.divide(chunks, pairs)

    def divide(self, chunks: int, pairs: int) -> None:
        """Set the room out for this many chunks of this size, or the beginning of it."""
        size = chunks * pairs
        self.blocks = self._words[: 2 * size + 2].reshape(-1, 2)
        self.words = self._words[: 2 * size].reshape(chunks, 2, pairs)
        self.bits = self._bits[:size].reshape(chunks, pairs)
        reals = self._reals[:, :size].reshape(4, chunks, pairs)
        self.radius, self.angle, self.square, self.cosine = reals
        self.points, self.normals = self._points[:, :size].reshape(2, chunks, pairs)


def gaussian_pairs(buffers: Buffers, stddev: float) -> NDArray[np.float64]:
    """Turn uniform words into normals of standard deviation `stddev`.

    Args:
        buffers: Holds uniform int64 `words`, `[C, 2, N]`.
        stddev: Standard deviation, at least 0.

    Returns:
        Independent normals, `[C, N, 2]`, fp64, a view of the buffers:
        stddev·√(-2 ln u)·(cos θ, sin θ) with u from the first row of a chunk's words and θ from the
        second.
    """
    _radii(buffers)
    _turn(buffers, stddev)
    return buffers.normals.view(np.float64).reshape(*buffers.normals.shape, 2)


def _radii(buffers: Buffers) -> None:
    """Write √(-2 ln u); u in [2⁻⁶⁵, 1] has full relative precision where it is small."""
    radius = buffers.radius
    radius[:] = buffers.words[:, 0].view(np.uint64)
    radius *= 2.0**-64
    radius += 2.0**-65  # the middle of the word's interval
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)


def _turn(buffers: Buffers, stddev: float) -> None:
    """Write stddev·radius·(cos θ + i sin θ), θ uniform on the circle.

    The upper bits of a word choose the middle of an arc from a table; its lower 50 bits turn that
    point within the arc, by at most 2e-4, for which two terms of each series give cos and sin with
    an error below 1e-16.
    """
    word, angle, square, cosine = buffers.words[:, 1], buffers.angle, buffers.square, buffers.cosine
    np.left_shift(word, _TABLE_BITS, out=buffers.bits)  # the lower bits, as a signed number
    angle[:] = buffers.bits
    angle *= 2.0 * math.pi * 2.0 ** (-64 - _TABLE_BITS)
    np.multiply(angle, angle, out=square)
    np.multiply(square, -stddev / 2.0, out=cosine)
    cosine += stddev
    np.multiply(cosine, buffers.radius, out=buffers.normals.real)
    square *= -stddev / 6.0
    square += stddev
    square *= angle
    np.multiply(square, buffers.radius, out=buffers.normals.imag)
    np.right_shift(word, 64 - _TABLE_BITS, out=buffers.bits)
    buffers.normals *= _unit_circle().take(buffers.bits, mode="wrap", out=buffers.points)


@cache
def _unit_circle() -> NDArray[np.complex128]:
    arcs = 2**_TABLE_BITS
    return np.exp(2j * math.pi * (np.arange(arcs) + 0.5) / arcs)


def _add(
    sums: NDArray[np.floating[Any]], offset: int, stream: Callable[[], WordStream], stddev: float
) -> None:
    """Add the noise of elements `offset …` to an array, each thread to a part of its own."""
    end = offset + len(sums)
    first, last = offset // _CHUNK, -(-end // _CHUNK)
    threads = max(1, min(torch.get_num_threads(), (last - first) // _WORTH_A_THREAD))
    inner = [(first + (last - first) * part // threads) * _CHUNK for part in range(1, threads)]
    shares = list(itertools.pairwise([offset, *inner, end]))

    def add(share: tuple[int, int]) -> None:
        words, room = stream(), _a_room()
        begin, end = share
        while begin < end:
            stop = min(end, (begin // _CHUNK + _AT_ONCE) * _CHUNK)
            noise = _draw(room, words, stddev, begin, stop)
            wide = room.points.reshape(-1).view(np.float64)[: len(noise)]  # numpy would make room
            part = sums[begin - offset : stop - offset]
            wide[:] = part
            wide += noise
            part[:] = wide
            begin = stop
        if len(_idle) < _KEPT:
            _idle.append(room)

    if threads == 1:
        add(shares[0])
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(add, shares):
            pass


_idle: list[Buffers] = []  # a thread takes one and returns it


def _a_room() -> Buffers:
    try:
        return _idle.pop()
    except IndexError:
        return Buffers(_AT_ONCE, _PAIRS)


def _draw(
    room: Buffers, words: WordStream, stddev: float, begin: int, end: int
) -> NDArray[np.float64]:
    """Return the noise of elements `begin … end - 1` of the whole tensor, in `room`.

    Chunks are drawn in full, except for a single one, where lanes around the elements suffice.
    """
    first, last = begin // _CHUNK, (end - 1) // _CHUNK
    start, stop = 0, _PAIRS
    if first == last:
        lanes = range(begin % _CHUNK // (2 * _LANES), (end - 1) % _CHUNK // (2 * _LANES) + 1)
        start, stop = lanes.start * _LANES, lanes.stop * _LANES
    room.divide(last - first + 1, stop - start)
    block = first * _PAIRS + start // 2
    if stop - start == _PAIRS:
        words.fill(room.blocks, block)
    else:
        half = (stop - start) // 2
        words.fill(room.blocks[: half + 1], block)
        words.fill(room.blocks[half:], block + _PAIRS // 2)
    origin = first * _CHUNK + 2 * start
    return gaussian_pairs(room, stddev).reshape(-1)[begin - origin : end - origin]


def _check(tensor: Tensor, stddev: float) -> None:
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"tensor is {tensor.dtype}; clipped sums and their noise must be float32 or float64. "
            "Sum in float32 and convert after the noise."
        )
    if hasattr(tensor, "to_local"):
        raise ValueError("tensor is a DTensor; pass the local shard and its offset.")
    if not (math.isfinite(stddev) and stddev >= 0):
        raise ValueError(f"stddev is {stddev}; it must be finite and at least 0.")
