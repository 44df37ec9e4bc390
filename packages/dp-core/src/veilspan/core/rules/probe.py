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

from veilspan.core.contributions import Contribution
from veilspan.core.products import compute_dtype
from veilspan.core.rules.base import Rule

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GROSS = 2.0**-4  # beyond what TF32 or bf16 rounds


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
    """Return a copy that shares everything but hooks and a patched forward."""
    split = isinstance(module, FSDPModule)
    kind = type(module).__mro__[2] if split else type(module)  # FSDP puts two classes before it
    twin = object.__new__(kind)
    twin.__dict__ = {k: v for k, v in module.__dict__.items() if k != "forward"}
    twin.__dict__ |= {k: OrderedDict() for k in _HOOKS}
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


def run(module: nn.Module, inputs: Tensor, *, graph: bool = False) -> Tensor | None:
    """Return the output of `module` in training mode, or None when it takes other inputs."""
    was_training = [(part, part.training) for part in module.modules()]
    for part, _ in was_training:
        part.training = True  # what runs in training is what must match: dropout must show
    try:
        with torch.set_grad_enabled(graph):
            # A tap takes the place of forward alone; hooks would take this call for a real one.
            output = module.forward(inputs)
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


def trains_inside(module: nn.Module) -> bool:
    """Return whether a module holds others that are trained."""
    return any(p.requires_grad for child in module.children() for p in child.parameters())


def differentiates_as(module: nn.Module, rule: Rule) -> bool:
    """Return whether autograd's gradients of a module are those of its rule.

    A module can compute one map and differentiate another: with a detached operand, or with a part
    of its gradient. Gradients of weights are compared in one direction.
    """
    trained = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]
    twin, inputs = _differentiable(module)
    output = run(twin, inputs, graph=True)
    if output is None or not output.requires_grad:
        return False
    leaves = {name: twin.get_parameter(name) for name in trained}
    if inputs.is_floating_point():
        leaves = {"": inputs, **leaves}
    grad_output = torch.linspace(-1.0, 1.0, output.numel()).to(output).view_as(output)
    exact = torch.autograd.grad(output, list(leaves.values()), grad_output, allow_unused=True)
    saved = rule.saved_input(inputs.detach(), output.detach())
    mine, parts = rule.backward(twin, saved, grad_output, needs_input=inputs.requires_grad)
    for name, gradient in zip(leaves, exact, strict=True):
        if gradient is None:
            return False
        if name:
            gradient, mine = _in_one_direction(gradient, parts[name])
        if not isinstance(mine, Tensor) or not close(mine, gradient, _GROSS):
            return False
    return True


def _in_one_direction(gradient: Tensor, part: Contribution) -> tuple[Tensor, Tensor]:
    """Return both gradients of a weight, as matrices, times one vector."""
    columns = gradient.reshape(len(gradient), -1)
    direction = torch.linspace(0.5, 1.5, columns.shape[1]).to(columns)[:, None]
    found = part.project(direction[None].to(compute_dtype(columns.dtype)))
    return columns @ direction, found.values_BRk[0]


def _differentiable(module: nn.Module) -> tuple[nn.Module, Tensor]:
    """Return a twin whose parameters are leaves of its own, with one record to run through it."""
    table = isinstance(module, nn.Embedding)
    twin = shallow_copy(module if table else probed(module))
    own = own_parameters(twin)
    if table:  # a few rows, as a gradient of all of them may be large
        own["weight"] = own["weight"][:8]
        vars(twin).update(num_embeddings=len(own["weight"]), padding_idx=None)
    leaves = {n: nn.Parameter(p, requires_grad=p.is_floating_point()) for n, p in own.items()}
    twin._parameters = {name: leaves.get(name) for name in twin._parameters}
    if table:
        return twin, torch.arange(len(own["weight"]), device=own["weight"].device)[None]
    known = [probe_input(own["weight"], width)[:1] for width in reversed(own["weight"].shape)]
    inputs = next((x for x in known if run(twin, x) is not None), known[0])
    return twin, inputs.requires_grad_()
