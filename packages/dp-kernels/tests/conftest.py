"""Kernels run in Triton's interpreter here, and on the GPU where there is one: the same tests.

Memory that an op allocates is filled with NaN before it gets it, and buffers are fenced.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined, hence before imports
os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # else cuBLAS fails as not deterministic

from veilspan.kernels.testing import DEVICE, Fence


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def _poisoned_workspaces() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fence() -> Iterator[Fence]:
    placed = Fence()
    yield placed
    placed.check()
