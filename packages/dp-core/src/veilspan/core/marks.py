"""Whether a model's parameters and saved buffers were written inside of a logical batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from veilspan.core.rules import is_adapted_parameter

_OF_A_PARAMETER, _OF_A_BUFFER = 2**6, 2**12  # elements, at most, that are compared


@dataclass(frozen=True)
class Mark:
    """What tells whether a tensor was written.

    Args:
        tensor: The tensor.
        version: How often it was written in place, as autograd counts; 0 where it counts more.
        sample: Bytes of some elements: what is written through `.data`, nobody counts.
    """

    tensor: Tensor
    version: int
    sample: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor, *, counted: bool = True) -> Mark:
        """Return the mark of a tensor as it is now.

        Args:
            tensor: The tensor.
            counted: Whether autograd's count of writes tells; else more elements are looked at.
        """
        version = tensor._version if counted and not tensor.is_inference() else 0
        most = _OF_A_PARAMETER if counted and isinstance(tensor, nn.Parameter) else _OF_A_BUFFER
        return cls(tensor, version, _sample(tensor, most))

    def is_same(self, other: Mark) -> bool:
        """Return whether autograd counted no write between the two, and both show their bytes."""
        same = self.tensor is other.tensor and self.version == other.version
        return same and (self.sample is None) == (other.sample is None)


def first_written(before: Mapping[str, Mark], now: Mapping[str, Mark]) -> str | None:
    """Return the name of a tensor that was written between the two, or None.

    All bytes of a device are compared at once: the host waits for a GPU at every comparison.
    """
    seen: dict[torch.device, list[tuple[str, Tensor, Tensor]]] = {}
    for name, mark in now.items():
        known = before.get(name)
        if known is None or not mark.is_same(known):
            return name
        if mark.sample is not None and known.sample is not None:
            seen.setdefault(mark.sample.device, []).append((name, known.sample, mark.sample))
    for of_device in seen.values():
        names, old, new = zip(*of_device, strict=True)
        if not torch.equal(torch.cat(old), torch.cat(new)):
            return next(n for n, a, b in zip(names, old, new, strict=True) if not torch.equal(a, b))
    return None


def _sample(tensor: Tensor, most: int) -> Tensor | None:
    """Return the bytes of up to `most` elements; None for a format that is not torch's."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    plain = type(local) in (Tensor, nn.Parameter) and local.layout is torch.strided
    if not plain or local.is_meta or local.is_quantized:
        return None
    flat = local.detach().reshape(-1)
    return flat[:: -(-len(flat) // most) or 1].clone().view(torch.uint8)


def marks_of(model: nn.Module) -> dict[str, Mark]:
    """Return a mark of each parameter and saved buffer, by name."""
    caches = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    # Taking a parametrization off sets the frozen parameter anew, to what it was.
    adapters = [module for module in model.modules() if is_adapted_parameter(module)]
    adapted = {id(p) for a in adapters for p in a.parameters() if not p.requires_grad}
    held = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: Mark.of(tensor, counted=id(tensor) not in adapted)
        for name, tensor in held
        if name not in caches
    }
