"""Convolutions over one, two or three dimensions; groups, strides and dilation included."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from veilspan.core.contributions import RowSums
from veilspan.core.formed import Recomputed
from veilspan.core.products import compute_dtype
from veilspan.core.rules.base import Gradients

_FORWARDS = {
    kind.forward: dimensions
    for kind, dimensions in ((nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3))
}


@dataclass(frozen=True, kw_only=True)
class ConvolutionRule:
    """Rule of a convolution with zero padding.

    Args:
        dimensions: Spatial dimensions; the input has two more, records and channels.
    """

    dimensions: int
    name: str = "convolution"

    def saved_input(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Keep the input in the dtype of the product, which autocast may have lowered.

        Raises:
            ValueError: If the input lacks its records: torch would take channels for them.
        """
        if inputs.ndim != self.dimensions + 2:
            raise ValueError(
                f"A convolution over {self.dimensions} dimensions received an input of shape "
                f"{tuple(inputs.shape)}; with per-record clipping it must be [records, channels, "
                f"{'…' if self.dimensions > 1 else 'length'}]."
            )
        return inputs.to(output.dtype)

    def backward(
        self, module: nn.Module, inputs: Tensor, grad_output: Tensor, *, needs_input: bool
    ) -> Gradients:
        """Return the transposed convolution; the weight, record by record, the bias' row sums."""
        grad_input = None
        if needs_input:
            weight = self._convolution(module).weight.detach().to(grad_output.dtype)
            grad_input = self._gradients(module, inputs, weight, grad_output, weight_too=False)
        form = partial(self._weight_grad, module, inputs, grad_output)
        rows_BTO = grad_output.flatten(2).transpose(1, 2)
        return grad_input, {
            "weight": Recomputed(size=len(inputs), form=form),
            "bias": RowSums(rows_BTn=rows_BTO),
        }

    def _weight_grad(
        self, module: nn.Module, inputs: Tensor, grad_output: Tensor, b: int
    ) -> Tensor:
        dtype = compute_dtype(grad_output.dtype)
        weight = self._convolution(module).weight.detach().to(dtype)
        act, grad = inputs[b : b + 1].to(dtype), grad_output[b : b + 1].to(dtype)
        return self._gradients(module, act, weight, grad, weight_too=True)

    def _gradients(
        self, module: nn.Module, inputs: Tensor, weight: Tensor, grad: Tensor, *, weight_too: bool
    ) -> Tensor:
        """Return the gradient of the weight, or that of the input."""
        layer = self._convolution(module)
        found = torch.ops.aten.convolution_backward(
            grad,
            inputs.to(grad.dtype),
            weight,
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            False,
            [0] * self.dimensions,
            layer.groups,
            [not weight_too, weight_too, False],
        )
        return found[1] if weight_too else found[0]

    @staticmethod
    def _convolution(module: nn.Module) -> _ConvNd:
        assert isinstance(module, _ConvNd)
        return module


def convolution_rule(module: nn.Module) -> ConvolutionRule | None:
    """Return the rule when `module` is a convolution with zero padding of known size, else None."""
    dimensions = _FORWARDS.get(type(module).forward)
    if dimensions is None or not isinstance(module, _ConvNd):
        return None
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None  # one record at a time serves those
    return ConvolutionRule(dimensions=dimensions)
