"""Gaussian noise that is the same for every sharding of a tensor.

A tensor has a stream of words of its own, and each chunk of the tensor takes its part of the
stream. A rank therefore draws exactly the elements that it holds, ranks that hold the same elements
draw the same noise, and nothing depends on the order of the calls.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import final

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

# Chunks begin at multiples of their size in the whole tensor and are always computed in full, so an
# element sits in the same place of the same arrays whoever asks for it, and no vector library can
# round it differently. At this size a chunk's arrays stay in the cache.
_PAIRS = 2**13
_CHUNK = 2 * _PAIRS
_CHUNKS_WORTH_THREADS = 8
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

        def desk() -> _Desk:
            return _Desk(self._words.stream(subkey), stddev)

        flat = tensor.reshape(-1)
        last = offset + flat.numel()
        chunks = range(offset // _CHUNK, (last - 1) // _CHUNK + 1)
        for chunk, noise in _in_order(chunks, desk, torch.get_num_threads()):
            origin = chunk * _CHUNK
            begin, end = max(offset, origin), min(last, origin + _CHUNK)
            part = torch.from_numpy(noise[begin - origin : end - origin])
            flat[begin - offset : end - offset].add_(part.to(flat.device))
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
    """Room for one chunk, written over and over: fresh pages would cost as much as the arithmetic.

    Args:
        pairs: Size of the chunk in pairs of elements.
    """

    def __init__(self, pairs: int) -> None:
        self.blocks = np.empty((pairs + 1, 2), np.int64)  # the last row is scratch space
        self.words = self.blocks.reshape(-1)[: 2 * pairs].reshape(2, pairs)
        self.bits = np.empty(pairs, np.int64)
        self.radius, self.angle, self.square, self.cosine = np.empty((4, pairs))
        self.points, self.normals = np.empty((2, pairs), np.complex128)


def gaussian_pairs(buffers: Buffers, stddev: float) -> NDArray[np.float64]:
    """Turn uniform words into normals of standard deviation `stddev`.

    Args:
        buffers: Holds uniform int64 `words`, `[2, N]`.
        stddev: Standard deviation, at least 0.

    Returns:
        Independent normals, `[N, 2]`, fp64, a view of the buffers: stddev·√(-2 ln u)·(cos θ, sin θ)
        with u from the first row of words and θ from the second.
    """
    _radii(buffers)
    _turn(buffers, stddev)
    return buffers.normals.view(np.float64).reshape(-1, 2)


def _radii(buffers: Buffers) -> None:
    """Write √(-2 ln u); u in [2⁻⁶⁵, 1] has full relative precision where it is small."""
    radius = buffers.radius
    radius[:] = buffers.words[0].view(np.uint64)
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
    word, angle, square, cosine = buffers.words[1], buffers.angle, buffers.square, buffers.cosine
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


@final
class _Desk:
    """Where one thread draws one chunk at a time."""

    def __init__(self, stream: WordStream, stddev: float) -> None:
        self._stream, self._stddev, self._buffers = stream, stddev, Buffers(_PAIRS)

    def draw(self, chunk: int) -> NDArray[np.float64]:
        """Return the noise of a chunk, `[_CHUNK]`, which lasts until the next call."""
        self._stream.fill(self._buffers.blocks, chunk * _PAIRS)
        return gaussian_pairs(self._buffers, self._stddev).reshape(-1)


def _in_order(
    chunks: range, desk: Callable[[], _Desk], threads: int
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield each chunk with its noise, in order; the noise lasts until the next is asked for."""
    if threads == 1 or len(chunks) < _CHUNKS_WORTH_THREADS:
        only = desk()
        yield from ((chunk, only.draw(chunk)) for chunk in chunks)
        return
    desks = [desk() for _ in range(2 * threads)]
    ahead: deque[tuple[int, Future[NDArray[np.float64]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for number, chunk in enumerate(chunks):
            if len(ahead) == len(desks):  # the oldest noise lies where this one will
                oldest, future = ahead.popleft()
                yield oldest, future.result()
            ahead.append((chunk, pool.submit(desks[number % len(desks)].draw, chunk)))
        for chunk, future in ahead:
            yield chunk, future.result()


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
