"""The cells of the grid: models, lengths, micro-batches, and which method can serve them."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from contestants import METHODS, Veilspan, why_absent
from models import QUICK, Shape

OURS = ("single_sample", "per_sample", "bookkeeping", "two_pass", "per_layer")
RIVALS = ("opacus_hooks", "opacus_ghost", "opacus_fgc", "fastdp_mixopt")
SLOW = 1.6
"""A method that many times slower than plain training runs in two rounds; far slower, in one."""
HOPELESS = 12.0
"""A method that many times slower at the next shorter T, with the same model and B, is left out."""

_SMALL = {"hidden": 128, "intermediate": 344, "layers": 2, "heads": 4, "vocabulary": 2048}
LLAMA_1B = {
    "hidden": 2048,
    "intermediate": 8192,
    "layers": 16,
    "heads": 32,
    "kv_heads": 8,
    "vocabulary": 128256,
    "fused_head": True,
}
LLAMA_8B = {**LLAMA_1B, "hidden": 4096, "intermediate": 14336, "layers": 32, "optimizer": "sgd"}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 operations per second by data sheet, for plain training's own share of them."""
_LENGTHS, _SIZES = (128, 1024, 4096, 8192), (1, 4, 16)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Cells of one size of model.

    Args:
        models: Fields of `Shape` by model name.
        pairs: (length T, records B of a micro-batch) of each cell, the short ones first.
        tokens: Of one logical batch, at least.
        seconds: No further round of a cell starts after this many.
        patience: A method is left out where a round of it is forecast to take more seconds.
        probing: Memory is left out where a micro-batch of plain training takes more seconds.
        methods: Which are compared.
    """

    models: dict[str, dict[str, Any]]
    pairs: tuple[tuple[int, int], ...]
    tokens: int
    seconds: float = 25.0
    patience: float = 600.0
    probing: float = 4.0
    methods: tuple[str, ...] = ("plain", "auto", "auto_free", *OURS, *RIVALS)


SCALES = {
    "quick": Scale(
        models={"llama": QUICK, "gpt2": {**QUICK, "family": "gpt2"}},
        pairs=((64, 1), (128, 1), (128, 4)),
        tokens=512,
    ),
    "small": Scale(
        models={"llama": _SMALL, "gpt2": {**_SMALL, "family": "gpt2", "intermediate": 512}},
        pairs=tuple((t, b) for b in _SIZES for t in _LENGTHS),
        tokens=8192,
    ),
    "issue": Scale(
        models={"llama": {}},
        pairs=((128, 8), (1024, 4), (4096, 1), (8192, 1)),
        tokens=16384,
        seconds=420.0,
        probing=40.0,
    ),
    "device": Scale(
        models={"llama-3.2-1b": LLAMA_1B, "llama-3.1-8b": LLAMA_8B},
        pairs=tuple((t, b) for b in _SIZES for t in (1024, 4096, 8192, 16384, 65536)),
        tokens=65536,
        seconds=120.0,
        patience=300.0,
        probing=20.0,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model at one length and micro-batch."""

    scale: str
    model: str
    size: int
    shape: Shape

    @property
    def key(self) -> str:
        """What addresses it in the result file."""
        return f"{self.scale}/{self.model}/T{self.shape.length}/B{self.size}"

    def described(self) -> dict[str, Any]:
        """Return its part of the result file."""
        shape = asdict(self.shape)
        length, records = shape.pop("length"), shape.pop("records")
        return {
            "key": self.key,
            "scale": self.scale,
            "model": self.model,
            "length": length,
            "size": self.size,
            "records": records,
            "shape": shape,
        }


