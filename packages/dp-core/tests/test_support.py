"""The preflight finds what would break the guarantee, before training, on synthetic records."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from veilspan.core import Flat, PrivacyError, PrivateStep
from veilspan.core.support import preflight


def attach(model, backward="per_sample", **options):
    return PrivateStep(
        model,
        clipping=Flat(clip_norm=1.0),
        noise_multiplier=1.0,
        expected_batch_size=1.0,
        backward=backward,
        **options,
    )


def losses(model, batch):
    return model(batch["x"]).square().flatten(1).sum(1)


def batch_of(size=2):
    torch.manual_seed(0)
    return {"x": torch.randn(size, 3, 4)}


@pytest.mark.parametrize("backward", ["auto", "single_sample", "per_sample", "two_pass"])
def test_a_sound_model_passes_with_a_path_for_every_parameter(backward):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    releases = []
    step = attach(model, backward, on_release=releases.append)
    report = preflight(step, losses, batch_of())
    assert [p.name for p in report.parameters] == [n for n, _ in model.named_parameters()]
    assert all(p.path for p in report.parameters)
    assert "records do not couple" in str(report)
    assert releases == []
    assert step.next_step == 0
    assert all(p.grad is None for p in model.parameters())


class CentreOverBatch(nn.Module):
    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, x):
        return x - self.share * x.mean(0, keepdim=True)


@pytest.mark.parametrize("share", [1.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pitfall_37_batch_statistics_before_the_first_trained_layer_are_found(share, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(CentreOverBatch(share), nn.Linear(4, 4)).to(dtype)
    with pytest.raises(PrivacyError, match="the records of a micro-batch couple"):
        preflight(attach(model), losses, {"x": batch_of()["x"].to(dtype)})


def test_pitfall_38_an_auxiliary_loss_over_the_batch_is_found():
    model = nn.Sequential(nn.Linear(4, 4))

    def with_balance(m, batch):
        out = m(batch["x"])
        return out.square().flatten(1).sum(1) + 0.01 * out.mean().square()

    with pytest.raises(PrivacyError, match="depends on other records"):
        preflight(attach(model), with_balance, batch_of())


def test_pitfall_40_dropout_alone_does_not_look_like_coupling():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    for dtype in (torch.float32, torch.bfloat16):
        batch = {"x": batch_of()["x"].to(dtype)}
        step = attach(model.to(dtype))
        assert preflight(step, losses, batch).records_probed == 2
        step.detach()


def test_a_batch_mean_and_a_scalar_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(PrivacyError, match="one loss per record"):
        preflight(attach(model), lambda m, b: losses(m, b).mean(), batch_of())


def test_the_probe_takes_exactly_two_records():
    with pytest.raises(ValueError, match="holds 3 records"):
        preflight(attach(nn.Sequential(nn.Linear(4, 4))), losses, batch_of(3))


class Selective(nn.Module):
    """Keeps products and recomputes the rest; torch lets such a graph be differentiated once."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))

    def forward(self, x):
        contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
        return checkpoint(self.inner, x, use_reentrant=False, context_fn=contexts)


@pytest.mark.parametrize("backward", ["single_sample", "per_sample", "bookkeeping"])
def test_a_model_under_selective_checkpointing_passes(backward):
    model = nn.Sequential(nn.Linear(4, 4), Selective())
    report = preflight(attach(model, backward), losses, batch_of())
    assert len(report.parameters) == 6
