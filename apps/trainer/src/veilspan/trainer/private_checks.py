"""What `make_private` refuses before anything is trained, and records that it cannot collate."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import IterableDataset, default_collate

from veilspan.core import PrivateStep
from veilspan.core.groups import Clipping
from veilspan.trainer.errors import TrainerError

_MADE_HERE = {"self", "model", "clipping", "noise_multiplier", "expected_batch_size", "noise"} | {
    "on_release",
    "first_step",
    "shards",
    "reduction",
}
_ELSEWHERE = {
    "noise_multiplier": "the noise follows from target_epsilon",
    "max_grad_norm": "pass clipping=Flat(clip_norm=...)",
    "clip_norm": "pass clipping=Flat(clip_norm=...)",
    "batch_size": "pass expected_batch_size",
    "target_delta": "pass delta",
    "poisson_sampling": "batches are always drawn so",
    "on_release": "the ledger hears of every release",
    "first_step": "the ledger tells it",
    "shards": "several processes are the trainer's",
    "reduction": "several processes are the trainer's",
}


def check_parts(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: object,
    clipping: object,
    ledger: object,
) -> None:
    """Refuse what does not fit together.

    Raises:
        TrainerError: Naming the argument, and what to pass in its place.
    """
    if not isinstance(model, nn.Module):
        raise TrainerError(f"model is {model!r}; pass the torch.nn.Module that is trained.")
    if not isinstance(optimizer, torch.optim.Optimizer) and not hasattr(optimizer, "param_groups"):
        raise TrainerError(
            f"optimizer is {optimizer!r}; pass an optimizer that was made for the parameters of "
            "model, such as torch.optim.AdamW(model.parameters())."
        )
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise TrainerError(
            f"make_private is for one process, and there are {dist.get_world_size()}: each would "
            "draw its own batches and noise. Use the trainer, or veilspan.core with "
            "veilspan.parallel."
        )
    has_items = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not has_items or isinstance(dataset, IterableDataset):
        raise TrainerError(
            f"dataset is a {type(dataset).__name__}; it must have len and an item per record. A "
            "loader or stream draws no Poisson batches: pass the dataset behind it."
        )
    if isinstance(dataset, Mapping):
        names = ", ".join(repr(name) for name in islice(dataset, 5))
        raise TrainerError(
            f"dataset is a {type(dataset).__name__} with the keys {names}; records have numbers "
            "for keys. Of several splits pass one; of columns, make a list of records."
        )
    if not isinstance(clipping, Clipping):
        raise TrainerError(f"clipping is {clipping!r}; pass Flat(clip_norm=1.0) or another group.")
    if not (isinstance(ledger, str | os.PathLike) and os.fspath(ledger)):
        raise TrainerError(f"ledger is {ledger!r}; name the file that counts the releases.")
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    if held != set(trained):
        missing = [name for number, name in trained.items() if number not in held]
        what = f"lacks {missing[0]}" if missing else "holds parameters that model does not train"
        raise TrainerError(
            f"optimizer {what}; it must hold exactly the trainable parameters of model. Freeze "
            "what is not to be trained with requires_grad_(False)."
        )


def check_options(options: Mapping[str, object]) -> None:
    """Refuse arguments that neither `make_private` nor `PrivateStep` takes here.

    Raises:
        TrainerError: Naming the argument, and what says the same.
    """
    known = [name for name in inspect.signature(PrivateStep).parameters if name not in _MADE_HERE]
    for name in options:
        if name not in known:
            instead = f": {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
            raise TrainerError(
                f"make_private takes no {name}{instead}. Beyond its own arguments it takes those "
                f"of PrivateStep: {', '.join(known)}."
            )


def collate_tensors(records: list[Any]) -> Any:
    """Make a micro-batch as PyTorch's `default_collate` does, or say what it cannot stack.

    Raises:
        TrainerError: If a field holds a list of numbers, of which PyTorch would make a list of
            tensors over the records, or if the records do not stack.
    """
    first = records[0]
    for name, value in first.items() if isinstance(first, Mapping) else ():
        if isinstance(value, list) and all(isinstance(one, int | float | list) for one in value):
            raise TrainerError(
                f"Field {name!r} of a record is a list, and the default collate stacks tensors. "
                'Of a datasets.Dataset whose lists have one length take .with_format("torch"); '
                "else pass collate=, a function from a list of records to a padded micro-batch."
            )
    try:
        return default_collate(records)
    except (RuntimeError, TypeError) as error:
        raise TrainerError(
            f"The default collate cannot make a micro-batch of these records: {error}. Pass "
            "collate=, a function from a list of records to a micro-batch, which pads records of "
            "different length and leaves out what is no tensor."
        ) from error
