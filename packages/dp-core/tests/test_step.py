"""The private step as a user meets it: one release per logical batch, and every refusal."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from veilspan.core import (
    Flat,
    GaussianNoise,
    PerLayer,
    PrivacyError,
    PrivateQuantile,
    PrivateStep,
    UnsupportedModelError,
    new_key,
)
from veilspan.core.reduction import LocalShards

KEY = bytes(range(32))
TAPPED = ["per_sample", "two_pass"]


def attach(model, *, clip_norm=1.0, noise_multiplier=0.0, **options):
    options = {"expected_batch_size": 4.0, "backward": "per_sample"} | options
    return PrivateStep(
        model, clipping=Flat(clip_norm=clip_norm), noise_multiplier=noise_multiplier, **options
    )


def square_losses(model, x):
    return model(x).square().flatten(1).sum(1)


def test_gradient_is_the_noisy_sum_over_the_expected_batch_size():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(2, 3)
    step = attach(model, clip_norm=1e6, expected_batch_size=10.0)
    with step:
        step.backward(square_losses(model, x))
    got = model.weight.grad.clone()
    model.zero_grad()
    step.detach()
    square_losses(model, x).sum().backward()
    assert torch.allclose(got, model.weight.grad / 10.0)


@pytest.mark.parametrize("backward", ["per_sample", "bookkeeping", "two_pass", "per_layer"])
@pytest.mark.parametrize("accumulate", ["fp32", "exact"])
def test_rows_that_are_no_records_add_nothing_and_are_not_counted(backward, accumulate):
    """Whatever they hold, also what is not finite."""
    torch.manual_seed(0)
    x = torch.randn(6, 3)
    x[0], x[2], x[5] = 1e3, math.inf, 1e9
    found = []
    for rows, is_record in (
        ([0, 1, 2, 3, 4, 5], torch.tensor([False, True, False, True, True, False])),
        ([1, 3, 4], None),
    ):
        torch.manual_seed(1)
        model = nn.Linear(3, 2)
        clipping = PerLayer(clip_norm=1.0, adaptive=PrivateQuantile())
        step = PrivateStep(
            model,
            clipping=clipping,
            noise_multiplier=1.0,
            expected_batch_size=4.0,
            backward=backward,
            accumulate=accumulate,
            noise=GaussianNoise(KEY),
        )
        with step:
            step.backward(square_losses(model, x[rows]), is_record)
        found.append((model.weight.grad, step.state_dict()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("backward", ["per_sample", "bookkeeping", "two_pass", "per_layer"])
def test_rows_that_are_no_records_are_not_counted_where_samples_are_formed_one_by_one(backward):
    ids, found = torch.tensor([[1, 2], [3, 3], [4, 1]]), []
    for rows, is_record in (([0, 1, 2], torch.tensor([False, True, False])), ([1], None)):
        torch.manual_seed(1)
        model = nn.Embedding(6, 3)
        clipping = PerLayer(clip_norm=1e-3, adaptive=PrivateQuantile())
        options = {"noise_multiplier": 1.0, "noise": GaussianNoise(KEY), "backward": backward}
        step = PrivateStep(model, clipping=clipping, expected_batch_size=4.0, **options)
        with step:
            step.backward(square_losses(model, ids[rows]), is_record)
        found.append((model.weight.grad, step.state_dict()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("flags", [torch.ones(3), torch.ones(2, dtype=torch.bool)])
def test_flags_that_do_not_fit_the_losses_are_refused(flags):
    model = nn.Linear(3, 2)
    step = attach(model)
    with pytest.raises(PrivacyError, match="is_record_B is"), step:
        step.backward(square_losses(model, torch.randn(3, 3)), flags)


@pytest.mark.parametrize("size", [0, 1, 5, 12])
def test_pitfall_27_the_scale_of_the_gradient_ignores_the_drawn_batch_size(size):
    model = nn.Linear(1, 1, bias=False)
    step = attach(model, clip_norm=1.0, expected_batch_size=4.0)
    with step:
        if size:
            step.backward((model(torch.full((size, 1), 1e3))).sum(1))
    assert model.weight.grad.item() == pytest.approx(size / 4.0, rel=1e-5)


def test_pitfall_02_an_empty_logical_batch_is_a_release_of_pure_noise():
    model = nn.Linear(500, 400, bias=False)
    releases = []
    step = attach(model, clip_norm=2.0, noise_multiplier=1.5, on_release=releases.append)
    with step:
        pass
    noise = model.weight.grad * 4.0
    assert [r.step for r in releases] == [0]
    assert noise.std().item() == pytest.approx(3.0, rel=0.01)


@pytest.mark.parametrize("clip_norm", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize("expected_batch_size", [1.0, 10.0])
def test_pitfall_14_noise_follows_sigma_times_the_clip_norm(clip_norm, expected_batch_size):
    model = nn.Linear(1000, 1000, bias=False)
    step = attach(
        model,
        clip_norm=clip_norm,
        noise_multiplier=0.7,
        expected_batch_size=expected_batch_size,
    )
    with step:
        pass
    expected = 0.7 * clip_norm / expected_batch_size
    assert model.weight.grad.std().item() == pytest.approx(expected, rel=0.01)


def test_pitfall_13_every_released_tensor_carries_noise():
    model = nn.Sequential(nn.Embedding(300, 64), nn.LayerNorm(64), nn.Linear(64, 500))
    step = attach(model, clip_norm=1e-8, noise_multiplier=1e8)
    with step:
        step.backward(square_losses(model, torch.zeros(2, 3, dtype=torch.long)))
    for parameter in model.parameters():
        spread = parameter.grad.std().item() * 4.0
        assert abs(spread - 1.0) < 5.0 / math.sqrt(2 * parameter.numel())


def test_pitfall_43_noise_differs_between_steps_tensors_and_attempts():
    model = nn.ModuleList([nn.Linear(300, 300, bias=False) for _ in range(2)])

    def released(key, first_step=0):
        step = attach(model, noise_multiplier=1.0, noise=GaussianNoise(key), first_step=first_step)
        draws = []
        for _ in range(2):
            with step:
                pass
            draws += [p.grad.flatten().clone() for p in model.parameters()]
            model.zero_grad()
        step.detach()
        return draws

    key = new_key()
    first, again = released(key), released(key)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    resumed = released(key, first_step=1)
    assert torch.equal(resumed[0], first[2])
    draws = torch.stack([*first, *released(new_key())])
    correlation = torch.corrcoef(draws).fill_diagonal_(0.0)
    assert correlation.abs().max() < 5 / math.sqrt(draws.shape[1])


@pytest.mark.parametrize("how", ["an earlier state", "a copy", "another PrivateStep"])
def test_pitfall_43_noise_is_drawn_once_for_a_step(how):
    """The difference of two releases under one noise is that of two clipped sums."""
    model, noise, heard = nn.Linear(3, 2), GaussianNoise(new_key()), []
    step = attach(model, noise_multiplier=1.0, noise=noise, on_release=heard.append)
    shallow = copy.copy(step)
    with step:
        pass
    model.zero_grad()
    if how == "a copy":
        step = shallow
    elif how == "an earlier state":
        step.load_state_dict(step.state_dict() | {"next_step": 0})
    else:
        step.detach()
        step = attach(model, noise_multiplier=1.0, noise=noise, on_release=heard.append)
    with pytest.raises(PrivacyError, match="Step 0 would have noise that was drawn before"), step:
        pass
    assert len(heard) == 1
    assert all(parameter.grad is None for parameter in model.parameters())
    step.next_step = 1  # an earlier state, with noise that is new
    with step:
        pass
    assert [release.step for release in heard] == [0, 1]


def test_pitfall_43_a_fork_does_not_draw_the_noise_of_its_parent(monkeypatch):
    step = attach(nn.Linear(3, 2), noise_multiplier=1.0)
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(PrivacyError, match="built in another process"), step:
        pass


def test_pitfall_17_an_exception_discards_the_logical_batch():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(3, 3)
    releases = []
    step = attach(model, on_release=releases.append)
    with pytest.raises(KeyError), step:
        step.backward(square_losses(model, x))
        raise KeyError
    assert releases == []
    assert all(p.grad is None for p in model.parameters())
    after = []
    for _ in range(2):
        with step:
            step.backward(square_losses(model, x[:1]))
        after += [p.grad for p in model.parameters()]
        model.zero_grad()
    assert torch.equal(after[0], after[2])
    assert torch.equal(after[1], after[3])


def test_pitfall_46_the_ledger_hears_of_a_release_before_the_noise_exists():
    events = []

    class Spy:
        def add_(self, tensor, **address):
            events.append("noise")

    model = nn.Linear(2, 2)
    step = attach(
        model, noise_multiplier=1.0, noise=Spy(), on_release=lambda r: events.append("ledger")
    )
    with step:
        pass
    assert events == ["ledger", "noise", "noise"]


def test_a_release_that_the_ledger_refuses_leaves_no_gradient():
    model = nn.Linear(2, 2)

    def refuse(release):
        raise OSError("disk full")

    step = attach(model, noise_multiplier=1.0, on_release=refuse)
    with pytest.raises(OSError, match="disk full"), step:
        step.backward(square_losses(model, torch.randn(2, 2)))
    assert model.weight.grad is None
    assert step.next_step == 0


def test_detach_restores_the_model_exactly():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    before = [dict(m.__dict__) for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    step = attach(model)
    assert "forward" in model[0].__dict__
    step.detach()
    for module, attributes in zip(model.modules(), before, strict=True):
        assert module.__dict__.keys() == attributes.keys()
        assert "forward" not in module.__dict__
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with pytest.raises(PrivacyError, match="detached"), step:
        pass


@pytest.mark.parametrize("name", ["noise_multiplier", "clipping", "expected_batch_size"])
def test_a_number_that_is_set_later_is_refused(name):
    """As a schedule does that was written for another library; the step would not obey."""
    step = attach(nn.Linear(3, 2), noise_multiplier=1.0)
    with pytest.raises(AttributeError, match=f"{name} of PrivateStep is fixed .* phases"):
        setattr(step, name, 2.0)
    assert getattr(step, name) != 2.0


def test_a_step_shows_its_numbers_and_no_key():
    step = attach(nn.Linear(2, 1), clip_norm=0.5, noise_multiplier=1.5, noise=GaussianNoise(KEY))
    assert repr(step) == (
        f"PrivateStep(clipping={Flat(clip_norm=0.5)!r}, noise_multiplier=1.5, "
        "expected_batch_size=4.0)"
    )
    assert repr(object.__new__(PrivateStep)) == "PrivateStep()"  # one that was refused


@pytest.mark.parametrize("made", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("inside", [False, True])
def test_a_copy_of_an_attached_model_gets_a_step_of_its_own(made, inside):
    """The copy takes the patches along, but no step that could undo them."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    step, x = attach(model), torch.randn(2, 3)
    with step:
        twin = made(model) if inside else None
        step.backward(square_losses(model, x))
    twin = made(model) if twin is None else twin
    twin.zero_grad()
    theirs = attach(twin)
    assert theirs.path_of(twin[0].weight) == "linear"
    with theirs:
        theirs.backward(square_losses(twin, x))
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert (mine.grad == other.grad).all()
    model.zero_grad()
    theirs.detach()
    assert "forward" not in vars(twin[0])
    assert not twin._forward_pre_hooks
    with step:  # the first one is attached as before
        step.backward(square_losses(model, x))


