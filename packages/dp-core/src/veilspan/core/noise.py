"""Gaussian noise that is the same for every sharding of a tensor.

Elements 2j and 2j+1 of a tensor are one Box–Muller pair, made of block j of the tensor's own stream
of words. A rank therefore draws exactly the elements that it holds, ranks that hold the same elements
draw the same noise, and nothing depends on the order of the calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import final

import torch
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

_CHUNK = 2**15  # pairs at a time: every buffer stays in a core's cache
_GRAIN = 2048  # torch gives a thread at least this many elements of log, sin, cos
_ALIGNMENT = 64  # elements: a multiple of every SIMD width and of the cache line


@final
class GaussianNoise:
    """Gaussian noise from AES-256 in counter mode under a secret key.

    Args:
        key: 32 secret bytes from `new_key()`. Replicas of one run need the same key.
        words: Generator of the uniform words.

    Raises:
        ValueError: If `key` is not 32 bytes drawn at random.

    Guarantee:
        The value added to an element is a function of (key, step, name, its index in the whole
        tensor, stddev): shards are disjoint parts of one draw, replicas are bitwise equal on
        machines of one kind, and different steps or names have computationally independent noise.
        Noise is computed in fp64 and the sum is rounded once to the tensor's type. The law is the
        normal law up to |z| = 9.41 (a 63-bit radius; 53-bit angle), beyond which it would lie with
        probability 5e-21.

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
        flat = tensor.reshape(-1)
        done = 0
        for noise in _normals(self._words, subkey, offset, flat.numel()):
            noise.mul_(stddev)  # apart from the addition: a fused multiply-add rounds differently
            flat[done : done + noise.numel()].add_(noise.to(flat.device))
            done += noise.numel()
        if not tensor.is_contiguous():
            tensor.copy_(flat.view(tensor.shape))


@final
class PhiloxNoise:
    """The same noise from Philox4x64, which is not cryptographic.

    For computers whose CPU has no AES instructions; elsewhere `GaussianNoise` is stronger as well as
    faster. A privacy statement must name `stream_name`: the guarantee then rests on nobody finding
    structure in Philox's output.

    Args:
        key: 32 secret bytes from `new_key()`, of which 16 bytes enter each stream.

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


def _normals(words: WordSource, subkey: bytes, offset: int, count: int) -> Iterator[Tensor]:
    """Yield standard normals for elements `offset … offset + count - 1`, fp64, chunk by chunk."""
    last = offset + count
    start = offset // 2 // _ALIGNMENT * _ALIGNMENT
    stream = words.stream(subkey, start)
    while 2 * start < last:
        pairs = _chunk_pairs((last + 1) // 2 - start, torch.get_num_threads())
        normals = box_muller(torch.from_numpy(stream.read(pairs))).view(-1)
        yield normals[max(0, offset - 2 * start) : last - 2 * start]
        start += pairs


def _chunk_pairs(wanted: int, threads: int) -> int:
    """Return how many pairs to compute so that no bit depends on the number of threads.

    Vector libraries may round differently in the last, partly filled vector. Torch gives each thread
    an equal part, at least `_GRAIN` elements, so multiples of these keep each part full and aligned.
    """
    whole = _GRAIN * threads
    if wanted <= whole:
        return math.ceil(wanted / _GRAIN) * _GRAIN
    return min(math.ceil(wanted / whole), max(1, _CHUNK // whole)) * whole


def box_muller(words_N2: Tensor) -> Tensor:
    """Turn uniform words into standard normals.

    Args:
        words_N2: Uniform int64, `[N, 2]`, on the CPU.

    Returns:
        Independent normals, `[N, 2]`, fp64: √(-2 ln u)·(cos θ, sin θ) with u in [2⁻⁶⁴, 1] from the
        size of the first word (its small values keep full relative precision, hence the long tails)
        and θ in [-π, π] from the second.
    """
    radius = words_N2[:, 0].to(torch.float64).abs_().mul_(2.0**-63).add_(2.0**-64)
    radius.log_().mul_(-2.0).sqrt_()
    angle = words_N2[:, 1].to(torch.float64).mul_(math.pi * 2.0**-63)
    normals_N2 = torch.empty(words_N2.shape, dtype=torch.float64, device="cpu")
    torch.mul(radius, angle.cos(), out=normals_N2[:, 0])
    torch.mul(radius, angle.sin_(), out=normals_N2[:, 1])
    return normals_N2
