"""Time of one ε and of one noise calibration, against other accountants that are installed.

Run `python benchmarks/bench_epsilon.py --json result.json`. Every row names its upper bound, so
that a faster but looser answer shows; `times ours` is the library's time over that of `veilspan` in
that row. `veilspan` gives an upper bound, as the others do; `veilspan both` is the default engine,
which gives a lower bound too and refines until they are close. Each question is asked once, after
another one that loads the library, so that neither imports nor caches count.

`--grid` asks wide settings as well, those of `tests/dp_accounting_golden.json`, and counts where a
library was faster than `veilspan`, where its bound was larger or smaller, and where it was below
the truth: below the lower bound of `veilspan both`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from veilspan.accounting.bounds import EpsilonBounds
from veilspan.accounting.calibration import calibrate_noise
from veilspan.accounting.engines import CertifiedEngine, PldEngine, SampledGaussian, grids

# q, σ, T, δ
SETTINGS = [
    (0.01, 1.0, 1_000, 1e-5),
    (0.001, 0.8, 10_000, 1e-6),
    (0.05, 3.0, 2_000, 1e-7),
    (0.01, 50.0, 1_000, 1e-6),
    (0.001, 5.0, 1_000_000, 1e-9),
    (0.01, 1.0, 1_000, 1e-13),
]
MARKS = ("<!-- epsilon: made by bench_epsilon.py --markdown -->", "<!-- epsilon: end -->")
GRID = Path(__file__).parents[1] / "tests" / "dp_accounting_golden.json"
WARM_UP = (0.02, 2.0, 100, 1e-5)
# target ε, δ, q, T
CALIBRATIONS = [(3.0, 1e-6, 0.01, 1_000), (0.05, 1e-6, 0.01, 1_000)]


def ours(q: float, sigma: float, steps: int, delta: float) -> float:
    return bounds_of(q, sigma, steps, delta, one_sided=True).upper


def ours_both(q: float, sigma: float, steps: int, delta: float) -> float:
    return bounds_of(q, sigma, steps, delta).upper


def ours_replace(q: float, sigma: float, steps: int, delta: float) -> float:
    return bounds_of(q, sigma, steps, delta, one_sided=True, relation="replace").upper


def bounds_of(
    q: float,
    sigma: float,
    steps: int,
    delta: float,
    *,
    one_sided: bool = False,
    relation: str = "add_remove",
) -> EpsilonBounds:
    grids.grid_of.cache_clear()  # the other engine may have asked the same
    mechanism = SampledGaussian(
        noise_multiplier=sigma, sampling_probability=q, steps=steps, relation=relation
    )
    engine = CertifiedEngine(pld=PldEngine(one_sided=one_sided))
    return engine.epsilon(mechanism, delta)


def prv_accountant(q: float, sigma: float, steps: int, delta: float) -> float:
    from prv_accountant.dpsgd import DPSGDAccountant

    accountant = DPSGDAccountant(
        noise_multiplier=sigma,
        sampling_probability=q,
        max_steps=steps,
        eps_error=0.01,
        delta_error=delta / 1000,
    )
    return accountant.compute_epsilon(delta, steps)[2]


def opacus(q: float, sigma: float, steps: int, delta: float) -> float:
    accountant = importlib.import_module("opacus.accountants").PRVAccountant()
    accountant.history = [(sigma, q, steps)]
    return accountant.get_epsilon(delta)


def dp_accounting(q: float, sigma: float, steps: int, delta: float) -> float:
    pld = importlib.import_module("dp_accounting.pld.privacy_loss_distribution")
    loss = pld.from_gaussian_mechanism(sigma, sampling_prob=q).self_compose(steps)
    return float(loss.get_epsilon_for_delta(delta))


def dp_accounting_replace(q: float, sigma: float, steps: int, delta: float) -> float:
    neighbours = importlib.import_module("dp_accounting").NeighboringRelation
    pld = importlib.import_module("dp_accounting.pld.privacy_loss_distribution")
    loss = pld.from_gaussian_mechanism(
        sigma, sampling_prob=q, neighboring_relation=neighbours.REPLACE_ONE
    )
    return float(loss.self_compose(steps).get_epsilon_for_delta(delta))


def our_noise(target: float, delta: float, q: float, steps: int) -> float:
    return calibrate_noise(
        target_epsilon=target, delta=delta, sampling_probability=q, steps=steps
    ).noise_multiplier


def opacus_noise(target: float, delta: float, q: float, steps: int) -> float:
    utils = importlib.import_module("opacus.accountants.utils")
    return utils.get_noise_multiplier(
        target_epsilon=target, target_delta=delta, sample_rate=q, steps=steps, accountant="prv"
    )


def timed(function: Callable[..., float], arguments: tuple[Any, ...]) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        value = function(*arguments)
    except ImportError:
        return {"error": "not installed"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"value": value, "seconds": time.perf_counter() - start}


def machine() -> dict[str, Any]:
    names = ("veilspan-accounting", "numpy", "scipy", "prv-accountant", "opacus", "dp-accounting")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def rows() -> list[dict[str, Any]]:
    epsilon = {
        "veilspan": ours,
        "veilspan both": ours_both,
        "prv-accountant": prv_accountant,
        "opacus": opacus,
        "dp-accounting": dp_accounting,
    }
    noise = {"veilspan": our_noise, "opacus": opacus_noise}
    result = []
    for function in epsilon.values():
        timed(function, WARM_UP)
    for setting in SETTINGS:
        for name, function in epsilon.items():
            named = dict(zip(("q", "sigma", "steps", "delta"), setting, strict=True))
            measured = timed(function, setting)
            result.append({"task": "epsilon", "library": name, **named, **measured})
    for setting in CALIBRATIONS:
        for name, function in noise.items():
            named = dict(zip(("target_epsilon", "delta", "q", "steps"), setting, strict=True))
            measured = timed(function, setting)
            result.append({"task": "noise", "library": name, **named, **measured})
    return with_ratios(result)


def grid_rows() -> list[dict[str, Any]]:
    """Return one row per library and setting of the grid, with our lower bound on the true ε."""
    asked = {
        "add_remove": {"veilspan": ours, "opacus": opacus, "dp-accounting": dp_accounting},
        "replace": {"veilspan": ours_replace, "dp-accounting": dp_accounting_replace},
    }
    result = []
    for relation, libraries in asked.items():
        for function in libraries.values():
            timed(function, WARM_UP)
        for row in json.loads(GRID.read_text())["rows"]:
            if row["relation"] != relation:
                continue
            named = {name: row[name] for name in ("q", "sigma", "steps", "delta")}
            least = bounds_of(*named.values(), relation=relation).lower
            result += [
                {
                    "library": name,
                    "relation": relation,
                    **named,
                    "least": least,
                    **timed(ask, (*named.values(),)),
                }
                for name, ask in libraries.items()
            ]
    return with_ratios(result)


def grid_table(rows: list[dict[str, Any]]) -> str:
    """Return how often each library of a grid was faster, larger, below the truth, or failed."""
    lines = [
        "| relation | library | settings | median time | longest | faster than ours | bound larger "
        "by a thousandth | smaller | below the truth | no answer |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for relation, library in dict.fromkeys((row["relation"], row["library"]) for row in rows):
        own, theirs = (
            [row for row in rows if row["relation"] == relation and row["library"] == name]
            for name in ("veilspan", library)
        )
        pairs = [(row, mine) for row, mine in zip(theirs, own, strict=True) if "value" in row]
        seconds = [row["seconds"] for row, _ in pairs]
        counts = (
            sum(row["seconds"] < mine["seconds"] for row, mine in pairs),
            sum(row["value"] > 1.001 * mine["value"] for row, mine in pairs),
            sum(row["least"] <= row["value"] < 0.999 * mine["value"] for row, mine in pairs),
            sum(row["value"] < (1 - 1e-6) * row["least"] for row, _ in pairs),
            len(theirs) - len(pairs),
        )
        times = [f"{1e3 * number:.0f} ms" for number in (statistics.median(seconds), max(seconds))]
        cells = [relation.replace("_", "/"), library, len(theirs), *times, *counts]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def with_ratios(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each row its time over that of ours, which comes first for every question."""
    own = None
    for row in measured:
        if row["library"] == "veilspan":
            own = row.get("seconds")
        elif own and "seconds" in row:
            row["times_ours"] = row["seconds"] / own
    return measured


