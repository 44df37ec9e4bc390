"""The bridge to Opacus: same numbers where Opacus is right, bounded where it is not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from veilspan.core.opacus import use_veilspan_norms
from veilspan.core.testing import per_sample_gradients

pytest.importorskip("opacus")
grad_sample = pytest.importorskip("opacus.grad_sample")
optimizers = pytest.importorskip("opacus.optimizers")
clipping_utils = pytest.importorskip("opacus.utils.fast_gradient_clipping_utils")

pytestmark = pytest.mark.filterwarnings(  # raised by Opacus' own hooks
    "ignore:Full backward hook is firing:UserWarning"
)
CLIP_NORM = 0.3
RTOL, ATOL = 2e-5, 1e-7  # fp32 rounding


class RootMeanSquare(nn.Module):
    """An RMSNorm as Hugging Face writes it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class TokenModel(nn.Module):
    """Every family of layers, tokens in, one vector a token out."""

    def __init__(self, *, padding_idx=None):
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=padding_idx)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 9)
        self.rms = nn.RMSNorm(9)
        self.down = nn.Linear(9, 6, bias=False)
        self.custom = RootMeanSquare(6)

    def forward(self, ids):
        return self.custom(self.down(self.rms(self.up(self.norm(self.embed(ids))).tanh())))


def square_losses(model, batch):
    output = model(batch["x"])
    return output.square().flatten(1).mean(1) if len(output) else output.flatten()


def engine_of(model, **options):
    options = {"strict": False, "max_grad_norm": CLIP_NORM} | options
    return grad_sample.GradSampleModuleFastGradientClipping(copy.deepcopy(model), **options)


def ghost_gradient(engine, losses, batch):
    """Return norms and clipped mean of one batch by Opacus' ghost clipping, without noise."""
    parameters = [p for p in engine.parameters() if p.requires_grad]
    optimizer = optimizers.DPOptimizerFastGradientClipping(
        torch.optim.SGD(parameters, lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=CLIP_NORM,
        expected_batch_size=4,
    )
    losses_B = losses(engine, batch)
    clipping_utils.DPTensorFastGradientClipping(engine, optimizer, losses_B).backward()
    optimizer.pre_step()
    return engine.per_sample_gradient_norms, [p.grad.clone() for p in parameters]


def true_norms(model, losses, batch):
    gradients = per_sample_gradients(model, losses, batch)
    squares = [[g.double().square().sum() for g in one.values()] for one in gradients]
    return torch.tensor(squares).sum(1).sqrt()


def assert_same_clipping(model, losses, batch, **options):
    theirs = engine_of(model)
    ours = engine_of(model)
    use_veilspan_norms(ours, **options)
    their_norms, their_gradient = ghost_gradient(theirs, losses, batch)
    our_norms, our_gradient = ghost_gradient(ours, losses, batch)
    torch.testing.assert_close(our_norms, their_norms, rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=RTOL, atol=ATOL)
    assert (their_norms > CLIP_NORM).any()


@pytest.fixture
def tokens():
    """Return ids with repeated tokens."""
    torch.manual_seed(0)
    return {"x": torch.randint(0, 11, (4, 13))}


@pytest.mark.parametrize("norms", ["auto", "direct", "gram"])
def test_norms_and_clipped_gradients_equal_opacus_on_tokens(tokens, norms):
    torch.manual_seed(0)
    assert_same_clipping(TokenModel(), square_losses, tokens, norms=norms)


@pytest.mark.parametrize("shape", [(4, 5), (1, 5), (4, 7, 5)])
def test_norms_and_clipped_gradients_equal_opacus_on_an_mlp(shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3))
    assert_same_clipping(model, square_losses, {"x": 3 * torch.randn(shape)})


