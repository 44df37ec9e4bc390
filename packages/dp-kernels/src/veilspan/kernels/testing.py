"""Memory that shows what a kernel must not touch, for tests of kernels.

On a computer without a GPU set `TRITON_INTERPRET=1` before `veilspan.kernels` is imported: Triton
then interprets its kernels, and the same tests run there.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

__all__ = ["DEVICE", "Fence", "random", "sparse"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where kernels are tested."""

_PAGE = mmap.PAGESIZE
_CANARIES = 1024  # bytes on each side of a fenced buffer on a GPU
_NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux: address space, not memory


@final
class Fence:
    """Places tensors where an access beyond their bounds shows.

    Bytes before and after a tensor hold a pattern, NaN as a float, that must survive. On the CPU
    the last element moreover touches a page that may not even be read: an access beyond it ends
    the process.

    Examples:
        >>> fence = Fence()
        >>> inside = fence(torch.arange(3.0))
        >>> inside += 1
        >>> fence.check()
    """

    def __init__(self) -> None:
        self._placed: list[tuple[Tensor, int, int]] = []
        self._maps: list[mmap.mmap] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy of `tensor` in fenced memory."""
        size = tensor.numel() * tensor.element_size()
        if DEVICE.type == "cpu":
            storage, end = self._guarded(size)
        else:
            storage = torch.empty(size + 2 * _CANARIES, dtype=torch.uint8, device=DEVICE)
            end = _CANARIES + size
        storage.fill_(0xFF)
        self._placed.append((storage, end - size, end))
        inside = storage[end - size : end].view(tensor.dtype).view(tensor.shape)
        return inside.copy_(tensor)

    def check(self) -> None:
        """Assert that no byte beside a tensor was written.

        Raises:
            AssertionError: If one was.
        """
        for storage, start, end in self._placed:
            beside = torch.cat([storage[:start], storage[end:]])
            assert bool((beside == 0xFF).all()), "memory beside a buffer was written"

    def _guarded(self, size: int) -> tuple[Tensor, int]:
        """Return bytes that end where a forbidden page begins, and their number."""
        usable = (-(-size // _PAGE) + 1) * _PAGE  # one page of canaries at least
        memory = mmap.mmap(-1, usable + _PAGE)
        self._maps.append(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        protect = ctypes.CDLL(None).mprotect
        assert protect(ctypes.c_void_p(address + usable), ctypes.c_size_t(_PAGE), 0) == 0
        return torch.frombuffer(memory, dtype=torch.uint8, count=usable), usable


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return standard normals of this shape, the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def sparse(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return zeros that may span more elements than fit into memory, for tests of 64-bit indices.

    On the CPU pages that nobody touches take no memory; on a GPU all of it is allocated.
    """
    length = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if DEVICE.type == "cuda":
        storage = torch.zeros(length, dtype=dtype, device=DEVICE)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        memory = mmap.mmap(-1, length * dtype.itemsize, flags=flags)
        storage = torch.frombuffer(memory, dtype=dtype, count=length)
    return storage.as_strided(tuple(shape), tuple(strides))
