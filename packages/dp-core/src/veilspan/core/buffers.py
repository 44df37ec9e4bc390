"""Memory for per-sample gradients that is kept from one micro-batch to the next.

On a CPU every large tensor would come as fresh pages from the operating system. On a GPU torch's
caching allocator does the same job.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SampleBuffers:
    """One buffer `[B, *parameter]` for each parameter that asked for one."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, size: int, parameter: nn.Parameter) -> Tensor | None:
        """Return room for `size` gradients of a parameter, values undefined; None off the CPU.

        Valid until the next call for the same name.
        """
        if parameter.device.type != "cpu":
            return None
        known = self._buffers.get(name)
        if known is None or len(known) < size or known.dtype != parameter.dtype:
            known = torch.empty((size, *parameter.shape), dtype=parameter.dtype)
            self._buffers[name] = known
        return known[:size]

    def clear(self) -> None:
        """Give the memory back."""
        self._buffers.clear()
