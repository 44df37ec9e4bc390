"""Triton where it is installed, or a stand-in with which the package still imports.

Every kernel file takes `jit`, `tl` and `triton` from here. Without Triton a kernel is a name that
raises when it is launched, and no launcher launches it: `runs_kernels` sends tensors to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

__all__ = ["AVAILABLE", "INTERPRETED", "jit", "runs_kernels", "tl", "triton"]

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton = tl = None

AVAILABLE: bool = triton is not None
"""Whether Triton can be imported."""

# A submodule that Triton's own __init__ binds without declaring it.
INTERPRETED: bool = AVAILABLE and bool(
    triton.knobs.runtime.interpret  # pyright: ignore[reportAttributeAccessIssue]
)
"""Whether `TRITON_INTERPRET=1` was set when the kernels were defined: they then run on the CPU."""


def jit(function: Callable[..., Any]) -> Any:
    """Return `function` as a Triton kernel, or as what raises without Triton."""
    if AVAILABLE:
        return triton.jit(function)
    return _Absent(function.__name__)


class _Absent:
    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getitem__(self, grid: object) -> Any:
        raise RuntimeError(
            f"kernel {self.__name__} needs Triton, which is not installed. pip install triton, or "
            "keep the tensors on the CPU, where PyTorch serves them."
        )


def runs_kernels(tensor: Tensor) -> bool:
    """Return whether Triton serves tensors like this one; otherwise PyTorch does.

    Triton serves fp32, fp16 and bf16 on GPUs, and on the CPU while it interprets its kernels.
    """
    if not AVAILABLE or tensor.dtype.itemsize > 4:
        return False
    return tensor.device.type == ("cpu" if INTERPRETED else "cuda")
