"""`tensor = (tensor + N(0, stddev²)) · scale` in place, the same for every sharding of the tensor.

An element's noise is a function of the key, the step, the name and its index in the whole tensor.
Elements form tiles of 16 rows and 128 columns; a column takes the 16 words of one block of the
stream and turns each two of them, a radius and an angle, into two normals (Box and Muller, 1958).

The NumPy formulation below draws the same numbers as the kernel, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import no_type_check

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from veilspan.kernels.checks import require_dtype, require_together
from veilspan.kernels.compat import jit, runs_kernels, tl
from veilspan.kernels.launch import UNCAPTURED, Compilation, configuration, configurations
from veilspan.kernels.normals import REFINED_BELOW, normals, normals_kernel
from veilspan.kernels.roofline import Work
from veilspan.kernels.streams import (
    WORDS,
    chacha20_block,
    check_count,
    check_key,
    check_stream,
    derive,
    philox_block,
    words,
)

__all__ = ["add_noise_"]

_COLUMNS = 128  # of a tile; part of the law of the noise, so no table may change it
_TILE = WORDS * _COLUMNS
_TILES_AT_ONCE = 32  # of the NumPy formulation: its arrays stay in the cache
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_INTEGER_INSTRUCTIONS = {"chacha20": 82.0, "philox4x32": 33.0}  # an element, sm_90


@torch.no_grad()
def add_noise_(
    tensor: Tensor,
    *,
    key: bytes,
    stddev: float,
    step: int,
    name: str,
    offset: int = 0,
    scale: float = 1.0,
    stream: str = "chacha20",
) -> None:
    """Set `tensor` to `(tensor + N(0, stddev²)) · scale`.

    Args:
        tensor: fp32, bf16 or fp64, any shape and device. Its flat elements are elements
            `offset … offset + numel - 1` of the whole tensor. bf16 sums are formed in fp32 and
            rounded once; sum the clipped contributions in fp32, and only convert what is noisy.
        key: 32 secret bytes.
        stddev: Standard deviation, in units of the tensor; finite, at least 0. It is rounded up to
            fp32. 0 adds nothing.
        step: Step of the run; never draw twice for one step and name under one key.
        name: Name of the whole tensor, the same on every rank.
        offset: Flat index of the first element in the whole tensor.
        scale: Factor after the noise, such as 1 / expected_batch_size; finite, above 0.
        stream: `"chacha20"`, or `"philox4x32"`, which is not cryptographic.

    Raises:
        ValueError: If an argument is not as above, or `tensor` is a DTensor.

    Guarantee:
        Shards of any cut are bitwise equal to the parts of the whole on one kind of device.
        Unit normals are fp32 numbers within 5e-7 relative of the exact transform of the words, and
        the same bits on every device whose arithmetic follows IEEE 754. The law is the normal law
        up to |z| = 9.49, where a 64-bit radius ends (probability beyond it: 2e-21).

    Examples:
        >>> key = bytes(range(32))  # only here: a key must be secret
        >>> whole, right = torch.zeros(10), torch.zeros(7)
        >>> add_noise_(whole, key=key, stddev=2.0, step=4, name="weight")
        >>> add_noise_(right, key=key, stddev=2.0, step=4, name="weight", offset=3)
        >>> torch.equal(whole[3:], right)
        True
    """
    require_together(tensor=tensor)
    require_dtype("tensor", tensor, _DTYPES)
    check_key(key)
    step, offset = check_count("step", step), check_count("offset", offset)
    check_count("offset + numel", offset + tensor.numel())
    stddev, scale = _checked(stddev, scale)
    subkey = derive(key, check_stream(stream), step, name)
    if tensor.numel() == 0:
        return
    flat = tensor.contiguous()
    torch.ops.veilspan.add_noise_(
        flat, torch.from_numpy(subkey.view(np.int32)), stddev, scale, offset, stream
    )
    if flat is not tensor:
        tensor.copy_(flat)


def work(elements: int, *, element_bytes: int = 4, stream: str = "chacha20") -> Work:
    """Return what `add_noise_` moves and computes: the tensor is read and written."""
    return Work(
        bytes=2.0 * elements * element_bytes, integers=elements * _INTEGER_INSTRUCTIONS[stream]
    )


@jit
@no_type_check
def _add_pairs(
    tile,
    column,
    first,
    last,
    stddev,
    scale,
    words,
    tails,
    REFINED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add the normals of these words to the elements `first … last - 1` of a tile."""
    for pair in tl.static_range(8):
        found = normals_kernel(words[2 * pair], tails[pair], words[2 * pair + 1], REFINED)
        for half in tl.static_range(2):
            place = column + (2 * pair + half) * COLUMNS
            inside = (place >= first) & (place < last)
            old = tl.load(tile + place, mask=inside, other=0.0).to(tl.float32)
            new = (old + found[half] * stddev) * scale
            tl.store(tile + place, new.to(tile.dtype.element_ty), mask=inside)


