"""Noise as an object that fits the `noise` argument of a private step."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from veilspan.kernels.checks import require_dtype
from veilspan.kernels.ops.add_noise import add_noise_
from veilspan.kernels.streams import STREAM_NAMES, check_key, check_stream

__all__ = ["TritonNoise"]


@final
class TritonNoise:
    """Gaussian noise drawn on the GPU that holds the tensor, by `add_noise_`.

    Elsewhere NumPy draws the same numbers.

    Args:
        key: 32 secret bytes.
        stream: `"chacha20"`, or `"philox4x32"`, which is not cryptographic: the guarantee then
            rests on nobody finding structure in its output.

    Raises:
        ValueError: If the key was not drawn at random, or there is no such stream.

    Guarantee:
        That of `add_noise_`. Only fp32 and fp64 are served: between clipping and noise, sums must
        not be rounded to less.

    Examples:
        >>> import os
        >>> noise = TritonNoise(os.urandom(32))
        >>> noise.stream_name
        'chacha20'
        >>> total = torch.zeros(3)
        >>> noise.add_(total, stddev=1.0, step=0, name="weight", offset=0)
    """

    def __init__(self, key: bytes, *, stream: str = "chacha20") -> None:
        self._key = check_key(key)
        self._stream = check_stream(stream)

    @property
    def stream_name(self) -> str:
        """Name of the generator, for the privacy statement."""
        return STREAM_NAMES[self._stream]

    def __repr__(self) -> str:
        return f"TritonNoise({self.stream_name}, secret key)"

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError(
            "TritonNoise holds a secret key, and a copy would draw the same noise again. "
            "Build a new one from the key where it is needed; keep it out of checkpoints."
        )

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
        require_dtype("tensor", tensor, (torch.float32, torch.float64))
        add_noise_(
            tensor,
            key=self._key,
            stddev=stddev,
            step=step,
            name=name,
            offset=offset,
            stream=self._stream,
        )
