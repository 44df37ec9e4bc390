"""Every strategy equals the per-sample autograd loop, over families, shapes and dtypes."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from veilspan.core import Automatic, Clip, Flat, PerLayer, PrivateStep
from veilspan.core.testing import Oracle, assert_step_matches_oracle
from veilspan.core.testing.conformance import assert_close, clipped_sum

TAPPED = [
    ("per_sample", "auto"),
    ("bookkeeping", "direct"),
    ("bookkeeping", "gram"),
    ("two_pass", "direct"),
    ("two_pass", "gram"),
    ("per_layer", "auto"),
]
STRATEGIES = [("single_sample", "auto"), *TAPPED]
FAMILIES = [
    "llama", "llama-tied", "llama-bias", "qwen2", "qwen3", "mistral",
    "gemma", "gemma3", "phi", "phi3", "gpt2",
]  # fmt: skip


def middle_norm(model, compute_losses, batch) -> float:
    """Return a threshold that clips half of the records."""
    return float(Oracle.of(model, compute_losses, batch, Flat(clip_norm=1.0)).norm_B.median())


def clipping_for(backward, clip_norm, rule=None):
    """Return flat clipping, or layer-wise where the strategy can do no other."""
    kind = PerLayer if backward == "per_layer" else Flat
    return kind(clip_norm=clip_norm, rule=rule or Clip())


def options_of(strategy, *, size, clip_norm, rule=None):
    """Return the arguments of the public suites for one strategy."""
    backward, norms = strategy
    return {
        "clipping": clipping_for(backward, clip_norm, rule or Clip()),
        "size": 1 if backward == "single_sample" else size,
        "backward": backward,
        "norms": norms,
    }


def assert_exact(model, losses, batch, strategy, **options):
    assert_step_matches_oracle(model, losses, batch, **options_of(strategy, **options))


def summed(model, losses, batch, strategy, **options):
    return clipped_sum(model, losses, batch, **options_of(strategy, **options))


def checkpointed(forward, reentrant):
    """Return a block's forward under activation checkpointing."""

    def run(hidden, *args, **kwargs):
        return checkpoint(partial(forward, **kwargs), hidden, *args, use_reentrant=reentrant)

    return run


@pytest.mark.usefixtures("genuine_float64")
@pytest.mark.parametrize("strategy", STRATEGIES, ids="-".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_clipped_sum_of_every_family_equals_the_oracle_in_fp64(
    family, strategy, make_model, make_batch, compute_losses
):
    model, batch = make_model(family), make_batch(3, 17)
    assert_exact(
        model,
        compute_losses,
        batch,
        strategy,
        size=3,
        clip_norm=middle_norm(model, compute_losses, batch),
    )


@pytest.mark.usefixtures("genuine_float64")
@pytest.mark.parametrize("strategy", STRATEGIES, ids="-".join)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 257])
@pytest.mark.parametrize("size", [0, 1, 2, 5])
def test_clipped_sum_of_every_shape_equals_the_oracle_in_fp64(
    size, length, strategy, make_model, make_batch, compute_losses
):
    model, batch = make_model("llama-tied", num_hidden_layers=1), make_batch(size, length)
    assert_exact(model, compute_losses, batch, strategy, size=5, clip_norm=0.5)


@pytest.mark.parametrize("strategy", STRATEGIES, ids="-".join)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_clipped_sum_equals_the_oracle_in_fp32(
    family, strategy, make_model, make_batch, compute_losses
):
    model, batch = make_model(family, dtype=torch.float32), make_batch(4, 65)
    assert_exact(
        model,
        compute_losses,
        batch,
        strategy,
        size=2,
        clip_norm=middle_norm(model, compute_losses, batch),
    )


@pytest.mark.usefixtures("genuine_float64")
@pytest.mark.parametrize("strategy", STRATEGIES, ids="-".join)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_pitfall_26_activation_checkpointing_changes_nothing(
    family, reentrant, strategy, make_model, make_batch, compute_losses
):
    model, batch = make_model(family), make_batch(3, 17)
    expected = Oracle.of(model, compute_losses, batch, clipping_for(strategy[0], 0.5))
    for block in model.model.layers if hasattr(model, "model") else model.transformer.h:
        block.forward = checkpointed(block.forward, reentrant)
    got = summed(model, compute_losses, batch, strategy, size=3, clip_norm=0.5)
    assert_close(got, expected.clipped_sum, 1e-10)


