"""Estimated norms: equal to what the very probes say of the per-sample gradients, and no less."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from veilspan.core import (
    Automatic,
    Flat,
    GaussianNoise,
    NormLaw,
    PerBlock,
    PerLayer,
    PrivateQuantile,
    PrivateStep,
    Sketch,
    UnsupportedModelError,
)
from veilspan.core.contributions import Lookups, OuterProducts, RowSums
from veilspan.core.formed import Formed, Recomputed
from veilspan.core.head import fused_causal_lm_losses
from veilspan.core.measures import Measure
from veilspan.core.measures import common_key as fresh_key
from veilspan.core.norms import BlockedKernel
from veilspan.core.plan import StrategyPlan
from veilspan.core.products import compute_dtype
from veilspan.core.reduction import LocalShards
from veilspan.core.survey import trainable_parameters
from veilspan.core.testing import Oracle
from veilspan.core.testing.conformance import assert_close, clipped_sum
from veilspan.core.testing.oracle import batch_size, per_sample_gradients, take

KEY = bytes(range(32))
STRATEGIES = ["two_pass", "bookkeeping", "per_layer"]
PROBES, BLOCKS = 8, 2


def sketch(probes=PROBES, blocks=BLOCKS):
    return Sketch(probes=probes, blocks=blocks, stream=GaussianNoise(KEY))


@pytest.fixture(autouse=True)
def _known_names(monkeypatch):
    """Let probes have names that a test can repeat."""
    monkeypatch.setattr("veilspan.core.measures.common_key", lambda shards, device: KEY)


@pytest.fixture
def always_estimate(monkeypatch):
    """Estimate every linear map that has more rows and columns than probes, however small."""
    monkeypatch.setattr(StrategyPlan, "sketch_pays", lambda self, *shape: self.probes > 0)


def drawn(name, parameter, size, micro_batch, probes):
    """Return the probes that the records of one micro-batch have for one parameter."""
    columns = parameter.numel() // len(parameter)
    values = torch.zeros((columns, size, probes), dtype=torch.float64)
    GaussianNoise(KEY).add_(
        values, stddev=1.0, step=micro_batch, name=f"probes/{KEY.hex()}/{name}", offset=0
    )
    return values.transpose(0, 1)


def expected_sum(model, losses, batch, clipping, *, size, exact=(), probes=PROBES, blocks=BLOCKS):
    """Return the sum whose factors follow from formed gradients times the probes themselves."""
    owned = trainable_parameters(model)
    groups = clipping.resolve({name: p.numel() for name, p in owned.items()})
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in owned.items()}
    for number, start in enumerate(range(0, batch_size(batch), size)):
        rows = take(batch, start, start + size)
        gradients = per_sample_gradients(model, losses, rows)
        draws = {n: drawn(n, p, len(gradients), number, probes) for n, p in owned.items()}
        for b, gradient in enumerate(gradients):
            for group in range(len(groups)):
                estimate = torch.zeros(blocks, dtype=torch.float64)
                members = groups.members(group)
                for name in members:
                    grad, p = gradient[name].double(), owned[name]
                    if name in exact or p.ndim < 2 or min(grad.flatten(1).shape) <= probes:
                        estimate += grad.square().sum()
                    else:
                        sq_k = (grad.flatten(1) @ draws[name][b]).square().sum(0)
                        estimate += sq_k.view(blocks, -1).mean(1)
                factor = groups.factors(group, estimate.max()[None], slack=0.0)[0]
                for name in members:
                    total[name] += factor * gradient[name].double()
    return total


def embedding_of(family):
    """Return the embedding whose exact norm is cheap, unless the head shares it."""
    return () if family in ("llama-tied", "gpt2", "gemma") else ("model.embed_tokens.weight",)


def clipping_of(strategy, clip_norm=0.3):
    kind = PerLayer if strategy == "per_layer" else Flat
    return kind(clip_norm=clip_norm, rule=Automatic(gamma=0.0))


# What is clipped


@pytest.mark.usefixtures("genuine_float64", "always_estimate")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-bias", "qwen3", "gpt2", "phi"])
def test_factors_are_those_of_the_gradients_times_the_probes(
    family, strategy, make_model, make_batch, compute_losses
):
    model, batch = make_model(family), make_batch(3, 17)
    if strategy == "per_layer" and family in ("llama-tied", "gpt2"):
        clipping = PerBlock(clip_norm=0.3, rule=Automatic(gamma=0.0))
        strategy = "bookkeeping"  # a tied layer does not end within itself
    else:
        clipping = clipping_of(strategy)
    exact = embedding_of(family)
    exact += ("transformer.wpe.weight",) if family == "gpt2" else ()
    expected = expected_sum(model, compute_losses, batch, clipping, size=2, exact=exact)
    got = clipped_sum(
        model, compute_losses, batch, clipping=clipping, size=2, backward=strategy, norms=sketch()
    )
    assert_close(got, expected, 1e-10)


@pytest.mark.usefixtures("genuine_float64", "always_estimate")
@pytest.mark.parametrize("strategy", ["two_pass", "bookkeeping"])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_fused_head_is_estimated_without_its_gradient(
    family, strategy, make_model, make_batch, compute_losses
):
    def losses(model, batch):
        return fused_causal_lm_losses(model, batch["ids"], batch["labels"], chunk=4)

    model, batch, clipping = make_model(family), make_batch(3, 9), clipping_of(strategy)
    expected = expected_sum(model, losses, batch, clipping, size=3, exact=embedding_of(family))
    got = clipped_sum(
        model, losses, batch, clipping=clipping, size=3, backward=strategy, norms=sketch()
    )
    assert_close(got, expected, 1e-10)


@pytest.mark.usefixtures("always_estimate")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_are_estimated_in_fp32(dtype, make_model, make_batch, compute_losses):
    """Guards for rounding only lengthen the norm, by a trifle."""
    model, batch = make_model("llama", dtype=dtype), make_batch(2, 33)
    clipping, exact = clipping_of("two_pass"), embedding_of("llama")
    expected = expected_sum(model, compute_losses, batch, clipping, size=2, exact=exact)
    got = clipped_sum(
        model, compute_losses, batch, clipping=clipping, size=2, backward="two_pass", norms=sketch()
    )
    assert_close(got, expected, 1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.usefixtures("genuine_float64")
@pytest.mark.parametrize("strategy", ["two_pass", "bookkeeping"])
def test_weights_with_no_more_rows_than_probes_stay_exact(
    strategy, make_model, make_batch, compute_losses
):
    model, batch = make_model("llama-tied"), make_batch(3, 17)
    clipping = Flat(clip_norm=0.3)
    exact = Oracle.of(model, compute_losses, batch, clipping)
    got = clipped_sum(
        model,
        compute_losses,
        batch,
        clipping=clipping,
        size=3,
        backward=strategy,
        norms=sketch(probes=64, blocks=4),
    )
    assert_close(got, exact.clipped_sum, 1e-10)


@pytest.mark.parametrize("size", [0, 1, 5])
@pytest.mark.parametrize("length", [1, 2, 65])
def test_every_size_and_length_is_served(
    size, length, make_model, make_batch, compute_losses, always_estimate
):
    model, batch = make_model("llama-tied", num_hidden_layers=1), make_batch(size, length)
    clipping = clipping_of("two_pass")
    expected = expected_sum(model, compute_losses, batch, clipping, size=5)
    got = clipped_sum(
        model, compute_losses, batch, clipping=clipping, size=5, backward="two_pass", norms=sketch()
    )
    assert_close(got, expected, 1e-5)  # RMSNorm of the models computes in fp32


# Kinds of contributions


def contributions(b=3, t=7, i=6, o=5):
    """Return one of each kind, with its per-sample gradients as matrices, `[B, R, N]`."""
    torch.manual_seed(0)
    act, grad = torch.randn(b, t, i).double(), torch.randn(b, t, o).double()
    ids = torch.randint(0, o, (b, t))
    formed = tuple(torch.randn(o, i).double() for _ in range(b))
    rows = torch.randn(b, t, o).double()
    kernel = BlockedKernel()
    yield OuterProducts(act_BTI=act, grad_BTO=grad, kernel=kernel), grad.mT @ act
    table = nn.functional.one_hot(ids, o).double().mT @ act
    yield Lookups(ids_BT=ids, grad_BTD=act, rows=o, kernel=kernel), table
    yield RowSums(rows_BTn=rows), rows.sum(1)[:, :, None]
    yield Formed(gradients=formed), torch.stack(formed)
    yield Recomputed(size=b, form=lambda k: formed[k]), torch.stack(formed)


@pytest.mark.parametrize("position", range(5))
def test_each_kind_projects_its_own_gradient(position):
    part, gradient = list(contributions())[position]
    probes = torch.randn(3, gradient.shape[2], 4).double()
    found = part.project(probes)
    torch.testing.assert_close(found.values_BRk, gradient @ probes)
    assert part.size == 3
    assert (found.size_B >= gradient.flatten(1).norm(dim=1) * (1 - 1e-12)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs", "count"), [(300, 290, 64), (1030, 7, 1), (5, 4, 0)])
def test_a_projection_is_the_same_in_one_piece_and_in_rows(inputs, outputs, count, dtype):
    """Shapes that a few rows at a time do not divide, and no probe at all."""
    act, grad = torch.randn(2, 9, inputs).to(dtype), torch.randn(2, 9, outputs).to(dtype)
    part = OuterProducts(act_BTI=act, grad_BTO=grad, kernel=BlockedKernel())
    probes = torch.randn(2, inputs, count, dtype=compute_dtype(dtype))
    expected = grad.double().mT @ (act.double() @ probes.double())
    found = part.project(probes).values_BRk
    assert found.dtype == probes.dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
    back = part.transposed().project(found).values_BRk
    expected = act.double().mT @ (grad.double() @ found.double())
    torch.testing.assert_close(back.double(), expected, rtol=1e-4, atol=2e-2)


@pytest.mark.parametrize("size", [1, 3])
def test_an_estimate_holds_nothing_as_tall_as_the_weight(size, largest):
    """The largest tensor is activations times probes; probes and projections come in pieces."""
    length, inputs, outputs, probes = 24, 900, 1000, 32
    part = OuterProducts(
        act_BTI=torch.randn(size, length, inputs),
        grad_BTO=torch.randn(size, length, outputs),
        kernel=BlockedKernel(),
    )
    measure = Measure(
        choose=lambda *shape: "direct",
        owned={"w": nn.Parameter(torch.zeros(outputs, inputs))},
        shards=LocalShards(),
        sketch=sketch(probes, 4),
        pays=lambda *shape: True,
    )
    measure.begin()
    with largest:
        values = measure.sq_norms("w", part).values_Bb
    assert largest.elements <= size * max(8192, length * probes) < size * probes * inputs
    drawn_BNk = drawn("w", torch.zeros(outputs, inputs), size, 0, probes).float()
    sq_Bk = (part.per_sample() @ drawn_BNk).square().sum(1).double()
    torch.testing.assert_close(values, sq_Bk.unflatten(1, (4, -1)).mean(2), rtol=1e-4, atol=0)


def test_terms_that_cancel_are_guarded_for_their_rounding():
    """A gradient of zero out of large terms: what is left of them is noise, and may not pass."""
    act = torch.randn(1, 8, 32).repeat(1, 2, 1)
    grad = torch.randn(1, 8, 24)
    part = OuterProducts(
        act_BTI=act, grad_BTO=torch.cat([grad, -grad], dim=1), kernel=BlockedKernel()
    )
    owned = {"w": nn.Parameter(torch.zeros(24, 32))}
    measure = Measure(
        choose=lambda *shape: "direct",
        owned=owned,
        shards=LocalShards(),
        sketch=sketch(),
        pays=lambda *shape: True,
    )
    measure.begin()
    size = float((act.norm(dim=2) * torch.cat([grad, grad], dim=1).norm(dim=2)).sum())
    found = measure.sq_norms("w", part)
    assert found.rounding_B is not None
    assert (found.rounding_B.sqrt() >= 1e-7 * size).all()


def test_the_bound_on_rounding_is_added_to_the_norm_not_to_its_square(always_estimate):
    """What is left of a gradient after cancellation is clipped as if rounding had shortened it."""
    step = rank_one_step(norms=sketch(blocks=1))
    x = torch.ones(1, 1001, 16)
    x[:, 1::2] = -1.0  # the gradient is that of one token, its terms are those of 1001
    gradient, size = torch.ones(16, 16).double(), 1001 * 4.0 * 4.0
    probes = drawn("map.weight", gradient, 1, 0, PROBES)[0]
    estimate = float((gradient @ probes).square().sum(0).mean().sqrt())
    bound = 8 * math.sqrt(1001 + 16) * torch.finfo(torch.float32).eps / 2 * size
    assert bound > 0.01 * estimate
    assert contributions_of(step, x) == pytest.approx(16 / (estimate + bound), rel=1e-4)


# Randomness


class Rows(nn.Module):
    """A record's gradient has rank one, and is as long as the record says."""

    def __init__(self, width=16):
        super().__init__()
        self.map = nn.Linear(width, width, bias=False)

    def forward(self, x_BTI):
        return self.map(x_BTI).sum((1, 2))