def test_the_batch_may_be_the_second_dimension():
    torch.manual_seed(0)
    model, batch = nn.Linear(5, 3), {"x": 3 * torch.randn(7, 4, 5)}

    def losses(model, batch):
        return model(batch["x"]).square().mean((0, 2))

    found = []
    for bridged in (False, True):
        engine = engine_of(model, batch_first=False)
        if bridged:
            use_veilspan_norms(engine)
        found.append(ghost_gradient(engine, losses, batch)[0])
    torch.testing.assert_close(found[1], found[0], rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen3", "phi"])
def test_norms_and_clipped_gradients_equal_opacus_on_transformers(
    make_model, make_batch, compute_losses, family
):
    model = make_model(family, dtype=torch.float32)
    assert_same_clipping(model, compute_losses, make_batch(3, 17))


def test_layers_of_transformers_all_take_a_rule_of_ours(make_model):
    engine = engine_of(make_model("llama", dtype=torch.float32))
    bridge = use_veilspan_norms(engine)
    assert set(bridge.layers.values()) == {"linear", "embedding", "norm"}
    assert bridge.layers["model.layers.0.input_layernorm"] == "norm"
    assert "lm_head" in bridge.explain()


def test_frozen_parameters_have_no_norm(tokens):
    model = TokenModel()
    for parameter in (model.embed.weight, model.up.weight, model.norm.bias):
        parameter.requires_grad_(False)
    assert_same_clipping(model, square_losses, tokens)


def test_pitfall_23_padding_idx_receives_no_gradient(tokens):
    model = TokenModel(padding_idx=0)
    tokens["x"][:, ::2] = 0
    engine = engine_of(model)
    use_veilspan_norms(engine)
    norms, _ = ghost_gradient(engine, square_losses, tokens)
    expected = true_norms(model, square_losses, tokens)
    torch.testing.assert_close(norms.double(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("norms", ["direct", "gram"])
@pytest.mark.parametrize(
    ("kind", "options"), [(nn.Linear, {"bias": False}), (nn.Linear, {}), (nn.LayerNorm, {})]
)
def test_pitfall_20_tokens_that_cancel_stay_bounded(kind, options, norms):
    """One repeated token whose output gradients all but cancel, at a large scale."""
    torch.manual_seed(0)
    model = kind(*[16] * (2 if kind is nn.Linear else 1), **options)
    row, push = torch.randn(16), 2.0**20 * torch.randn(8, 1, 16)
    batch = {"x": row.expand(8, 2, 16), "weight": torch.cat([push, -push * (1 + 1e-6)], dim=1)}

    def losses(model, batch):
        return (model(batch["x"]) * batch["weight"]).flatten(1).sum(1)

    expected = true_norms(model, losses, batch)
    theirs, ours = engine_of(model), engine_of(model)
    use_veilspan_norms(ours, norms=norms)
    wrong, _ = ghost_gradient(theirs, losses, batch)
    right, _ = ghost_gradient(ours, losses, batch)
    if kind is nn.Linear:
        assert (wrong < 0.5 * expected).any(), "Opacus no longer loses these norms"
    assert (right.double() >= expected * (1 - 1e-6)).all()
    for b in range(8):
        one = {name: value[b : b + 1] for name, value in batch.items()}
        _, gradient = ghost_gradient(ours, losses, one)
        added = torch.cat([g.flatten() for g in gradient]).double().norm() * 4
        assert added <= CLIP_NORM * (1 + 1e-6)


def test_pitfall_2_an_empty_batch_with_an_embedding_is_a_step():
    empty = {"x": torch.zeros(0, 13, dtype=torch.long)}
    model = TokenModel()
    with pytest.raises(RuntimeError):
        ghost_gradient(engine_of(model), square_losses, empty)
    engine = engine_of(model)
    use_veilspan_norms(engine)
    norms, gradient = ghost_gradient(engine, square_losses, empty)
    assert norms.shape == (0,)
    assert not any(g.any() for g in gradient)


def test_pitfall_19_norms_of_bf16_models_are_formed_in_fp32(tokens):
    torch.manual_seed(0)
    model = TokenModel().bfloat16()
    engine = engine_of(model)
    use_veilspan_norms(engine)
    norms, _ = ghost_gradient(engine, square_losses, tokens)
    assert norms.dtype == torch.float32


def test_pitfall_19_a_bf16_norm_never_falls_below_that_of_the_products():
    torch.manual_seed(0)
    model = nn.Linear(64, 48, bias=False).bfloat16()
    batch = {"x": torch.randn(32, 33, 64).bfloat16()}
    weights = torch.randn(32, 33, 48).bfloat16()

    def losses(model, batch):
        return (model(batch["x"]) * weights).float().flatten(1).sum(1)

    expected = (weights.double().mT @ batch["x"].double()).flatten(1).norm(dim=1)
    theirs, ours = engine_of(model, loss_reduction="sum"), engine_of(model, loss_reduction="sum")
    use_veilspan_norms(ours)
    for engine in (theirs, ours):
        losses(engine, batch).sum().backward()
    assert (theirs.get_norm_sample().double() < expected * (1 - 1e-4)).any()
    assert (ours.get_norm_sample().double() >= expected * (1 - 1e-6)).all()
    torch.testing.assert_close(ours.get_norm_sample().double(), expected, rtol=1e-5, atol=0)


def test_autocast_norms_are_those_of_the_products_that_autocast_formed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 3))
    batch = {"x": 4 * torch.randn(4, 9, 16)}

    def losses(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(batch["x"])
        return output.float().square().flatten(1).mean(1)

    engine = engine_of(model)
    use_veilspan_norms(engine)
    norms, _ = ghost_gradient(engine, losses, batch)
    expected = true_norms(model, square_losses, batch)
    torch.testing.assert_close(norms.double(), expected, rtol=0.02, atol=0)


def test_inputs_of_four_dimensions_and_norms_without_bias_work():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8, bias=False))
    batch = {"x": torch.randn(3, 2, 4, 5)}
    engine = engine_of(model)
    use_veilspan_norms(engine)
    norms, _ = ghost_gradient(engine, square_losses, batch)
    expected = true_norms(model, square_losses, batch)
    torch.testing.assert_close(norms.double(), expected, rtol=2e-5, atol=0)


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.norm(self.norm(x).tanh()))


