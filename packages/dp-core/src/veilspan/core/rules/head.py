"""Linear map scored by cross entropy: its logits exist for a few tokens of one sample at a time.

The backward pass computes each chunk of logits again. Shape letters: B samples, T tokens, t tokens
of a chunk, D features, V vocabulary; 2 is (highest logit, Σ exp(logit - highest)).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veilspan.core.formed import Recomputed
from veilspan.core.norms import magnitudes
from veilspan.core.products import compute_dtype
from veilspan.core.projection import Projection
from veilspan.core.rules.base import Gradients


@dataclass(frozen=True, kw_only=True)
class LogitMap:
    """What a model makes of its head's output x: `scale · x`, or `cap · tanh(scale · x / cap)`.

    Args:
        scale: Factor, as in Granite and Cohere.
        cap: Largest magnitude of a logit, as in Gemma 2; None for no cap.
    """

    scale: float = 1.0
    cap: float | None = None

    def apply_(self, values: Tensor) -> Tensor:
        """Return the logits, in place of `values`."""
        if self.scale != 1.0:
            values.mul_(self.scale)
        if self.cap is not None:
            values.div_(self.cap).tanh_().mul_(self.cap)
        return values

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return the derivative where the map gave `logits`."""
        if self.cap is None:
            return self.scale
        return (logits / self.cap).square_().neg_().add_(1.0).mul_(self.scale)


