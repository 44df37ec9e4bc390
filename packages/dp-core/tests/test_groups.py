"""Groups and budgets: what they cover, what they refuse, and the sensitivity they add up to."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from veilspan.core import (
    Automatic,
    ByPattern,
    Clip,
    Flat,
    PerBlock,
    PerLayer,
    PerParameter,
    PrivateQuantile,
    PrivateStep,
)
from veilspan.core.backward.passes import BookPass

SIZES = {
    "model.embed_tokens.weight": 40,
    "model.layers.0.self_attn.q_proj.weight": 16,
    "model.layers.0.self_attn.q_proj.bias": 4,
    "model.layers.0.mlp.experts.3.up.weight": 24,
    "model.layers.1.self_attn.q_proj.weight": 16,
    "model.norm.weight": 4,
    "lm_head.weight": 40,
}


@pytest.mark.parametrize("backward", ["single_sample", "per_sample", "two_pass", "per_layer"])
@pytest.mark.parametrize("clip_norm", [1e-7, 1.6e-7, 3e-7])
def test_a_factor_that_would_round_up_in_fp32_drops_its_record(backward, clip_norm):
    """The gradient is 2e38; times the fp32 number above the factor it exceeds the threshold."""
    model = nn.Linear(1, 1, bias=False)
    step = PrivateStep(
        model,
        clipping=PerLayer(clip_norm=clip_norm),
        noise_multiplier=0.0,
        expected_batch_size=1.0,
        backward=backward,
    )
    with step:
        step.backward(model(torch.full((1, 1), 2e38)).sum(1))
    assert model.weight.grad.abs().item() <= clip_norm


@pytest.mark.parametrize(
    "backward", ["single_sample", "per_sample", "bookkeeping", "two_pass", "per_layer"]
)
@pytest.mark.parametrize("scale", [1e-21, 1e-22, 3e-23, 1e-24, 1e-30])
@pytest.mark.parametrize(
    ("clip_norm", "rule"), [(1.0, Automatic(gamma=0.0)), (1e-25, Clip()), (1e-30, Clip())]
)
def test_a_norm_whose_squares_underflow_in_fp32_is_rounded_up(backward, scale, clip_norm, rule):
    torch.manual_seed(0)
    model, captured = nn.Linear(6, 4), []
    step = PrivateStep(
        model,
        clipping=(PerLayer if backward == "per_layer" else Flat)(clip_norm=clip_norm, rule=rule),
        noise_multiplier=0.0,
        expected_batch_size=1.0,
        backward=backward,
    )
    for _ in range(4):
        with step:
            step.backward(scale * model(torch.randn(1, 5, 6)).flatten(1).sum(1))
        grads = [p.grad.double().flatten() for p in model.parameters()]
        captured.append(float(torch.cat(grads).norm()))
        model.zero_grad()
    assert max(captured) <= clip_norm * (1 + 1e-7)


@pytest.mark.parametrize(
    ("clipping", "names"),
    [
        (Flat(clip_norm=1.0), ["all"]),
        (
            PerBlock(clip_norm=1.0),
            ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"],
        ),
        (
            PerLayer(clip_norm=1.0),
            [
                "model.embed_tokens",
                "model.layers.0.self_attn.q_proj",
                "model.layers.0.mlp.experts.3.up",
                "model.layers.1.self_attn.q_proj",
                "model.norm",
                "lm_head",
            ],
        ),
        (PerParameter(clip_norm=1.0), list(SIZES)),
        (
            ByPattern(clip_norm=1.0, patterns={"attention": "*.self_attn.*", "rest": "*"}),
            ["rest", "attention"],
        ),
    ],
)
def test_every_parameter_is_in_the_group_that_the_kind_says(clipping, names):
    groups = clipping.resolve(SIZES)
    assert list(groups.names) == names
    assert set(groups.index) == set(SIZES)
    members = [name for m in range(len(groups)) for name in groups.members(m)]
    assert sorted(members) == sorted(SIZES)


KINDS = [Flat, PerBlock, PerLayer, PerParameter]


@given(
    kind=st.sampled_from(KINDS),
    clip_norm=st.floats(1e-6, 1e6),
    budgets=st.sampled_from(["equal", "dimension", "given"]),
    weights=st.lists(st.floats(1e-3, 1e3), min_size=7, max_size=7),
)
def test_thresholds_always_add_up_to_the_clip_norm(kind, clip_norm, budgets, weights):
    names = kind(clip_norm=clip_norm).resolve(SIZES).names
    chosen = dict(zip(names, weights, strict=False)) if budgets == "given" else budgets
    groups = kind(clip_norm=clip_norm, budgets=chosen).resolve(SIZES)
    assert groups.sensitivity == pytest.approx(clip_norm, rel=1e-14)
    assert math.fsum(c * c for c in groups.clip_norms) <= clip_norm**2 * (1 + 1e-13)


def test_budgets_by_dimension_grow_with_the_root_of_the_group():
    groups = PerParameter(clip_norm=1.0, budgets="dimension").resolve({"a": 1, "b": 9})
    assert groups.clip_norms[1] / groups.clip_norms[0] == pytest.approx(3.0)


def test_given_budgets_whose_squares_add_up_are_the_thresholds_themselves():
    budgets = {"a": 0.3, "b": 0.4}
    groups = PerParameter(clip_norm=0.5, budgets=budgets).resolve({"a": 1, "b": 9})
    assert dict(zip(groups.names, groups.clip_norms, strict=True)) == pytest.approx(budgets)


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names():
    clipping = ByPattern(clip_norm=1.0, patterns={"head": "lm_heads.weight", "rest": "*"})
    with pytest.raises(ValueError, match=r"matches no .*Nearest.*lm_head\.weight"):
        clipping.resolve(SIZES)


def test_a_parameter_outside_of_all_patterns_is_refused_by_name():
    clipping = ByPattern(clip_norm=1.0, patterns={"attention": ["*.self_attn.*", "*.mlp.*"]})
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' is in no"):
        clipping.resolve(SIZES)


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ({"al": 1.0}, r"names group 'al'.*Nearest names: all"),
        ({}, "no number for group 'all'"),
        ({"all": 0.0}, r"budgets\['all'\] is 0.0"),
        ("even", "budgets is 'even'"),
    ],
)
def test_budgets_that_do_not_fit_the_groups_are_refused(budgets, message):
    with pytest.raises(ValueError, match=message):
        Flat(clip_norm=1.0, budgets=budgets).resolve(SIZES)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_norm_that_is_not_positive_is_refused_for_every_kind(kind, clip_norm):
    with pytest.raises(ValueError, match="clip_norm is"):
        kind(clip_norm=clip_norm)


def attach(model, **options):
    settings: dict[str, Any] = {"noise_multiplier": 0.0, "expected_batch_size": 1.0}
    return PrivateStep(model, **(settings | options))


@pytest.mark.parametrize("clipping", [Flat(clip_norm=1.0), PerBlock(clip_norm=1.0)])
def test_per_layer_refuses_groups_that_reach_beyond_a_layer(clipping):
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="every group must end within a layer"):
        attach(model, clipping=clipping, backward="per_layer")


def test_pitfall_12_layerwise_thresholds_share_one_sensitivity_and_one_noise():
    model = nn.Sequential(nn.Linear(300, 300, bias=False), nn.Linear(300, 300, bias=False))
    releases = []
    step = attach(
        model,
        clipping=PerLayer(clip_norm=2.0),
        noise_multiplier=1.5,
        on_release=releases.append,
        backward="per_layer",
    )
    with step:
        pass
    assert releases[0].sensitivity == pytest.approx(2.0)
    for parameter in model.parameters():
        assert parameter.grad.std().item() == pytest.approx(3.0, rel=0.02)


@pytest.mark.parametrize("rule", [Clip(), Automatic(gamma=0.0)])
def test_pitfall_12_one_record_stays_within_the_total_in_every_grouping(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x = 1e3 * torch.randn(1, 5, dtype=torch.float64)
    for kind in KINDS:
        step = attach(model, clipping=kind(clip_norm=0.5, rule=rule), backward="bookkeeping")
        with step:
            step.backward(model(x).square().sum(1))
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
        model.zero_grad()
        step.detach()
        assert norm <= 0.5
        if kind is Flat:
            assert norm == pytest.approx(0.5, rel=1e-6)


def within_norms(norms, quantile, **options):
    """Run adaptive steps on records whose gradients have the given norms; return the step."""
    model = nn.Linear(1, 1, bias=False)
    step = attach(
        model,
        clipping=Flat(clip_norm=1.0, adaptive=quantile),
        expected_batch_size=float(len(norms)),
        backward="per_sample",
        **options,
    )
    for _ in range(60):
        with step:
            step.backward((model(torch.tensor(norms)[:, None])).sum(1))
        model.zero_grad()
    return step


def test_an_adaptive_threshold_finds_the_quantile_of_the_norms():
    step = within_norms([float(n) for n in range(1, 101)], PrivateQuantile(quantile=0.8))
    assert step.sensitivity == pytest.approx(80.0, rel=0.05)


def test_pitfall_18_the_threshold_is_constant_within_a_logical_batch_and_moves_after_it():
    model = nn.Linear(1, 1, bias=False)
    step = attach(
        model,
        clipping=Flat(clip_norm=1.0, adaptive=PrivateQuantile()),
        expected_batch_size=2.0,
        backward="per_sample",
    )
    with step:
        for _ in range(2):
            step.backward(model(torch.full((1, 1), 50.0)).sum(1))
            assert step.sensitivity == 1.0
    assert model.weight.grad.item() == pytest.approx(1.0, rel=1e-5)  # both clipped to 1
    assert step.sensitivity == pytest.approx(math.exp(0.2 * 0.5))  # nobody was within


def test_pitfall_18_counts_and_gradients_are_one_gaussian_mechanism():
    quantile = PrivateQuantile(share=0.04)
    releases = []
    model = nn.Linear(400, 300, bias=False)
    step = attach(
        model,
        clipping=PerLayer(clip_norm=2.0, adaptive=quantile),
        noise_multiplier=1.5,
        on_release=releases.append,
    )
    with step:
        pass
    release = releases[0]
    sensitivity_of_counts = math.sqrt(1) / 2
    inverse = (
        release.gradient_noise_multiplier**-2 + (release.count_stddev / sensitivity_of_counts) ** -2
    )
    assert inverse == pytest.approx(1.5**-2)
    spread = model.weight.grad.std().item()
    assert spread == pytest.approx(2.0 * release.gradient_noise_multiplier, rel=0.01)


def test_pitfall_18_an_adaptive_threshold_is_noised_and_survives_a_restart():
    first = within_norms([1.0, 5.0], PrivateQuantile(learning_rate=0.05), noise_multiplier=1.0)
    without = within_norms([1.0, 5.0], PrivateQuantile(learning_rate=0.05))
    assert first.sensitivity != without.sensitivity
    model = nn.Linear(1, 1, bias=False)
    again = attach(model, clipping=Flat(clip_norm=1.0, adaptive=PrivateQuantile()))
    again.load_state_dict(first.state_dict())
    assert (again.next_step, again.sensitivity) == (60, first.sensitivity)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantile": 1.0}, "quantile is 1.0"),
        ({"share": 0.0}, "share is 0.0"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
    ],
)
def test_a_private_quantile_outside_of_its_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PrivateQuantile(**options)


def test_adaptive_thresholds_refuse_a_rule_without_threshold():
    with pytest.raises(ValueError, match="no threshold that norms stay below"):
        Flat(clip_norm=1.0, rule=Automatic(), adaptive=PrivateQuantile())


def most_held(clipping, backward, monkeypatch):
    """Return the most output gradients alive when a layer hands over its own."""
    seen, counts, receive = [], [], BookPass.receive

    def count(self, use):
        seen.append(StorageWeakRef(use.grad_output.untyped_storage()))
        counts.append(sum(not storage.expired() for storage in seen))
        receive(self, use)

    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(6)]
    model = nn.Sequential(*layers)
    step = PrivateStep(
        model, clipping=clipping, noise_multiplier=0, expected_batch_size=1, backward=backward
    )
    with step, monkeypatch.context() as patch:
        patch.setattr(BookPass, "receive", count)
        step.backward(model(torch.randn(1, 5, 8)).square().flatten(1).sum(1))
    assert len(counts) == 12
    return max(counts)


def test_a_group_that_ends_early_lets_go_of_its_tensors(monkeypatch):
    """There are 12 layers in 6 blocks, and every output gradient is of one size."""
    assert most_held(Flat(clip_norm=1.0), "bookkeeping", monkeypatch) == 12
    assert most_held(PerBlock(clip_norm=1.0), "bookkeeping", monkeypatch) == 2
    assert most_held(PerLayer(clip_norm=1.0), "bookkeeping", monkeypatch) == 1
    assert most_held(PerLayer(clip_norm=1.0), "per_layer", monkeypatch) == 1


@pytest.mark.parametrize("kind", [Flat, PerBlock, PerLayer, PerParameter, ByPattern])
def test_the_help_of_each_kind_tells_of_every_argument(kind):
    text = inspect.getdoc(kind) or ""
    for name in inspect.signature(kind).parameters:
        assert re.search(rf"^ +([\w, ]+, )?{name}(, [\w, ]+)?: ", text, re.MULTILINE), name
