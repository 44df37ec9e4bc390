"""Losses from a chunk of logits at a time: when, and that they are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from veilspan.core import Flat, PrivateStep
from veilspan.trainer import logits
from veilspan.trainer.data import Batch
from veilspan.trainer.errors import ModelError
from veilspan.trainer.forecast import flops_per_sequence, memory_forecast
from veilspan.trainer.logits import chunks_logits
from veilspan.trainer.model_cost import count_cost
from veilspan.trainer.models import build_model
from veilspan.trainer.processes import Processes
from veilspan.trainer.recipe import Recipe
from veilspan.trainer.sequences import SequenceLosses
from veilspan.trainer.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
LENGTH, BYTES = 64, 64 * 259 * 4  # of the logits of one unit


@pytest.fixture
def recipe(tmp_path: Path, recipe_in: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """Make a recipe with a wish for its logits."""
    return lambda wish="auto", **keys: recipe_in(tmp_path, compute__logits=wish, **keys)


@pytest.mark.parametrize(
    ("free", "wish", "parallel", "chunked"),
    [
        (17 * BYTES, "auto", {}, False),
        (15 * BYTES, "auto", {}, True),
        (31 * BYTES, "auto", {"parallel__replicate": 2}, True),  # the processes share the memory
        (15 * BYTES, "auto", {"parallel__context": 2}, True),  # the memory, and the tokens
        (15 * BYTES, "whole", {}, False),
        (10**15, "chunked", {}, True),
    ],
)
def test_free_memory_decides_where_the_recipe_does_not(
    monkeypatch, recipe, free: int, wish: str, parallel: dict[str, int], chunked: bool
):
    monkeypatch.setattr(logits, "free_bytes", lambda device: free)
    settings = recipe(wish, **parallel)
    assert chunks_logits(settings, build_model(settings, TOKENIZER)) is chunked
    assert count_cost(settings, TOKENIZER).chunked is chunked


def test_a_head_that_is_more_than_a_linear_map_keeps_its_logits(monkeypatch, recipe):
    monkeypatch.setattr(logits, "free_bytes", lambda device: 0)
    lora = {"model__lora": {"rank": 2, "target_modules": ["lm_head"]}}
    model = build_model(recipe(**lora), TOKENIZER)
    assert not chunks_logits(recipe(**lora), model)
    with pytest.raises(ModelError, match=r'compute\.logits is "chunked".*"whole" or "auto"'):
        chunks_logits(recipe("chunked", **lora), model)


def test_scaled_logits_are_chunked_unless_the_weights_are_split(monkeypatch, recipe):
    monkeypatch.setattr(logits, "free_bytes", lambda device: 0)
    model = build_model(recipe(), TOKENIZER)
    config: Any = model.config
    config.logits_scaling = 8.0
    assert chunks_logits(recipe(), model)
    split = recipe(parallel__context=2)
    assert not chunks_logits(split, model)
    config.logits_scaling = 1.0
    assert chunks_logits(split, model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backward", ["single_sample", "per_sample", "bookkeeping", "two_pass"])
def test_clipped_sums_are_those_of_whole_logits(recipe, dtype: str, backward: str):
    settings = recipe(model__dtype=dtype)
    processes = Processes(device=torch.device("cpu"))
    ids = torch.randint(259, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[1, 40:] = -100
    labels[2] = -100

    def clipped(chunked: bool) -> list[torch.Tensor]:
        model = build_model(settings, TOKENIZER)
        losses = SequenceLosses(settings, processes, chunked=chunked)
        step = PrivateStep(
            model,
            clipping=Flat(clip_norm=1.0),
            noise_multiplier=0.0,
            expected_batch_size=1.0,
            backward=backward,
        )
        size = 1 if backward == "single_sample" else 3
        with step:
            for rows in torch.arange(3).split(size):
                batch = Batch(input_ids=ids[rows], labels=labels[rows])
                step.backward(losses.losses_B(model, batch))
        return [p.grad.flatten() for p in model.parameters() if p.grad is not None]

    whole, chunked = (torch.cat(clipped(each)) for each in (False, True))
    rounding = 1e-5 if dtype == "float32" else 3e-2
    assert (whole - chunked).norm() <= rounding * whole.norm()


def test_the_forecast_holds_a_chunk_and_computes_logits_twice(recipe):
    whole, chunked = recipe("whole"), recipe("chunked")
    one, other = (count_cost(settings, TOKENIZER) for settings in (whole, chunked))
    assert "logits" in memory_forecast(whole, one, microbatch_size=1)
    forecasts = [memory_forecast(chunked, other, microbatch_size=size) for size in (1, 4)]
    assert all("logits" not in forecast for forecast in forecasts)
    assert len({forecast["a chunk of logits"] for forecast in forecasts}) == 1
    extra = flops_per_sequence(chunked, other) - flops_per_sequence(whole, one)
    assert extra == 2 * LENGTH * 259 * 32


def test_what_else_follows_the_head_is_refused_with_the_key_to_set(recipe):
    settings = recipe("chunked")
    model = build_model(settings, TOKENIZER)
    model.register_forward_hook(
        lambda _m, _args, output: setattr(output, "logits", -(output.logits**2))
    )
    losses = SequenceLosses(settings, Processes(device=torch.device("cpu")), chunked=True)
    ids = torch.zeros((1, 8), dtype=torch.int64)
    with pytest.raises(ModelError, match=r'after its head.*compute\.logits = "whole"'):
        losses.losses_B(model, Batch(input_ids=ids, labels=ids))
