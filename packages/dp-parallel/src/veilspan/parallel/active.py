"""The context-parallel region that attention layers find themselves in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch.distributed as dist

from veilspan.parallel.attention import AllGatherKV, Attention, AttentionName, Ulysses, choose
from veilspan.parallel.layout import Layout
from veilspan.parallel.mesh import ParallelMesh


@dataclass(frozen=True, kw_only=True)
class Region:
    """What an attention layer needs to know about the ranks that share its sequence.

    Attributes:
        layout: Who holds which tokens.
        group: Process group of the context axis.
        attention: The attention asked for.
    """

    layout: Layout
    group: dist.ProcessGroup
    attention: AttentionName

    def strategy(self, *, heads: int, key_heads: int) -> Attention:
        """Return the attention for a layer with `heads` query heads and `key_heads` key heads."""
        name = choose(self.attention, heads=heads, key_heads=key_heads, ranks=self.layout.ranks)
        kind = Ulysses if name == "ulysses" else AllGatherKV
        return kind(layout=self.layout, group=self.group)


class _Current:
    """Holder of the region in force.

    A plain object, not a context variable: on CUDA the backward pass, and with it the recomputation
    of checkpointed layers, runs on another thread, which does not see this thread's context.
    """

    region: Region | None = None


_CURRENT = _Current()


@contextmanager
def context_parallel(
    mesh: ParallelMesh, layout: Layout, attention: AttentionName = "auto"
) -> Iterator[None]:
    """Let attention layers attend to the whole sequence, of which each rank holds a part.

    The block must enclose the forward *and* the backward pass, because checkpointed layers run
    their attention again in the backward pass. With a context degree of 1 it changes nothing.
    Outside of any block the registered attention is ordinary causal attention.

    Args:
        mesh: The processes.
        layout: Who holds which tokens; `layout.ranks` must be the mesh's context degree.
        attention: `"auto"`, `"ulysses"` or `"allgather"`; see `choose`.

    Raises:
        ValueError: If the layout is for another number of ranks or the attention unknown.
        RuntimeError: If a block is already open in this process.

    Examples:
        >>> from veilspan.parallel import Layout, build_mesh
        >>> with context_parallel(build_mesh(), Layout(length=8, ranks=1)):
        ...     pass  # losses_B = …; step.backward(losses_B)
    """
    if layout.ranks != mesh.context_degree:
        raise ValueError(
            f"layout.ranks is {layout.ranks} but the mesh has a context degree of "
            f"{mesh.context_degree}; build the layout with ranks=mesh.context_degree."
        )
    if attention not in get_args(AttentionName):
        raise ValueError(
            f"attention is {attention!r}; it must be one of {list(get_args(AttentionName))}."
        )
    if _CURRENT.region is not None:
        raise RuntimeError(
            "a context_parallel block is already open; leave it before the next one."
        )
    if mesh.context_degree == 1:
        yield
        return
    _CURRENT.region = Region(layout=layout, group=mesh.context_group, attention=attention)
    try:
        yield
    finally:
        _CURRENT.region = None


def current_region() -> Region | None:
    """Return the region in force in this process, None outside of any `context_parallel`."""
    return _CURRENT.region
