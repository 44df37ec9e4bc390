"""The grid's results as tables, as plots, and as the regret of the cost model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

GIVEN = ("single_sample", "per_sample", "bookkeeping", "two_pass")
"""What `auto` chooses among under flat clipping."""
TOLERANCE = 1.1
MARKS = ("<!-- core_grid: made by bench_grid.py --markdown -->", "<!-- core_grid: end -->")

_Result = Mapping[str, Any]


def regret(cells: Sequence[_Result]) -> dict[str, Any]:
    """Return time of the cost model's choice over that of the best of our strategies, by cell.

    `given`: among strategies at the cell's micro-batch. `free`: among all that were measured. Cells
    where not all strategies under flat clipping ran tell nothing and are left out.
    """
    found: dict[str, dict[str, float]] = {"given": {}, "free": {}}
    for cell in cells:
        ratio = {r["method"]: r["ratio"]["median"] for r in cell["rows"] if "ratio" in r}
        if not {"per_sample", "bookkeeping", "two_pass"} <= ratio.keys():
            continue
        at_size = [n for n in GIVEN if n != "single_sample" or cell["size"] == 1]
        for kind, auto, others in (
            ("given", "auto", at_size),
            ("free", "auto_free", [*GIVEN, "auto"]),
        ):
            if auto in ratio:
                best = max(ratio[n] for n in (*others, auto) if n in ratio)
                found[kind][cell["key"]] = best / ratio[auto]
    return {
        kind: {"line": _line(list(values.values())), "time_over_best": values}
        for kind, values in found.items()
        if values
    }


def _line(values: Sequence[float]) -> str:
    within = sum(value <= TOLERANCE for value in values)
    return (
        f"within 10 % of the best on {within} of {len(values)} cells "
        f"({within / len(values):.0%}), at worst {max(values):.2f} times its time"
    )


def table(cell: _Result) -> str:
    """Return one line per contestant of a cell."""
    lines = [
        f"{cell['key']}: {cell['records']} records a logical batch, "
        f"plain training at {cell['plain_teraflops'] * 1e3:.0f} GFLOP/s{_share(cell)}",
        f"{'method':<16} {'s':>8} {'ratio':>7} {'quartiles':>15} {'of best':>8} {'MiB':>7}",
    ]
    for row in cell["rows"]:
        if "skipped" in row:
            lines.append(f"{row['method']:<16} skipped: {row['skipped']}")
            continue
        ratio, same = row["ratio"], f" = {row['same_as']}" if "same_as" in row else ""
        peak = f"{row['peak_mib']:.0f}" if "peak_mib" in row else ""
        lines.append(
            f"{row['method']:<16} {row['seconds']['median']:>8.3f} {ratio['median']:>7.3f} "
            f"{ratio['q1']:>6.3f} … {ratio['q3']:.3f} {row['best_ratio']['median']:>8.3f} "
            f"{peak:>7}  {row['size']} x {row['strategy']}{same}"
        )
    return "\n".join(lines)


def _share(cell: _Result) -> str:
    """Return plain training's own share of what the device can do, where that is known."""
    return f", {cell['plain_mfu']:.0%} of the data sheet" if "plain_mfu" in cell else ""


