"""Gaussian noise that is the same for every sharding of a tensor.

Elements 2j and 2j+1 of a tensor are one Box–Muller pair, made of block j of the tensor's own stream
of words. A rank therefore draws exactly the elements that it holds, ranks that hold the same
elements draw the same noise, and nothing depends on the order of the calls.
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
    check_count,
    check_key,
    derive,
    new_key,
)

__all__ = ["GaussianNoise", "PhiloxNoise", "new_key"]

_CHUNK = 2**12  # pairs at a time: every buffer of a chunk stays in a core's cache
_VECTOR = 2**6  # pairs: a multiple of every SIMD width
_CHUNKS_WORTH_THREADS = 16
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
        normal law up to |z| = 9.41, where a 63-bit radius ends (probability beyond it: 5e-21).

    Source: Box and Muller (1958), https://doi.org/10.1214/aoms/1177706645.

    Example:
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
        first, last = offset // 2, (offset + tensor.numel() + 1) // 2

        def draw(pairs: range) -> Tensor:
            words = self._words.read(subkey, pairs.start, len(pairs))
            return torch.from_numpy(gaussian_pairs(words, stddev).reshape(-1))

        flat = tensor.reshape(-1)
        for pairs, noise in _in_order(draw, _chunks(first, last), torch.get_num_threads()):
            begin = 2 * pairs.start - offset  # in `flat`; vectors may reach beyond both of its ends
            part = noise[max(0, -begin) : flat.numel() - begin]
            flat[max(0, begin) :][: part.numel()].add_(part.to(flat.device))
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


def gaussian_pairs(words_N2: NDArray[np.int64], stddev: float) -> NDArray[np.float64]:
    """Turn uniform words into normals of standard deviation `stddev`.

    Args:
        words_N2: Uniform int64, `[N, 2]`.
        stddev: Standard deviation, at least 0.

    Returns:
        Independent normals, `[N, 2]`, fp64: stddev·√(-2 ln u)·(cos θ, sin θ). The size of the first
        word is u, in [2⁻⁶⁴, 1] with full relative precision where it is small: hence the long
        tails. The second word is θ: its upper bits choose a point of a table, its lower 50 bits
        turn that point by at most 2e-4, by two terms of the series of cos and sin (error < 1e-16).
    """
    radius = words_N2[:, 0].astype(np.float64)
    np.abs(radius, out=radius)
    radius *= 2.0**-63
    radius += 2.0**-64
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    radius *= stddev

    low_bits = 64 - _TABLE_BITS
    turn = (words_N2[:, 1] & ((1 << low_bits) - 1)).astype(np.float64)
    turn -= 2.0 ** (low_bits - 1)  # the table holds the middle of each arc
    turn *= 2.0 * math.pi * 2.0**-64
    square = turn * turn
    normals = np.empty(len(words_N2), np.complex128)
    np.multiply(square, -0.5, out=normals.real)
    normals.real += 1.0
    normals.real *= radius
    turn *= radius
    np.multiply(square, -1.0 / 6.0, out=normals.imag)
    normals.imag += 1.0
    normals.imag *= turn
    normals *= _unit_circle().take(words_N2[:, 1] >> low_bits, mode="wrap")
    return normals.view(np.float64).reshape(-1, 2)


@cache
def _unit_circle() -> NDArray[np.complex128]:
    arcs = 2**_TABLE_BITS
    return np.exp(2j * math.pi * (np.arange(arcs) + 0.5) / arcs)


def _chunks(first: int, last: int) -> Iterator[range]:
    """Split pairs `first … last - 1`, widened to whole vectors, at multiples of `_CHUNK`.

    An element thus always sits in the same lane of a full vector, where no library rounds it
    differently from one call to the next.
    """
    begin, end = first // _VECTOR * _VECTOR, math.ceil(last / _VECTOR) * _VECTOR
    while begin < end:
        stop = min(end, (begin // _CHUNK + 1) * _CHUNK)
        yield range(begin, stop)
        begin = stop


def _in_order(
    draw: Callable[[range], Tensor], chunks: Iterator[range], threads: int
) -> Iterator[tuple[range, Tensor]]:
    """Yield each chunk with its noise, in order; at most a few chunks exist at any time."""
    jobs = list(chunks)
    if threads == 1 or len(jobs) < _CHUNKS_WORTH_THREADS:
        yield from ((job, draw(job)) for job in jobs)
        return
    with ThreadPoolExecutor(min(threads, len(jobs))) as pool:
        ahead: deque[tuple[range, Future[Tensor]]] = deque()
        for job in jobs:
            ahead.append((job, pool.submit(draw, job)))
            if len(ahead) > 2 * threads:
                chunk, future = ahead.popleft()
                yield chunk, future.result()
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
