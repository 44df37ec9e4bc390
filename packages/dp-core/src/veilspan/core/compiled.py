"""The tap inside a compiled graph.

The hand-over is an operator that the compiler does not look into, so that the graph has no break:
the forward pass of a layer is compiled as it is, its backward runs between compiled parts.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

if TYPE_CHECKING:
    from veilspan.core.taps import FactorSite, Site

_sites: WeakValueDictionary[int, Site] = WeakValueDictionary()
_numbers = itertools.count()
_DONATED_BY_DEFAULT = functorch_config.donated_buffer


def number_of(site: Site) -> int:
    """Return a new number that names `site` in compiled graphs."""
    number = next(_numbers)
    _sites[number] = site
    return number


def site_of(number: int) -> Site | None:
    """Return the site that a number names, while there is one."""
    return _sites.get(number)


def keep_saved_tensors(keep: bool) -> None:
    """Let what gets compiled from now on run its backward pass twice, or stop it.

    By default compiled code frees what it saved as it goes, and refuses a second backward pass.
    """
    functorch_config.donated_buffer = False if keep else _DONATED_BY_DEFAULT


def no_view(output: Tensor) -> Tensor:
    """Return the same memory as a tensor that is no view: it may be written in place after a tap.

    A linear map returns a view of a product with fewer dimensions, which nobody else holds.
    """
    return torch.ops.aten._unsafe_view(output, output.shape)


class TracedTap(torch.autograd.Function):
    """Identity on an output that needs no gradient of its own."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, inputs: Tensor, anchor: Tensor, saved: Tensor, number: int
    ) -> Tensor:
        """Return `output`."""
        ctx.number, ctx.needs_grad = number, inputs.requires_grad
        ctx.save_for_backward(saved, anchor)
        return no_view(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        """Hand over through an operator that the compiler cannot look into."""
        saved, anchor = ctx.saved_tensors
        grad_input, grad_anchor = torch.ops.veilspan.hand_over(
            saved, grad_outputs[0], anchor, ctx.number, ctx.needs_grad
        )
        return None, grad_input if ctx.needs_grad else None, grad_anchor, None, None


_library = torch.library.Library("veilspan", "DEF")
_library.define(
    "hand_over(Tensor inputs, Tensor grad_output, Tensor anchor, int site, bool needs_grad)"
    " -> (Tensor, Tensor)"
)


@torch.library.impl(_library, "hand_over", "CompositeExplicitAutograd")
def _hand_over(
    inputs: Tensor, grad_output: Tensor, anchor: Tensor, site: int, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return the input gradient (empty if not needed) and that of the anchor, zero."""
    found = cast("FactorSite", _sites[site])
    running = found.running_pass(anchor)
    if running.keeps:  # compiled code reuses the memory of what it has handed out
        inputs, grad_output = inputs.clone(), grad_output.clone()
    grad_input = found.hand_over(running, inputs, grad_output, needs_grad=needs_grad)
    if grad_input is None:
        grad_input = inputs.new_empty(0)
    elif grad_input.data_ptr() == grad_output.data_ptr():
        grad_input = grad_input.clone()  # an operator's output must not alias its input
    return grad_input.to(inputs.dtype).contiguous(), torch.zeros_like(anchor)


@torch.library.register_fake("veilspan::hand_over", lib=_library)
def _hand_over_fake(
    inputs: Tensor, grad_output: Tensor, anchor: Tensor, site: int, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    like = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    return like if needs_grad else inputs.new_empty(0), torch.empty_like(anchor)