def length_of(step):
    """Return the norm of the sum that was released without noise, and forget it."""
    (weight,) = step.parameters.values()
    norm = float(weight.grad.double().norm())
    weight.grad = None
    return norm


def contributions_of(step, x_BTI):
    """Return the norm of the sum of one logical batch without noise."""
    with step:
        step.backward(step.model(x_BTI))
    return length_of(step)


def rank_one_step(**options):
    torch.manual_seed(0)
    return PrivateStep(
        Rows(),
        clipping=Flat(clip_norm=1.0),
        noise_multiplier=0.0,
        expected_batch_size=1,
        **({"norms": sketch(), "backward": "two_pass"} | options),
    )


@pytest.mark.usefixtures("always_estimate")
def test_pitfall_58_probes_are_fresh_for_every_record_micro_batch_and_attempt():
    step, record = rank_one_step(), 1e4 * torch.ones(1, 1, 16)
    seen = [contributions_of(step, record) for _ in range(3)]
    with pytest.raises(RuntimeError, match="stop"), step:  # nothing of it was released
        step.backward(step.model(record))
        raise RuntimeError("stop")
    seen.append(contributions_of(step, record))
    with step:
        for _ in range(2):
            step.backward(step.model(record))
    twice = length_of(step)
    together = contributions_of(step, record.expand(2, 1, 16))
    assert len({round(value, 9) for value in seen}) == 4
    halves = [seen[0] * 2, twice, together]
    assert len({round(value, 9) for value in halves}) == 3
    assert step.next_step == 6


