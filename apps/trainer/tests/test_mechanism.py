"""Who computes norms, sums and noise of a run, and what is checked before it may."""

import sys
from types import SimpleNamespace

import pytest
import torch

from veilspan.core import GaussianNoise, PhiloxNoise, new_key
from veilspan.core.norms import BlockedKernel
from veilspan.kernels import TritonKernel, TritonNoise
from veilspan.trainer import mechanism as module
from veilspan.trainer.budget import noise_named, privacy_plan
from veilspan.trainer.errors import TrainerError
from veilspan.trainer.loop import train
from veilspan.trainer.mechanism import check_arithmetic, draws_alike, mechanism, noise_source
from veilspan.trainer.metrics import read_metrics
from veilspan.trainer.plots import series
from veilspan.trainer.run_folder import RunFolder

CPU = torch.device("cpu")


class ShortNorms(BlockedKernel):
    """A kernel whose norms are a little below the true ones, as a wrong compiler makes them."""

    def sq_norm_direct(self, act_BTI, grad_BTO):
        sq_norm_B, size_B = super().sq_norm_direct(act_BTI, grad_BTO)
        return sq_norm_B * (1 - 2e-5), size_B


class OwnOfEachCall:
    """Noise that another device would draw otherwise."""

    def __init__(self):
        self.noise, self.calls = GaussianNoise(new_key()), 0

    def add_(self, tensor, *, stddev, step, name, offset):
        self.calls += 1
        self.noise.add_(tensor, stddev=stddev, step=self.calls, name=name, offset=offset)


def test_the_recipe_names_who_computes(tmp_path, recipe_in):
    for wish, kind in (("torch", type(None)), ("triton", TritonKernel)):
        recipe = recipe_in(tmp_path, compute__kernels=wish)
        assert isinstance(mechanism(recipe, privacy_plan(recipe, 24))["kernel"], kind)


@pytest.mark.parametrize(
    ("name", "kind", "stream"),
    [
        ("aes", GaussianNoise, "aes-ctr"),
        ("chacha20", TritonNoise, "chacha20"),
        ("philox", PhiloxNoise, "philox"),
    ],
)
def test_the_plan_names_the_stream_that_draws(tmp_path, recipe_in, name, kind, stream):
    noise = noise_source(name, new_key())
    assert isinstance(noise, kind)
    assert noise_named(noise) == name
    assert privacy_plan(recipe_in(tmp_path, privacy__noise=name), 24).noise_stream == stream


def test_a_philox_of_kernels_is_not_called_cryptographic():
    assert noise_named(TritonNoise(new_key(), stream="philox4x32")) == "philox"


def test_a_run_learns_the_same_with_either(tmp_path, recipe_in):
    losses = {}
    for kernels in ("torch", "triton"):
        everybody = {"expected_batch_size": None, "sampling_probability": 1.0}
        little = {"target_epsilon": None, "noise_multiplier": 1e-9}
        recipe = recipe_in(
            tmp_path,
            compute__kernels=kernels,
            compute__microbatch_size=4,
            compute__backward="bookkeeping",
            run__folder=str(tmp_path / kernels),
            **{f"privacy__{key}": value for key, value in {**everybody, **little}.items()},
        )
        rows = read_metrics(RunFolder(train(recipe)).metrics)
        losses[kernels] = [loss for _, loss in series(rows, "heldout_loss")]
    assert len(losses["torch"]) > 1
    assert losses["torch"][-1] < losses["torch"][0]
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-3)


def test_arithmetic_that_is_right_passes(tmp_path, recipe_in):
    check_arithmetic(recipe_in(tmp_path, compute__kernels="triton", privacy__noise="chacha20"), CPU)


def test_pitfall_51_norms_and_noise_of_a_wrong_device_are_refused(tmp_path, recipe_in, monkeypatch):
    recipe = recipe_in(tmp_path, compute__kernels="triton", privacy__noise="chacha20")
    monkeypatch.setattr(module, "_triton_kernel", ShortNorms)
    with pytest.raises(TrainerError, match=r"below the true norm.*compute\.kernels = .torch"):
        train(recipe)
    monkeypatch.setattr(module, "_triton_kernel", TritonKernel)
    assert not draws_alike(OwnOfEachCall(), CPU)
    monkeypatch.setattr(module, "draws_alike", lambda noise, device: False)
    with pytest.raises(TrainerError, match=r"draws other noise on cpu.*privacy\.noise = .aes"):
        train(recipe)
    assert not recipe.run.folder.exists()


def test_python_that_takes_the_checks_out_is_refused(tmp_path, recipe_in, monkeypatch):
    monkeypatch.setattr(module.sys, "flags", SimpleNamespace(optimize=1))
    with pytest.raises(TrainerError, match=r"-O takes.*compute\.kernels = .torch"):
        check_arithmetic(recipe_in(tmp_path, compute__kernels="triton"), CPU)


def test_noise_that_adds_nothing_is_not_alike():
    class Silent:
        def add_(self, tensor, **address):
            pass

    assert not draws_alike(Silent(), CPU)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"compute__kernels": "triton"}, r'compute\.kernels is "triton".*= "torch"'),
        ({"privacy__noise": "chacha20"}, r'privacy\.noise is "chacha20".*= "aes"'),
    ],
)
def test_a_missing_package_is_named_before_anything_is_written(
    tmp_path, recipe_in, monkeypatch, keys, named
):
    monkeypatch.setitem(sys.modules, "veilspan.kernels", None)
    recipe = recipe_in(tmp_path, **keys)
    with pytest.raises(TrainerError, match=named) as raised:
        train(recipe)
    assert "veilspan-trainer[kernels]" in str(raised.value)
    assert not recipe.run.folder.exists()
