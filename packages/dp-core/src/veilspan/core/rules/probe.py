"""Small experiments that tell what an unknown module computes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Let a module show its own parameters whole where ranks hold them in parts.

    Every rank must enter with the same module at the same time.
    """
    kept = dict(module._parameters)
    for name, parameter in kept.items():
        if isinstance(parameter, DTensor):
            with torch.no_grad():
                full = parameter.full_tensor()
            module._parameters[name] = nn.Parameter(full, requires_grad=parameter.requires_grad)
    try:
        yield
    finally:
        module._parameters.update(kept)


def shallow_copy(module: nn.Module) -> nn.Module:
    """Return a copy that shares everything but a patched forward, and the hooks of FSDP."""
    split = isinstance(module, FSDPModule)
    kind = type(module).__mro__[2] if split else type(module)  # FSDP puts two classes before it
    twin = object.__new__(kind)
    twin.__dict__ = {k: v for k, v in module.__dict__.items() if k != "forward"}
    if split:
        twin._forward_hooks, twin._forward_pre_hooks = OrderedDict(), OrderedDict()
    return twin


def own_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that `module` itself owns, by name, detached."""
    return {name: p.detach() for name, p in module.named_parameters(recurse=False)}


def probe_input(like: Tensor, width: int) -> Tensor:
    """Return a fixed `[2, 3, width]` input in the dtype and on the device of `like`."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((2, 3, width), generator=generator, dtype=torch.float64)
    return values.to(device=like.device, dtype=like.dtype)


def run(module: nn.Module, inputs: Tensor) -> Tensor | None:
    """Return the output of `module` in training mode, or None when it takes other inputs."""
    was_training = module.training
    module.training = True  # what runs in training is what must match: dropout must show
    try:
        with torch.no_grad():
            # The hooks of FSDP would take a lone call for the first one of a whole model.
            output = (module.forward if isinstance(module, FSDPModule) else module)(inputs)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError):
        return None
    finally:
        module.training = was_training
    return output if isinstance(output, Tensor) else None


def agrees(module: nn.Module, inputs: Tensor, expected: Tensor) -> bool:
    """Return whether `module(inputs)` equals `expected` up to rounding."""
    output = run(module, inputs)
    return output is not None and close(output, expected)


def close(output: Tensor, expected: Tensor) -> bool:
    """Return whether two results agree up to the rounding of their dtype (fp32 at the best)."""
    if output.shape != expected.shape:
        return False
    eps = max(torch.finfo(torch.float32).eps, torch.finfo(expected.dtype).eps)
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return bool(((output.to(expected.dtype) - expected).abs().max() <= 64 * eps * scale).item())
