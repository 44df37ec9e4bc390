"""Elementwise-affine norms, recognised by what they compute rather than by class name.

`y = x̂ · (offset + weight) + bias`, where x̂ is whatever the module makes of one row of x when its
gain is one: LayerNorm, RMSNorm and their Hugging Face relatives, Gemma's `1 + weight`, LayerScale.
Where x̂ is that of LayerNorm or RMSNorm, the gradient is the kernel's; else autograd's through x̂.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from veilspan.core.contributions import RowSums
from veilspan.core.products import compute_dtype
from veilspan.core.protocols import NormKernel
from veilspan.core.rules.base import Gradients
from veilspan.core.rules.probe import close, own_parameters, probe_input, probed, run, shallow_copy


@dataclass(frozen=True, kw_only=True)
class Standard:
    """x̂ = x / √(mean x² + eps), of x less its mean where `centred`."""

    centred: bool
    eps: float

    def unit(self, rows: Tensor) -> Tensor:
        """Return x̂ of each row."""
        if self.centred:
            rows = rows - rows.mean(-1, keepdim=True)
        return rows * (rows.square().mean(-1, keepdim=True) + self.eps).rsqrt()


@dataclass(frozen=True, kw_only=True)
class NormRule:
    """Rule of an elementwise-affine map after a row-wise normalisation.

    Args:
        offset: Added to the weight.
        kernel: Backward pass of a standard normalisation.
        standard: What x̂ is, where that is known.
    """

    offset: float
    kernel: NormKernel
    standard: Standard | None = None
    name: str = "norm"

    def saved_input(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Keep the input; x̂ is cheaper to recompute than to store."""
        return inputs

    def backward(
        self, module: nn.Module, inputs: Tensor, grad_output: Tensor, *, needs_input: bool
    ) -> Gradients:
        """Return the gradient through x̂; `Σ g·x̂` of the weight, `Σ g` of the bias."""
        dtype = compute_dtype(grad_output.dtype)
        grad_BTn = grad_output.reshape(grad_output.shape[0], -1, grad_output.shape[-1])
        bias = RowSums(rows_BTn=grad_BTn)
        gain = own_parameters(module)["weight"].to(dtype) + self.offset
        if needs_input and self.standard is not None:
            grad_input, grad_Bn = self.kernel.normalisation_backward(
                inputs.detach().reshape(grad_BTn.shape),
                gain,
                grad_BTn,
                centred=self.standard.centred,
                eps=self.standard.eps,
            )
            weight = RowSums(rows_BTn=grad_Bn[:, None])
            return grad_input.view(inputs.shape), {"weight": weight, "bias": bias}
        leaf = inputs.detach().requires_grad_(needs_input)
        with torch.set_grad_enabled(needs_input):
            unit = unit_gain(module, self.offset)(leaf)
        grad_input = None
        if needs_input:
            scaled = (grad_output * gain.to(grad_output.dtype)).to(unit.dtype)
            grad_input = torch.autograd.grad(unit, leaf, scaled)[0]
        unit_BTn = unit.detach().reshape(grad_BTn.shape).to(dtype)
        return grad_input, {"weight": RowSums(rows_BTn=grad_BTn.to(dtype) * unit_BTn), "bias": bias}


def norm_rule(module: nn.Module, kernel: NormKernel) -> NormRule | None:
    """Return the rule when `module` is an elementwise-affine row-wise map, else None."""
    own = own_parameters(module)
    weight = own.get("weight")
    if weight is None or weight.ndim != 1 or not set(own) <= {"weight", "bias"}:
        return None
    form = probed(module)
    for offset in (0.0, 1.0):
        if _is_affine(form, offset):
            return NormRule(offset=offset, kernel=kernel, standard=_standard(form, offset))
    return None


def _standard(module: nn.Module, offset: float) -> Standard | None:
    """Return what x̂ is when it is that of LayerNorm or RMSNorm, with a number of the module as eps.

    Rows of unit size tell whether a mean is taken off, small rows which number eps is. A norm that
    computes in fp32 within an fp64 model is none: its gradient is not that of the formula.
    """
    own = {name: p.to(compute_dtype(p.dtype)) for name, p in own_parameters(module).items()}
    own["weight"] = torch.full_like(own["weight"], 1.0 - offset)
    inputs = probe_input(own["weight"], own["weight"].numel())
    rounding = 64 * torch.finfo(inputs.dtype).eps
    for eps in {v for v in vars(module).values() if isinstance(v, float) and 0.0 < v < 1.0}:
        rows = torch.cat([inputs + 1.0, (inputs + 1.0) * eps**0.5])
        found = run(_twin(module, dict(own), zero=True), rows)
        for centred in (False, True):
            standard = Standard(centred=centred, eps=eps)
            if found is not None and close(found, standard.unit(rows), rounding):
                return standard
    return None


def unit_gain(module: nn.Module, offset: float) -> nn.Module:
    """Return a twin of `module` with its own arithmetic but a gain of one and no shift."""
    own = own_parameters(module)
    return _twin(module, {**own, "weight": torch.full_like(own["weight"], 1.0 - offset)}, zero=True)


def _is_affine(module: nn.Module, offset: float) -> bool:
    own = own_parameters(module)
    weight = own["weight"]
    inputs = probe_input(weight, weight.numel())
    gain = weight + torch.linspace(0.5, 1.5, weight.numel()).to(weight)
    unit = run(unit_gain(module, offset), inputs)
    output = run(_twin(module, {**own, "weight": gain}, zero=False), inputs)
    if unit is None or output is None or unit.shape != inputs.shape:
        return False
    expected = unit * (offset + gain) + own.get("bias", torch.zeros_like(gain))
    moved = inputs.clone()
    moved[1, 2] += 1.0  # a row-wise map leaves every other row alone
    again = run(unit_gain(module, offset), moved)
    if (
        again is None
        or not torch.equal(again[0], unit[0])
        or not torch.equal(again[1, :2], unit[1, :2])
    ):
        return False
    return close(output, expected.to(output.dtype))


def _twin(module: nn.Module, parameters: dict[str, Tensor], *, zero: bool) -> nn.Module:
    twin = shallow_copy(module)
    if zero and "bias" in parameters:
        parameters["bias"] = torch.zeros_like(parameters["bias"])
    twin._parameters = cast(
        "dict[str, nn.Parameter | None]",
        {name: parameters.get(name) for name in module._parameters},
    )
    return twin
