"""The trained model as an ordinary Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from veilspan.trainer.checkpoint import CheckpointError, Checkpoints, named_tensors
from veilspan.trainer.errors import TrainerError
from veilspan.trainer.files import remove_folder, replace_folder, write_whole
from veilspan.trainer.models import build_model
from veilspan.trainer.processes import Processes
from veilspan.trainer.recipe import Recipe
from veilspan.trainer.run_folder import RunFolder
from veilspan.trainer.tokenizer import load_tokenizer


class ExportError(TrainerError):
    """The model folder cannot be written."""


def export_model(
    model: nn.Module, recipe: Recipe, folder: RunFolder, processes: Processes, *, note: str = ""
) -> Path:
    """Write weights (safetensors), configuration and tokenizer; every process must call this.

    Adapters are merged into the weights. `AutoModelForCausalLM.from_pretrained` loads the folder
    without this package.

    Args:
        model: The trained model, split over processes or not.
        recipe: The recipe it was built from.
        folder: The run folder; the model goes to its `model/`.
        processes: Who holds the parts.
        note: Markdown for the folder's README, such as the privacy statement.

    Returns:
        The model folder.

    Raises:
        ExportError: On every process, if the folder cannot be written.
    """
    weights = _gather(model, keep=processes.is_first)
    with processes.together(lambda error: _explain(error, folder.model)):
        if processes.is_first:
            tokenizer = load_tokenizer(recipe)
            _write(_rebuild(weights, recipe, tokenizer), tokenizer, folder.model, note)
    return folder.model


def export_checkpoint(root: Path, *, note: str = "") -> Path:
    """Export the newest checkpoint of a run folder, in one process, without training.

    Args:
        root: Run folder.
        note: Markdown for the model folder's README.

    Returns:
        The model folder.

    Raises:
        TrainerError: If there is no run, no checkpoint, or the folder cannot be written.
    """
    folder, alone = RunFolder(root), Processes(device=torch.device("cpu"))
    recipe = folder.read_recipe()
    checkpoints = Checkpoints(folder.checkpoints, keep=recipe.run.keep_checkpoints, processes=alone)
    newest = checkpoints.newest()
    if newest is None:
        raise CheckpointError(f"{root} holds no checkpoint to export; train first.")
    model = build_model(recipe, load_tokenizer(recipe))
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints.load(newest, named_tensors(model, optimizer))
    return export_model(model, recipe, folder, alone, note=note)


def _gather(model: nn.Module, *, keep: bool) -> dict[str, torch.Tensor]:
    """Return whole tensors by name, on the CPU, on the process that keeps them."""
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in named_tensors(model, None).items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = full.detach().cpu()
    return whole


def _rebuild(
    weights: dict[str, torch.Tensor], recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> nn.Module:
    """Return a fresh model with these weights: none of our patches, an ordinary attention."""
    model = build_model(recipe, tokenizer, attn_implementation="sdpa")
    own = named_tensors(model, None)
    assert own.keys() == weights.keys()  # both are named by the same recipe
    for name, tensor in own.items():
        tensor.copy_(weights[name])
    if recipe.model.lora is not None:
        model = model.merge_and_unload()  # pyright: ignore[reportCallIssue]
    model.config.use_cache = True  # pyright: ignore  # training has none, generation wants one
    model.generation_config.use_cache = True  # pyright: ignore
    return model.eval()


def _write(model: nn.Module, tokenizer: PreTrainedTokenizerBase, final: Path, note: str) -> None:
    partial = final.with_name(f".partial-{final.name}")
    remove_folder(partial)
    partial.mkdir(parents=True)
    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(partial)  # pyright: ignore[reportCallIssue]
    finally:
        if shows_bars:
            transformers_logging.enable_progress_bar()
    tokenizer.save_pretrained(partial)
    if note:
        write_whole(partial / "README.md", note)
    _share_weights(partial)
    replace_folder(partial, final)


def _share_weights(folder: Path) -> None:
    """Let weights be read by whoever may read the rest; safetensors makes them their owner's."""
    permissions = (folder / "config.json").stat().st_mode & 0o777
    for weights in folder.glob("*.safetensors"):
        weights.chmod(permissions)


def _explain(error: Exception, path: Path) -> ExportError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ExportError(
        f"Cannot write the model folder {path}: {reason}. The checkpoint is complete: free disk "
        "space, then start the same command again; it only exports."
    )
