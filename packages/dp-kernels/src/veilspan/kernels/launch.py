"""How every kernel is launched: blocks, warps and stages from one table per GPU architecture.

A table maps the name of an op to rows; the first row whose bounds hold is taken. Tables are data:
`tables/sm_90.json` and its siblings. Where an architecture or an op has no entry of its own, the
next older one serves, and at last `default.json`. Nothing is tuned or compiled at import.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import torch
from torch import Tensor

from veilspan.kernels.compat import INTERPRETED

ARCHITECTURES = ("sm_90", "sm_80")
"""GPU architectures with tables of their own, newest first."""

UNCAPTURED = (torch.Tag.cudagraph_unsafe,)
"""Tags of ops that copy numbers from the host, as a CUDA graph cannot: Inductor leaves them out."""

_SHARED_SM_90 = 227 * 1024
"""Shared memory that a program may have on an H100, bytes; what came later may have less."""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One way to launch a kernel.

    Args:
        blocks: Compile-time sizes of the kernel by the names of its arguments.
        num_warps: Warps per program, 32 threads each.
        num_stages: Depth of the software pipeline of its loops.
        route: "kernel", or "library" where PyTorch computes the op in blocks instead.
        up_to: Bounds on the sizes that this way is for.
    """

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 3
    route: Literal["kernel", "library"] = "kernel"
    up_to: Mapping[str, int] = field(default_factory=dict)

    def launch(
        self, kernel: Any, grid: tuple[int, ...], first: Tensor, *arguments: Any, **constants: Any
    ) -> None:
        """Launch a kernel in this way, on the device of its first argument.

        Triton launches on the current device, whose context cannot read another one's memory.

        Args:
            kernel: The kernel, as `compat.jit` returned it.
            grid: Number of programs in each dimension.
            first: Its first argument.
            *arguments: The other ones.
            **constants: Compile-time arguments that are no blocks.
        """
        with torch.cuda.device_of(first):
            kernel[grid](first, *arguments, **constants, **self.blocks, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """How Triton compiles and launches the kernel.

        Fusion of a product and a sum is off: it would round a contribution otherwise than its norm.
        """
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": False,
        }


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """One kernel in one configuration.

    Args:
        name: Name for reports; an op's kernels begin with the name of the op.
        kernel: The kernel, as `compat.jit` returned it.
        signature: Triton types of the arguments that are no constants, such as `*bf16` or `i32`.
        constants: Compile-time arguments, the blocks of the configuration among them.
        chosen: The configuration.
        odd: Integer arguments that are not known to be multiples of 16.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    chosen: Configuration
    odd: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Name and blocks: what a report calls it."""
        return f"{self.name} {'x'.join(str(size) for size in self.chosen.blocks.values())}"


def configuration(op: str, device: torch.device, **sizes: int) -> Configuration:
    """Return how to launch `op` on a device.

    Args:
        op: Name of the op, which is the name of its file.
        device: Where the tensors are.
        sizes: Sizes that the rows of the table put bounds on, such as `inputs=4096`.

    Raises:
        KeyError: If no table knows the op.
    """
    return configured(op, architecture(device), **sizes)


def configured(op: str, table: str, **sizes: int) -> Configuration:
    """Return how to launch `op` by the table of this name."""
    for row in rows(op, table):
        if all(sizes.get(name, 0) <= bound for name, bound in row.get("up_to", {}).items()):
            return _parsed(row)
    raise KeyError(f"no row of table {table!r} fits {op!r} with {sizes}")


def configurations(op: str, table: str) -> list[Configuration]:
    """Return every way to launch `op` that a table holds, for ahead-of-time compilation."""
    return [_parsed(row) for row in rows(op, table)]


def rows(op: str, table: str) -> list[dict[str, Any]]:
    """Return the rows of an op: its own in this table, or those of the next older one."""
    for name in _older(table):
        found = _table(name).get(op)
        if found:
            return found
    raise KeyError(f"no table knows the op {op!r}; it is listed in tables/default.json")


def architecture(device: torch.device) -> str:
    """Return the name of the table for a device."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip is not None:
        return "default"
    found = torch.cuda.get_device_properties(device)
    number = 10 * found.major + found.minor
    if number > 90 and found.shared_memory_per_block_optin < _SHARED_SM_90:
        return "sm_89"  # workstation GPUs keep the shared memory of that generation
    return f"sm_{number}"


def _older(table: str) -> list[str]:
    if not table.startswith("sm_"):
        return [table, "default"]
    number = int(table.removeprefix("sm_"))
    return [name for name in ARCHITECTURES if int(name.removeprefix("sm_")) <= number] + ["default"]


def _parsed(row: Mapping[str, Any]) -> Configuration:
    return Configuration(
        blocks=row.get("blocks", {}),
        num_warps=row.get("warps", 4),
        num_stages=row.get("stages", 3),
        route=row.get("route", "kernel"),
        up_to=row.get("up_to", {}),
    )


@cache
def _table(name: str) -> dict[str, list[dict[str, Any]]]:
    return json.loads((files("veilspan.kernels") / "tables" / f"{name}.json").read_text("utf-8"))