def test_outside_of_a_step_the_model_behaves_as_its_own():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    plain = model(x)
    step = attach(model)
    assert torch.equal(model(x), plain)
    model(x).sum().backward()
    assert model.weight.grad is not None
    model.zero_grad()
    with step, torch.no_grad():
        model(torch.randn(7, 3))  # evaluation inside of a step is no micro-batch


@pytest.mark.parametrize("backward", ["single_sample", *TAPPED])
def test_pitfall_06_a_scalar_loss_is_refused(backward):
    model = nn.Linear(3, 2)
    step = attach(model, backward=backward)
    with pytest.raises(PrivacyError, match="one floating-point loss per record"), step:
        step.backward(square_losses(model, torch.randn(2, 3)).mean())


def test_losses_that_are_not_one_per_record_are_refused():
    model = nn.Linear(3, 2)
    step = attach(model)
    with pytest.raises(PrivacyError, match="holds 4 losses, but the model's input holds 2"), step:
        step.backward(model(torch.randn(2, 3)).square().flatten())
    with pytest.raises(PrivacyError, match="does not require grad"), step:
        step.backward(torch.zeros(2))
    with pytest.raises(PrivacyError, match="float"), step:
        step.backward([1.0])  # pyright: ignore[reportArgumentType]


def test_single_sample_refuses_two_records():
    model = nn.Linear(3, 2)
    step = attach(model, backward="single_sample")
    with pytest.raises(ValueError, match="microbatches\\(size=1\\)"), step:
        step.backward(square_losses(model, torch.randn(2, 3)))


