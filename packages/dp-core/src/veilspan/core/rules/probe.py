"""Small experiments that tell what an unknown module computes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

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


def probed(module: nn.Module) -> nn.Module:
    """Return the module with its weight and bias in fp32 where they are narrower.

    bf16 would round away what tells one map from another. As it is, where it runs in no other
    dtype.
    """
    if not any(_narrow(parameter) for parameter in module._parameters.values()):
        return module
    twin = shallow_copy(module)
    twin._parameters = {
        name: nn.Parameter(p.detach().float(), requires_grad=False) if _narrow(p) else p
        for name, p in module._parameters.items()
    }
    weight = own_parameters(twin)["weight"]
    runs = any(run(twin, probe_input(weight, width)) is not None for width in weight.shape)
    return twin if runs else module


def _narrow(parameter: nn.Parameter | None) -> TypeGuard[nn.Parameter]:
    return parameter is not None and parameter.dtype in (torch.bfloat16, torch.float16)


def probe_input(like: Tensor, width: int) -> Tensor:
    """Return a fixed `[2, 3, width]` input in the dtype and on the device of `like`."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((2, 3, width), generator=generator, dtype=torch.float64)
    return values.to(device=like.device, dtype=like.dtype)


def run(module: nn.Module, inputs: Tensor) -> Tensor | None:
    """Return the output of `module` in training mode, or None when it takes other inputs."""
    was_training = [(part, part.training) for part in module.modules()]
    for part, _ in was_training:
        part.training = True  # what runs in training is what must match: dropout must show
    try:
        with torch.no_grad():
            # The hooks of FSDP would take a lone call for the first one of a whole model.
            output = (module.forward if isinstance(module, FSDPModule) else module)(inputs)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError):
        return None
    finally:
        for part, training in was_training:
            part.training = training
    return output if isinstance(output, Tensor) else None


def agrees(module: nn.Module, inputs: Tensor, expected: Tensor) -> bool:
    """Return whether `module(inputs)` equals `expected` up to rounding."""
    output = run(module, inputs)
    return output is not None and close(output, expected)


def close(output: Tensor, expected: Tensor, rounding: float | None = None) -> bool:
    """Return whether two results agree up to rounding: that of their dtype, fp32 at the best."""
    if output.shape != expected.shape:
        return False
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = (output.double() - expected.double()).abs().max()
    return bool(error <= (rounding_of(expected.dtype) if rounding is None else rounding) * scale)


def rounding_of(dtype: torch.dtype) -> float:
    """Return the error, against the largest element, that rounding alone explains."""
    eps = torch.finfo(dtype).eps
    single = torch.finfo(torch.float32).eps
    return 8 * eps if eps > single else 64 * single
