"""Whether the logits of a unit exist as a whole, or those of some of its tokens at a time."""

from __future__ import annotations

from typing import Any

import torch

from veilspan.core.headless import obstacle_to_fusing
from veilspan.core.rates import free_bytes
from veilspan.trainer.errors import ModelError
from veilspan.trainer.recipe import Recipe

_SHARE = 1 / 8
"""Part of the free memory that the logits of one unit, with their gradient, may take."""


def device_of(recipe: Recipe) -> torch.device:
    """Return the device that a process of this machine would train on."""
    on_gpu = recipe.compute.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def chunks_logits(recipe: Recipe, model: Any) -> bool:
    """Return whether losses are taken from a chunk of logits at a time.

    That spares memory in proportion to tokens times vocabulary, and computes the logits twice.

    Args:
        recipe: The recipe; `compute.logits` decides, or leaves it to the free memory.
        model: Its model; it may be on the meta device.

    Raises:
        ModelError: If chunks are asked for, and the model's head is more than a linear map.

    Guarantee:
        It depends on the recipe, the model and the machine, never on what a unit holds.
    """
    wish = recipe.compute.logits
    if wish == "whole":
        return False
    obstacle = obstacle_to_fusing(model, split=recipe.shards > 1)
    if wish == "chunked" and obstacle is not None:
        raise ModelError(
            f'compute.logits is "chunked", but losses need the logits of this model as a whole: '
            f'{obstacle} Set compute.logits = "whole" or "auto".'
        )
    if obstacle is not None:
        return False
    device = device_of(recipe)
    free = free_bytes(device) // (1 if device.type == "cuda" else recipe.processes)
    return wish == "chunked" or 2 * _logits_bytes(recipe, model) > _SHARE * free


def _logits_bytes(recipe: Recipe, model: Any) -> int:
    """Return the memory of the logits of one unit on one process."""
    tokens = recipe.data.sequence_length // recipe.parallel.context
    vocabulary = model.config.get_text_config().vocab_size
    return tokens * vocabulary * getattr(torch, recipe.model.dtype).itemsize