@pytest.mark.usefixtures("genuine_float64")
@pytest.mark.parametrize("strategy", STRATEGIES, ids="-".join)
def test_parts_frozen_before_attach_stay_out_of_the_norm(
    strategy, make_model, make_batch, compute_losses
):
    model, batch = make_model("llama-bias"), make_batch(3, 9)
    for name, parameter in model.named_parameters():
        if "embed" in name or "layers.0" in name or name.endswith("q_proj.weight"):
            parameter.requires_grad_(False)  # the bias of q_proj stays trainable
    assert_exact(model, compute_losses, batch, strategy, size=3, clip_norm=0.3)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("strategy", STRATEGIES, ids="-".join)
def test_peft_lora_adapters_are_clipped_exactly(strategy, make_model, make_batch, compute_losses):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(make_model("llama", dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide errors of A
                parameter.normal_()
    assert_exact(model, compute_losses, make_batch(3, 17), strategy, size=3, clip_norm=0.3)


@pytest.mark.usefixtures("genuine_float64")
@pytest.mark.parametrize("strategy", STRATEGIES, ids="-".join)
@pytest.mark.parametrize("gamma", [0.0, 0.01])
def test_automatic_clipping_equals_the_oracle(
    gamma, strategy, make_model, make_batch, compute_losses
):
    assert_exact(
        make_model("llama"),
        compute_losses,
        make_batch(3, 9),
        strategy,
        size=3,
        clip_norm=1.0,
        rule=Automatic(gamma=gamma),
    )


@pytest.mark.parametrize("strategy", STRATEGIES, ids="-".join)
def test_infinite_clip_norm_without_noise_is_ordinary_training(
    strategy, make_model, make_batch, compute_losses
):
    backward, norms = strategy
    private, plain = make_model("llama"), make_model("llama")
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (private, plain)]
    step = PrivateStep(
        private,
        clipping=clipping_for(backward, float("inf")),
        noise_multiplier=0,
        expected_batch_size=4,
        backward=backward,
        norms=norms,
    )
    for seed in range(3):
        batch = make_batch(4, 17, seed=seed)
        size = 1 if backward == "single_sample" else 2
        with step:
            for start in range(0, 4, size):
                part = {k: v[start : start + size] for k, v in batch.items()}
                step.backward(compute_losses(private, part))
        compute_losses(plain, batch).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    step.detach()
    for ours, theirs in zip(private.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sizes", [[32], [8, 8, 8, 8], [1] * 32, [0, 5, 27]])
@pytest.mark.parametrize("backward", ["per_sample", "bookkeeping", "two_pass", "per_layer"])
def test_pitfall_16_any_division_into_micro_batches_gives_the_same_sum(
    sizes, backward, make_model, make_batch, compute_losses
):
    model, batch = make_model("llama-tied", num_hidden_layers=1), make_batch(32, 5)
    clipping = clipping_for(backward, 0.5)
    expected = Oracle.of(model, compute_losses, batch, clipping)
    releases = []
    step = PrivateStep(
        model,
        clipping=clipping,
        noise_multiplier=0,
        expected_batch_size=1,
        backward=backward,
        on_release=releases.append,
    )
    with step:
        start = 0
        for size in sizes:
            part = {k: v[start : start + size] for k, v in batch.items()}
            step.backward(compute_losses(model, part) if size else torch.zeros(0))
            start += size
    step.detach()
    assert len(releases) == 1
    got = {n: p.grad for n, p in model.named_parameters()}
    assert_close(got, expected.clipped_sum, 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_bf16_model_are_those_of_its_weights_in_fp32(
    family, make_model, make_batch, compute_losses
):
    """What a module computes is found out by experiment, which bf16 must not blur."""
    model, batch = make_model(family, dtype=torch.bfloat16), make_batch(2, 12)
    exact = copy.deepcopy(model).float()
    compute_losses(exact, batch).sum().backward()
    found = summed(model, compute_losses, batch, ("per_sample", "auto"), size=2, clip_norm=1e6)
    largest = max(float(p.grad.norm()) for p in exact.parameters())
    for name, parameter in exact.named_parameters():
        off = float((found[name].float() - parameter.grad).norm())
        assert off <= 0.1 * float(parameter.grad.norm()) + 0.005 * largest, name