@jit
@no_type_check
def _add_noise_kernel(
    tensor,
    table,
    stddev,
    scale,
    COLUMNS: tl.constexpr,
    CHACHA: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program serves BLOCKS columns of a tile.

    `table` holds the subkey, 8 integers, the first tile, the elements of it that lie before the
    tensor, and the length of the tensor.
    """
    program = tl.program_id(0).to(tl.int64)
    tile = program // (COLUMNS // BLOCKS)
    column = (tl.program_id(0) % (COLUMNS // BLOCKS)) * BLOCKS + tl.arange(0, BLOCKS)
    block = (tl.load(table + 8) + tile) * COLUMNS + column
    begin = tile * (16 * COLUMNS) - tl.load(table + 9)  # in the tensor, below 0 in its first tile
    first = tl.maximum(-begin, 0).to(tl.int32)
    last = tl.minimum(tl.load(table + 10) - begin, 16 * COLUMNS).to(tl.int32)
    low = block.to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    words = chacha20_block(table, low, high, 0) if CHACHA else philox_block(table, low, high, 0)
    least = tl.minimum(words[0], words[2])
    for pair in tl.static_range(2, 8):
        least = tl.minimum(least, words[2 * pair])
    if tl.min(least) < 256:  # once in 2²⁴ pairs
        tails = chacha20_block(table, low, high, 1) if CHACHA else philox_block(table, low, high, 1)
        _add_pairs(tensor + begin, column, first, last, stddev, scale, words, tails, True, COLUMNS)
    else:
        _add_pairs(tensor + begin, column, first, last, stddev, scale, words, words, False, COLUMNS)


@torch.library.custom_op("veilspan::add_noise_", mutates_args=("tensor",), tags=UNCAPTURED)
def _add_noise(
    tensor: Tensor, subkey: Tensor, stddev: float, scale: float, offset: int, stream: str
) -> None:
    if runs_kernels(tensor):
        _launch(tensor, subkey, stddev, scale, offset, stream)
    else:
        _add(tensor, subkey, stddev, scale, offset, stream)


@_add_noise.register_fake
def _(
    tensor: Tensor, subkey: Tensor, stddev: float, scale: float, offset: int, stream: str
) -> None:
    return None


def _launch(
    tensor: Tensor, subkey: Tensor, stddev: float, scale: float, offset: int, stream: str
) -> None:
    first, before = divmod(offset, _TILE)
    tiles = -(-(before + tensor.numel()) // _TILE)
    numbers = [word % 2**32 for word in subkey.tolist()] + [first, before, tensor.numel()]
    chosen = configuration("add_noise", tensor.device)
    chosen.launch(
        _add_noise_kernel,
        (tiles * (_COLUMNS // chosen.blocks["BLOCKS"]),),
        tensor,
        # One small copy instead of arguments, each value of which Triton might compile anew.
        torch.tensor(numbers, dtype=torch.int64).to(tensor.device, non_blocking=True),
        stddev,
        scale,
        COLUMNS=_COLUMNS,
        CHACHA=stream == "chacha20",
    )


def _add(
    tensor: Tensor, subkey: Tensor, stddev: float, scale: float, offset: int, stream: str
) -> None:
    """Add the noise with NumPy, some tiles at a time."""
    flat = tensor.view(-1)
    key = subkey.cpu().numpy().view(np.uint32)
    last = offset + flat.numel()
    span = _TILE * _TILES_AT_ONCE
    for start in range(offset // _TILE * _TILE, last, span):
        begin, end = max(offset, start), min(last, start + span)
        noise = _unit_normals(key, stream, start // _TILE, -(-(end - start) // _TILE))
        part = flat[begin - offset : end - offset]
        wide = torch.promote_types(part.dtype, torch.float32)
        drawn = torch.from_numpy(noise[begin - start : end - start]).to(part.device, wide)
        part.copy_(part.to(wide).add_(drawn.mul_(stddev)).mul_(scale))


def _unit_normals(
    subkey: NDArray[np.uint32], stream: str, first: int, tiles: int
) -> NDArray[np.float32]:
    """Return the normals of neighbouring tiles, `[tiles · 2048]`."""
    blocks = np.arange(_COLUMNS * tiles, dtype=np.uint64) + np.uint64(_COLUMNS * first)
    drawn = words(stream, subkey, blocks, 0)
    radii, angles = drawn[0::2], drawn[1::2]
    more = np.zeros_like(radii)
    _, rare = np.nonzero(radii < REFINED_BELOW)
    if rare.size:
        more[:, rare] = words(stream, subkey, blocks[rare], 1)[:8]
    rows = np.stack(normals(radii, more, angles), 1).reshape(WORDS, tiles, _COLUMNS)
    return rows.transpose(1, 0, 2).reshape(-1)


def _checked(stddev: float, scale: float) -> tuple[float, float]:
    """Return the numbers, the deviation rounded up to what fp32 holds."""
    largest = float(np.finfo(np.float32).max)
    if not 0 <= stddev <= largest:
        raise ValueError(f"stddev is {stddev}; it must be finite in fp32 and at least 0.")
    if not 0 < scale <= largest:
        raise ValueError(f"scale is {scale}; it must be finite in fp32 and above 0.")
    rounded = np.float32(stddev)
    if float(rounded) < stddev:
        rounded = np.nextafter(rounded, np.float32(math.inf))
    return float(rounded), float(scale)


def compilations(table: str) -> Iterator[Compilation]:
    """Yield what to compile ahead of time for the GPUs of a table."""
    for chosen in configurations("add_noise", table):
        for stream, dtype in (("chacha20", "fp32"), ("philox4x32", "bf16")):
            yield Compilation(
                name=f"add_noise {stream} {dtype}",
                kernel=_add_noise_kernel,
                signature={
                    "tensor": f"*{dtype}",
                    "table": "*i64",
                    "stddev": "fp32",
                    "scale": "fp32",
                },
                constants={
                    "COLUMNS": _COLUMNS,
                    "CHACHA": stream == "chacha20",
                    **chosen.blocks,
                },
                chosen=chosen,
            )
