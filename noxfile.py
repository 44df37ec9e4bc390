"""Every check and every demonstration of this repository, as one command each.

`nox -s tests` and `nox -s demo` need nothing but Python 3.11 or newer. Sessions share three
environments below `.nox/`, because installing torch is the slow part:

* `workbench`: all packages, editable, with the test tools and what benchmarks compare with
  (`tests`, `bench`);
* `tools`: linters and the documentation builder, without torch (`lint`, `imports`, `docs`,
  `typecheck`, which reads the libraries out of `workbench`);
* `demo`: the trainer as a user installs it;
* `gpu`: all packages with a CUDA build of torch (`gpu`).

Only `wheel` builds an environment of its own for each package: it proves that the wheel and the
dependencies it declares are enough. An environment is rebuilt when a file that defines it changes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["tests", "lint", "typecheck", "imports", "docs"]

ROOT = Path(__file__).resolve().parent
# Listed so that a package comes after those it depends on.
PACKAGES = {
    "accounting": "packages/dp-accounting",
    "core": "packages/dp-core",
    "kernels": "packages/dp-kernels",
    "parallel": "packages/dp-parallel",
    "trainer": "apps/trainer",
}
EXTRAS = {"accounting": "[plot]", "core": "", "kernels": "", "parallel": "[hf]", "trainer": "[all]"}
EDITABLE = [part for name, path in PACKAGES.items() for part in ("-e", f"{path}{EXTRAS[name]}")]

CONSTRAINTS = str(ROOT / os.environ.get("VEILSPAN_CONSTRAINTS", "constraints/cpu.txt"))
GPU_CONSTRAINTS = str(ROOT / os.environ.get("VEILSPAN_CONSTRAINTS", "constraints/gpu.txt"))
# Compiling all of torch and transformers takes longer than compiling what a session imports.
PIP_INSTALL = ["-m", "pip", "install", "-q", "--no-compile"]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# One thread per worker: two workers with two threads each are slower than two with one.
TEST_ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
# Tests of one file share trained models and started processes, so a file stays on one worker.
PARALLEL_TESTS = ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"]
IS_ALONE = """
import importlib, importlib.util, sys
assert "site-packages" in importlib.import_module(sys.argv[1]).__file__
assert not any(importlib.util.find_spec(sibling) for sibling in sys.argv[2:])
"""

if not Path(CONSTRAINTS).is_file():
    raise SystemExit(
        f"VEILSPAN_CONSTRAINTS names {CONSTRAINTS}, which is not a file; "
        "use constraints/cpu.txt or constraints/gpu.txt."
    )
if sys.version_info < (3, 11):  # noqa: UP036 - it is the Python of whoever runs nox
    raise SystemExit(
        f"Veilspan needs Python 3.11 or newer, and nox runs on {sys.version.split()[0]}. "
        "Install nox with a newer Python: python3.11 -m pip install nox"
    )

per_package = nox.parametrize("name", list(PACKAGES), ids=list(PACKAGES))
shared = nox.session(venv_backend="none")


@shared
@nox.parametrize("name", [*PACKAGES, "repository"], ids=[*PACKAGES, "repository"])
def tests(session: nox.Session, name: str) -> None:
    """Run the tests and the docstring examples of one package, or those across packages."""
    python = workbench(session)
    if name == "repository":
        paths = ["tests"]
    else:
        paths = [f"{PACKAGES[name]}/tests", f"{PACKAGES[name]}/src", "--doctest-modules"]
    run(session, python, "-m", "pytest", *PARALLEL_TESTS, *paths, *session.posargs, env=TEST_ENV)


@shared
def lint(session: nox.Session) -> None:
    """Check format and style of every Python file; `-- fix` repairs what it can."""
    python = tools(session)
    fix = "fix" in session.posargs
    run(session, python, "-m", "ruff", "check", *(["--fix"] if fix else []), ".")
    run(session, python, "-m", "ruff", "format", *([] if fix else ["--check"]), ".")


@shared
@per_package
def typecheck(session: nox.Session, name: str) -> None:
    """Check the types of one package, its tests included: they exercise the seams."""
    libraries = workbench(session)
    python = tools(session)
    command = [python, "-m", "pyright", "--pythonpath", libraries, PACKAGES[name]]
    run(session, *command, *session.posargs, env={"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"})


@shared
def imports(session: nox.Session) -> None:
    """Check the dependency rule: only the trainer joins the packages."""
    python = tools(session)
    sources = os.pathsep.join(str(ROOT / path / "src") for path in PACKAGES.values())
    command = [str(Path(python).with_name("lint-imports")), "--no-cache"]
    run(session, *command, env={"PYTHONPATH": sources})


@shared
def docs(session: nox.Session) -> None:
    """Build the site, with every warning an error; `-- serve` previews it."""
    python = tools(session)
    command = ["serve"] if "serve" in session.posargs else ["build", "--strict"]
    run(session, python, "-m", "mkdocs", *command, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(reuse_venv=False)
@per_package
def wheel(session: nox.Session, name: str) -> None:
    """Install the built wheel alone, with what it declares, and test it away from the sources."""
    siblings = [other for other in PACKAGES if name == "trainer" and other != name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        session.install("-q", "-c", CONSTRAINTS, "build", "hatchling")
        for built in [name, *siblings]:  # the siblings' wheels stand in for the package index
            command = ["--no-isolation", "--outdir", str(folder / "dist"), PACKAGES[built]]
            session.run("python", "-m", "build", *command, silent=True)
        if name != "accounting":
            install_torch(session, "python")
        wheels = ["--find-links", str(folder / "dist"), f"veilspan-{name}{EXTRAS[name]}"]
        session.install("-q", "-c", CONSTRAINTS, *wheels)
        for part in {"tests", "recipes"} & {
            path.name for path in (ROOT / PACKAGES[name]).iterdir()
        }:
            shutil.copytree(ROOT / PACKAGES[name] / part, folder / part)
        session.chdir(folder)
        absent = [f"veilspan.{other}" for other in PACKAGES if other not in (name, *siblings)]
        session.run("python", "-c", IS_ALONE, f"veilspan.{name}", *absent)
        models = ["test-models"] if name != "accounting" else []
        session.install("-q", "-c", CONSTRAINTS, *requirements("test", *models))
        config = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder)]
        session.run("pytest", *PARALLEL_TESTS, *config, "tests", *session.posargs, env=TEST_ENV)


@shared
@per_package
def bench(session: nox.Session, name: str) -> None:
    """Measure one package; each `bench_*.py` writes `benchmarks/results/<package>_*.json`."""
    scripts = sorted((ROOT / PACKAGES[name] / "benchmarks").glob("bench_*.py"))
    if not scripts:
        session.skip(f"{name} has no benchmarks")
    python = workbench(session)
    for script in scripts:
        result = f"benchmarks/results/{name}_{script.stem.removeprefix('bench_')}.json"
        run(session, python, str(script), "--output", result, *session.posargs)


@shared
def gpu(session: nox.Session) -> None:
    """On an NVIDIA GPU: the kernels' tests, op and whole-step benchmarks, within nine minutes."""
    extras = requirements("test", "test-models", "bench")
    python = environment(session, "gpu", [*EDITABLE, *extras], constraints=GPU_CONSTRAINTS)
    run(session, python, "packages/dp-kernels/benchmarks/gpu.py", *session.posargs)


