"""Rules that keep the repository in shape: what no test of a single package can see."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "accounting": ROOT / "packages/dp-accounting",
    "core": ROOT / "packages/dp-core",
    "kernels": ROOT / "packages/dp-kernels",
    "parallel": ROOT / "packages/dp-parallel",
    "trainer": ROOT / "apps/trainer",
}
MAY_IMPORT = {
    "accounting": set[str](),
    "core": set[str](),
    "kernels": set[str](),
    "parallel": set[str](),
    "trainer": {"accounting", "core", "kernels", "parallel"},
}
MAX_LINES = 320
MACHINE_PATH = re.compile(r"(?<![\w.<>{}-])/(?:root|work|opt|Users/\w+|home/\w+)/\w")
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX)\b|raise NotImplementedError")
DATA_PARALLEL = re.compile(r"\bdp_(rank|size|degree|group|mesh|shard|replicate|world)\w*")

per_package = pytest.mark.parametrize("name", sorted(PACKAGES))


def source(name: str) -> Path:
    return PACKAGES[name] / "src/veilspan" / name


def project(name: str) -> dict:
    return tomllib.loads((PACKAGES[name] / "pyproject.toml").read_text())["project"]


def root_tools() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]


def tracked_files() -> list[Path]:
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached"]
    listed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def tracked_texts() -> Iterator[tuple[Path, str]]:
    for path in tracked_files():
        if path != Path(__file__).resolve() and path.suffix not in {".png", ".parquet"}:
            yield path.relative_to(ROOT), path.read_text(encoding="utf-8")


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def pins(path: Path) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    found = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return {canonicalize_name(r.name): str(r.specifier) for r in found}


# The namespace


def test_the_namespace_holds_no_code() -> None:
    veilspan = importlib.import_module("veilspan")
    assert getattr(veilspan, "__file__", None) is None
    assert not list(ROOT.glob("*/*/src/veilspan/__init__.py"))


@per_package
def test_every_package_declares_its_types(name: str) -> None:
    assert (source(name) / "py.typed").is_file()


@per_package
def test_every_package_is_licensed_and_described(name: str) -> None:
    folder = PACKAGES[name]
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert project(name)["license"] == "Apache-2.0"
    readme = (folder / "README.md").read_text()
    assert readme.startswith(f"# veilspan-{name}\n")
    assert "```python" in readme


@per_package
def test_version_agrees_with_the_installed_one_and_the_changelog(name: str) -> None:
    version = project(name)["version"]
    assert importlib.metadata.version(f"veilspan-{name}") == version
    changelog = (PACKAGES[name] / "CHANGELOG.md").read_text()
    releases = re.findall(r"^## \[(\d[^\]]*)\] - \d{4}-\d{2}-\d{2}$", changelog, re.M)
    assert releases[0] == version
    assert "## [Unreleased]" in changelog


@per_package
def test_public_names_are_sorted_and_importable(name: str) -> None:
    package = importlib.import_module(f"veilspan.{name}")
    assert package.__all__ == sorted(package.__all__)
    assert [entry for entry in package.__all__ if not hasattr(package, entry)] == []


# Shape of the code


def test_no_source_file_is_longer_than_a_reader_can_hold() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for name in PACKAGES
        for path in source(name).rglob("*.py")
    }
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


@per_package
def test_packages_import_only_what_the_dependency_rule_allows(name: str) -> None:
    forbidden = {f"veilspan.{other}" for other in set(PACKAGES) - MAY_IMPORT[name] - {name}}
    if name == "accounting":
        forbidden |= {"torch"}
    broken = [
        (str(path.relative_to(ROOT)), module)
        for path in source(name).rglob("*.py")
        for module in imported_modules(path)
        if any(module == root or module.startswith(f"{root}.") for root in forbidden)
    ]
    assert broken == []


@per_package
def test_every_module_says_its_purpose_first(name: str) -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in source(name).rglob("*.py")
        if ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) is None
    ]
    assert silent == []


def test_docstring_examples_have_the_heading_that_the_site_renders_as_code() -> None:
    other = [
        str(path.relative_to(ROOT))
        for name in PACKAGES
        for path in source(name).rglob("*.py")
        if re.search(r"^ *Example:$", path.read_text(encoding="utf-8"), re.M)
    ]
    assert other == []  # write "Examples:"


@pytest.mark.parametrize(
    ("pattern", "suffixes"),
    [
        pytest.param(MACHINE_PATH, None, id="paths of one machine"),
        pytest.param(UNFINISHED, {".py", ".toml", ".yml"}, id="unfinished code"),
        pytest.param(DATA_PARALLEL, {".py", ".md"}, id="dp for data parallel"),
    ],
)
def test_no_tracked_file_holds(pattern: re.Pattern[str], suffixes: set[str] | None) -> None:
    found = [
        (str(path), match.group())
        for path, text in tracked_texts()
        if suffixes is None or path.suffix in suffixes
        for match in pattern.finditer(text)
    ]
    assert found == []


def test_no_tracked_file_is_large() -> None:
    large = [str(path) for path in tracked_files() if path.stat().st_size > 1 << 20]
    assert large == []


# Tools agree with each other


def nox_sessions() -> set[str]:
    tree = ast.parse((ROOT / "noxfile.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    decorated = {"shared", "nox.session"}
    return {
        function.name
        for function in functions
        if {ast.unparse(d).split("(")[0] for d in function.decorator_list} & decorated
    }


def nox_commands() -> Iterator[tuple[str, str]]:
    """Yield (file, session) of each `nox -s …` that a tracked text mentions."""
    for path, text in tracked_texts():
        if path.suffix in {".md", ".yml"} or path.name == "run":
            for words in re.findall(r"nox -s ((?:\"[^\"]+\"|[a-z]+)(?: [a-z]+)*)", text):
                yield from ((str(path), session) for session in shlex.split(words))


def test_every_nox_command_in_the_documentation_exists() -> None:
    names = "|".join([*PACKAGES, "repository", "NAME", r"\$\{\{ matrix.package \}\}"])
    known = re.compile(rf"({'|'.join(sorted(nox_sessions()))})(\(({names})\))?")
    commands = list(nox_commands())
    assert {("README.md", "tests"), ("README.md", "demo")} <= set(commands)
    assert [command for command in commands if not known.fullmatch(command[1])] == []


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    (pattern,) = re.findall(r"grep -m1 '\^(.*)\$' README.md", script.read_text())
    assert (ROOT / "README.md").read_text().splitlines().count(pattern) == 1


def test_every_tool_knows_every_package() -> None:
    tools, site = root_tools(), (ROOT / "mkdocs.yml").read_text()
    readme = (ROOT / "README.md").read_text()
    development = (ROOT / "requirements-dev.txt").read_text()
    assert set(tools["importlinter"]["root_packages"]) == {f"veilspan.{n}" for n in PACKAGES}
    for name, folder in PACKAGES.items():
        place = folder.relative_to(ROOT).as_posix()
        assert f"{place}/src" in tools["pyright"]["extraPaths"]
        assert f"- {place}/src" in site
        assert f"-e {place}" in development
        assert f"[{place}]({place}) | `veilspan-{name}` | `veilspan.{name}`" in readme
        assert place in (ROOT / "noxfile.py").read_text()


def test_exact_pins_agree_with_the_constraints() -> None:
    common = pins(ROOT / "constraints/common.txt")
    for path in [*ROOT.glob("requirements/*.txt"), ROOT / "requirements-dev.txt"]:
        asked = pins(path)
        assert asked == {name: common.get(name) for name in asked}, path.name


@per_package
def test_every_declared_dependency_is_pinned_within_its_range(name: str) -> None:
    allowed = pins(ROOT / "constraints/common.txt") | pins(ROOT / "constraints/cpu.txt")
    extras = project(name).get("optional-dependencies", {}).values()
    declared = [*project(name)["dependencies"], *(entry for extra in extras for entry in extra)]
    outside = [str(Requirement(entry)) for entry in declared if not _admits(entry, allowed)]
    assert outside == []


@per_package
def test_a_package_that_hands_tensors_to_numpy_declares_it(name: str) -> None:
    """PyTorch works without NumPy, until a tensor is to become an array."""
    sources = "".join(path.read_text() for path in (PACKAGES[name] / "src").rglob("*.py"))
    needs = re.search(r"^\s*(import|from) numpy|\.numpy\(|from_numpy\(", sources, re.M)
    declared = {Requirement(entry).name for entry in project(name)["dependencies"]}
    assert not needs or "numpy" in declared


def _admits(entry: str, allowed: dict[str, str]) -> bool:
    requirement = Requirement(entry)
    if requirement.name.startswith("veilspan-"):
        return requirement.specifier.contains(project(requirement.name[9:])["version"])
    pin = allowed.get(canonicalize_name(requirement.name), "")
    return requirement.specifier.contains(pin.removeprefix("==")) if pin else False


def test_both_constraint_files_pin_the_same_torch() -> None:
    cpu, gpu = pins(ROOT / "constraints/cpu.txt"), pins(ROOT / "constraints/gpu.txt")
    assert cpu["torch"] == gpu["torch"]
    assert cpu.keys() - gpu.keys() == {"triton"}  # CUDA builds of torch bring their own


# The site


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page() -> None:
    entries = re.findall(r"(?:: |- )(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(entries) == sorted(pages)


def test_the_architecture_names_files_that_exist() -> None:
    named = set(re.findall(r"\b[a-z_]+\.py\b", (ROOT / "ARCHITECTURE.md").read_text("utf-8")))
    there = {path.name for name in PACKAGES for path in source(name).rglob("*.py")}
    assert named - there - {"__init__.py"} == set()


def test_sharp_edges_and_the_pitfalls_that_have_tests_are_the_same() -> None:
    listed = [edge["row"] for edge in sharp_edges().edges()]
    tests = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in [*PACKAGES.values(), ROOT]
        for path in (folder / "tests").rglob("test_*.py")
    )
    tested = {int(row) for row in re.findall(r"def test_pitfall_(\d+)_", tests)}
    assert len(listed) == len(set(listed))
    assert sorted(set(listed) - tested) == []
    assert sorted(tested - set(listed)) == []


def test_the_page_of_sharp_edges_is_what_its_table_makes() -> None:
    made = sharp_edges()
    assert made.PAGE.read_text(encoding="utf-8") == made.page(), "run python docs/sharp_edges.py"
    assert {edge["breaks"] for edge in made.edges()} <= {"always", "sometimes", "never"}


def sharp_edges() -> ModuleType:
    """Return the script that makes the page."""
    path = ROOT / "docs/sharp_edges.py"
    spec = importlib.util.spec_from_file_location("sharp_edges", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
