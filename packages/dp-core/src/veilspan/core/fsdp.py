"""FSDP2 under a private step: plain sums of one record, and nothing that outlives its pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

_PLAIN_SUMS: dict[str, object] = {
    # Else FSDP2 keeps the gradient of this record, and adds it to that of a later one.
    "reduce_grads": True,
    # Ranks reach different experts. By default each packs only the gradients it has, so that those
    # of different parameters would be added up.
    "reduce_scatter_unused_params": True,
    # The shares of the ranks add up to the record's loss; by default FSDP2 takes their mean.
    "gradient_divide_factor": 1.0,
    # gloo has no pre-multiplied sum, and NCCL's has had rounding faults.
    "force_sum_reduction_for_comms": True,
}
_SINCE_TORCH_2_13 = "reduce_scatter_unused_params"


@contextmanager
def plain_sums(model: nn.Module, degree: int) -> Iterator[None]:
    """Let FSDP2 sum every gradient of one backward pass over the ranks; then as the user had it.

    Args:
        model: The model; any of its modules may be split.
        degree: Ranks that hold one sequence together; with one, nothing is summed.
    """
    before: list[tuple[Any, dict[str, object]]] = []
    for group in _groups(model) if degree > 1 else ():
        names = [n for n in _PLAIN_SUMS if n != _SINCE_TORCH_2_13 or hasattr(group, n)]
        before.append((group, {name: getattr(group, name) for name in names}))
        for name in names:
            setattr(group, name, _PLAIN_SUMS[name])
    try:
        yield
    finally:
        for group, settings in before:
            for name, value in settings.items():
                setattr(group, name, value)


def gathered_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the whole parameters that FSDP2 lets forward passes use in place of split ones."""
    for group in _groups(model):
        for held in group.fsdp_params:
            whole = getattr(held, "_unsharded_param", None)
            if whole is not None:
                yield whole


def show_shards(model: nn.Module) -> None:
    """Let go of what was gathered, so that the model shows the parameters that are trained."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def forget_pass(model: nn.Module, owned: Iterable[Tensor]) -> None:
    """Forget a pass that an error may have stopped half-way, and all gradients.

    Args:
        model: The model.
        owned: Trainable parameters as the optimizer sees them.
    """
    # Those that are gathered too: the next backward pass would add its record's gradient to them.
    for parameter in (*owned, *(p for p in model.parameters() if p.requires_grad)):
        parameter.grad = None
    for root in _roots(model):
        begun = root._get_fsdp_state()._is_root is not None
        if begun and hasattr(root, "reset_iter_state"):  # torch 2.13
            root.reset_iter_state()


def _roots(module: nn.Module) -> Iterator[FSDPModule]:
    """Yield the outermost modules that FSDP2 splits."""
    if isinstance(module, FSDPModule):
        yield module
        return
    for child in module.children():
        yield from _roots(child)


def _groups(model: nn.Module) -> Iterator[Any]:
    """Yield what FSDP2 gathers and reduces together; torch has setters for it, but no getters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            found = getattr(state, "_fsdp_param_groups", None)
            if found is None:  # before torch 2.13 there is one, or none
                found = [group for group in [state._fsdp_param_group] if group is not None]
            yield from found
