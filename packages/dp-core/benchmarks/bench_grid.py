"""Time and memory of private training beside plain training and its rivals, over a grid of cells.

    python bench_grid.py --output core_grid.json
    python bench_grid.py --device cuda --output gpu_grid.json

The first is for the CPU, the second for a GPU: bf16, the shapes of Llama-3.2-1B and 3.1-8B.

A cell is a model, a length T and records B of a micro-batch. Within a cell, methods take turns in
every round of one logical batch: forward, backward, clipping, noise and AdamW. Ratios are paired by
round: plain seconds over method seconds, so 1.0 means that privacy costs no time. `ratio` compares
with plain training at the same micro-batch B, `best_ratio` with the fastest plain training measured
in the cell. `auto` may choose the strategy, `auto_free` also the micro-batch; where one comes down
to a contestant that runs anyway, it shares its time. What a method cannot serve is skipped by the
rules in `cells.py`, and the file says why. The file is written after every cell.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from cells import PEAK_FLOPS, RIVALS, SCALES, SLOW, Cell, Entry, Experience, cells, entries
from contestants import METHODS, why_absent
from memory import peak_mib
from models import QUICK, Shape
from report import insert, markdown, plots, regret, table
from rounds import Limits, Times, gradient_errors, machine, quartiles, time_rounds, today, write


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scales", nargs="+", choices=SCALES, help="sizes of model")
    parser.add_argument("--models", nargs="+", help="by name; default all of the scale")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens T; default all of the scale")
    parser.add_argument("--sizes", type=int, nargs="+", help="micro-batches B; default all")
    parser.add_argument("--methods", nargs="+", help="default all of the scale")
    parser.add_argument("--rounds", type=int, help="timed rounds per cell, at most")
    parser.add_argument(
        "--cell-seconds", type=float, help="then no further round; default by scale"
    )
    parser.add_argument("--minutes", type=float, help="then no further cell")
    parser.add_argument(
        "--until", type=float, default=math.inf, help="Unix time; then no further cell or method"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory (CPU)")
    parser.add_argument(
        "--only-memory", action="store_true", help="only add peak memory to the cells of the file"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", "--json", type=Path, help="write the results here, as JSON")
    parser.add_argument("--continue", dest="resume", action="store_true", help="keep its cells")
    parser.add_argument("--markdown", type=Path, help="only put the tables into this page")
    parser.add_argument("--quick", action="store_true", help="tiny model: does everything run?")
    options = parser.parse_args()
    default = ["device"] if options.device == "cuda" else ["issue", "small"]
    if options.markdown and not (options.output and options.output.exists()):
        parser.error("--markdown needs the file that --output names")
    options.resume = options.resume or options.only_memory
    options.scales = options.scales or (["quick"] if options.quick else default)
    options.rounds = options.rounds or (1 if options.quick else 5)
    return options


def measure(cell: Cell, options: argparse.Namespace, shorter: Experience) -> dict[str, Any]:
    """Return the result of one cell."""
    names = options.methods or SCALES[cell.scale].methods
    if options.device == "cuda":  # `auto` counts what the cell before has left behind as used
        gc.collect()
        torch.cuda.empty_cache()
    found = entries(cell, names, shorter)
    running = {
        name: (entry.method, entry.size)
        for name, entry in found.items()
        if entry.same_as is None and entry.skipped is None
    }
    seconds = options.cell_seconds or SCALES[cell.scale].seconds
    limits = Limits(rounds=options.rounds, seconds=seconds, until=options.until, slow=SLOW)
    times = time_rounds(cell.shape, running, limits, lambda line: print(line, flush=True))
    plain = times.settled("plain").values()
    micro_batch = min(plain, default=0.0) * cell.size / cell.shape.records
    wanted = options.device == "cpu" and not options.no_memory
    if wanted and micro_batch <= SCALES[cell.scale].probing:
        for name, (method, size) in running.items():
            if name not in times.failures:
                peak = peak_mib(cell.shape, method, size, options.threads)
                times.peaks |= {} if peak is None else {name: peak}
    rows = [row(name, entry, found, times) for name, entry in found.items()]
    flops = cell.shape.flops() / min(plain) if plain else 0.0
    gpu = str(machine().get("gpu", "")) if options.device == "cuda" else ""
    peak = next((rate for name, rate in PEAK_FLOPS.items() if name in gpu), None)
    return {
        **cell.described(),
        "load_average": os.getloadavg()[0],
        "plain_teraflops": flops / 1e12,
        **({"plain_mfu": flops / peak} if peak else {}),
        "rows": rows,
    }


def row(name: str, entry: Entry, found: dict[str, Entry], times: Times) -> dict[str, Any]:
    """Return the result of one contestant."""
    run = entry.same_as or name
    result: dict[str, Any] = {"method": name, "strategy": entry.method, "size": entry.size}
    why = entry.skipped or times.failures.get(run) or times.failures.get("plain")
    if why is not None or not times.seconds.get(run):
        return {**result, "skipped": why or "not reached"}
    plains = [n for n in found if found[n].method == "plain" and times.seconds.get(n)]
    best = min(plains, key=lambda n: quartiles(list(times.settled(n).values()))["median"])
    return {
        **result,
        **({"same_as": entry.same_as} if entry.same_as else {}),
        "seconds": quartiles(list(times.settled(run).values())),
        "ratio": quartiles(times.paired(run, "plain")),
        "best_ratio": quartiles(times.paired(run, best)),
        "rounds": list(times.seconds[run].values()),
        **({"peak_mib": times.peaks[run]} if run in times.peaks else {}),
    }


def at_shorter_length(cell: Cell, done: list[dict[str, Any]]) -> Experience:
    """Return what the next shorter T taught; too slow there is too slow here."""
    same = [c for c in done if (c["scale"], c["model"]) == (cell.scale, cell.model)]
    same = [c for c in same if c["size"] == cell.size and c["length"] < cell.shape.length]
    if not same:
        return Experience()
    nearest = max(same, key=lambda c: c["length"])
    slow = {r["method"]: float("inf") for r in nearest["rows"] if "slow" in r.get("skipped", "")}
    slow |= {r["method"]: 1 / r["ratio"]["median"] for r in nearest["rows"] if "ratio" in r}
    return Experience(slowdown=slow, flops=1e12 * nearest["plain_teraflops"] or float("inf"))


def chosen_cells(options: argparse.Namespace) -> list[Cell]:
    """Return the cells that the options ask for, in order."""
    return [
        cell
        for scale in options.scales
        for cell in cells(scale, options.device)
        if (not options.models or cell.model in options.models)
        and (not options.lengths or cell.shape.length in options.lengths)
        and (not options.sizes or cell.size in options.sizes)
    ]


def add_memory(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Measure peak memory where the file has a time but no memory; a busy machine will do."""
    wanted = {cell.key: cell for cell in chosen_cells(options)}
    for measured in result["cells"]:
        cell = wanted.get(measured["key"])
        if cell is None:
            continue
        for row in (r for r in measured["rows"] if "ratio" in r and "peak_mib" not in r):
            peak = peak_mib(cell.shape, row["strategy"], row["size"], options.threads)
            row |= {} if peak is None else {"peak_mib": peak}
        write(result, options.output)


