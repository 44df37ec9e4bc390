"""The private step on every mesh of a world: what was found, property by property."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from kit import (
    CLIP_NORM,
    KEY,
    LENGTH,
    RECORDS,
    add_records,
    every_pair,
    full,
    llama,
    losses_of,
    oracle,
    private_step,
    relative,
    whole,
)
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from veilspan.core import (
    Flat,
    GaussianNoise,
    PerBlock,
    PerLayer,
    PrivacyError,
    PrivateQuantile,
    Release,
    UnsupportedModelError,
    fsdp,
    new_key,
    poisson_batches,
)
from veilspan.core.support import preflight
from veilspan.parallel import (
    ContextShards,
    Layout,
    ParallelMesh,
    build_mesh,
    context_parallel,
    register_attention,
    shard_model,
)
from veilspan.parallel.testing import rank_main

MESHES = {1: [(1, 1)], 2: [(1, 2), (2, 1)], 4: [(1, 4), (2, 2)]}


class Wide(nn.Module):
    """About 10⁶ parameters in rows that divide by 4, for statistics of noise alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(500, 500) for _ in range(4))

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        return inputs


def clipped_sums(mesh: ParallelMesh) -> dict[str, float]:
    """Relative error of the clipped sum against the per-sample loop, per case."""
    errors = {}
    mine = list(range(RECORDS))[mesh.replicate_rank :: mesh.replicate_degree]
    expected = [oracle(tied, range(RECORDS)) for tied in (False, True)]
    for tied, kind, checkpointing, dtype in every_pair(
        (False, True),
        ("contiguous", "zigzag"),
        ("none", "full"),
        (torch.float64, torch.float32),
    ):
        model = llama(dtype, register_attention(), tied=tied)
        step = private_step(shard_model(model, mesh, checkpointing=checkpointing), mesh)
        layout = Layout(length=LENGTH, ranks=mesh.context_degree, kind=kind)
        add_records(step, mesh, layout, mine)
        case = f"tied={tied} {kind} {checkpointing} {dtype}"
        errors[case] = relative(whole(step), expected[tied])
    return errors


def uneven(mesh: ParallelMesh) -> dict[str, float]:
    """Replicas with different numbers of records, also none; a record that is not finite."""
    layout = Layout(length=LENGTH, ranks=mesh.context_degree)
    step = private_step(shard_model(llama(torch.float64, register_attention()), mesh), mesh)
    first = mesh.replicate_rank == 0
    found = {}
    four_and_one = [0, 1, 2, 3] + [4] * (mesh.replicate_degree > 1)
    add_records(step, mesh, layout, [0, 1, 2, 3] if first else [4])
    found["four and one"] = relative(whole(step), oracle(False, four_and_one))
    step.model.zero_grad()
    add_records(step, mesh, layout, [0, 4] if first else [])
    found["two and none"] = relative(whole(step), oracle(False, [0, 4]))
    step.model.zero_grad()
    add_records(step, mesh, layout, [0, 1, 4] if first else [], poison=1)
    found["not finite"] = relative(whole(step), oracle(False, [0, 4]))
    step.model.zero_grad()
    with torch.no_grad(), context_parallel(mesh, layout):
        losses_of(step.model, mesh, layout, 0)  # an evaluation between two steps
    add_records(step, mesh, layout, [1] if first else [])
    length = torch.stack([x.square().sum() for x in whole(step).values()]).sum().sqrt()
    found["aligned parts"] = length.item() / CLIP_NORM
    return found


def choices(mesh: ParallelMesh) -> dict[str, Any]:
    """Groups against the per-sample loop, exact sums bit by bit, adaptive thresholds per rank."""
    layout = Layout(length=LENGTH, ranks=mesh.context_degree)
    mine = list(range(RECORDS))[mesh.replicate_rank :: mesh.replicate_degree]

    def step_with(**options: Any) -> Any:
        step = private_step(
            shard_model(llama(torch.float64, register_attention()), mesh), mesh, **options
        )
        add_records(step, mesh, layout, mine)
        return step

    errors = {}
    for clipping in (PerLayer(clip_norm=CLIP_NORM), PerBlock(clip_norm=CLIP_NORM)):
        found = whole(step_with(clipping=clipping))
        errors[type(clipping).__name__] = relative(found, oracle(False, range(RECORDS), clipping))
    exact = torch.cat([x.flatten() for x in whole(step_with(accumulate="exact")).values()])
    adaptive = step_with(
        clipping=PerLayer(clip_norm=CLIP_NORM, adaptive=PrivateQuantile()),
        noise_multiplier=1.0,
        noise=GaussianNoise(KEY),
    )
    return {
        "errors": errors,
        "exact digest": hashlib.sha256(exact.numpy().tobytes()).hexdigest(),
        "thresholds": adaptive.state_dict()["clip_norms"],
    }


