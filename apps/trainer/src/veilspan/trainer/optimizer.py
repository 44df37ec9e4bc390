"""AdamW and a learning rate that depends on the step number only."""

from __future__ import annotations

import math

import torch
from torch import nn

from veilspan.trainer.sections import Optimizer


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; vectors (norms, biases) never decay.

    Args:
        model: The model, already split over the processes if it is going to be.
        settings: Section `[optimizer]`.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in trainable if parameter.ndim >= 2],
            "weight_decay": settings.weight_decay,
        },
        {
            "params": [parameter for parameter in trainable if parameter.ndim < 2],
            "weight_decay": 0.0,
        },
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
    )


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine or a constant.

    Args:
        settings: Section `[optimizer]`.
        step: Index of the step, 0 … steps - 1.
        steps: Steps of the whole plan.

    Guarantee:
        A function of public numbers. A rate that reacts to the training loss would be a release of
        its own.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    passed = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    low = settings.min_lr_ratio
    return settings.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * passed)) / 2)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for every parameter."""
    for group in optimizer.param_groups:
        group["lr"] = rate
