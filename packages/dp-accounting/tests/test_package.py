"""The public surface is small, documented, and what the documents show runs."""

import doctest
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import veilspan.accounting
import veilspan.accounting.audit
import veilspan.accounting.engines
from veilspan.accounting import bounds, ledger, mechanism, phases, plan, tradeoff
from veilspan.accounting.audit import norm_ratios, one_run, white_box, whole_runs

README = pathlib.Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize(
    "module", [veilspan.accounting, veilspan.accounting.audit, veilspan.accounting.engines]
)
def test_exported_names_are_sorted_complete_and_documented(module):
    names = module.__all__
    assert names == sorted(names)
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(names)
    for name in names:
        assert inspect.getdoc(getattr(module, name)), name


def test_import_needs_neither_torch_nor_a_plotting_library():
    code = (
        "import sys, veilspan.accounting;"
        "print([m for m in ('torch', 'matplotlib', 'prv_accountant') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "module",
    [
        bounds,
        ledger,
        mechanism,
        norm_ratios,
        one_run,
        phases,
        plan,
        tradeoff,
        white_box,
        whole_runs,
    ],
)
def test_examples_in_docstrings_print_what_they_say(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.skipif(not README.exists(), reason="runs from the sources only")
def test_readme_example_runs_and_prints_what_it_says(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 1
    done = subprocess.run(
        [sys.executable, "-c", blocks[0]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"print\(.*?\)  # (.+)", blocks[0])
    assert shown
    assert done.stdout.splitlines()[: len(shown)] == shown