def naive_norm_ratio(mesh: ParallelMesh) -> float:
    """The norm by adding the squares of the ranks, as a naive port would, over the true norm."""
    model = llama(torch.float64, register_attention())
    layout = Layout(length=LENGTH, ranks=mesh.context_degree)
    with context_parallel(mesh, layout):
        losses_of(model, mesh, layout, 1).sum().backward()
    part = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    squares = ContextShards(mesh).sum_scalars(part.square().sum())
    if mesh.context_degree > 1:
        dist.all_reduce(part, group=mesh.context_group)
    return (squares.sqrt() / part.norm()).item()


def noise(mesh: ParallelMesh) -> dict[str, Any]:
    """The gradient of an empty batch is noise alone."""
    torch.manual_seed(0)
    step = private_step(
        shard_model(Wide(), mesh), mesh, noise_multiplier=3.0, noise=GaussianNoise(KEY)
    )
    with step:
        pass
    gradients = {name: x.flatten() for name, x in whole(step).items()}
    everything = torch.cat(list(gradients.values()))
    weights = [x for name, x in gradients.items() if name.endswith("weight")]
    parts = [part for x in weights for part in x.chunk(4)]  # what each of 4 ranks would hold
    correlation = torch.corrcoef(torch.stack(parts)) - torch.eye(len(parts))
    return {
        "digest": hashlib.sha256(everything.numpy().tobytes()).hexdigest(),
        "std over sigma C": everything.std().item() / (3.0 * CLIP_NORM),
        "draws": everything.numel(),
        "correlation": correlation.abs().max().item() * math.sqrt(len(parts[0])),
    }


def twenty_steps(mesh: ParallelMesh) -> dict[str, Any]:
    """Train on Poisson draws; each replica takes its share of every draw."""
    layout = Layout(length=LENGTH, ranks=mesh.context_degree, kind="zigzag")
    model = shard_model(llama(torch.float64, register_attention(), tied=True), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = private_step(
        model, mesh, noise_multiplier=0.5, expected_batch_size=2.0, noise=GaussianNoise(KEY)
    )
    sizes = []
    for draw in poisson_batches(RECORDS, 0.4, 20, key=KEY):
        mine = draw.share(mesh.replicate_rank, mesh.replicate_degree)
        sizes.append(len(draw))
        add_records(step, mesh, layout, mine.records.tolist())
        optimizer.step()
        optimizer.zero_grad()
    local = [ContextShards(mesh).local(p).detach() for p in model.parameters()]
    return {
        "digest": hashlib.sha256(b"".join(x.numpy().tobytes() for x in local)).hexdigest(),
        "parameters": [full(p.detach()).norm().item() for p in model.parameters()],
        "sizes": sizes,
    }


def empty_draws(mesh: ParallelMesh) -> dict[str, Any]:
    """200 draws of which nine in ten are empty: each is a release, with noise."""
    torch.manual_seed(0)
    releases = []
    linear = nn.Linear(8, 4)
    model = shard_model(nn.Sequential(nn.ModuleList([linear])), mesh)
    step = private_step(
        model,
        mesh,
        noise_multiplier=1.0,
        noise=GaussianNoise(KEY),
        on_release=lambda release: releases.append(release.step),
    )
    pure, empty = [], 0
    for draw in poisson_batches(10, 0.01, 200, key=KEY):
        share = draw.share(mesh.replicate_rank, mesh.replicate_degree)
        with step:
            for _ in share.records:
                step.backward(linear(torch.ones(1, 8)).sum(dim=1) / mesh.context_degree)
        if len(draw) == 0:
            empty += 1
            pure.append(torch.cat([x.flatten() for x in whole(step).values()]))
        model.zero_grad()
    return {
        "releases": releases == list(range(200)),
        "empty": empty,
        "std over sigma C": torch.cat(pure).std().item() / CLIP_NORM,
    }


class Routed(nn.Module):
    """Experts that are modules of their own: each serves the tokens of one sign."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x_BTI: Tensor) -> Tensor:
        first = x_BTI[..., 0] > 0
        outputs = torch.zeros_like(x_BTI)
        for served, expert in zip((first, ~first), self.experts, strict=True):
            if served.any():
                outputs[served] = expert(x_BTI[served])
        return outputs


def routed(mesh: ParallelMesh) -> float:
    """Relative error where the tokens of each rank reach other experts of the same size."""
    torch.manual_seed(0)
    block, x_BTI = Routed().double(), torch.randn(1, 8, 8).double()
    x_BTI[:, :4, 0], x_BTI[:, 4:, 0] = 1.0, -1.0
    (mesh.replicate_degree * block(x_BTI).square().sum()).backward()
    model = nn.Sequential(nn.ModuleList([block]))
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    step = private_step(shard_model(model, mesh), mesh, clipping=Flat(clip_norm=1e6))
    layout = Layout(length=8, ranks=mesh.context_degree)
    with step:
        part = layout.take(x_BTI, mesh.context_rank, 1)
        step.backward(block(part).square().sum((1, 2)))
    return relative(whole(step), expected)


def routed_or_refused(mesh: ParallelMesh) -> float | str:
    """The same, or what is said by a torch before 2.13."""
    try:
        return routed(mesh)
    except UnsupportedModelError as error:
        return str(error)


def routed_by_an_older_torch(mesh: ParallelMesh) -> float | str:
    """The same where FSDP2 reduces only what each rank has, as it did before torch 2.13."""
    settings, name = fsdp._PLAIN_SUMS, fsdp._SINCE_TORCH_2_13
    kept = settings.pop(name)
    try:
        return routed_or_refused(mesh)
    finally:
        settings[name] = kept


def settings_of_others(mesh: ParallelMesh) -> dict[str, Any]:
    """FSDP2 as its user left it: means over ranks, and no reduction but of the last gradient."""
    layout = Layout(length=LENGTH, ranks=mesh.context_degree)
    model = llama(torch.float64, register_attention())
    split = [*model.model.layers, model] if mesh.context_degree > 1 else []
    for module in split:
        fully_shard(module, mesh=mesh.context_mesh)
    wide = Flat(clip_norm=1e6)  # a mean would be clipped to the same length
    step = private_step(model, mesh, clipping=wide)
    records = [0, 1, 4]
    with step, context_parallel(mesh, layout):
        for record in records if mesh.replicate_rank == 0 else ():
            for module in split:
                module.set_requires_gradient_sync(record == records[-1])
            step.backward(losses_of(model, mesh, layout, record))
    groups = [module._get_fsdp_state()._fsdp_param_group for module in split]
    return {
        "error": relative(whole(step), oracle(False, records, wide)),
        "restored": all(
            group.gradient_divide_factor is None
            and not group.force_sum_reduction_for_comms
            and not getattr(group, "reduce_scatter_unused_params", False)
            for group in groups
        ),
    }


def refusals(mesh: ParallelMesh) -> dict[str, str]:
    """What must not get as far as a step: a model nobody sharded, replicas that would part."""
    model = shard_model(Wide(), mesh)
    return {
        "unsharded": said(lambda: private_step(Wide(), mesh)),
        "own noise": said(lambda: private_step(model, mesh, noise_multiplier=1.0)),
        "no reduction": said(lambda: private_step(model, mesh, reduction=None)),
    }


class Failing(torch.autograd.Function):
    """Fails in one of the passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, where: str) -> Tensor:
        if where == "forward":
            raise ArithmeticError(where)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ArithmeticError("backward")


