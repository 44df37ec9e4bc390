"""Peak memory of a method on the CPU, measured in processes of its own."""

from __future__ import annotations

import collections
import contextlib
import gc
import multiprocessing
import resource
import statistics
import sys
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from contestants import METHODS
from models import Shape

_IMPORTED = (
    "opacus.grad_sample",
    "opacus.optimizers",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)
# The server imports once and computes nothing, so that each child is a fresh process in no time.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["memory", *_IMPORTED])


def high_water_mib() -> float:
    """Return the largest resident size that this process ever had, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include the parent that started this process
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**10
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _forget_high_water() -> None:
    """Start the high-water mark anew: what building the model left free is no reserve."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(
    shape: Shape, name: str, size: int, threads: int, *, processes: int = 3
) -> float | None:
    """Return the growth of the resident high-water mark over two micro-batches and an update, MiB.

    It counts from the moment when model and optimizer exist: gradients, the optimizer's state,
    activations and scratch memory, but not the weights, the interpreter or the libraries. What the
    allocator keeps differs from process to process: the median of several counts. None if one died.
    """
    peaks = [_peak_mib(shape, name, size, threads) for _ in range(processes)]
    known = [peak for peak in peaks if peak is not None]
    return statistics.median(known) if len(known) == processes else None


def _peak_mib(shape: Shape, name: str, size: int, threads: int) -> float | None:
    mine, theirs = _CONTEXT.Pipe()
    child = _CONTEXT.Process(target=_measure, args=(theirs, shape, (name, size), threads))
    child.start()
    theirs.close()
    try:
        return mine.recv()
    except EOFError:
        return None
    finally:
        child.join()


def _measure(answer: Connection, shape: Shape, method: tuple[str, int], threads: int) -> None:
    torch.set_num_threads(threads)
    name, size = method
    trained = METHODS[name](replace(shape, records=2 * size), size, 1.0)
    tokens = replace(shape, records=2 * size).tokens(0)
    gc.collect()
    _forget_high_water()
    before = high_water_mib()
    collections.deque(trained.gradient(tokens), maxlen=0)
    trained.update()
    answer.send(high_water_mib() - before)
