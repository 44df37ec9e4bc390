"""The command line: train, plan, report, export."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from veilspan.trainer.errors import TrainerError
from veilspan.trainer.recipe import load_recipe

USER_ERROR = 2
"""Exit status where the user can put something right."""

_PATIENCE = 30.0  # seconds
_STORAGE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
}

app = typer.Typer(
    name="veilspan.trainer",
    help="Train language models with differential privacy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe, a TOML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one key; repeatable."),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="Folder of a run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Train a model, or continue a run that was interrupted."""
    with _user_errors():
        resolved = load_recipe(recipe, overrides or ())
        from veilspan.trainer.interrupts import Interrupted
        from veilspan.trainer.loop import train as train_recipe

        try:
            train_recipe(resolved)
        except Interrupted as end:
            _stop(str(end), 128 + end.signal_number)
        except KeyboardInterrupt:
            _stop(
                "Interrupted at once. The same command continues the run from its newest "
                "checkpoint; releases since then stay counted.",
                128 + signal.SIGINT,
            )
    _leave()


@app.command()
def plan(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print what a run will cost in privacy, memory and time; nothing is trained."""
    with _user_errors():
        resolved = load_recipe(recipe, overrides or ())
        from veilspan.trainer.forecast import make_forecast
        from veilspan.trainer.forecast_tables import show_forecast

        forecast = make_forecast(resolved)
        if _rank() > 0:  # under torchrun, one process tells
            return
        if as_json:
            typer.echo(json.dumps(forecast.to_dict(), indent=2, ensure_ascii=False))
        else:
            show_forecast(Console(), forecast)


@app.command()
def report(run_folder: RunPath) -> None:
    """Write the privacy statement and the report of a run again."""
    with _user_errors():
        from veilspan.trainer.report import write_report

        typer.echo(write_report(run_folder))


@app.command()
def export(run_folder: RunPath) -> None:
    """Write the newest checkpoint of a run as a Hugging Face model folder."""
    with _user_errors():
        from veilspan.trainer.export import export_checkpoint
        from veilspan.trainer.report import write_statement

        typer.echo(export_checkpoint(run_folder, note=write_statement(run_folder)))


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn what the user can put right into one message and exit status 2."""
    try:
        yield
    except TrainerError as error:
        _refuse(str(error))
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        _refuse(
            f"{error.filename or 'A file'} cannot be written or read: {error.strerror}. Put that "
            "right, then give the same command again; what was complete is still there."
        )
    except Exception as error:
        if not isinstance(error, _refusals()):
            raise
        _refuse(str(error))


def _refusals() -> tuple[type[Exception], ...]:
    from veilspan.accounting import BudgetExceeded, LedgerError
    from veilspan.core import PrivacyError

    return PrivacyError, LedgerError, BudgetExceeded


def _refuse(message: str) -> None:
    if _rank() > 0:
        # The first process has usually failed too; the launcher then ends this one before it
        # repeats the message. Where this process alone has failed, it must not do so in silence.
        time.sleep(_PATIENCE)
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"Error: {message}", style="bold red", markup=False, highlight=False)
    if _distributed():
        # The other processes may be waiting for this one: no orderly end is possible.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(USER_ERROR)
    raise typer.Exit(USER_ERROR)


def _stop(message: str, status: int) -> None:
    """End every process with the status of a signal, after one message."""
    if _rank() == 0:
        Console(stderr=True, soft_wrap=True).print(message, markup=False, highlight=False)
    if _distributed():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # others may be gone already
    raise typer.Exit(status)


def _rank() -> int:
    """Return the number that torchrun gave this process, also before the processes meet."""
    return int(os.environ.get("RANK", "0"))


def _leave() -> None:
    if _distributed():
        from veilspan.parallel import finish

        finish()


def _distributed() -> bool:
    """Tell whether process groups exist, without the seconds that importing torch takes."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()
