"""The tap of a module whose records run through it one at a time (`RecordsAlone`).

The forward pass builds one autograd graph per record on detached inputs; the backward pass
differentiates them and hands each record's gradients to the pass that is running. Shape letter: B
samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from veilspan.core.contributions import Contribution
from veilspan.core.errors import PrivacyError
from veilspan.core.formed import Formed
from veilspan.core.lone_arguments import PLAIN, describe, is_cut, refuse_lists, require_usable
from veilspan.core.micro_batch import MicroBatch
from veilspan.core.norms import few_numbers
from veilspan.core.rules.alone import RecordsAlone
from veilspan.core.taps import Site


@dataclass(kw_only=True)
class LoneSite(Site):
    """A patched module whose records run alone.

    Args:
        rule: What is cut into records.
        everything: All trainable parameters of the model, by name.
    """

    rule: RecordsAlone
    everything: Mapping[str, nn.Parameter]

    @_disable_dynamo  # there is a graph for each record, and no compiler's graph around them
    def tapped(self, batch: MicroBatch, *args: Any, **kwargs: Any) -> Any:
        """Run the module record by record.

        Raises:
            PrivacyError: If the records are not dimension 0 of what goes in and comes out.
        """
        call = _Call.of(self, batch.size, args, kwargs)
        joined = iter(_LoneTap.apply(self, call, batch, batch.anchor, *call.tensors()))
        assert call.returns is not None
        leaves = [next(joined) if torch.is_tensor(v) else v for v in call.returned]
        return tree_unflatten(leaves, call.returns)

    def gradients(
        self, graph: _Graph, grad_outputs: Sequence[Tensor | None], *, keep_graph: bool
    ) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        """Return the gradients of one record's inputs, and of the parameters, by name in the model.

        Raises:
            PrivacyError: If a parameter from outside of the module is used inside.
        """
        into = [*graph.inputs, *self.everything.values()]
        pairs = [
            (out, g) for out, g in zip(graph.outputs, grad_outputs, strict=True) if g is not None
        ]
        pairs = [(out, g) for out, g in pairs if out.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(into)
        if pairs:
            outputs, grads = zip(*pairs, strict=True)
            found = torch.autograd.grad(
                outputs, into, grads, retain_graph=keep_graph, allow_unused=True
            )
        own, parts = set(self.owned.values()), {}
        for (name, parameter), grad in zip(
            self.everything.items(), found[len(graph.inputs) :], strict=True
        ):
            if name in own:
                parts[name] = torch.zeros_like(parameter) if grad is None else grad
            elif grad is not None:
                raise PrivacyError(
                    f"Module '{self.name}' uses parameter '{name}', which is not its own, so no "
                    "per-sample norm covers it there. Use backward='single_sample'."
                )
        return list(found[: len(graph.inputs)]), parts


@dataclass
class _Graph:
    """One record's way through the module: the inputs that need a gradient, and all outputs."""

    inputs: list[Tensor]
    outputs: list[Tensor]