def test_single_sample_clips_a_sparse_gradient_of_an_embedding():
    torch.manual_seed(0)
    dense, sparse = nn.Embedding(5, 3), nn.Embedding(5, 3, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    for model in (dense, sparse):
        step = attach(model, backward="single_sample")
        with step:
            step.backward(model(torch.tensor([[1, 4, 1]])).square().sum((1, 2)))
    assert dense.weight.grad is not None
    assert sparse.weight.grad is not None
    assert torch.equal(sparse.weight.grad, dense.weight.grad)


def test_positions_first_is_refused_outside_of_single_sample():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(3, 3)

        def forward(self, x):
            return self.rnn(x.transpose(0, 1))[0][-1]

    last = Last()
    model = nn.Sequential(nn.Linear(3, 3), last)
    with pytest.raises(
        UnsupportedModelError, match=r"Module '1\.rnn' \(LSTM\) has positions first"
    ):
        attach(model)
    step = attach(model, backward="auto")
    with step:
        step.backward(square_losses(model, torch.randn(1, 4, 3)))
    assert "'1.rnn' has positions first" in step.explain()
    assert last.rnn.weight_hh_l0.grad is not None


def test_a_second_step_on_the_same_model_is_refused():
    model = nn.Sequential(nn.Linear(3, 3))
    first = attach(model)
    with pytest.raises(UnsupportedModelError, match="patched by another PrivateStep"):
        attach(model)
    first.detach()
    attach(model).detach()
    assert "forward" not in vars(model[0])


def test_a_plain_backward_inside_of_a_step_is_refused():
    model = nn.Linear(3, 2)
    step = attach(model)
    with pytest.raises(PrivacyError, match=r"outside of step\.backward"), step:
        square_losses(model, torch.randn(2, 3)).sum().backward()
    step.detach()
    model.zero_grad()
    step = attach(model, backward="single_sample")
    with pytest.raises(PrivacyError, match="inside the logical batch"), step:
        square_losses(model, torch.randn(2, 3)).sum().backward()
    assert model.weight.grad is None


@pytest.mark.parametrize("backward", ["single_sample", *TAPPED, "bookkeeping"])
def test_pitfall_19_the_callers_autocast_rounds_no_norm(backward):
    """Whoever calls step.backward inside of the autocast of the forward pass gets the same sum."""

    def mean_gradient(inside):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 8))
        step = attach(model, backward=backward)
        with step:
            with torch.autocast("cpu", torch.bfloat16):
                losses_B = model(torch.randn(1, 64, 32)).float().square().sum((1, 2))
                if inside:
                    step.backward(losses_B)
            if not inside:
                step.backward(losses_B)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    assert torch.equal(mean_gradient(True), mean_gradient(False))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_pitfall_19_products_that_round_fp32_operands_are_refused(precision):
    torch.set_float32_matmul_precision(precision)
    try:
        model = nn.Linear(3, 2)
        step = attach(model, backward="two_pass")
        with pytest.raises(PrivacyError, match="set_float32_matmul_precision"), step:
            step.backward(square_losses(model, torch.randn(2, 3)))
        step.detach()
        alone = attach(model, backward="single_sample")
        with alone:  # the norm is of what is added, however it was rounded
            alone.backward(square_losses(model, torch.randn(1, 3)))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_pitfall_35_parameters_split_over_ranks_need_their_shards(tmp_path):
    meeting = f"file://{tmp_path / 'ranks'}"
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        for backward in ("auto", "single_sample", "per_sample"):
            with pytest.raises(UnsupportedModelError, match="Pass shards="):
                attach(model, backward=backward)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("backward", ["auto", "single_sample", *TAPPED, "bookkeeping"])
