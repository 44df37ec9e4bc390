"""Make docs/sharp-edges.md from docs/sharp_edges.toml: `python docs/sharp_edges.py`."""

from __future__ import annotations

import tomllib
from itertools import groupby
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER / "sharp-edges.md"

HEAD = """\
# Sharp edges

Most mistakes in private training raise no error. The model trains, an ε is printed, and it is not
true. This page lists those that Veilspan knows. Each is refused before training starts or held down
by tests: the tests of row 20 are called `test_pitfall_20_…`, and the build fails when a row here
has no test or a test has no row. The second column says whether the mistake breaks the stated
guarantee: always, sometimes (in a plausible configuration), or never (the result is wrong in
another way).
"""

TAIL = """\
## What no software can check

The assumptions at the end of [What the guarantee says](privacy-model.md#what-is-assumed):
hyper-parameters or a tokenizer that were chosen on the private data, duplicates, side channels,
floating-point numbers.
"""


def edges() -> list[dict[str, Any]]:
    """Return the entries of the table, in the order of the page."""
    with (FOLDER / "sharp_edges.toml").open("rb") as file:
        return tomllib.load(file)["edge"]


def page() -> str:
    """Return the page that the table makes."""
    parts = [HEAD]
    for about, rows in groupby(edges(), key=lambda edge: edge["about"]):
        lines = [
            f"## {about}\n",
            "| Row | Breaks ε | What goes wrong | What Veilspan does |",
            "| --- | --- | --- | --- |",
        ]
        lines += [f"| {e['row']} | {e['breaks']} | {e['wrong']} | {e['answer']} |" for e in rows]
        parts.append("\n".join(lines) + "\n")
    return "\n".join([*parts, TAIL])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
