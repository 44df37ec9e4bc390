"""Every Python block that a reader may copy runs as it stands, and without a warning."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "packages/*/README.md", "apps/*/README.md", "docs/**/*.md")
    for path in ROOT.glob(pattern)
    if "```python" in path.read_text(encoding="utf-8")
)


def test_the_root_readme_has_code() -> None:
    assert "README.md" in PAGES


# What dynamo does to torch itself while it traces; the second is how it traces any Function.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be")
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    scope = {"__name__": "__example__"}
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], ROOT / page, "exec"), scope)
