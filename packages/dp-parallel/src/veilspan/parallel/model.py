"""One model spread over the processes of a mesh."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial, wraps
from itertools import chain
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from veilspan.parallel.active import current_region
from veilspan.parallel.blocks import decoder_blocks
from veilspan.parallel.huggingface import ATTENTION_NAME
from veilspan.parallel.mesh import ParallelMesh

Axis = Literal["context", "replicate"]
Checkpointing = Literal["none", "full"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def shard_model(
    model: ModelT,
    mesh: ParallelMesh,
    *,
    axis: Axis = "context",
    checkpointing: Checkpointing = "none",
    param_dtype: torch.dtype | None = None,
) -> ModelT:
    """Prepare a whole model for training on a mesh, in place.

    In this order: every rank takes over rank 0's parameters and buffers; each decoder block is
    recomputed in the backward pass if asked for; FSDP2 splits each block, then what remains, over
    one axis of the mesh. Gradients are summed over that axis, never averaged: each rank's loss is
    its share of the record's loss. Names of modules and parameters stay as they were. Where the
    axis has one rank nothing is split.

    Call it before the model is handed to `PrivateStep` and to the optimizer.

    Args:
        model: The same architecture on every rank, parameters on `mesh.device`.
        mesh: The processes.
        axis: `"context"` splits the model over ranks that hold one sequence together; `"replicate"`
            over ranks with different records, for `ReplicaShards`.
        checkpointing: `"full"` keeps only the input of each block and computes the rest again in
            the backward pass; `"none"` keeps everything.
        param_dtype: Compute dtype, for example `torch.bfloat16`, while parameters, reductions and
            gradients keep theirs; None computes in the parameters' own dtype. Where nothing is
            split it is applied by autocast.

    Returns:
        The model.

    Raises:
        ValueError: If `axis` or `checkpointing` is unknown, the decoder blocks cannot be found or
            share parameters, a parameter is on the meta device or already split, or `param_dtype`
            is not a floating dtype.

    Guarantee:
        All ranks start from bitwise equal parameters, so replicas that apply equal updates stay
        equal.
    """
    if axis not in get_args(Axis):
        raise ValueError(f"axis is {axis!r}; it must be one of {list(get_args(Axis))}.")
    if checkpointing not in get_args(Checkpointing):
        raise ValueError(
            f"checkpointing is {checkpointing!r}; it must be one of "
            f"{list(get_args(Checkpointing))}."
        )
    if param_dtype is not None and not param_dtype.is_floating_point:
        raise ValueError(f"param_dtype is {param_dtype}; it must be a floating dtype or None.")
    _refuse_unready(model)
    blocks = decoder_blocks(model)
    _broadcast(model, mesh)
    if checkpointing == "full":
        for block in blocks:
            # FSDP2's hooks are on the call, outside of forward: a second run finds all parameters.
            _wrap_forward(block, _checkpointed)
    over = mesh.context_degree if axis == "context" else mesh.replicate_degree
    if over > 1:
        split = mesh.context_mesh if axis == "context" else mesh.replicate_mesh
        _split(model, blocks, split, param_dtype)
    elif param_dtype is not None:
        _wrap_forward(model, partial(_autocast, mesh.device_type, param_dtype))
    _refuse_wrong_inputs(model, in_parts=over > 1 and axis == "context")
    return model


def _refuse_unready(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"the parameter {name} is on the meta device; load its values first.")
        if not (type(parameter) is nn.Parameter and type(parameter.data) is Tensor):
            raise ValueError(
                f"the parameter {name} is a {type(parameter.data).__name__}; shard_model takes a "
                "model of ordinary parameters, once."
            )


def _broadcast(model: nn.Module, mesh: ParallelMesh) -> None:
    if mesh.world_size == 1:
        return
    with torch.no_grad():
        for tensor in chain(model.parameters(), model.buffers()):
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, src=0)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.copy_(whole)


def _wrap_forward(module: nn.Module, call: Callable[..., Any]) -> None:
    """Let `call(forward, *args, **kwargs)` stand in for the module's forward.

    The instance is changed, not wrapped in another module, so that the names of parameters, which
    address the noise and the checkpoint, do not depend on how the model is run.
    """
    forward = module.forward

    @wraps(forward)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return call(forward, *args, **kwargs)

    module.forward = stand_in


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a block so that the backward pass computes what is inside it again."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if kwargs.get("past_key_values") is not None:
        raise ValueError(
            "a key cache is in use while blocks are checkpointed, and the second run of a block "
            "would add its keys again; pass use_cache=False to the model when training."
        )
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _autocast(
    device_type: str, dtype: torch.dtype, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    with torch.autocast(device_type, dtype=dtype):
        return forward(*args, **kwargs)


def _split(
    model: nn.Module, blocks: nn.ModuleList, mesh: DeviceMesh, param_dtype: torch.dtype | None
) -> None:
    narrow = any(p.element_size() < 4 for p in model.parameters() if p.requires_grad)
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=torch.float32 if param_dtype is not None or narrow else None,
    )
    # Embedding and head stay together in the root group: tied weights must not be split apart.
    for module in (*blocks, model):
        # The backward pass begins with the head, which need not be freed before and gathered again.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=module is not model)
    # A forward pass that no backward pass follows must leave nothing gathered for later ones.
    model.register_forward_pre_hook(lambda *_: _let_go(model), prepend=True)
    model.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else _let_go(model))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum, and NCCL's has had rounding faults.
            module.set_force_sum_reduction_for_comms(True)


def _let_go(root: nn.Module) -> None:
    assert isinstance(root, FSDPModule)
    root.reshard()


def _refuse_wrong_inputs(model: nn.Module, *, in_parts: bool) -> None:
    """Stop what the registered attention would silently get wrong.

    Args:
        model: The model.
        in_parts: Whether the ranks hold parts of one sequence.
    """
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != ATTENTION_NAME:
        return

    signature = inspect.signature(model.forward)

    def check(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # Hugging Face's decoders take the mask as their second positional argument too.
        given = {**kwargs, **signature.bind_partial(*args, **kwargs).arguments}
        mask = given.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            raise ValueError(
                f"attention_mask hides tokens, but {ATTENTION_NAME} is causal and takes no mask: "
                "fill sequences on the right, set the labels there to the ignore index, and pass "
                "no mask."
            )
        if in_parts:
            _refuse_local_view(given)
        if given.get("position_ids") is not None:
            _refuse_packed(given["position_ids"])

    # Before FSDP2 gathers parameters, so that an error leaves nothing half-way.
    model.register_forward_pre_hook(check, with_kwargs=True, prepend=True)


def _refuse_packed(position_ids: Tensor) -> None:
    """Refuse positions that begin anew, by which Hugging Face tells several documents in a row."""
    region, tokens = current_region(), position_ids.shape[-1]
    if region is None:  # whole sequences, or what follows those in a cache
        follow = bool((position_ids.diff(dim=-1) == 1).all())
    else:
        rank = dist.get_rank(region.group)
        mine = region.layout.positions(rank, position_ids.device)
        follow = tokens != len(mine) or bool(
            (position_ids == mine).all()
        )  # attention tells lengths
    if not follow:
        raise ValueError(
            f"position_ids are not those of one sequence, but {ATTENTION_NAME} attends to "
            "everything before a token: documents that are packed into a row would see each other. "
            "Give each document a row of its own, and pass the position_ids that shard_batch "
            "returns."
        )


def _refuse_local_view(given: Mapping[str, Any]) -> None:
    """Refuse inputs of a forward pass in which a rank would take its part for a whole sequence."""
    if current_region() is None:
        if not torch.is_grad_enabled():
            return  # an evaluation of whole sequences
        raise ValueError(
            "the model was called outside of context_parallel, where each rank attends to its own "
            "tokens alone; enclose forward and backward in `with context_parallel(mesh, layout):`, "
            "or evaluate whole sequences under torch.no_grad()."
        )
    if given.get("position_ids") is None:
        raise ValueError(
            "position_ids is missing, so every rank would count from zero; pass the position_ids "
            "that shard_batch returns."
        )
    if given.get("labels") is not None:
        raise ValueError(
            "labels was given to the model, which shifts them after the cut and averages over the "
            "tokens held here; take the loss of its logits and the labels that shard_batch "
            "returns, divided by num_tokens_B."
        )
