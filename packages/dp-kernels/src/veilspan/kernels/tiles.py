"""GᵀA, the product behind every op on a linear map: tile by tile in Triton, in blocks in PyTorch.

Ops that share these functions round alike: a norm is that of the bits that a sum adds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import no_type_check

import torch
from torch import Tensor

from veilspan.kernels.compat import jit, runs_kernels, tl
from veilspan.kernels.launch import Compilation, Configuration, configuration, configurations

__all__ = [
    "accumulator",
    "exact_products",
    "has_odd_rows",
    "operands",
    "plan",
    "product",
    "product_blocks",
    "product_compilations",
    "row_blocks",
    "sq_norms",
    "tile_count",
    "tile_place",
    "tile_product",
    "used_samples",
]

SCRATCH = 1 << 22
"""Elements of a block in PyTorch: 16 MiB in fp32, so that the L2 cache of a large GPU holds it."""

_CHAIN = 256  # fp32 sums of squares stay this short; longer chains lose digits of the norm
_SIGNATURE = {2: "bf16", 4: "fp32"}


@jit
@no_type_check
def tile_place(index, outputs, inputs, BLOCK_O, BLOCK_I, GROUP):
    """Return row and column of a tile: GROUP rows of tiles are walked column by column.

    Programs that run at the same time then share their operands in the L2 cache.
    """
    rows = tl.cdiv(outputs, BLOCK_O)
    band = GROUP * tl.cdiv(inputs, BLOCK_I)
    first = index // band * GROUP
    height = tl.minimum(rows - first, GROUP)
    return first + index % band % height, index % band // height


@jit
@no_type_check
def tile_product(  # noqa: PLR0913 - a kernel takes every address, stride and block
    act,
    grad,
    row,
    column,
    tokens,
    outputs,
    inputs,
    act_token,
    grad_token,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return one tile of GᵀA of one sample, summed in fp32; lanes beyond an edge are 0."""
    act_token = tl.cast(act_token, tl.int64)  # 32 bits overflow within one block
    grad_token = tl.cast(grad_token, tl.int64)
    token = tl.arange(0, BLOCK_T)
    output = row * BLOCK_O + tl.arange(0, BLOCK_O)
    feature = column * BLOCK_I + tl.arange(0, BLOCK_I)
    grads = grad + token[None, :] * grad_token + output[:, None]
    acts = act + token[:, None] * act_token + feature[None, :]
    tile = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(0, tokens, BLOCK_T):
        there = token < tokens - start
        g = tl.load(grads, mask=there[None, :] & (output[:, None] < outputs), other=0.0)
        a = tl.load(acts, mask=there[:, None] & (feature[None, :] < inputs), other=0.0)
        if UPCAST:  # the interpreter computes wrongly in bf16; products of bf16 are exact in fp32
            g = g.to(tl.float32)
            a = a.to(tl.float32)
        tile = tl.dot(g, a, tile, input_precision="ieee")  # never TF32
        grads += BLOCK_T * grad_token
        acts += BLOCK_T * act_token
    return tile