@dataclass
class _Call:
    """Arguments of one call, flat, and which of them are cut into records.

    Args:
        forward: The module's own forward.
        signature: Its signature.
        specs: Argument name and structure of its value, in order.
        leaves: All values, tensors among them.
        cut: Whether dimension 0 of a leaf is the records.
        size: Records B.
        returned: What the module returned for the last record, flat, once it has run.
        returns: The structure of that.
    """

    forward: Callable[..., Any]
    signature: inspect.Signature
    specs: list[tuple[str, TreeSpec]]
    leaves: list[Any]
    cut: list[bool]
    size: int
    returned: list[Any] = field(default_factory=list)
    returns: TreeSpec | None = None

    @classmethod
    def of(
        cls,
        site: LoneSite,
        size: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> _Call:
        """Decide what is cut.

        Raises:
            PrivacyError: Naming the module and the argument that does not fit.
        """
        signature = inspect.signature(site.forward)
        specs, leaves, cut = [], [], []
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            flat, spec = tree_flatten(value)
            refuse_lists(site, name, value, size)
            specs.append((name, spec))
            for leaf in flat:
                require_usable(site, site.rule, name, leaf, size, first=not any(cut))
                one_for_all = (
                    torch.is_tensor(leaf) and leaf.requires_grad and leaf.shape[:1] == (1,)
                )
                leaves.append(leaf.expand(size, *leaf.shape[1:]) if one_for_all else leaf)
                cut.append(is_cut(site.rule, name, leaves[-1], size))
        return cls(site.forward, signature, specs, leaves, cut, size)

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the leaves."""
        return [leaf for leaf in self.leaves if torch.is_tensor(leaf)]

    def run(self, b: int, tensors: Sequence[Tensor]) -> _Graph:
        """Run record `b` on detached inputs."""
        given, inputs, leaves = iter(tensors), [], []
        for leaf, cut in zip(self.leaves, self.cut, strict=True):
            if not torch.is_tensor(leaf):
                leaves.append(leaf)
                continue
            tensor = next(given)
            part = (tensor[b : b + 1] if cut else tensor).detach()
            if tensor.requires_grad:
                inputs.append(part.requires_grad_())
            leaves.append(part)
        values, start = {}, 0
        for name, spec in self.specs:
            values[name] = tree_unflatten(leaves[start : start + spec.num_leaves], spec)
            start += spec.num_leaves
        bound = inspect.BoundArguments(self.signature, values)  # pyright: ignore[reportArgumentType]
        self.returned, self.returns = tree_flatten(self.forward(*bound.args, **bound.kwargs))
        return _Graph(inputs, [value for value in self.returned if torch.is_tensor(value)])


@dataclass(frozen=True)
class LoneUse:
    """One use of a module whose records run alone.

    Args:
        site: The module.
        grads: Gradient of each parameter, by name in the model, for each record.
        grad_outputs: Gradient of each output, where there is one, for each record.
    """

    site: LoneSite
    grads: list[dict[str, Tensor]]
    grad_outputs: list[list[Tensor]]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the gradients."""
        return next(iter(self.grads[0].values())).dtype

    def parts(self) -> Iterator[tuple[str, Contribution]]:
        """Yield what this use adds to each trainable parameter, by name in the model."""
        for name in self.site.owned.values():
            yield name, Formed(gradients=tuple(grads[name] for grads in self.grads))

    def reached(self) -> Tensor:
        """Return the samples whose output gradient is neither zero nor 0 · inf, `[B]` bool."""
        device = next(iter(self.grads[0].values())).device
        found = [any(((g != 0) & g.isfinite()).any() for g in own) for own in self.grad_outputs]
        return torch.tensor(found, dtype=torch.bool, device=device)

    def sq_size(self, b: int) -> Tensor:
        """Return the squared norm of the output gradient of sample `b`, fp64 scalar."""
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in self.grad_outputs[b]]
        like = next(iter(self.grads[b].values()))
        return sum((n.square() for n in norms), start=like.new_zeros((), dtype=torch.float64))

    def glimpse(self) -> dict[str, Tensor]:
        """Return a few numbers of each sample's gradients: of parameters, and of outputs."""
        formed = {name: [grads[name] for grads in self.grads] for name in self.grads[0]}
        outputs = zip(*self.grad_outputs, strict=True)
        whole = formed | {f"output {i}": grads for i, grads in enumerate(outputs)}
        return {n: torch.cat([few_numbers(g[None]) for g in grads]) for n, grads in whole.items()}


class _LoneTap(torch.autograd.Function):
    """Forward of each record in a graph of its own; backward that hands the gradients over."""

    @staticmethod
    def forward(
        ctx: Any, site: LoneSite, call: _Call, batch: MicroBatch, anchor: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the outputs of all records, joined."""
        with torch.enable_grad():
            graphs = [call.run(b, tensors) for b in range(call.size)]
        for output in call.returned:
            scalar = torch.is_tensor(output) and output.ndim == 0
            if scalar or not isinstance(output, (Tensor, *PLAIN)):
                raise PrivacyError(
                    f"Module '{site.name}' returns {describe(output)}, which cannot be joined "
                    "over the records along dimension 0 (an auxiliary loss would couple them). Use "
                    "backward='single_sample'."
                )
        columns = list(zip(*(graph.outputs for graph in graphs), strict=True))
        joined = tuple(torch.cat([out.detach() for out in column]) for column in columns)
        ctx.mark_non_differentiable(
            *(j for j, column in zip(joined, columns, strict=True) if not column[0].requires_grad)
        )
        ctx.set_materialize_grads(False)
        ctx.site, ctx.batch, ctx.anchor = site, batch, anchor
        ctx.graphs = graphs
        return joined

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        """Hand over every record's gradients, and return those of the inputs."""
        site, batch, graphs = ctx.site, ctx.batch, ctx.graphs
        running = site.running_pass(ctx.anchor)
        rows = [[len(out) for out in graph.outputs] for graph in graphs]
        pieces = [
            [None] * len(graphs) if g is None else g.split([r[i] for r in rows])
            for i, g in enumerate(grad_outputs)
        ]
        found: list[list[Tensor]] = []
        grads: list[dict[str, Tensor]] = []
        for b, graph in enumerate(graphs):
            mine = [piece[b] for piece in pieces]
            # What was computed before the module, such as a normalised weight, serves every record.
            keep_graph = batch.keeps_graph or b + 1 < len(graphs)
            inputs, own = site.gradients(graph, mine, keep_graph=keep_graph)
            found.append(
                [
                    torch.zeros_like(leaf) if grad is None else grad
                    for leaf, grad in zip(graph.inputs, inputs, strict=True)
                ]
            )
            grads.append(own)
            if not batch.keeps_graph:
                graph.inputs, graph.outputs = [], []
        arrived = [[g for g in column if g is not None] for column in zip(*pieces, strict=True)]
        running.receive(LoneUse(site, grads, arrived))
        columns = [list(column) for column in zip(*found, strict=True)]
        back = iter([torch.cat(column) if len(column) > 1 else column[0] for column in columns])
        needed = ctx.needs_input_grad[4:]
        return None, None, None, None, *(next(back) if need else None for need in needed)