def markdown(report: dict[str, Any]) -> str:
    """Return the table of the documentation."""
    lines = [
        "| question | library | answer | time | times ours |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        value = f"{row['value']:.6g}" if "value" in row else row["error"]
        seconds = f"{1e3 * row['seconds']:.1f} ms" if "seconds" in row else ""
        times = f"{row['times_ours']:.1f}" if "times_ours" in row else ""
        what = "ε" if row["task"] == "epsilon" else "σ"
        lines.append(
            f"| {what} at {_setting(row)} | {row['library']} | {value} | {seconds} | {times} |"
        )
    if "grid" in report:
        lines += ["", grid_table(report["grid"])]
    return "\n".join(lines)


def _setting(row: dict[str, Any]) -> str:
    names = {"target_epsilon": "ε", "q": "q", "sigma": "σ", "steps": "T", "delta": "δ"}
    return ", ".join(f"{short} = {row[name]:g}" for name, short in names.items() if name in row)


def insert(text: str, page: Path) -> None:
    """Put the table between its marks in a page."""
    head, rest = page.read_text().split(MARKS[0])
    page.write_text(f"{head}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    parser.add_argument("--markdown", type=Path, help="put the table into this page")
    parser.add_argument("--grid", action="store_true", help="ask the wide settings as well")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    report = {"machine": machine(), "rows": rows()}
    if options.grid:
        report["grid"] = grid_rows()
    print(f"{report['machine']['cpu']}, {report['machine']['platform']}")
    for row in report["rows"]:
        setting = ", ".join(
            f"{name}={row[name]:g}"
            for name in ("target_epsilon", "q", "sigma", "steps", "delta")
            if name in row
        )
        answer = row.get("error") or f"{row['value']:<12.6g} {row['seconds'] * 1e3:9.1f} ms"
        if "times_ours" in row:
            answer += f" {row['times_ours']:8.1f} times ours"
        print(f"{row['task']:<8} {row['library']:<15} {setting:<50} {answer}")
    if options.grid:
        print(grid_table(report["grid"]))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.markdown:
        insert(markdown(report), options.markdown)


if __name__ == "__main__":
    main()