def after_errors(mesh: ParallelMesh) -> dict[str, float]:
    """Relative error of the batch after one that failed half-way through a pass, on all ranks."""
    layout, found = Layout(length=LENGTH, ranks=mesh.context_degree), {}
    for where in ("forward", "backward"):
        step = private_step(shard_model(llama(torch.float64, register_attention()), mesh), mesh)

        def fail(_: Any, __: Any, output: Any, where: str = where) -> Any:
            return (Failing.apply(output[0], where), *output[1:])

        handle = step.model.model.layers[0].self_attn.register_forward_hook(fail)
        with contextlib.suppress(ArithmeticError):
            add_records(step, mesh, layout, [1])
        handle.remove()
        add_records(step, mesh, layout, [0] if mesh.replicate_rank == 0 else [])
        found[where] = relative(whole(step), oracle(False, [0]))
    return found


def after_a_forward_pass(mesh: ParallelMesh) -> dict[str, Any]:
    """A step built while FSDP2 still holds parameters gathered; then one of them is frozen."""
    layout = Layout(length=LENGTH, ranks=mesh.context_degree)
    model = shard_model(llama(torch.float64, register_attention()), mesh)
    with context_parallel(mesh, layout):
        losses_of(model, mesh, layout, 1)  # no backward pass follows
    step = private_step(model, mesh)
    add_records(step, mesh, layout, [0] if mesh.replicate_rank == 0 else [])
    error = relative(whole(step), oracle(False, [0]))
    model.zero_grad()
    model.lm_head.weight.requires_grad_(False)
    return {"error": error, "frozen": said(step.__enter__)}