def test_pitfall_35_parameters_split_over_ranks_with_other_records_are_refused(backward):
    class HalfOfTheRows(LocalShards):
        def local(self, tensor):
            return tensor.chunk(2)[0]

    with pytest.raises(UnsupportedModelError, match="gradients of different records"):
        attach(nn.Linear(4, 4), backward=backward, shards=HalfOfTheRows())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("noise_multiplier", -1.0, "noise_multiplier is -1.0"),
        ("noise_multiplier", math.nan, "noise_multiplier is nan"),
        ("expected_batch_size", 0, "expected_batch_size is 0"),
        ("backward", "ghost", "backward is 'ghost'"),
        ("norms", "fast", "norms is 'fast'"),
        ("first_step", -1, "first_step is -1"),
    ],
)
def test_numbers_out_of_range_are_named(option, value, message):
    with pytest.raises(ValueError, match=message):
        attach(nn.Linear(2, 2), **{option: value})


def test_no_noise_hides_an_infinite_clip_norm():
    with pytest.raises(ValueError, match="clip_norm is infinite"):
        attach(nn.Linear(2, 2), clip_norm=math.inf, noise_multiplier=1.0)


def test_complex_parameters_are_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(UnsupportedModelError, match=r"'1\.weight' is torch\.complex64"):
        PrivateStep(
            model, clipping=Flat(clip_norm=1.0), noise_multiplier=1.0, expected_batch_size=1.0
        )


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(UnsupportedModelError, match="no trainable parameter"):
        attach(nn.Linear(2, 2).requires_grad_(False))