def fresh(options: argparse.Namespace) -> dict[str, Any]:
    """Return a result file without cells: the machine, and how exact each method's gradient is."""
    errors = {}
    if options.device == "cpu":
        others = ("plain", "per_layer", "per_layer_triton", "bookkeeping_triton")
        flat = [n for n in METHODS if n not in others and not why_absent(n)]
        for family in ("llama", "gpt2"):
            shape = Shape(length=33, family=family, **QUICK)
            errors[family] = gradient_errors(shape, flat, 2)
    return {
        "benchmark": "private training over a grid of models, lengths and micro-batches",
        "date": today(),
        "machine": machine(),
        "gradient_errors": errors,
        "absent": {name: why for name in RIVALS if (why := why_absent(name))},
        "cells": [],
    }


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    before = options.output and options.output.exists() and (options.resume or options.markdown)
    result = json.loads(options.output.read_text()) if before else fresh(options)
    if options.markdown:
        insert(markdown(result), options.markdown)
        return
    if options.only_memory:
        add_memory(result, options)
    start, done = time.perf_counter(), {cell["key"] for cell in result["cells"]}
    for cell in chosen_cells(options) if not options.only_memory else []:
        if options.minutes and time.perf_counter() - start > 60 * options.minutes:
            print(f"{options.minutes:g} minutes are over; --continue measures the other cells")
            break
        if time.time() > options.until:
            print("no time is left; --continue measures the other cells")
            break
        if cell.key in done:
            continue
        measured = measure(cell, options, at_shorter_length(cell, result["cells"]))
        result["cells"].append(measured)
        result["date"] = today()  # of the last cell; --continue keeps older ones
        result["regret"] = regret(result["cells"])
        write(result, options.output)
        print(table(measured), flush=True)
    for section, line in ((k, v["line"]) for k, v in result.get("regret", {}).items()):
        print(f"{section}: {line}")
    if options.output and result["cells"]:
        plots(result, options.output)


if __name__ == "__main__":
    main()