@shared
def demo(session: nox.Session) -> None:
    """Train a small Llama privately on two processes, from nothing, in a few minutes."""
    python = environment(session, "demo", EDITABLE)
    run(session, python, "apps/trainer/demo.py", *session.posargs)


def workbench(session: nox.Session) -> str:
    """Return the Python that holds all packages and the test tools."""
    extras = requirements("test", "test-models", "bench")
    return environment(session, "workbench", [*EDITABLE, *extras])


def tools(session: nox.Session) -> str:
    """Return the Python that holds linters and documentation tools; it has no torch."""
    return environment(session, "tools", requirements("lint", "docs"), torch=False)


def environment(
    session: nox.Session,
    name: str,
    packages: list[str],
    *,
    torch: bool = True,
    constraints: str = CONSTRAINTS,
) -> str:
    """Create `.nox/<name>` unless it is up to date, and return its Python.

    Args:
        session: The running session.
        name: Folder below `.nox/`.
        packages: Arguments of `pip install`.
        torch: Whether the environment holds torch.
        constraints: File of tested versions.
    """
    folder = ROOT / ".nox" / name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "veilspan-stamp"
    wanted = fingerprint(packages, constraints)
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return str(python)
    session.log(f"Installing .nox/{name} ({'a few minutes' if torch else 'a minute'}, once)")
    run(session, sys.executable, "-m", "venv", "--clear", str(folder))
    if torch:
        install_torch(session, str(python), constraints)
    run(session, str(python), *PIP_INSTALL, "-c", constraints, *packages)
    stamp.write_text(wanted)
    return str(python)


def install_torch(session: nox.Session, python: str, constraints: str = CONSTRAINTS) -> None:
    """Install the pinned torch; for the CPU constraints, PyTorch's own CPU build if reachable.

    The package index offers a CUDA build to Linux, several gigabytes that a CPU never uses. The CPU
    index is asked for torch alone, so nothing else can come from it, and few retries make a machine
    that does not reach it fall back at once.
    """
    index = ["--extra-index-url", CPU_INDEX, "--retries", "1", "--timeout", "30"]
    options = index if Path(constraints).name == "cpu.txt" else []
    run(session, python, *PIP_INSTALL, "-c", constraints, "--no-deps", *options, "torch")


def requirements(*names: str) -> list[str]:
    """Return the `-r` arguments for files in `requirements/`."""
    return [part for name in names for part in ("-r", str(ROOT / "requirements" / f"{name}.txt"))]


def fingerprint(packages: list[str], constraints: str) -> str:
    """Return a hash of the interpreter and of all files that decide what gets installed."""
    digest = hashlib.sha256(f"{sys.version}{packages}{constraints}".encode())
    files = [*ROOT.glob("constraints/*.txt"), *ROOT.glob("requirements/*.txt")]
    for path in sorted([*files, *(ROOT / p / "pyproject.toml" for p in PACKAGES.values())]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run(session: nox.Session, *command: str, env: dict[str, str] | None = None) -> None:
    """Run a program that does not belong to an environment made by nox."""
    session.run(*command, env=env, external=True)