@pytest.mark.usefixtures("always_estimate")
@pytest.mark.parametrize("stream", [None, GaussianNoise(KEY)])
def test_pitfall_58_two_steps_never_have_the_same_probes(stream, monkeypatch):
    """Neither one after the other, nor on replicas whose records differ, whatever the stream."""
    monkeypatch.setattr("veilspan.core.measures.common_key", fresh_key)
    record = 1e4 * torch.ones(1, 1, 16)
    wanted = Sketch(probes=8, blocks=2, stream=stream)
    steps = [rank_one_step(norms=wanted) for _ in range(2)]
    assert contributions_of(steps[0], record) != contributions_of(steps[1], record)


@pytest.mark.usefixtures("always_estimate")
@pytest.mark.parametrize(("blocks", "mean"), [(1, 1.0), (2, 1.375)])
def test_an_estimate_has_the_mean_of_the_largest_block(blocks, mean):
    step, record = rank_one_step(norms=sketch(blocks=blocks)), 1e4 * torch.ones(1, 1, 16)
    # the record is clipped, so its contribution is the norm over its estimate
    estimates = [contributions_of(step, record) ** -2 for _ in range(400)]
    assert sum(estimates) / len(estimates) == pytest.approx(mean, abs=0.1)


@pytest.mark.usefixtures("always_estimate")
def test_a_record_that_is_not_finite_is_dropped_and_one_of_zeros_adds_zero():
    step = rank_one_step()
    bad = torch.ones(3, 2, 16)
    bad[0] = math.nan
    bad[1] = 0.0
    with step:
        step.backward(step.model(bad))
    assert 0 < length_of(step) < 3
    assert contributions_of(step, torch.zeros(2, 2, 16)) == 0.0


