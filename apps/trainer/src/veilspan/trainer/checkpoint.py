"""Checkpoints that any number of processes can write and any other number can read.

Tensors go through torch's distributed checkpoint into safetensors shards, everything else into a
small JSON file: nothing that could run code when it is read. A checkpoint holds what the guarantee
already covers (weights and optimizer state are computed from noisy gradients); it never holds a
key or a random state.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from veilspan.accounting import Ledger, LedgerError
from veilspan.trainer.errors import TrainerError
from veilspan.trainer.files import remove_folder, remove_leftovers, replace_folder, write_whole
from veilspan.trainer.processes import Processes
from veilspan.trainer.run_folder import RunFolder, ledger_head

_PREFIX, _INFO, _FORMAT = "step-", "checkpoint.json", 1
_WRAPPER = "_checkpoint_wrapped_module."


class CheckpointError(TrainerError):
    """A checkpoint that cannot be written, is damaged, or belongs to another run."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run had come when a checkpoint was made.

    Args:
        step: Finished optimizer steps.
        ledger_length: Entries the ledger had; the ledger may have grown since, never shrunk.
        ledger_head: Hash of the last of these entries.
        recipe_digest: Which run this is.
    """

    step: int
    ledger_length: int
    ledger_head: str
    recipe_digest: str
    format: int = _FORMAT


def named_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None
) -> dict[str, Tensor]:
    """Return parameters, persistent buffers and optimizer state by stable names.

    The tensors share storage with the model and the optimizer, so reading a checkpoint into them
    restores both. Tied parameters appear once. State that the optimizer has not made yet is made
    here, as zeros.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        name = name.replace(_WRAPPER, "")
        tensors[f"model.{name}"] = parameter.detach()
        if optimizer is not None and parameter.requires_grad:
            for key, value in _adam_state(optimizer, parameter).items():
                tensors[f"optimizer.{name}.{key}"] = value
    for owner, module in model.named_modules():
        owner = f"{owner}.".replace(_WRAPPER, "").lstrip(".")
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                tensors[f"model.{owner}{key}"] = buffer
    return tensors


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Where they lie, one folder per checkpoint.
        keep: How many of the newest to keep.
        processes: Who writes together.
    """

    def __init__(self, folder: Path, *, keep: int, processes: Processes) -> None:
        self._folder = folder
        self._keep = keep
        self._processes = processes

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        return newest_checkpoint(self._folder)

    def has(self, step: int) -> bool:
        """Return on every process whether the checkpoint of a step is there."""
        return self._processes.broadcast((self._path(step) / _INFO).is_file())

    def _path(self, step: int) -> Path:
        return self._folder / f"{_PREFIX}{step:08d}"

    def save(
        self,
        tensors: dict[str, Tensor],
        progress: Progress,
        *,
        before_rename: Callable[[], None] = lambda: None,
    ) -> None:
        """Write a checkpoint whole or not at all; every process must call this.

        Args:
            tensors: From `named_tensors`.
            progress: How far the run has come.
            before_rename: Called when everything is written but not yet in place.

        Raises:
            CheckpointError: On every process, if any of them cannot write. Checkpoints made
                before are untouched.
        """
        final = self._path(progress.step)
        partial = self._folder / f".partial-{final.name}"
        with self._writing(final):
            if self._processes.is_first:
                remove_folder(partial)
                partial.mkdir(parents=True)
        with self._writing(final), _plain_errors(), _quiet():
            save_shards(
                tensors,
                storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
                no_dist=not self._processes.distributed,
            )
        before_rename()
        with self._writing(final):
            if self._processes.is_first:
                write_whole(partial / _INFO, json.dumps(asdict(progress), indent=2) + "\n")
                replace_folder(partial, final)
                self._remove_old()

    def load(self, path: Path, tensors: dict[str, Tensor]) -> Progress:
        """Read a checkpoint into `tensors`, in place; every process must call this.

        Raises:
            CheckpointError: If the checkpoint is damaged or does not fit the model.
        """
        progress = read_progress(path)
        try:
            with torch.no_grad(), _plain_errors(), _quiet():
                load_shards(
                    tensors,
                    storage_reader=HuggingFaceStorageReader(str(path)),
                    no_dist=not self._processes.distributed,
                )
        except Exception as error:
            raise CheckpointError(
                f"The checkpoint {path} cannot be read into this model: {_cause(error)}. "
                "Remove that folder to continue from the one before it; the ledger still counts "
                "every step that was taken."
            ) from error
        return progress

    def _remove_old(self) -> None:
        for path in _complete(self._folder)[: -self._keep]:
            remove_folder(path)
        remove_leftovers(self._folder)  # also of steps that no later start saves again

    def _writing(self, path: Path) -> AbstractContextManager[None]:
        return self._processes.together(
            lambda error: CheckpointError(
                f"Cannot write the checkpoint {path}: {_cause(error)}. Earlier checkpoints are "
                "untouched. Free disk space or move the run folder, then start the same command "
                "again; the run continues from the newest checkpoint."
            )
        )


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a folder of checkpoints, or None."""
    return next(reversed(_complete(folder)), None)


def _complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first; a copy under another name is none."""
    found = {
        int(digits): path
        for path in folder.glob(f"{_PREFIX}*")
        if (digits := path.name.removeprefix(_PREFIX)).isdecimal() and (path / _INFO).is_file()
    }
    return [found[step] for step in sorted(found)]


def newest_progress(folder: RunFolder) -> Progress | None:
    """Return what the newest checkpoint of a run says about itself, or None without any."""
    newest = newest_checkpoint(folder.checkpoints)
    return None if newest is None else read_progress(newest)


def require_ledger_of(progress: Progress, ledger: Ledger, folder: RunFolder) -> None:
    """Refuse a ledger that does not hold every release a checkpoint was made with.

    Raises:
        LedgerError: If the ledger was cut or comes from elsewhere: it counts too little.
    """
    ledger.require_at_least(progress.ledger_length)
    if ledger_head(folder.ledger, progress.ledger_length) != progress.ledger_head:
        raise LedgerError(
            f"{folder.ledger} is not the ledger that the newest checkpoint was made with: release "
            f"{progress.ledger_length} differs. Restore the right one, or start a new run; going "
            "on would under-count the privacy spent."
        )


def read_progress(path: Path) -> Progress:
    """Return what a checkpoint says about itself.

    Raises:
        CheckpointError: If that file is damaged or of an unknown format.
    """
    try:
        fields = json.loads((path / _INFO).read_text(encoding="utf-8"))
        if fields["format"] != _FORMAT:
            raise ValueError(f"format {fields['format']}, this version reads {_FORMAT}")
        return Progress(**fields)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"The checkpoint {path} is damaged ({error}). Remove that folder to continue from the "
            "one before it."
        ) from error


def _adam_state(
    optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter
) -> dict[str, Tensor]:
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _cause(error: BaseException) -> str:
    """Return the innermost reason, such as "No space left on device"."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise what went wrong instead of torch's wrapper, which is no `Exception`."""
    try:
        yield
    except CheckpointException as error:
        cause = next((pair[0] for pair in error.failures.values()), error)
        raise RuntimeError(_cause(cause)) from cause


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's note that one process works alone, which is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
