"""The bridge leaves Opacus as it was: training, other engines, accountants and refusals."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from veilspan.core import (
    Flat,
    PrivacyError,
    PrivateStep,
    Sketch,
    UnsupportedModelError,
    new_key,
    poisson_batches,
)
from veilspan.core.opacus import opacus_accountant, use_veilspan_norms

opacus = pytest.importorskip("opacus")
grad_sample = pytest.importorskip("opacus.grad_sample")
optimizers = pytest.importorskip("opacus.optimizers")
accountants = pytest.importorskip("opacus.accountants")
clipping_utils = pytest.importorskip("opacus.utils.fast_gradient_clipping_utils")

pytestmark = [  # raised by Opacus' own hooks and generator
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning"),
]
CLIP_NORM = 0.3
REGISTRIES = ("NORM_SAMPLERS", "GRAD_SAMPLERS")


class Classifier(nn.Sequential):
    """Tokens in, one vector a record out."""

    def __init__(self):
        super().__init__(nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 9), nn.RMSNorm(9))

    def forward(self, input):
        return super().forward(input).mean(1)


def engine_of(model, **options):
    options = {"max_grad_norm": CLIP_NORM} | options
    return grad_sample.GradSampleModuleFastGradientClipping(copy.deepcopy(model), **options)


def test_no_other_engine_changes_and_remove_undoes_everything():
    hooks = grad_sample.GradSampleHooksFastGradientClipping
    registries = {name: dict(getattr(hooks, name)) for name in REGISTRIES}
    ours, other = engine_of(Classifier()), engine_of(Classifier())
    before = set(vars(ours))
    bridge = use_veilspan_norms(ours)
    assert ours.NORM_SAMPLERS[nn.Linear] is not registries["NORM_SAMPLERS"][nn.Linear]
    assert ours.GRAD_SAMPLERS[nn.Conv1d] is registries["GRAD_SAMPLERS"][nn.Conv1d]
    for name, registry in registries.items():
        assert getattr(hooks, name) == registry
        assert getattr(other, name) is getattr(hooks, name)
    bridge.remove()
    bridge.remove()
    assert set(vars(ours)) == before
    with use_veilspan_norms(ours):
        assert ours.NORM_SAMPLERS is not hooks.NORM_SAMPLERS
    assert all(getattr(ours, name) is getattr(hooks, name) for name in REGISTRIES)


def test_a_sampler_that_the_user_registered_stays(monkeypatch):
    engine = engine_of(Classifier())

    def mine(layer, activations, backprops):
        raise AssertionError

    monkeypatch.setitem(engine.NORM_SAMPLERS, nn.Linear, mine)
    bridge = use_veilspan_norms(engine)
    assert engine.NORM_SAMPLERS[nn.Linear] is mine
    assert bridge.layers == {"0": "embedding", "1": "norm", "2": "opacus", "3": "norm"}
    later = type("Later", (nn.Module,), {})
    monkeypatch.setitem(type(engine).GRAD_SAMPLERS, later, mine)
    assert engine.GRAD_SAMPLERS[later] is mine


def test_a_layer_added_under_the_bridge_is_refused():
    engine = engine_of(Classifier())
    use_veilspan_norms(engine)
    engine.remove_hooks()
    engine._module[2] = nn.Linear(6, 9)
    engine.add_hooks()
    for parameter in engine._module[2].parameters():
        parameter._forward_counter = 0
    output = engine(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(UnsupportedModelError, match="Linear was added"):
        output.sum().backward()


def private_parts(model, *, noise_multiplier=0.0, records=40, batch_size=8, **options):
    """Return what `make_private` returns for random tokens; loader and optimizer included."""
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (records, 13))
    data = torch.utils.data.TensorDataset(ids, torch.randint(0, 6, (records,)))
    engine = opacus.PrivacyEngine(accountant="rdp")
    parts = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        criterion=nn.CrossEntropyLoss(),
        data_loader=torch.utils.data.DataLoader(data, batch_size=batch_size),
        noise_multiplier=noise_multiplier,
        max_grad_norm=CLIP_NORM,
        grad_sample_mode="ghost",
        **options,
    )
    return engine, parts


@pytest.mark.parametrize("wrap_model", [True, False])
def test_training_by_make_private_is_the_same_with_the_bridge(wrap_model):
    torch.manual_seed(1)
    start, trained = Classifier(), []
    for bridged in (False, True):
        model = copy.deepcopy(start)
        _, (module, optimizer, criterion, loader) = private_parts(
            model, noise_multiplier=1.0, wrap_model=wrap_model
        )
        if bridged:
            use_veilspan_norms(module)
        torch.manual_seed(2)  # the same draws and the same noise
        forward = module if wrap_model else model
        for ids, labels in loader:
            criterion(forward(ids), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-5)


def test_pitfall_2_empty_draws_of_make_private_are_steps():
    model, sizes = Classifier(), []
    engine, parts = private_parts(model, noise_multiplier=1.0, batch_size=1)
    module, optimizer, criterion, loader = parts
    use_veilspan_norms(module)
    torch.manual_seed(2)
    for ids, labels in loader:
        criterion(module(ids), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        sizes.append(len(ids))
    assert 0 in sizes
    assert sum(steps for _, _, steps in engine.accountant.history) == len(sizes)
    assert all(p.isfinite().all() for p in model.parameters())


def test_flat_clipping_of_a_private_step_trains_like_opacus_ghost_clipping():
    torch.manual_seed(1)
    model = Classifier()
    twin, rows = copy.deepcopy(model), torch.randint(0, 11, (10, 8, 13))
    labels = torch.randint(0, 6, (10, 8))
    engine = engine_of(model)
    use_veilspan_norms(engine)
    optimizer = optimizers.DPOptimizerFastGradientClipping(
        torch.optim.SGD(engine.parameters(), lr=0.5),
        noise_multiplier=0.0,
        max_grad_norm=CLIP_NORM,
        expected_batch_size=8,
    )
    step = PrivateStep(
        twin,
        clipping=Flat(clip_norm=CLIP_NORM),
        noise_multiplier=0.0,
        expected_batch_size=8,
    )
    sgd, curves = torch.optim.SGD(twin.parameters(), lr=0.5), {"opacus": [], "veilspan": []}
    for ids, targets in zip(rows, labels, strict=True):
        losses_B = F.cross_entropy(engine(ids), targets, reduction="none")
        clipping_utils.DPTensorFastGradientClipping(engine, optimizer, losses_B).backward()
        optimizer.step()
        optimizer.zero_grad()
        curves["opacus"].append(losses_B.mean().item())
        with step:
            losses_B = F.cross_entropy(twin(ids), targets, reduction="none")
            step.backward(losses_B)
        sgd.step()
        sgd.zero_grad()
        curves["veilspan"].append(losses_B.mean().item())
    torch.testing.assert_close(curves["veilspan"], curves["opacus"], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        list(twin.parameters()), list(engine.parameters()), rtol=1e-4, atol=1e-6
    )
    assert (engine.per_sample_gradient_norms > CLIP_NORM).any()


@pytest.mark.parametrize("name", ["rdp", "prv"])
def test_the_accountant_counts_the_epsilon_that_opacus_counts_itself(name):
    steps, sigma, q = 6, 1.1, 0.2
    accountant, reference = (accountants.create_accountant(name) for _ in range(2))
    model = nn.Linear(3, 1)
    step = PrivateStep(
        model,
        clipping=Flat(clip_norm=1.0),
        noise_multiplier=sigma,
        expected_batch_size=20 * q,
        on_release=opacus_accountant(accountant, sampling_probability=q),
    )
    records = torch.randn(20, 3)
    for draw in poisson_batches(20, q, steps, key=new_key()):
        with step:
            for part in draw.microbatches(4):
                step.backward(model(records[part]).square().sum(1))
        model.zero_grad()
        reference.step(noise_multiplier=sigma, sample_rate=q)
    assert accountant.history == reference.history
    assert accountant.get_epsilon(1e-5) == reference.get_epsilon(1e-5)


def test_pitfall_57_the_accountant_of_opacus_refuses_estimated_norms():
    accountant, model = accountants.RDPAccountant(), nn.Linear(3, 1)
    step = PrivateStep(
        model,
        clipping=Flat(clip_norm=1.0),
        noise_multiplier=1.0,
        expected_batch_size=4,
        norms=Sketch(),
        on_release=opacus_accountant(accountant, sampling_probability=0.2),
    )
    with pytest.raises(PrivacyError, match="Norms are estimated"), step:
        step.backward(model(torch.randn(2, 3)).square().sum(1))
    assert accountant.history == []
    assert model.weight.grad is None


@pytest.mark.parametrize("mode", ["GradSampleModule", "GradSampleModuleFastGradientClipping"])
def test_a_model_that_opacus_still_holds_is_refused_by_a_private_step(mode):
    """Its hooks failed inside of the first micro-batch, with an error of their own."""
    wrapped = getattr(grad_sample, mode)(nn.Linear(3, 3))
    options = {"clipping": Flat(clip_norm=1.0), "noise_multiplier": 1.0, "expected_batch_size": 4}
    with pytest.raises(UnsupportedModelError, match=f"{mode}.*to_standard_module"):
        PrivateStep(wrapped, **options)
    PrivateStep(wrapped.to_standard_module(), **options).detach()


def test_the_accountant_of_a_privacy_engine_is_that_of_its_own_training():
    engine, parts = private_parts(Classifier(), noise_multiplier=1.0)
    module, optimizer, criterion, loader = parts
    for ids, labels in loader:
        criterion(module(ids), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    counted = opacus.PrivacyEngine(accountant="rdp")
    model = nn.Linear(3, 1)
    step = PrivateStep(
        model,
        clipping=Flat(clip_norm=1.0),
        noise_multiplier=1.0,
        expected_batch_size=8,
        on_release=opacus_accountant(counted.accountant, sampling_probability=1 / len(loader)),
    )
    for _ in range(len(loader)):
        with step:
            pass
        model.zero_grad()
    assert counted.get_epsilon(1e-5) == engine.get_epsilon(1e-5) > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: nn.Linear(2, 2), 'engine is Linear.*grad_sample_mode="ghost"'),
        (lambda: grad_sample.GradSampleModule(nn.Linear(2, 2)), "engine is GradSampleModule;"),
        (opacus.PrivacyEngine, "engine is PrivacyEngine"),
        (
            lambda: grad_sample.GradSampleHooksFastGradientClippingFSDP(nn.Linear(2, 2)),
            "sharded.*shards=",
        ),
    ],
)
def test_anything_but_a_ghost_engine_is_refused(given, message):
    with pytest.raises(TypeError, match=message):
        use_veilspan_norms(given())


@pytest.mark.parametrize("option", [{"use_ghost_clipping": False}, {"force_functorch": True}])
def test_an_engine_that_never_asks_for_norms_is_refused(option):
    (name, value) = next(iter(option.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        use_veilspan_norms(engine_of(nn.Linear(2, 2), **option))


def test_options_outside_of_their_range_are_refused():
    engine = engine_of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="norms is 'quick'"):
        use_veilspan_norms(engine, norms="quick")
    with pytest.raises(TypeError, match="kernel is object"):
        use_veilspan_norms(engine, kernel=object())  # pyright: ignore[reportArgumentType]
    use_veilspan_norms(engine)
    with pytest.raises(ValueError, match=r"already uses.*remove\(\)"):
        use_veilspan_norms(engine)


def test_models_without_a_layer_of_ours_are_refused():
    with pytest.raises(UnsupportedModelError, match="no norm to replace"):
        use_veilspan_norms(engine_of(nn.Conv1d(3, 3, 1)))
    with pytest.raises(UnsupportedModelError, match="max_norm"):
        use_veilspan_norms(engine_of(nn.Embedding(4, 3, max_norm=1.0)))


@pytest.mark.parametrize(
    ("accountant", "way_out"),
    [(opacus.PrivacyEngine, r"PrivacyEngine; .*pass its \.accountant"), (dict, "dict; .*pass one")],
)
def test_anything_but_an_accountant_is_refused(accountant, way_out):
    with pytest.raises(TypeError, match=way_out):
        opacus_accountant(accountant(), sampling_probability=0.1)


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.5, float("nan")])
def test_a_sampling_probability_outside_of_its_range_is_refused(probability):
    with pytest.raises(ValueError, match="sampling_probability is"):
        opacus_accountant(accountants.RDPAccountant(), sampling_probability=probability)


def test_a_missing_or_old_opacus_is_named_with_the_way_out(monkeypatch):
    engine, rdp = engine_of(nn.Linear(2, 2)), accountants.RDPAccountant()
    monkeypatch.setattr(opacus, "__version__", "1.5.4")
    with pytest.raises(ImportError, match=r"1\.6 or newer, and 1\.5\.4.*veilspan-core\[opacus\]"):
        use_veilspan_norms(engine)
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(ImportError, match=r"not installed: pip install.*veilspan-core\[opacus\]"):
        opacus_accountant(rdp, sampling_probability=0.1)
