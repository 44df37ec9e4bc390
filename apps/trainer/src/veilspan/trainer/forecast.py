"""What a run will cost in privacy, memory and time, before anything is trained."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from veilspan.accounting import EpsilonBounds, PrivacyPlan
from veilspan.core.cost import ModelShape, best_microbatch, norm_cost
from veilspan.core.head import chunk_elements
from veilspan.core.norms import BlockedKernel
from veilspan.core.rates import DeviceRates
from veilspan.trainer.budget import privacy_plan
from veilspan.trainer.data import open_heldout, open_records
from veilspan.trainer.logits import device_of
from veilspan.trainer.microbatch import Microbatch, chosen_microbatch, settled_microbatch
from veilspan.trainer.model_cost import ModelCost, count_cost
from veilspan.trainer.recipe import Recipe
from veilspan.trainer.tokenizer import load_tokenizer

EFFICIENCY = 0.5
"""Share of the speed of bare matrix products that training reaches; a round figure."""

_BENCHMARK_SECONDS = 0.3
_FP32 = 4  # bytes


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Cost of a run.

    Attributes:
        plan: Numbers that the guarantee depends on.
        epsilon: ε at the end of the run.
        num_records: Units N.
        num_heldout: Public held-out records.
        model: Cost of the model.
        microbatch: Units per forward and backward; where the recipe leaves it open, what a run
            that started here and now would choose.
        memory: Bytes of each process by purpose, tensors only.
        processes: Number of processes.
        flops_per_second: Measured speed of matrix products of one process.
        seconds: Estimated duration of all steps, when every unit has full length.
    """

    plan: PrivacyPlan
    epsilon: EpsilonBounds
    num_records: int
    num_heldout: int
    model: ModelCost
    microbatch: Microbatch
    memory: dict[str, int]
    processes: int
    flops_per_second: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers and texts."""
        return {
            "privacy": {**self.plan.to_dict(), **self.epsilon.to_dict()},
            "num_records": self.num_records,
            "num_heldout": self.num_heldout,
            "model": {name: n for name, n in asdict(self.model).items() if name != "linears"},
            "microbatch": asdict(self.microbatch),
            "memory_bytes_per_process": {**self.memory, "total": sum(self.memory.values())},
            "processes": self.processes,
            "flops_per_second_per_process": self.flops_per_second,
            "seconds": self.seconds,
        }


def make_forecast(recipe: Recipe) -> Forecast:
    """Compute the cost of a run; opens the data as a run does, builds no model, trains nothing.

    Raises:
        TrainerError: If recipe, data or model do not fit together.
    """
    tokenizer = load_tokenizer(recipe)
    records = open_records(recipe, tokenizer)
    plan = privacy_plan(recipe, records.num_units)
    heldout = open_heldout(recipe, tokenizer)
    cost = count_cost(recipe, tokenizer)
    speed = _measured_speed(recipe, cost)
    microbatch = settled_microbatch(recipe) or _chosen(recipe, plan, cost)
    return Forecast(
        plan=plan,
        epsilon=plan.epsilon(),
        num_records=records.num_units,
        num_heldout=0 if heldout is None else len(heldout),
        model=cost,
        microbatch=microbatch,
        memory=memory_forecast(recipe, cost, microbatch_size=microbatch.size),
        processes=recipe.processes,
        flops_per_second=speed,
        seconds=flops_per_sequence(recipe, cost)
        * plan.sampling_probability
        * len(records)
        * plan.steps
        / (EFFICIENCY * speed * recipe.processes),
    )


def memory_forecast(recipe: Recipe, cost: ModelCost, *, microbatch_size: int) -> dict[str, int]:
    """Return the bytes that one process needs, by purpose; tensors only.

    Parameters and everything of their shape are split over the processes that hold them together,
    tokens over those of one sequence. Whole weights exist for one block at a time, and always for
    embedding and head.
    """
    parts, ranks = recipe.shards, recipe.parallel.context
    state = _FP32 * cost.trainable // parts  # float32, whatever the model's dtype
    sequences = microbatch_size
    memory = {
        "parameters": cost.parameter_bytes // parts,
        "gradients": state * (sequences if recipe.compute.backward == "per_sample" else 1),
        "clipped sums": state,
        "optimizer": 2 * state,
        "activations": sequences * _activations(recipe, cost) // ranks,
    }
    if cost.chunked:
        memory["a chunk of logits"] = 2 * _FP32 * chunk_elements(device_of(recipe))
    else:
        memory["logits"] = 2 * sequences * cost.logits_bytes // ranks  # with their gradient
    if parts > 1:
        # Weights and gradient; embedding and head stay gathered from forward to backward pass.
        memory["gathered weights"] = 2 * (cost.block_bytes + cost.root_bytes)
    return memory


def flops_per_sequence(recipe: Recipe, cost: ModelCost) -> int:
    """Return the operations to train on one sequence of full length.

    A backward pass costs two forward passes: one for the gradient of the inputs, one for that of
    the weights, which frozen weights do not need. Recomputed activations cost one more; logits that
    never exist as a whole are computed once more.
    """
    passes = 2 + (cost.trainable == cost.parameters)
    passes += recipe.compute.checkpointing == "full"
    logits = cost.logits_bytes // cost.element_bytes if cost.chunked else 0
    return passes * cost.forward_flops + 2 * logits * cost.hidden_size


def _chosen(recipe: Recipe, plan: PrivacyPlan, cost: ModelCost) -> Microbatch:
    """Ask the cost model about a model that is not there; the run asks it about the real one."""
    device = device_of(recipe)
    rates = DeviceRates.of(device, getattr(torch, recipe.model.dtype), BlockedKernel())
    seconds = norm_cost(recipe.compute.norms, rates, probes=recipe.privacy.norm_probes or 0)

    def fastest(length: int, most: int) -> int:
        return best_microbatch(length, most, _shape(recipe, cost), rates, seconds)

    memory = memory_forecast(recipe, cost, microbatch_size=1)
    return chosen_microbatch(recipe, plan, memory, fastest, device)


def _shape(recipe: Recipe, cost: ModelCost) -> ModelShape:
    features = [inputs + outputs for inputs, outputs in cost.linears]
    groups = {"flat": 1, "block": max(1, cost.blocks)}.get(recipe.privacy.groups, len(features))
    return ModelShape(
        linears=cost.linears,
        parameters=cost.trainable,
        largest=max(inputs * outputs for inputs, outputs in cost.linears),
        features=max(*features, sum(features) // groups),
        layered=recipe.privacy.groups in ("layer", "parameter"),
        frozen=cost.parameters - cost.trainable,
        estimated=recipe.privacy.norm_probes is not None,
    )


def _activations(recipe: Recipe, cost: ModelCost) -> int:
    if recipe.compute.checkpointing == "none":
        return cost.saved_bytes
    between_blocks = cost.sequence_length * cost.hidden_size * cost.element_bytes * cost.blocks
    return between_blocks + cost.saved_bytes // max(1, cost.blocks)


def _measured_speed(recipe: Recipe, cost: ModelCost) -> float:
    """Return operations per second of one process, when all of this machine's work at once."""
    device = device_of(recipe)
    on_gpu = device.type == "cuda"
    rows, width = (4096, 4096) if on_gpu else (256, 1024)  # large ones take minutes on a CPU
    rows = max(16, min(rows, cost.sequence_length // recipe.parallel.context))
    width = min(width, cost.hidden_size)
    dtype = getattr(torch, recipe.model.dtype)
    left = torch.randn(rows, width, device=device).to(dtype)
    right = torch.randn(width, 4 * width, device=device).to(dtype)
    speed = _matmul_speed(left, right)
    if on_gpu:
        return speed
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = recipe.compute.threads or max(1, (cores or 1) // recipe.processes)
    busy = max(1.0, threads * recipe.processes / (cores or 1))
    return speed / torch.get_num_threads() * threads / busy


def _matmul_speed(left: torch.Tensor, right: torch.Tensor) -> float:
    flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
    torch.mm(left, right)  # warm-up
    _synchronize(left.device)
    products, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < _BENCHMARK_SECONDS:
        torch.mm(left, right)
        _synchronize(left.device)
        products += 1
    return products * flops / elapsed


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