@dataclass(kw_only=True)
class HeadRule:
    """Rule of one call of a linear head whose output is the loss of each token.

    Args:
        targets_BT: Token id that each position is scored on; any valid id where nothing counts.
        counted_BT: Whether the position counts.
        chunk: Tokens whose logits exist at the same time.
        logit_map: What follows the linear map.
    """

    targets_BT: Tensor
    counted_BT: Tensor
    chunk: int
    logit_map: LogitMap
    stats_2BT: Tensor = field(init=False)
    name: str = "linear + cross entropy"

    def token_losses(self, module: nn.Linear, hidden_BTD: Tensor) -> Tensor:
        """Return the cross entropy of each token, `[B, T]`, differentiable by autograd."""
        return _TokenLosses.apply(self, hidden_BTD, module.weight, module.bias)

    def saved_input(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Keep the hidden states."""
        return inputs

    def backward(
        self, module: nn.Module, inputs: Tensor, grad_output: Tensor, *, needs_input: bool
    ) -> Gradients:
        """Return the gradient of the hidden states; weight and bias, each formed when asked for.

        Whatever is formed computes the logits of a sample again; the first of a sample writes its
        gradient of the hidden states as well.
        """
        assert isinstance(module, nn.Linear)
        work = _Chunks(
            rule=self,
            hidden_BTD=inputs.detach(),
            weight_VD=module.weight.detach(),
            bias_V=None if module.bias is None else module.bias.detach(),
            grad_BT=grad_output.detach(),
        )
        sweeps = _Sweeps(work=work, hidden_BTD=torch.empty_like(inputs) if needs_input else None)
        size, form = len(inputs), sweeps.weight_grad
        return sweeps.hidden_grad if needs_input else None, {
            "weight": Recomputed(size=size, form=form, projected=sweeps.weight_projection),
            "bias": Recomputed(size=size, form=sweeps.bias_grad),
        }


class _TokenLosses(torch.autograd.Function):
    """Losses of tokens whose backward forms every gradient in one sweep over the chunks."""

    @staticmethod
    def forward(
        ctx: Any, rule: HeadRule, hidden_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None
    ) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward(hidden_BTD, weight_VD, bias_V)
        shape = rule.targets_BT.shape
        losses_BT = hidden_BTD.new_empty(shape, dtype=compute_dtype(hidden_BTD.dtype))
        rule.stats_2BT = losses_BT.new_empty((2, *shape))
        work = _Chunks(rule=rule, hidden_BTD=hidden_BTD, weight_VD=weight_VD, bias_V=bias_V)
        for b in range(len(hidden_BTD)):
            work.score(b, losses_BT[b])
        return losses_BT

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "head_losses has no second derivative: call backward without create_graph=True, "
                "or use torch.nn.functional.cross_entropy on the logits."
            )
        hidden_BTD, weight_VD, bias_V = ctx.saved_tensors
        _, needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad
        hidden = torch.empty_like(hidden_BTD) if needs_hidden else None
        weight = _wide_zeros_like(weight_VD) if needs_weight else None
        bias = _wide_zeros_like(bias_V) if needs_bias else None
        work = _Chunks(
            rule=ctx.rule,
            hidden_BTD=hidden_BTD,
            weight_VD=weight_VD,
            bias_V=bias_V,
            grad_BT=grad_outputs[0],
        )
        for b in range(len(hidden_BTD)):
            hidden_TD = None if hidden is None else hidden[b]
            work.accumulate(b, hidden_TD=hidden_TD, weight_VD=weight, bias_V=bias)
        return (
            None,
            hidden,
            None if weight is None else weight.to(weight_VD.dtype),
            None if bias is None else bias.to(bias_V.dtype),
        )


@dataclass(frozen=True, kw_only=True)
class _Chunks:
    """The arithmetic, chunk by chunk; no chunk holds tokens of two samples.

    Args:
        rule: What is scored, and how.
        hidden_BTD: Input of the linear map, in the dtype of its product.
        weight_VD: Its weight.
        bias_V: Its bias.
        grad_BT: Gradient of the loss of each token, in a backward pass.
    """

    rule: HeadRule
    hidden_BTD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    grad_BT: Tensor | None = None

    def score(self, b: int, losses_T: Tensor) -> None:
        """Write the token losses of sample `b`, and what its backward needs to know of them."""
        rule = self.rule
        highest_T, sums_T = rule.stats_2BT[:, b]
        for rows, _, logits in self._logits(b):
            torch.amax(logits, 1, out=highest_T[rows])
            logits.sub_(highest_T[rows, None])
            target = logits.gather(1, rule.targets_BT[b, rows, None]).squeeze(1)
            torch.sum(logits.exp_(), 1, out=sums_T[rows])
            torch.sub(sums_T[rows].log(), target, out=losses_T[rows])
        losses_T.masked_fill_(~rule.counted_BT[b], 0.0)

    def accumulate(
        self,
        b: int,
        *,
        hidden_TD: Tensor | None = None,
        weight_VD: Tensor | None = None,
        bias_V: Tensor | None = None,
    ) -> None:
        """Write the gradient of the hidden states of sample `b`; add those of weight and bias."""
        for act_tD, grad_tV in self._logit_grads(b, hidden_TD):
            if weight_VD is not None:
                weight_VD.addmm_(grad_tV.mT.to(weight_VD.dtype), act_tD.to(weight_VD.dtype))
            if bias_V is not None:
                bias_V.add_(grad_tV.sum(0, dtype=bias_V.dtype))

    def projection(self, b: int, probes_Dk: Tensor, hidden_TD: Tensor | None) -> Projection:
        """Return the weight gradient of sample `b` times probes; write that of the hidden states.

        The gradient of the weight is not formed.
        """
        values_Vk = probes_Dk.new_zeros((len(self.weight_VD), probes_Dk.shape[1]))
        size = probes_Dk.new_zeros((), dtype=torch.float64)
        for act_tD, grad_tV in self._logit_grads(b, hidden_TD):
            act_tD, grad_tV = act_tD.to(values_Vk.dtype), grad_tV.to(values_Vk.dtype)
            values_Vk.addmm_(grad_tV.mT, act_tD @ probes_Dk)
            size += magnitudes(act_tD[None], grad_tV[None])[0]
        terms = self.hidden_BTD.shape[1] + len(probes_Dk)
        return Projection(values_BRk=values_Vk[None], size_B=size[None], terms=terms)

    def _logits(self, b: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield the positions, the input and the logits, fp32 or fp64, of each chunk."""
        rule, dtype = self.rule, self.hidden_BTD.dtype
        weight = self.weight_VD.to(dtype)
        bias = None if self.bias_V is None else self.bias_V.to(dtype)
        length = self.hidden_BTD.shape[1]
        for start in range(0, length, rule.chunk):
            rows = slice(start, min(start + rule.chunk, length))
            # Tokens that do not count may be infinite or NaN, and 0 · NaN would reach the weight.
            act_tD = self.hidden_BTD[b, rows].masked_fill(~rule.counted_BT[b, rows, None], 0.0)
            values = F.linear(act_tD, weight, bias).to(compute_dtype(dtype))
            yield rows, act_tD, rule.logit_map.apply_(values)

    def _logit_grads(
        self, b: int, hidden_TD: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the input and the gradient of the head's output of each chunk.

        The gradient of the hidden states is written on the way, where there is room for it.
        """
        assert self.grad_BT is not None
        matrix = self.weight_VD.to(self.hidden_BTD.dtype)
        rule = self.rule
        highest_T, sums_T = rule.stats_2BT[:, b]
        for rows, act_tD, logits in self._logits(b):
            slope = rule.logit_map.slope(logits)
            weight = self.grad_BT[b, rows, None].to(logits.dtype)
            grad = logits.sub_(highest_T[rows, None]).exp_().mul_(weight / sums_T[rows, None])
            grad.scatter_add_(1, rule.targets_BT[b, rows, None], -weight)
            grad.mul_(slope).masked_fill_(~rule.counted_BT[b, rows, None], 0.0)
            grad_tV = grad.to(act_tD.dtype)
            if hidden_TD is not None:
                torch.mm(grad_tV, matrix, out=hidden_TD[rows])
            yield act_tD, grad_tV


@dataclass(kw_only=True)
class _Sweeps:
    """Gradients that are formed when asked for; a sample's first gives its hidden states theirs.

    Args:
        work: The arithmetic.
        hidden_BTD: Room for the gradient of the hidden states, until it is given out; None where
            nobody wants it.
    """

    work: _Chunks
    hidden_BTD: Tensor | None
    _written: set[int] = field(default_factory=set, init=False)

    def weight_grad(self, b: int) -> Tensor:
        """Return the weight gradient of sample `b`, `[V, D]` fp32 or fp64."""
        total = _wide_zeros_like(self.work.weight_VD)
        self.work.accumulate(b, hidden_TD=self._room(b), weight_VD=total)
        return total

    def weight_projection(self, b: int, probes_Dk: Tensor) -> Projection:
        """Return the weight gradient of sample `b` times probes, without forming it."""
        return self.work.projection(b, probes_Dk, self._room(b))

    def bias_grad(self, b: int) -> Tensor:
        """Return the bias gradient of sample `b`, `[V]` fp32 or fp64."""
        assert self.work.bias_V is not None
        total = _wide_zeros_like(self.work.bias_V)
        self.work.accumulate(b, hidden_TD=self._room(b), bias_V=total)
        return total

    def hidden_grad(self) -> Tensor:
        """Return the gradient of the hidden states, `[B, T, D]`; ask once."""
        hidden_BTD = self.hidden_BTD
        assert hidden_BTD is not None
        for b in range(len(hidden_BTD)):
            room = self._room(b)
            if room is not None:
                self.work.accumulate(b, hidden_TD=room)
        self.hidden_BTD = None  # whoever still forms gradients does not hold it
        return hidden_BTD

    def _room(self, b: int) -> Tensor | None:
        """Return where to write the hidden states' gradient of sample `b`, the first time."""
        if self.hidden_BTD is None or b in self._written:
            return None
        self._written.add(b)
        return self.hidden_BTD[b]


def _wide_zeros_like(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=compute_dtype(tensor.dtype))
