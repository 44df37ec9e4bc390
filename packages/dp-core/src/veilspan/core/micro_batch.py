"""One micro-batch on its way: how often its layers ran, and what a backward pass wants of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from veilspan.core.contributions import Contribution
from veilspan.core.errors import PrivacyError

if TYPE_CHECKING:
    from veilspan.core.taps import Site


class Use(Protocol):
    """One use of a module, on its way back."""

    @property
    def site(self) -> Site:
        """The module."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the gradients of all samples at once would be formed."""
        ...

    def parts(self) -> Iterator[tuple[str, Contribution]]:
        """Yield what this use adds to each trainable parameter, by name in the model."""
        ...

    def reached(self) -> Tensor:
        """Return the samples whose output gradient is neither zero nor 0 · inf, `[B]` bool."""
        ...

    def sq_size(self, b: int) -> Tensor:
        """Return the squared norm of the output gradient of sample `b`, fp64 scalar."""
        ...

    def glimpse(self) -> dict[str, Tensor]:
        """Return a few numbers of each sample, `[B, n]`, of all that the gradients are made of."""
        ...


class Pass(Protocol):
    """What one backward pass wants of the layers."""

    @property
    def keeps(self) -> bool:
        """Whether factors are kept beyond `receive`; compiled code reuses their memory."""
        ...

    def receive(self, use: Use) -> None:
        """Take what one use of a module adds to the gradients of its parameters."""
        ...


@dataclass
class MicroBatch:
    """One micro-batch on its way: how often each parameter is used, and the pass that is running.

    Args:
        size: Records B.
        strategy: Name of the backward strategy.
        device: Where the model is.
        sites: The patched modules.
        watched: Puts something around every pass that looks at what the pass receives.
    """

    size: int
    strategy: str
    device: torch.device
    sites: Sequence[Site]
    running: Pass | None = None
    keeps_graph: bool = False
    watched: Callable[[Pass], AbstractContextManager[Pass]] = nullcontext
    anchor: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # An input that needs a gradient, so that autograd visits layers whose input needs none.
        self.anchor = torch.zeros((), device=self.device, requires_grad=True)
        for site in self.sites:
            site.calls.zero_()

    def differentiate(self, loss: Tensor, wanted: Pass, *, keep_graph: bool = False) -> None:
        """Run one backward pass of `loss` whose taps hand over to `wanted`."""
        _ = self.uses
        self.keeps_graph = keep_graph
        with self.watched(wanted) as watched:
            self.running = _CountedPass(watched, Counter(self._calls))
            loss.backward(retain_graph=keep_graph)

    @cached_property
    def uses(self) -> Counter[str]:
        """How often the forward passes used each parameter.

        Counted once, before the first backward pass: a forward pass that activation checkpointing
        runs again is no new use.
        """
        uses = Counter[str]()
        for site in self.sites:
            uses.update(dict.fromkeys(site.owned.values(), self._calls[site.name]))
        return uses

    @cached_property
    def _calls(self) -> dict[str, int]:
        return {site.name: int(site.calls) for site in self.sites}


@dataclass
class _CountedPass:
    """Refuses a module that comes back more often than it ran: nobody would wait for the last.

    Args:
        wanted: The pass that is running.
        awaited: How often each module still may come back, by path.
    """

    wanted: Pass
    awaited: Counter[str]

    @property
    def keeps(self) -> bool:
        """What the pass does."""
        return self.wanted.keeps

    def receive(self, use: Use) -> None:
        """Pass one use on.

        Raises:
            PrivacyError: If the module came back that often already.
        """
        name = use.site.name
        self.awaited[name] -= 1
        if self.awaited[name] < 0:
            raise PrivacyError(
                f"Module '{name}' came back from the backward pass more often than the forward "
                "pass called it, so its norm would miss a part. Let activation checkpointing run "
                "what it ran the first time, as often; what a checkpointed function needs a "
                "gradient of, give it as an argument."
            )
        self.wanted.receive(use)


class Progress(Protocol):
    """Who knows the micro-batch in progress."""

    micro_batch: MicroBatch | None

    def batch_of(self, inputs: Tensor) -> MicroBatch | None:
        """Return the micro-batch that a call belongs to; None to pass it through."""
        ...

    def detach(self) -> None:
        """Undo every patch."""
        ...
