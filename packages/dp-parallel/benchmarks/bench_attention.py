"""Time of attention over two processes against plain attention in one, on the CPU.

One forward and backward pass of one layer; the median of several rounds, the contestants
interleaved. The ranks take as long as the slower one. Plain attention has as many threads as there
are ranks, so that both use the same cores.

    python bench_attention.py [--output FILE] [--lengths 1024 2048 4096]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from veilspan.parallel import Layout, build_mesh
from veilspan.parallel.attention import AllGatherKV, Ulysses
from veilspan.parallel.testing import rank_main, run_ranks

RANKS = 2
ROUNDS = 7
HEADS, KEY_HEADS, WIDTH = 8, 4, 64
CONTESTANTS = {
    "ulysses contiguous": (Ulysses, "contiguous"),
    "ulysses zigzag": (Ulysses, "zigzag"),
    "allgather contiguous": (AllGatherKV, "contiguous"),
    "allgather zigzag": (AllGatherKV, "zigzag"),
}


def operands(tokens: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((HEADS, tokens), (KEY_HEADS, tokens), (KEY_HEADS, tokens))
    return [torch.randn(1, heads, t, WIDTH, requires_grad=True) for heads, t in shapes]


def seconds(call: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> float:
    started = time.perf_counter()
    call(*inputs).sum().backward()
    return time.perf_counter() - started


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def body(arguments: list[str]) -> dict[str, dict[str, list[float]]]:
    mesh = build_mesh(context=RANKS)
    found: dict[str, dict[str, list[float]]] = {}
    for length in map(int, arguments):
        calls: dict[str, Callable[..., torch.Tensor]] = {
            name: kind(
                layout=Layout(length=length, ranks=RANKS, kind=layout), group=mesh.context_group
            )
            for name, (kind, layout) in CONTESTANTS.items()
        }
        rounds: dict[str, list[float]] = {name: [] for name in ("plain", *calls)}
        whole, part = operands(length), operands(length // RANKS)
        for _ in range(ROUNDS):
            rounds["plain"].append(plain_round(mesh.rank, whole))
            for name, call in calls.items():
                dist.barrier()
                slowest = torch.tensor(seconds(call, part), dtype=torch.float64)
                dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
                rounds[name].append(slowest.item())
        found[str(length)] = rounds
    return found


def plain_round(rank: int, whole: list[torch.Tensor]) -> float:
    """Time plain attention on rank 0 while the other rank leaves it the cores."""
    dist.barrier()
    taken = torch.full((1,), float("inf"), dtype=torch.float64)
    if rank == 0:
        torch.set_num_threads(RANKS)
        taken.fill_(seconds(plain, whole))
        torch.set_num_threads(1)
    dist.broadcast(taken, src=0)
    return taken.item()


def machine() -> dict[str, Any]:
    model = "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(": ")[1] for x in lines if x.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    settings = parser.parse_args()
    lengths = [str(length) for length in settings.lengths]
    found = run_ranks(Path(__file__), [RANKS], arguments=lengths, timeout_s=900)[RANKS][0]
    medians = {
        length: {name: statistics.median(rounds) for name, rounds in contestants.items()}
        for length, contestants in found.items()
    }
    print("milliseconds of one layer, forward and backward, and speed over plain")
    print(f"{'':24}" + "".join(f"{'T=' + length:>18}" for length in medians))
    for name in ("plain", *CONTESTANTS):
        cells = [f"{m[name] * 1e3:12.1f} {m['plain'] / m[name]:4.2f}×" for m in medians.values()]
        print(f"{name:24}" + "".join(cells))
    result = {
        "what": "seconds of one attention layer, forward and backward, each round",
        "machine": machine(),
        "revision": revision(),
        "setting": {
            "ranks": RANKS,
            "rounds": ROUNDS,
            "heads": HEADS,
            "key_heads": KEY_HEADS,
            "head_width": WIDTH,
            "dtype": "float32",
            "threads of plain": RANKS,
        },
        "medians": medians,
        "seconds": found,
    }
    if settings.output:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        settings.output.write_text(json.dumps(result, indent=2) + "\n")


def revision() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return run.stdout.strip() or "unknown"


if __name__ == "__main__":
    # The ranks are forks of this file, started with a folder and the sizes of their worlds.
    if len(sys.argv) > 2 and Path(sys.argv[1]).is_dir():
        rank_main(body)
    else:
        main()