# The law, and what it does not cover


def test_the_release_tells_the_law_of_its_norms(make_model, make_batch, compute_losses):
    releases = []
    model = make_model("llama", dtype=torch.float32)
    for clipping, groups in ((Flat(clip_norm=1.0), 1), (PerBlock(clip_norm=1.0), 5)):
        step = PrivateStep(
            model,
            clipping=clipping,
            noise_multiplier=1.0,
            expected_batch_size=2,
            norms=Sketch(probes=32, blocks=4),
            on_release=releases.append,
        )
        with step:
            step.backward(compute_losses(model, make_batch(2, 9)))
        step.detach()
        model.zero_grad()
        law = NormLaw(probes=32, blocks=4, probes_shared=False, groups=groups)
        assert releases[-1].norms == law
    step = PrivateStep(
        model,
        clipping=clipping,
        noise_multiplier=1.0,
        expected_batch_size=2,
        on_release=releases.append,
    )
    with step:
        pass
    assert releases[-1].norms is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backward": "per_sample"}, "forms every gradient"),
        ({"backward": "single_sample"}, "forms every gradient"),
        ({"clipping": PerLayer(clip_norm=1.0, budgets="dimension")}, "equal thresholds"),
        (
            {"clipping": Flat(clip_norm=1.0, adaptive=PrivateQuantile(quantile=0.5))},
            "depend on the estimates",
        ),
    ],
)
def test_what_no_law_covers_is_refused(options, message, make_model):
    model = make_model("llama")
    with pytest.raises((ValueError, UnsupportedModelError), match=message):
        PrivateStep(
            model,
            **(
                {
                    "clipping": Flat(clip_norm=1.0),
                    "noise_multiplier": 1.0,
                    "expected_batch_size": 2,
                    "norms": Sketch(),
                }
                | options
            ),
        )


@pytest.mark.parametrize("numbers", [{"blocks": 3}, {"probes": 0}, {"blocks": 0}, {"probes": 2.5}])
def test_numbers_that_make_no_sketch_are_refused(numbers):
    with pytest.raises(ValueError, match=r"probes|blocks"):
        Sketch(**numbers)
