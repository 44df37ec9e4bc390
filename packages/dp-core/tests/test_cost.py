"""The cost model: its choices where they are clear, and the rates it stands on."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from veilspan.core import Flat, PerLayer, PrivateStep
from veilspan.core.choice import choose
from veilspan.core.cost import (
    Forecast,
    ModelShape,
    best_microbatch,
    cheaper_norm,
    forecast_all,
    keeping_pays,
    norm_cost,
)
from veilspan.core.norms import BlockedKernel
from veilspan.core.rates import DeviceRates

RATES = DeviceRates(flops=1e11, norm_flops=1e11, bandwidth=1e10, reading=1e10)
LINEARS = tuple([(512, 512)] * 16 + [(512, 1376)] * 8 + [(1376, 512)] * 4 + [(512, 8192)])


def shape(*, layered=False, features=None):
    elements = sum(i * o for i, o in LINEARS)
    features = sum(i + o for i, o in LINEARS) if features is None else features
    return ModelShape(
        linears=LINEARS,
        parameters=elements,
        largest=512 * 8192,
        features=features,
        layered=layered,
    )


SECONDS = norm_cost("auto", RATES)


def rates_here(dtype=torch.float32, **options):
    return DeviceRates.of(torch.device("cpu"), dtype, BlockedKernel(), **options)


def method(length, inputs, outputs):
    return cheaper_norm((length, inputs, outputs), RATES)


def chosen(size, length, *, memory=1e12, rates=RATES, **options):
    return choose(forecast_all(size, length, shape(**options), rates, SECONDS), memory)


def test_gram_norms_for_short_and_direct_norms_for_long_sequences():
    assert method(16, 512, 512) == "gram"
    assert method(4096, 512, 512) == "direct"


def test_one_record_is_taken_as_it_is():
    assert chosen(1, 4096).name == "single_sample"
    assert "batch's own" in chosen(1, 4096).reason


def test_long_records_keep_their_gradients_and_very_short_ones_their_activations():
    assert chosen(4, 4096).name == "per_sample"
    assert chosen(64, 8).name == "bookkeeping"


def test_what_is_kept_of_a_layer_is_the_smaller_of_gradient_and_factors():
    whole = sum(i * o for i, o in LINEARS) * 4.0 * 4  # bytes of four gradients
    short, longer = ({f.name: f for f in chosen(4, t).forecasts} for t in (64, 1024))
    assert short["per_sample"].bytes < whole / 4
    assert longer["per_sample"].bytes == whole
    table = dataclasses.replace(shape(), parameters=shape().parameters + 8192 * 512)
    looked_up = dataclasses.replace(table, tables=((8192, 512),))
    dense, sparse = (
        next(f for f in forecast_all(4, 512, s, RATES, SECONDS) if f.name == "per_sample")
        for s in (table, looked_up)
    )
    assert sparse.bytes < dense.bytes - 4 * 4 * 8192 * 512 / 2
    assert sparse.seconds < dense.seconds


def test_where_norms_read_slowly_short_sequences_keep_the_factors_of_wide_layers():
    measured = DeviceRates(
        flops=8e10, norm_flops=8e10, bandwidth=3e10, reading=1.5e10, store_passes=2.0
    )
    assert keeping_pays((128, 512, 1376), measured)
    assert not keeping_pays((128, 512, 512), measured)
    assert not keeping_pays((1024, 512, 1376), measured)
    even = dataclasses.replace(measured, reading=3e10, store_passes=1.0)
    assert not keeping_pays((128, 512, 1376), even)


def test_what_does_not_fit_into_memory_is_not_chosen():
    tight = chosen(4, 4096, memory=1e6)
    assert tight.name == "two_pass"
    assert "fit into 1 MiB" in tight.reason
    assert len(tight.forecasts) == 3


def test_where_memory_counts_the_leanest_of_strategies_that_tie_is_chosen():
    forecasts = [
        Forecast(name="per_sample", seconds=0.100, bytes=800.0),
        Forecast(name="bookkeeping", seconds=0.104, bytes=300.0),
        Forecast(name="two_pass", seconds=0.400, bytes=0.0),
    ]
    assert choose(forecasts, 1e3).name == "per_sample"
    tied = choose(forecasts, 1e3, ordinary=1.0)
    assert tied.name == "bookkeeping"
    assert tied.reason == "about as fast as per_sample, in less memory"
    assert choose(forecasts, 1e4, ordinary=1.0).name == "per_sample"  # there is plenty
    assert choose(forecasts, 100.0, ordinary=1.0).name == "two_pass"
    alone = [Forecast(name="single_sample", seconds=0.2, bytes=9.0), *forecasts]
    assert choose(alone, 1e3, ordinary=1.0).name == "single_sample"


def test_short_sequences_write_no_product_that_they_add():
    short, longer = (
        next(f for f in chosen(16, t).forecasts if f.name == "bookkeeping") for t in (128, 129)
    )
    saved = 4.0 * sum(i * o for i, o in LINEARS) / RATES.bandwidth
    assert longer.seconds - short.seconds > saved


def test_groups_within_layers_are_clipped_in_place():
    assert chosen(4, 1024, layered=True).name == "per_layer"


def test_small_groups_keep_fewer_books():
    flat = {f.name: f.bytes for f in chosen(4, 128).forecasts}
    blocks = {f.name: f.bytes for f in chosen(4, 128, features=4000).forecasts}
    assert blocks["bookkeeping"] < flat["bookkeeping"] / 5


def test_short_records_share_a_micro_batch_and_long_ones_do_not_need_to():
    sizes = [best_microbatch(t, 64, shape(), RATES, SECONDS) for t in (8, 4096)]
    assert sizes[0] > 8
    assert sizes[1] <= 2
    assert best_microbatch(8, 1, shape(), RATES, SECONDS) == 1


def test_more_records_share_weights_that_every_product_copies():
    copying = dataclasses.replace(RATES, weight_passes=9.0)
    once, copied = (best_microbatch(512, 64, shape(), rates, SECONDS) for rates in (RATES, copying))
    assert once < copied
    assert rates_here().weight_passes == 9.0


def test_frozen_weights_take_time_that_no_micro_batch_saves():
    adapters = dataclasses.replace(shape(), linears=((512, 8), (8, 512)), parameters=8192)
    frozen = dataclasses.replace(adapters, frozen=10**8)
    alone, beside = (best_microbatch(512, 64, s, RATES, SECONDS) for s in (adapters, frozen))
    assert beside < alone


def test_rates_are_measured_once_and_read_from_then_on(tmp_path):
    cache = tmp_path / "below" / "rates.json"
    first = rates_here(cache=cache)
    again = rates_here(cache=cache)
    assert (first.flops, first.bandwidth) == (again.flops, again.bandwidth)
    assert first.norm_flops == first.flops  # fp32 is what norms are formed in
    assert first.reading == again.reading
    assert 1e8 < first.flops < 1e15
    assert 1e8 < first.bandwidth < 1e13
    assert 1e8 < first.reading < 1e13
    assert 1e-8 < first.call_seconds < 1e-2


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"cpu": {"flops": -1}}', '{"cpu": 3}'])
def test_a_damaged_file_of_rates_is_measured_anew(tmp_path, content):
    cache = tmp_path / "rates.json"
    cache.write_text(content)
    assert rates_here(cache=cache).flops > 1e8
    assert len(json.loads(cache.read_text())) == 1


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert rates_here(cache=tmp_path / "file" / "rates.json").flops > 1e8


def test_products_of_each_dtype_have_their_own_rates(tmp_path):
    cache = tmp_path / "rates.json"
    wide, low = (rates_here(dtype, cache=cache) for dtype in (torch.float32, torch.bfloat16))
    assert len(json.loads(cache.read_text())) == 2
    assert low.flops != low.norm_flops  # measured apart: norms widen their operands
    assert 0.2 < low.norm_flops / wide.norm_flops < 5.0


def test_measuring_draws_nothing_and_hears_of_no_autocast():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        rates = rates_here(cache=None)
    assert torch.equal(torch.get_rng_state(), before)
    assert rates.norm_flops == rates.flops


def test_slow_products_of_norms_and_sums_speak_for_keeping_gradients():
    slow = dataclasses.replace(RATES, norm_flops=RATES.flops / 8)
    forecasts = (forecast_all(16, 96, shape(), rates, SECONDS) for rates in (RATES, slow))
    even, slowed = ({f.name: f.seconds for f in found} for found in forecasts)
    products = 2.0 * 16 * 96 * sum(i * o for i, o in LINEARS) / RATES.flops
    for name in ("bookkeeping", "two_pass"):
        assert slowed[name] - even[name] == pytest.approx(7 * products)
    shapes = [(96, i, o) for i, o in sorted(set(LINEARS))]
    assert any(keeping_pays(s, RATES) for s in shapes)
    assert not any(keeping_pays(s, slow) for s in shapes)


def test_products_that_norms_form_faster_than_the_model_save_time():
    slow = dataclasses.replace(RATES, flops=RATES.norm_flops / 20)  # fp16 on many a CPU
    found = {f.name: f for f in forecast_all(4, 128, shape(), slow, SECONDS)}
    assert found["bookkeeping"].seconds < 0
    assert " -" in str(found["bookkeeping"])
    assert choose(list(found.values()), 1e12).name == "bookkeeping"


@pytest.mark.parametrize("backward", ["auto", "bookkeeping"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "autocast"])
def test_the_rates_are_those_of_the_dtype_that_the_model_multiplies_in(monkeypatch, kind, backward):
    asked = []
    known = rates_here()

    def rates_of(device, dtype, kernel):
        asked.append(dtype)
        return known

    monkeypatch.setattr(DeviceRates, "of", rates_of)
    model = nn.Linear(8, 4).to(torch.bfloat16 if kind == "bf16" else torch.float32)
    step = PrivateStep(
        model,
        clipping=Flat(clip_norm=1.0),
        noise_multiplier=0,
        expected_batch_size=1,
        backward=backward,
    )
    assert not asked  # nothing is multiplied yet
    for _ in range(2):
        model.zero_grad()
        with step:
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
                out = model(torch.randn(4, 3, 8).to(model.weight.dtype))
            step.backward(out.float().square().flatten(1).sum(1))
    assert asked == [torch.float32 if kind == "fp32" else torch.bfloat16]


def test_explain_shows_the_forecast_of_every_strategy_that_was_compared():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    step = PrivateStep(
        model, clipping=PerLayer(clip_norm=1.0), noise_multiplier=0, expected_batch_size=1
    )
    with step:
        step.backward(model(torch.randn(4, 30, 64)).square().flatten(1).sum(1))
    text = step.explain()
    for name in ("per_sample", "bookkeeping", "two_pass", "per_layer"):
        assert f"    {name}" in text
    assert "MiB" in text


def test_a_memory_budget_limits_what_auto_chooses():
    model = nn.Linear(64, 64)
    options = {"clipping": Flat(clip_norm=1.0), "noise_multiplier": 0, "expected_batch_size": 1}
    step = PrivateStep(model, memory_budget=10.0, **options)
    with step:
        step.backward(model(torch.randn(4, 300, 64)).square().flatten(1).sum(1))
    assert "4 x 300 tokens: two_pass" in step.explain()
    step.detach()
    with pytest.raises(ValueError, match=r"memory_budget is -1"):
        PrivateStep(model, memory_budget=-1.0, **options)


def test_the_best_micro_batch_of_a_model_without_taps_is_one():
    model = nn.Linear(64, 64)
    options = {"clipping": Flat(clip_norm=1.0), "noise_multiplier": 0, "expected_batch_size": 1}
    assert PrivateStep(model, backward="single_sample", **options).best_microbatch(8, 64) == 1


class Tied(nn.Module):
    """A table of 7 x 6 used twice, and 2 x 6 x 6 elements whose records run alone."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.rnn = nn.RNN(6, 6, batch_first=True, bias=False)
        self.mix = nn.Linear(6, 6)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mix(self.rnn(self.embed(ids))[0]))


def tied_step(memory_budget):
    return PrivateStep(
        Tied(),
        clipping=Flat(clip_norm=1.0),
        noise_multiplier=0.0,
        expected_batch_size=3,
        memory_budget=memory_budget,
    )


def test_a_memory_budget_that_no_strategy_meets_is_refused_with_the_least_that_would_do():
    least = 3 * 4 * (7 * 6 + 2 * 6 * 6)  # records, bytes, the tied table and the recurrent layer
    step = tied_step(least - 1)
    ids = torch.randint(0, 7, (3, 5))
    with pytest.raises(ValueError, match=rf"less than {least:,} \(two_pass\)"), step:
        step.model(ids)
    enough = tied_step(least)
    with enough:
        enough.backward(enough.model(ids).square().flatten(1).sum(1))
    assert "two_pass" in enough.explain()