def parted(mesh: ParallelMesh) -> dict[str, str]:
    """What is said where ranks are about to release different things; the ledger must not hear."""
    released: list[Release] = []
    other: dict[str, dict[str, Any]] = {
        "the key of noise": {"noise": GaussianNoise(new_key())},
        "noise_multiplier": {"noise_multiplier": 1.0 + mesh.rank},
        "the thresholds of clipping": {"clipping": Flat(clip_norm=1.0 + mesh.rank)},
        "the step": {"first_step": mesh.rank},
        "expected_batch_size": {"expected_batch_size": 1.0 + mesh.rank},
    }
    found = {}
    for name, options in other.items():
        common = {"noise_multiplier": 1.0, "noise": GaussianNoise(KEY)}
        model = shard_model(nn.Sequential(nn.ModuleList([nn.Linear(8, 4)])), mesh)
        step = private_step(model, mesh, on_release=released.append, **{**common, **options})
        found[name] = said(step.__enter__) + said(lambda step=step: step.__exit__(None, None, None))
    return {**found, "released": str(len(released))}


def failed_alone(mesh: ParallelMesh) -> list[str]:
    """What is said where a batch failed on one replica alone, whose loop goes on to the next.

    Before it, one replica alone runs the preflight, which is no failure.
    """
    if mesh.replicate_degree == 1:
        return []
    layer, released, first = nn.Linear(8, 4), [], mesh.replicate_rank == 0
    model = shard_model(nn.Sequential(nn.ModuleList([layer])), mesh)
    step = private_step(model, mesh, on_release=released.append)

    def losses_of(_: nn.Module, batch: Any) -> Tensor:
        return layer(batch["x"]).sum(dim=1) / mesh.context_degree

    def one_batch(*, fails: bool = False) -> None:
        with contextlib.suppress(ArithmeticError), step:
            if fails:
                raise ArithmeticError
            step.backward(losses_of(model, {"x": torch.ones(1, 8)}))
        model.zero_grad()

    if first:
        preflight(step, losses_of, {"x": torch.randn(2, 8)})
    one_batch()
    if first:
        one_batch(fails=True)
    return [said(one_batch), str(len(released))]


def own_thresholds(mesh: ParallelMesh) -> list[float]:
    """Adaptive thresholds of ranks that were given neither a key nor replicas."""
    if mesh.replicate_degree > 1:
        return []
    step = private_step(
        shard_model(Wide(), mesh),
        mesh,
        clipping=PerLayer(clip_norm=CLIP_NORM, adaptive=PrivateQuantile()),
        noise_multiplier=1.0,
        expected_batch_size=1000.0,  # so large that the noise takes no count out of its range
        reduction=None,
    )
    with step:
        pass
    return list(step.state_dict()["clip_norms"].values())


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, PrivacyError) as error:
        return str(error)
    return "nothing was raised"


def split_over_replicas(mesh: ParallelMesh) -> list[str]:
    """What each strategy says of FSDP2 over ranks that hold different records."""
    model, said = Wide(), []
    assert mesh.device_mesh is not None
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh.device_mesh["replicate"])
    for backward in ("auto", "single_sample", "per_sample", "bookkeeping", "two_pass", "per_layer"):
        try:
            private_step(model, mesh, backward=backward, clipping=PerLayer(clip_norm=CLIP_NORM))
            said.append("nothing was raised")
        except ValueError as error:
            said.append(str(error))
    return said


def body(arguments: list[str]) -> dict[str, Any]:
    keep_float64()
    found = {}
    for replicate, context in MESHES[dist.get_world_size()]:
        mesh = build_mesh(replicate=replicate, context=context)
        found[f"{replicate}x{context}"] = {
            "rank": [mesh.replicate_rank, mesh.context_rank],
            "clipped sums": clipped_sums(mesh),
            "uneven": uneven(mesh),
            "choices": choices(mesh),
            "naive norm": naive_norm_ratio(mesh),
            "noise": noise(mesh),
            "twenty steps": twenty_steps(mesh),
            "empty draws": empty_draws(mesh),
            "routed": routed_or_refused(mesh),
            "routed by an older torch": routed_by_an_older_torch(mesh),
            "settings of others": settings_of_others(mesh),
            "refusals": refusals(mesh),
            "after a forward pass": after_a_forward_pass(mesh),
            "parted": parted(mesh),
            "after errors": after_errors(mesh),
            "failed alone": failed_alone(mesh),
            "own thresholds": own_thresholds(mesh),
            "split over replicas": split_over_replicas(mesh) if replicate > 1 else [],
        }
    return found


def keep_float64() -> None:
    """Keep fp64 models in fp64 where their layers ask for fp32, so that 1e-10 is a fair test."""
    to = Tensor.to

    def wide_to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked = (*args, kwargs.get("dtype"))
        narrow = self.dtype is torch.float64 and any(a is torch.float32 for a in asked)
        return self if narrow else to(self, *args, **kwargs)

    Tensor.to = wide_to
    Tensor.float = lambda self: wide_to(self, torch.float32)


if __name__ == "__main__":
    rank_main(body)