def test_a_norm_that_is_used_twice_keeps_working():
    torch.manual_seed(0)
    assert_same_clipping(Reused(), square_losses, {"x": 4 * torch.randn(3, 7, 5)})


class Gate(nn.Module):
    """A gain around a trainable child: Opacus samples the two as one layer."""

    def __init__(self):
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(5)), nn.Linear(5, 5)

    def forward(self, x):
        return self.inner(x) * self.weight


def test_a_layer_around_trainable_layers_keeps_the_rule_of_opacus():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), Gate())
    bridge = use_veilspan_norms(engine_of(model))
    assert bridge.layers == {"0": "linear", "1": "opacus"}
    assert_same_clipping(model, square_losses, {"x": 3 * torch.randn(3, 7, 5)})


def test_recurrent_layers_keep_the_rule_of_opacus():
    torch.manual_seed(0)

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = pytest.importorskip("opacus.layers").DPLSTM(5, 4, batch_first=True)
            self.out = nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.lstm(x)[0])

    model = Recurrent()
    bridge = use_veilspan_norms(engine_of(model))
    cells = {rule for name, rule in bridge.layers.items() if name.startswith("lstm")}
    assert (bridge.layers["out"], cells) == ("linear", {"opacus"})
    assert_same_clipping(model, square_losses, {"x": 9 * torch.randn(3, 7, 5)})


@pytest.mark.parametrize("norms", ["auto", "direct", "gram"])
def test_no_tensor_holds_a_pair_of_tokens(norms, largest):
    torch.manual_seed(0)
    length, model = 1500, nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    batch = {"x": torch.randn(2, length, 6)}
    found = {}
    for name, engine in {"theirs": engine_of(model), "ours": engine_of(model)}.items():
        if name == "ours":
            use_veilspan_norms(engine, norms=norms)
        with type(largest)() as watch:
            ghost_gradient(engine, square_losses, batch)
        found[name] = watch.elements
    assert found["theirs"] == 2 * length**2
    assert found["ours"] <= max(2 * 256**2, 2 * length * 6)
