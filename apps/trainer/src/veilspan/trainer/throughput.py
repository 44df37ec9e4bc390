"""Speed of a run, stated without revealing how many units were drawn."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_REMEMBERED = 64  # micro-batches


class Throughput:
    """Tokens per second of a step with the expected batch.

    How long a step took tells how many units it drew, which is private. Here the time per token of
    each full micro-batch and the time of each release are medians of their own, and the rate is put
    together for the expected batch, a public constant. A synthetic micro-batch is the first, so
    that no rate is missing where a step drew too few units for a full one.

    Args:
        expected_tokens: Expected units per step times the sequence length.
        replicas: Copies of the model that share the units out.
        device: Where the work happens.
    """

    def __init__(self, expected_tokens: float, replicas: int, device: torch.device) -> None:
        self._expected_tokens = expected_tokens
        self._replicas = replicas
        self._device = device
        self._per_token: deque[float] = deque(maxlen=_REMEMBERED)
        self._release: list[float] = []
        self._began_release = 0.0

    @contextmanager
    def microbatch(self, tokens: int, *, full: bool) -> Iterator[None]:
        """Time one forward and backward over `tokens` tokens, padding included.

        Only a full micro-batch counts, of as many units as fit and padded to full length: how full
        the last one of a step is, and how long units are, is private.
        """
        began = self._now()
        yield
        if full:
            self._per_token.append((self._now() - began) / tokens)

    def begin_release(self) -> None:
        """Note that the last micro-batch of a step is done."""
        self._began_release = self._now()

    def end_release(self) -> None:
        """Note that reduction, ledger, noise and optimizer of a step are done."""
        self._release.append(self._now() - self._began_release)

    def rate(self) -> float | None:
        """Return tokens per second with the releases since the last call; None without any."""
        if not self._per_token or not self._release:
            return None
        work = self._expected_tokens / self._replicas * statistics.median(self._per_token)
        seconds = work + statistics.median(self._release)
        self._release.clear()
        return self._expected_tokens / seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def peak_memory_gib(device: torch.device) -> float | None:
    """Return the most memory that tensors of this process ever took on a GPU; None on a CPU.

    What a process holds on a CPU grows with the rows it reads, so its peak tells how long the
    longest private row is.
    """
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 2**30