def markdown(result: _Result) -> str:
    """Return the tables of a result file for the documentation."""
    machine = result["machine"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    lines = [f"Measured {result['date']} on {device}, torch {machine['torch']}.", ""]
    for name, part in result.get("regret", {}).items():
        lines.append(f"* Cost model, micro-batch {name}: {part['line']}.")
    for name, why in result.get("absent", {}).items():
        lines.append(f"* `{name}` is not in this file: {why}.")
    groups: dict[tuple[str, str], list[_Result]] = {}
    for cell in result["cells"]:
        groups.setdefault((cell["scale"], cell["model"]), []).append(cell)
    for (scale, model), cells in groups.items():
        shape = cells[0]["shape"]
        lines += ["", f"### {model}, {shape['layers']} layers of width {shape['hidden']} ({scale})"]
        lines += [
            "",
            "Plain seconds over method seconds, the same micro-batch; median of rounds.",
            "",
        ]
        lines += _grid(cells, lambda row: f"{row['ratio']['median']:.2f}")
        weighed = [cell for cell in cells if any("peak_mib" in row for row in cell["rows"])]
        if weighed:
            lines += ["", "Peak memory above the weights, MiB.", ""]
            lines += _grid(
                weighed, lambda row: f"{row['peak_mib']:.0f}" if "peak_mib" in row else ""
            )
    return "\n".join(lines)


def _grid(cells: Sequence[_Result], show: Any) -> Iterator[str]:
    heads = [f"T={cell['length']} B={cell['size']}" for cell in cells]
    yield "| method | " + " | ".join(heads) + " |"
    yield "| --- |" + " --- |" * len(cells)
    names = list(dict.fromkeys(row["method"] for cell in cells for row in cell["rows"]))
    for name in names:
        rows = [{r["method"]: r for r in cell["rows"]}.get(name, {}) for cell in cells]
        shown = ["–" if "ratio" not in row else show(row) for row in rows]
        yield f"| `{name}` | " + " | ".join(shown) + " |"


def insert(text: str, page: Path, marks: tuple[str, str] = MARKS) -> None:
    """Put generated text between its two marks in a page.

    Raises:
        ValueError: If the page lacks the marks.
    """
    content = page.read_text()
    begin, end = marks
    if begin not in content or end not in content:
        raise ValueError(f"{page} has no lines {begin!r} and {end!r} to put the text between.")
    head, rest = content.split(begin, 1)
    page.write_text(f"{head}{begin}\n\n{text}\n\n{end}{rest.split(end, 1)[1]}")


def plots(result: _Result, path: Path) -> None:
    """Draw the ratio over T, the ratio over B and the memory over T beside the result file."""
    for axis, value, other in (
        ("length", "ratio", "size"),
        ("size", "ratio", "length"),
        ("length", "peak_mib", "size"),
    ):
        name = f"{path.stem}_{'memory' if value == 'peak_mib' else 'time'}_over_{axis}.svg"
        _plot(result, (axis, value, other), path.with_name(name))


def _plot(result: _Result, what: tuple[str, str, str], path: Path) -> None:
    """Draw one panel per model and value of the other axis."""
    from matplotlib.figure import Figure

    axis, value, other = what
    panels: dict[tuple[str, str], dict[int, list[_Result]]] = {}
    told = [cell for cell in result["cells"] if any(value in row for row in cell["rows"])]
    for cell in told:
        row = panels.setdefault((cell["scale"], cell["model"]), {})
        row.setdefault(cell[other], []).append(cell)
    panels = {
        group: {o: cells for o, cells in row.items() if len({c[axis] for c in cells}) > 1}
        for group, row in panels.items()
    }
    panels = {group: row for group, row in panels.items() if row}
    if not panels:
        return
    width = max(len(row) for row in panels.values())
    figure = Figure(figsize=(4 * width, 3.2 * len(panels) + 1), layout="constrained")
    grid = figure.subplots(len(panels), width, squeeze=False, sharey="row")
    for (group, row), line in zip(panels.items(), grid, strict=True):
        for axes in line[len(row) :]:
            axes.set_visible(False)
        for (fixed, cells), axes in zip(sorted(row.items()), line, strict=False):
            _draw(axes, cells, axis, value)
            axes.set_title(f"{group[1]} ({group[0]}), {'B' if other == 'size' else 'T'} = {fixed}")
            axes.set_xlabel("tokens T" if axis == "length" else "records B of a micro-batch")
        unit = "plain seconds / seconds" if value == "ratio" else "peak above the weights, MiB"
        line[0].set_ylabel(unit)
    labelled = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labelled.setdefault(label, handle)
    figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=6)
    machine = result["machine"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    figure.suptitle(f"{device}, torch {machine['torch']}")
    figure.savefig(path)


def _colour(name: str) -> str:
    """Return one colour per contestant, the same in every panel; the automatic ones are dark."""
    known = ("single_sample", "per_sample", "bookkeeping", "two_pass", "per_layer")
    rivals = ("opacus_hooks", "opacus_ghost", "opacus_fgc", "fastdp_mixopt")
    others = {"auto": "black", "auto_free": "dimgray"}
    names = (*known, *rivals)
    return f"C{names.index(name)}" if name in names else others.get(name, "C9")


def _draw(axes: Any, cells: Sequence[_Result], axis: str, value: str) -> None:
    ordered = sorted(cells, key=lambda cell: cell[axis])
    names = list(dict.fromkeys(row["method"] for cell in ordered for row in cell["rows"]))
    for name in names:
        points = [
            (cell[axis], row[value]["median"] if value == "ratio" else row[value])
            for cell in ordered
            for row in cell["rows"]
            if row["method"] == name and value in row
        ]
        if points and not (value == "ratio" and name == "plain"):
            rival = name.startswith(("opacus", "fastdp"))
            style = "--" if rival else ":" if name.startswith(("auto", "plain")) else "-"
            axes.plot(
                *zip(*points, strict=True), style, color=_colour(name), marker="o", label=name
            )
    axes.set_xscale("log", base=2)
    if value == "ratio":
        axes.axhline(1.0, color="black", linewidth=0.8)
    else:
        axes.set_yscale("log")