def cells(name: str, device: str) -> Iterator[Cell]:
    """Yield the cells of a scale."""
    scale = SCALES[name]
    for model, fields in scale.models.items():
        for length, size in scale.pairs:
            batches = max(1, scale.tokens // (length * size))
            shape = Shape(length=length, records=batches * size, device=device, **fields)
            if name == "device":
                shape = replace(shape, dtype="bfloat16", checkpointing=length >= 8192)
            yield Cell(scale=name, model=model, size=size, shape=shape)


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What the next shorter T, with the same model and B, taught.

    Args:
        slowdown: Seconds over plain seconds, by contestant; infinite if too slow to run.
        flops: Operations per second of plain training; infinite if nothing is known.
    """

    slowdown: Mapping[str, float] = field(default_factory=dict)
    flops: float = float("inf")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One contestant of a cell: what it runs, or whose time it shares, or why it does not run.

    Args:
        method: Key of `METHODS`.
        size: Records of its micro-batches.
        same_as: Contestant that runs the very same code.
        skipped: Why it does not run.
    """

    method: str
    size: int
    same_as: str | None = None
    skipped: str | None = None


def entries(cell: Cell, names: Sequence[str], shorter: Experience) -> dict[str, Entry]:
    """Return the contestants of a cell by name, plain training at the same micro-batch first.

    Args:
        cell: The cell.
        names: Which are wanted.
        shorter: What the next shorter T taught.
    """
    found = {"plain": Entry(method="plain", size=cell.size)}
    for name in names:
        if name in METHODS and name not in ("plain", "auto"):
            size = 1 if name == "single_sample" else cell.size
            why = why_absent(name) or _why_skipped(cell, name, shorter)
            found[name] = Entry(method=name, size=size, skipped=why)
    if "auto" in names or "auto_free" in names:
        try:
            found |= _automatic(cell, found)
        except Exception as error:
            if cell.shape.device == "cpu":
                raise
            traceback.print_exception(error)  # on a GPU the others are measured all the same
            why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
            found |= {
                name: Entry(method="auto", size=cell.size, skipped=why)
                for name in ("auto", "auto_free")
                if name in names
            }
    return {name: entry for name, entry in found.items() if name != "auto" or name in names}


def _automatic(cell: Cell, found: dict[str, Entry]) -> dict[str, Entry]:
    """Return `auto` with the given and with the free micro-batch, and plain training beside it.

    A contestant that comes down to one that runs anyway shares its time.
    """
    length = cell.shape.length
    step = Veilspan(cell.shape, cell.size, 1.0, backward="auto")
    size = step.best_microbatch(length, cell.size)
    result: dict[str, Entry] = {}
    if size != cell.size:
        result["plain_free"] = Entry(method="plain", size=size)
    for name, size_here in (("auto", cell.size), ("auto_free", size)):
        method = step.choice(size_here, length)
        known = [
            n for n, e in (found | result).items() if (e.method, e.size) == (method, size_here)
        ]
        same = known[0] if known else None
        if same is not None and found.get(same, Entry(method="", size=0)).skipped:
            same = None
        result[name] = Entry(method=method, size=size_here, same_as=same)
    return result


def _why_skipped(cell: Cell, name: str, shorter: Experience) -> str | None:
    """Return why a method cannot serve a cell: a forecast of its memory, or a shorter T."""
    room, need = _room(cell.shape.device), _extra_bytes(cell, name)
    if need > room:
        need, room = need / 2**30, room / 2**30
        return f"would take {need:.0f} GiB beyond plain training; the rule allows {room:.0f}"
    slowdown = shorter.slowdown.get(name, 0.0)
    if slowdown > HOPELESS:
        return f"{slowdown:.1f} times slower than plain training at the next shorter T"
    seconds, patience = slowdown * cell.shape.flops() / shorter.flops, SCALES[cell.scale].patience
    if seconds > patience:
        return f"too slow: would take {seconds:.0f} s a round; the rule allows {patience:.0f}"
    return None


def _room(device: str) -> float:
    """Return the bytes that a method may use beyond plain training: 0.6 of the memory."""
    if device == "cpu":
        return 0.6 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0.6 * torch.cuda.get_device_properties(0).total_memory


def _extra_bytes(cell: Cell, name: str) -> float:
    """Return the forecast memory beyond plain training: gradients per record, tables of T x T."""
    shape, size = cell.shape, float(cell.size)
    width = 4.0 if shape.dtype == "float32" else 2.0
    matrices = 3 if shape.family == "llama" else 2
    layer = 4 * shape.hidden**2 + matrices * shape.hidden * shape.intermediate
    head = shape.hidden * shape.vocabulary
    stored = width * size * (shape.layers * layer + 2 * head)
    tables = 3 * width * size * shape.length**2
    one_hot = 3 * width * size * shape.length * shape.vocabulary
    return {
        "per_sample": stored,
        "opacus_hooks": 2 * stored,
        "opacus_ghost": tables,
        "opacus_fgc": 2 * width * size * head,
        "fastdp_mixopt": stored + min(tables, width * size * head) + one_hot,
    }.get(name, 0.0)