def tile_count(chosen: Configuration, outputs: int, inputs: int) -> int:
    """Return the number of tiles of one sample."""
    blocks = chosen.blocks
    return -(-outputs // blocks["BLOCK_O"]) * -(-inputs // blocks["BLOCK_I"])


def accumulator(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which products of these are summed: fp64 with any fp64, else fp32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def plan(
    op: str, act_BTI: Tensor, grad_BTO: Tensor, *results: Tensor, any_length: bool = False
) -> Configuration | None:
    """Return how to launch the kernel of an op, or None where PyTorch computes it in blocks.

    Rows of the table may bound `samples`, `tokens`, `inputs`, `outputs`, the `bytes` of an element,
    and `odd`, which is 1 where rows begin at addresses that tensor cores cannot be fed from fast.
    `any_length` asks for the kernel also where long sequences would go to the library.
    """
    tensors = (act_BTI, grad_BTO, *results)
    if not all(runs_kernels(tensor) for tensor in tensors):
        return None
    samples, tokens, inputs = act_BTI.shape
    chosen = configuration(
        op,
        act_BTI.device,
        samples=samples,
        tokens=0 if any_length else tokens,
        inputs=inputs,
        outputs=grad_BTO.shape[2],
        bytes=torch.promote_types(act_BTI.dtype, grad_BTO.dtype).itemsize,
        odd=int(any(has_odd_rows(tensor) for tensor in tensors)),
    )
    return chosen if chosen.route == "kernel" else None


def has_odd_rows(tensor: Tensor) -> bool:
    """Return whether Triton cannot know that rows are aligned, and must load element by element."""
    starts = [tensor.shape[-1]]
    if _neighbours(tensor):  # otherwise it is copied first
        starts += [tensor.data_ptr(), *tensor.stride()[:-1]]
    return any(start % 16 for start in starts)


def operands(act_BTI: Tensor, grad_BTO: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in their common dtype, with features that are neighbours in memory."""
    common = torch.promote_types(act_BTI.dtype, grad_BTO.dtype)
    return _dense(act_BTI.to(common)), _dense(grad_BTO.to(common))


def product(act_nTI: Tensor, grad_nTo: Tensor) -> Tensor:
    """Return GᵀA per sample, `[n, o, I]`, summed and returned in fp32, or fp64 with any fp64.

    Raises:
        ValueError: If cuBLAS would round fp32 operands to TF32.
    """
    wide = accumulator(act_nTI, grad_nTo)
    device = act_nTI.device.type
    alike = act_nTI.dtype == grad_nTo.dtype
    narrow = alike and act_nTI.dtype.itemsize == 2
    widens = narrow and device == "cuda" and torch.version.hip is None and act_nTI.numel() > 0
    with exact_products(device, act_nTI.dtype if widens else wide):
        if widens:  # bf16 tensor cores, fp32 results
            return torch.bmm(grad_nTo.mT, act_nTI, out_dtype=wide)
        if alike and act_nTI.dtype == wide:
            return torch.bmm(grad_nTo.mT, act_nTI)
        return _widened(act_nTI, grad_nTo, wide)


@contextmanager
def exact_products(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Let products keep the digits of their operands.

    Raises:
        ValueError: If cuBLAS would round fp32 operands to TF32.
    """
    # Attributes of this object are made at run time, so its stub lacks them.
    rounds = torch.backends.cuda.matmul.fp32_precision == "tf32"  # pyright: ignore[reportAttributeAccessIssue]
    if device == "cuda" and dtype == torch.float32 and rounds:
        raise ValueError(
            "fp32 operands and TF32 products do not go together: the norm would not be that of the "
            'gradient. Call torch.set_float32_matmul_precision("highest") or pass bf16 operands.'
        )
    with torch.autocast(device, enabled=False):  # it would round fp32 operands to bf16
        yield


def product_blocks(act_BTI: Tensor, grad_BTO: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield samples, output features and their part of GᵀA, at most `SCRATCH` elements each."""
    samples, _, inputs = act_BTI.shape
    outputs = grad_BTO.shape[2]
    if samples * inputs * outputs == 0:
        return
    many = min(max(SCRATCH // (inputs * outputs), 1), samples)
    for rows in row_blocks(outputs, many * inputs):
        for sample in range(0, samples, many):  # inside, so that a sum over them stays in the cache
            some = slice(sample, sample + many)
            yield some, rows, product(act_BTI[some], grad_BTO[some, :, rows])


def sq_norms(values_nx: Tensor) -> Tensor:
    """Return Σ values² of each sample, `[n]` fp64, from fp32 chains of at most 256 squares."""
    flat = values_nx.reshape(len(values_nx), values_nx[:1].numel())
    whole = flat.shape[1] // _CHAIN * _CHAIN
    chains = flat[:, :whole].unflatten(1, (whole // _CHAIN, _CHAIN))
    return _chain_norms(chains).square().sum(1) + _chain_norms(flat[:, whole:]).square()


def row_blocks(outputs: int, inputs: int) -> Iterator[slice]:
    """Yield rows of an [O, I] matrix, at most `SCRATCH` elements at a time."""
    rows = max(SCRATCH // max(inputs, 1), 1)
    if rows > 128:
        rows -= rows % 128  # whole tiles of the library
    for start in range(0, outputs, rows):
        yield slice(start, min(start + rows, outputs))


def used_samples(factor_B: Tensor) -> Sequence[int]:
    """Return the samples that a sum needs; on a GPU all of them, since asking it would wait."""
    if factor_B.device.type == "cpu":
        return factor_B.nonzero().flatten().tolist()
    return range(len(factor_B))


def product_compilations(
    op: str,
    table: str,
    kernel: object,
    signature: Mapping[str, str],
    *,
    constants: Mapping[str, object] = MappingProxyType({}),
    variant: str = "",
) -> Iterator[Compilation]:
    """Yield the kernel of an op for every row of a table that launches it.

    `signature` and `constants` hold what an op has beyond operands, sizes, strides and blocks.
    """
    strides = ("act_sample", "act_token", "grad_sample", "grad_token")
    more = [name for name, kind in signature.items() if kind.startswith("i")]
    integers = ("tokens", "outputs", "inputs", *strides, *more)
    found: dict[str, Compilation] = {}  # by label: two rows may have the same blocks
    for chosen in configurations(op, table):
        if chosen.route == "library":
            continue
        dtype = _SIGNATURE[chosen.up_to.get("bytes", 4)]
        for ones in (False, True) if dtype == "fp32" else (False,):
            compilation = Compilation(
                name=f"{op} {dtype}{variant}{' of ones' if ones else ''}",
                kernel=kernel,
                signature={
                    **dict.fromkeys(("act", "grad"), f"*{dtype}"),
                    **dict.fromkeys(integers, "i32"),
                    **signature,
                },
                # Triton compiles a kernel anew for integers that are 1: they become constants.
                constants={
                    "UPCAST": False,
                    **constants,
                    **chosen.blocks,
                    **(dict.fromkeys(integers, 1) if ones else {}),
                },
                chosen=chosen,
                odd=("tokens", "samples") if chosen.up_to.get("odd") == 0 else integers,
            )
            found[compilation.label] = compilation
    yield from found.values()


def _widened(act_nTI: Tensor, grad_nTo: Tensor, wide: torch.dtype) -> Tensor:
    """Return the product of operands that are converted some tokens at a time."""
    samples, tokens, inputs = act_nTI.shape
    outputs = grad_nTo.shape[2]
    found = act_nTI.new_zeros((samples, outputs, inputs), dtype=wide)
    step = max(SCRATCH // max(samples * (inputs + outputs), 1), 1)
    for start in range(0, tokens, step):
        these = slice(start, start + step)
        found.baddbmm_(grad_nTo[:, these].mT.to(wide), act_nTI[:, these].to(wide))
    return found


def _chain_norms(rows: Tensor) -> Tensor:
    wide = accumulator(rows)
    return torch.linalg.vector_norm(rows, dim=-1, dtype=wide).double()


def _dense(tensor: Tensor) -> Tensor:
    return tensor if _neighbours(tensor) else tensor.contiguous()


def _neighbours(tensor: Tensor) -> bool:
    return tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