def test_backward_needs_a_logical_batch_and_batches_do_not_nest():
    model = nn.Linear(2, 2)
    step = attach(model)
    with pytest.raises(PrivacyError, match="outside of `with step:`"):
        step.backward(torch.zeros(2, requires_grad=True))
    with pytest.raises(PrivacyError, match="already inside"), step, step:
        pass


def test_auto_takes_one_record_as_it_is_and_stores_gradients_of_several():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    step = attach(model, backward="auto")
    with step:
        step.backward(square_losses(model, torch.randn(1, 300, 64)))
        step.backward(square_losses(model, torch.randn(4, 300, 64)))
    text = step.explain()
    assert "micro-batch of 1 x 300 tokens: single_sample" in text
    assert "micro-batch of 4 x 300 tokens: per_sample" in text
    assert "linear" in text


def test_a_layer_that_sees_tokens_as_rows_is_no_obstacle_to_single_samples():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            return self.inner(x.flatten(0, 1)).view(x.shape)

    torch.manual_seed(0)
    model, x = Tokens(), torch.randn(1, 5, 3)
    step = attach(model, clip_norm=1e6, backward="auto", expected_batch_size=1.0)
    with step:
        step.backward(square_losses(model, x))
    got = model.inner.weight.grad.clone()
    model.zero_grad()
    step.detach()
    plain = torch.autograd.grad(square_losses(model, x).sum(), model.inner.weight)[0]
    assert torch.allclose(got, plain)


def test_explain_names_the_norm_method_of_every_linear_map():
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    step = attach(model, backward="two_pass")
    for length, method in ((8, "gram"), (4096, "direct")):
        with step:
            step.backward(square_losses(model, torch.randn(2, length, 512)))
        model.zero_grad()
        assert step.explain().count(f"norm {method}") == 2
