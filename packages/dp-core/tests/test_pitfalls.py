"""Pitfalls of parameters: who uses them, who writes them, who sees their gradient.

A test's number is the row of the table of sharp edges.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from veilspan.core import Flat, PerLayer, PrivacyError, PrivateStep, UnsupportedModelError
from veilspan.core.support import preflight
from veilspan.core.testing import Oracle, assert_step_matches_oracle
from veilspan.core.testing.conformance import assert_close
from veilspan.core.testing.oracle import batch_size, take

TAPPED = ["per_sample", "bookkeeping", "two_pass", "per_layer"]
STRATEGIES = ["single_sample", *TAPPED]

under_every_strategy = pytest.mark.parametrize("backward", STRATEGIES)
under_every_tap = pytest.mark.parametrize("backward", TAPPED)


def clipping_for(backward, clip_norm=1.0):
    """Return flat clipping, or layer-wise where the strategy can do no other."""
    return (PerLayer if backward == "per_layer" else Flat)(clip_norm=clip_norm)


def attach(model, backward="per_sample", *, noise_multiplier=0.0, **options):
    return PrivateStep(
        model,
        clipping=clipping_for(backward),
        noise_multiplier=noise_multiplier,
        expected_batch_size=1.0,
        backward=backward,
        **options,
    )


def square_losses(model, x):
    return model(x).square().flatten(1).sum(1)


def batch_losses(model, batch):
    return square_losses(model, batch["x"])


def records(backward, *shape):
    """Return random records, as many as the strategy takes at a time."""
    return torch.randn(1 if backward == "single_sample" else 2, *shape)


def assert_exact(model, losses, batch, backward, *, clip_norm=1.0, **options):
    assert_step_matches_oracle(
        model,
        losses,
        batch,
        clipping=clipping_for(backward, clip_norm),
        size=1 if backward == "single_sample" else 5,
        backward=backward,
        **options,
    )


def gradients(step, losses, batch):
    """Return what one logical batch releases, by name."""
    size = 1 if step.takes_single_samples else batch_size(batch)
    with step:
        for start in range(0, batch_size(batch), size):
            step.backward(losses(step.model, take(batch, start, start + size)))
    found = {name: p.grad.clone() for name, p in step.parameters.items()}
    step.model.zero_grad()
    return found


@pytest.fixture
def one_rank(tmp_path):
    """A process group of one process."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


USES = {
    "F.linear": lambda hidden, table: nn.functional.linear(hidden, table),
    "weight.t() @": lambda hidden, table: (table @ hidden.mT).mT,
    "torch.matmul": lambda hidden, table: torch.matmul(hidden, table.t()),
    "einsum": lambda hidden, table: torch.einsum("btd,vd->btv", hidden, table),
    "weight penalty": lambda hidden, table: hidden + table.square().sum(),
}


class AroundItsModule(nn.Module):
    """Uses the table of an embedding without calling the embedding."""

    def __init__(self, use):
        super().__init__()
        self.embed, self.mix, self.use = nn.Embedding(5, 4), nn.Linear(4, 4), USES[use]

    def forward(self, ids):
        return self.use(self.mix(self.embed(ids)), self.embed.weight)


TEACHERS = {
    "parameters of another": lambda p: p.detach() * 0.5 + 0.1,
    "a function of its own": lambda p: 2.0 * p,
}


def called_with(teacher):
    def losses(model, batch):
        others = {name: TEACHERS[teacher](p) for name, p in model.named_parameters()}
        return functional_call(model, others, (batch["x"],)).square().flatten(1).sum(1)

    return losses


@pytest.mark.parametrize("teacher", TEACHERS)
@under_every_tap
def test_pitfall_08_a_call_with_other_parameters_is_refused(backward, teacher):
    """Its input gradients would be those of the model's own parameters."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    step, batch = attach(model, backward), {"x": records(backward, 3)}
    with pytest.raises(PrivacyError, match="Module '0' was called with another 'weight'"), step:
        step.backward(called_with(teacher)(model, batch) + batch_losses(model, batch))


@under_every_strategy
def test_pitfall_08_a_teacher_without_gradients_may_have_other_parameters(backward):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    others = {name: 0.5 * p.detach() for name, p in model.named_parameters()}

    def distilled(model, batch):
        with torch.no_grad():
            wanted = functional_call(model, others, (batch["x"],))
        return (model(batch["x"]) - wanted).square().sum(1)

    batch = {"x": torch.randn(5, 3, dtype=torch.float64)}
    assert_exact(model, distilled, batch, backward)


@pytest.mark.parametrize("use", USES)
@under_every_tap
def test_pitfall_08_functional_use_of_an_owned_parameter_is_refused(backward, use):
    model = AroundItsModule(use)
    step = attach(model, backward)
    with pytest.raises(PrivacyError, match=r"Parameter 'embed.weight' received a gradient"), step:
        step.backward(square_losses(model, torch.randint(0, 5, (2, 3))))
    assert model.embed.weight.grad is None


@under_every_tap
def test_pitfall_08_a_layer_that_reads_the_weight_of_its_part_is_exact(backward):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    attention.in_proj_weight.requires_grad_(False)
    attention.in_proj_bias.requires_grad_(False)
    model = nn.Sequential(nn.Linear(4, 4))
    model.attention = attention  # never calls its out_proj, reads out_proj.weight

    def losses(model, batch):
        hidden = model[0](batch["x"])
        return model.attention(hidden, hidden, hidden)[0].square().flatten(1).sum(1)

    batch = {"x": torch.randn(5, 3, 4, dtype=torch.float64)}
    assert_exact(model.double(), losses, batch, backward)


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).mT


@pytest.mark.parametrize("kind", ["parametrize", "weight_norm", "orthogonal"])
@under_every_tap
def test_pitfall_08_a_weight_computed_from_other_parameters_is_exact(backward, kind):
    torch.manual_seed(0)
    model, utils = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.utils
    if kind == "parametrize":
        utils.parametrize.register_parametrization(model[0], "weight", Symmetric())
    else:
        getattr(utils.parametrizations, kind)(model[0])
    batch = {"x": torch.randn(5, 2, 3, dtype=torch.float64)}
    assert_exact(model.double(), batch_losses, batch, backward)


@under_every_tap
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_pitfall_08_a_weight_computed_before_the_layer_runs_is_exact(backward):
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3).double()), nn.Linear(3, 3).double())
    batch = {"x": torch.randn(5, 2, 3, dtype=torch.float64)}
    assert_exact(model, batch_losses, batch, backward)


@pytest.mark.parametrize("use", ["F.linear", "weight.t() @", "torch.matmul", "einsum"])
def test_pitfall_08_one_record_at_a_time_makes_functional_use_exact(use):
    batch = {"ids": torch.randint(0, 5, (4, 3))}
    model = AroundItsModule(use).double()
    assert_exact(model, lambda m, b: square_losses(m, b["ids"]), batch, "single_sample")


class Loop(nn.Module):
    """One linear map used three times, by keyword, with a tied read-out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.norm = nn.RMSNorm(6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input=ids)
        for _ in range(3):
            hidden = hidden + checkpoint(self.body, hidden, use_reentrant=False)
        return self.head(input=hidden)

    def body(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.mix(input=self.norm(x=hidden)))


def entropies(model, batch):
    logits = model(batch["ids"])[:, :-1]
    target = batch["ids"][:, 1:]
    return nn.functional.cross_entropy(logits.mT, target, reduction="none").sum(1)


@pytest.mark.parametrize("norms", ["direct", "gram"])
@under_every_strategy
def test_pitfall_25_modules_used_several_times_by_keyword_are_exact(backward, norms):
    torch.manual_seed(0)
    batch = {"ids": torch.randint(0, 7, (3, 9))}
    assert_exact(Loop().double(), entropies, batch, backward, clip_norm=2.0, norms=norms)


@pytest.mark.parametrize("norms", ["direct", "gram"])
@under_every_strategy
def test_pitfall_09_correlated_uses_of_a_tied_weight_are_added_before_the_norm(backward, norms):
    torch.manual_seed(0)
    model = Loop().double()
    with torch.no_grad():  # uses that point the same way: adding norms would be far too small
        model.embed.weight.copy_(torch.ones(7, 6) + 0.01 * torch.randn(7, 6))
    batch = {"ids": torch.full((2, 9), 3)}
    assert_exact(model, entropies, batch, backward, clip_norm=0.1, norms=norms)


@under_every_strategy
def test_pitfall_10_a_branch_that_is_skipped_leaves_no_stale_norm(backward):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(3, 1), nn.Linear(3, 1)
            self.use_right = True

        def forward(self, x):
            return self.right(x) if self.use_right else self.left(x)

    torch.manual_seed(0)
    model, batch = Branch().double(), {"x": torch.randn(4, 3, dtype=torch.float64)}
    step = attach(model, backward)
    for use_right in (True, False, True):
        model.use_right = use_right
        got = gradients(step, batch_losses, batch)
        expected = Oracle.of(model, batch_losses, batch, clipping_for(backward))
        assert_close(got, expected.clipped_sum, 1e-10)


class Adapted(nn.Module):
    """A layer with a low-rank adapter beside it, as PEFT would put in its place."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(3, 1), nn.Linear(1, 3)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


CHANGES = {
    "freeze": lambda model: model[0].weight.requires_grad_(False),
    "unfreeze": lambda model: model[1].bias.requires_grad_(True),
    "add": lambda model: model.append(nn.Linear(3, 3)),
    "replace": lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(3, 3))),
    "adapt": lambda model: model.insert(0, Adapted(model.pop(0))),
}


@pytest.mark.parametrize("change", CHANGES)
@under_every_strategy
def test_pitfall_11_parameters_changed_after_attach_are_refused(backward, change):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].bias.requires_grad_(False)
    step = attach(model, backward)
    with pytest.raises(PrivacyError, match="after PrivateStep was attached"), step:
        step.backward(square_losses(model, records(backward, 3)))
        CHANGES[change](model)
    with pytest.raises(PrivacyError, match="after PrivateStep was attached"), step:
        pass
    assert all(p.grad is None for p in model.parameters())


class Prompted(nn.Module):
    """Holds a tensor that is trained, but is no parameter."""

    def __init__(self, *, buffer):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        prompt = torch.zeros(3, requires_grad=True)
        if buffer:
            self.register_buffer("prompt", prompt)
        else:
            self.prompt = prompt

    def forward(self, x):
        return self.linear(x + self.prompt)


@pytest.mark.parametrize("buffer", [False, True])
@under_every_strategy
def test_pitfall_11_a_trained_tensor_that_is_no_parameter_is_refused(backward, buffer):
    model = nn.Sequential(Prompted(buffer=buffer))
    with pytest.raises(UnsupportedModelError, match=r"'0.prompt' requires a gradient but is no"):
        attach(model, backward)
    model[0].prompt.requires_grad_(False)
    vars(model[0])["alias"] = next(model.parameters())  # a parameter, under a second name
    step = attach(model, backward)
    model[0].prompt.requires_grad_(True)
    with pytest.raises(UnsupportedModelError, match=r"'0.prompt' requires a gradient but"), step:
        pass


@under_every_tap
def test_pitfall_11_a_layer_exchanged_for_one_with_the_same_parameters_is_refused(backward):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    step = attach(model, backward)
    other = nn.Linear(3, 3)
    for name, parameter in model[0].named_parameters():
        setattr(other, name, parameter)
    model[0] = other
    with pytest.raises(PrivacyError, match=r"Parameter '0.\w+' received a gradient"), step:
        step.backward(square_losses(model, torch.randn(2, 3)))


@under_every_strategy
def test_pitfall_11_a_second_optimizer_inside_of_the_batch_is_refused(backward):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    step = attach(model, backward)
    with (
        pytest.raises(PrivacyError, match=r"'0.weight' was written inside the logical batch"),
        step,
    ):
        step.backward(square_losses(model, records(backward, 3)))
        second = torch.optim.SGD(model.parameters(), lr=0.1)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        second.step()
        second.zero_grad()


@under_every_strategy
def test_pitfall_11_new_values_under_an_old_parameter_are_those_that_count(backward):
    model, batch = nn.Linear(3, 2).double(), {"x": torch.randn(3, 3, dtype=torch.float64)}
    step = attach(model, backward)
    gradients(step, batch_losses, batch)
    model.weight.data = torch.randn(2, 3, dtype=torch.float64)
    expected = Oracle.of(model, batch_losses, batch, clipping_for(backward))
    assert_close(gradients(step, batch_losses, batch), expected.clipped_sum, 1e-10)


@pytest.mark.filterwarnings("ignore:.*pipeline.*:UserWarning")
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("backward", ["single_sample", "per_sample"])
def test_pitfall_36_a_pipeline_schedule_that_differentiates_by_itself_is_refused(backward):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    step, x = attach(model, backward), torch.randn(2, 3)
    stage = PipelineStage(model, 0, 1, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=nn.functional.mse_loss)
    with pytest.raises(RuntimeError) as refused, step:
        schedule.step(x, target=x)
    assert "step.backward" in str(refused.value.__cause__ or refused.value)
    assert all(p.grad is None for p in model.parameters())


@under_every_strategy
def test_pitfall_41_a_gradient_from_elsewhere_is_refused(backward):
    model = nn.Linear(3, 2)
    step = attach(model, backward)
    with step:
        step.backward(square_losses(model, records(backward, 3)))
    with pytest.raises(PrivacyError, match="zero_grad"), step:
        pass
    model.zero_grad(set_to_none=False)
    with pytest.raises(PrivacyError, match="set_to_none=True"), step:
        pass
    model.zero_grad()
    with pytest.raises(PrivacyError, match=r"step\.backward"), step:
        model.weight.grad = torch.zeros_like(model.weight)


@under_every_strategy
def test_pitfall_11_a_head_outside_of_the_model_is_refused(backward):
    """Its gradient was raw: neither clipped nor noised."""
    body, head, x = nn.Linear(4, 4), nn.Linear(4, 1, bias=False), torch.randn(1, 4)
    step = attach(body, backward)
    with pytest.raises(PrivacyError, match=r"reach a parameter of shape \(1, 4\)"), step:
        step.backward(head(body(x)).square().sum(1))
    assert head.weight.grad is None
    head.requires_grad_(False)
    with step:
        step.backward(head(body(x)).square().sum(1))


@under_every_strategy
def test_pitfall_11_a_prompt_that_is_no_parameter_is_refused(backward):
    """A leaf tensor given to an optimizer: its gradient was raw."""
    model, x = nn.Linear(4, 1), torch.randn(1, 3, 4)
    prompt = torch.zeros(2, 4, requires_grad=True)

    def losses(model, batch):
        extended = torch.cat([prompt.expand(len(batch["x"]), 2, 4), batch["x"]], dim=1)
        return model(extended).square().sum((1, 2))

    step = attach(model, backward)
    with step:
        step.backward(losses(model, {"x": x}))
        assert prompt.grad is None  # an optimizer passes it over
    model.zero_grad()
    with pytest.raises(PrivacyError, match=r"a tensor of shape \(2, 4\) which requires"), step:
        step.backward(losses(model, {"x": x}))
    assert prompt.grad is None
    step.detach()
    step = attach(model, backward)
    with pytest.raises(PrivacyError, match=r"a tensor of shape \(2, 4\) which requires"):
        preflight(step, losses, {"x": torch.randn(2, 3, 4)})


@under_every_strategy
def test_inputs_that_require_a_gradient_are_no_prompt(backward):
    """As frozen embeddings give them to adapters under reentrant checkpointing."""
    model = nn.Linear(4, 1)
    step = attach(model, backward)
    for _ in range(2):
        with step:
            for _ in range(3):
                x = torch.randn(1, 3, 4, requires_grad=True)
                step.backward(model(x).square().sum((1, 2)))
        model.zero_grad()


@pytest.mark.parametrize("backward", ["single_sample", "auto"])
def test_pitfall_41_a_backward_pass_before_that_of_the_step_is_refused(backward):
    """Where one record needs no tap, its gradient was clipped together with the other's."""
    model = nn.Linear(4, 4)
    step = attach(model, backward)
    with pytest.raises(PrivacyError, match=r"holds a \.grad before step\.backward"), step:
        model(torch.randn(1, 4)).square().sum().backward()
        step.backward(model(torch.randn(1, 4)).square().sum(1))


def test_pitfall_41_a_gradient_left_on_a_frozen_parameter_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model(torch.randn(2, 4)).sum().backward()
    model[0].requires_grad_(False)
    model[1].zero_grad()
    step = attach(model, "per_sample")
    with pytest.raises(PrivacyError, match=r"'0\.weight' holds a \.grad before"), step:
        pass
    model.zero_grad()
    with step:
        step.backward(model(torch.randn(2, 4)).sum(1))


def test_an_interrupted_evaluation_leaves_no_trace():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    step = attach(model, "per_sample")

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(torch.randn(2, 4))
    handle.remove()
    with step:
        step.backward(model(torch.randn(2, 4)).sum(1))


@under_every_strategy
def test_pitfall_42_an_optimizer_inside_of_backward_is_refused(backward):
    model = nn.Linear(3, 2)
    hook = model.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(UnsupportedModelError, match="post-accumulate-grad hook"):
        attach(model, backward)
    hook.remove()
    step = attach(model, backward)
    model.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(UnsupportedModelError, match="post-accumulate-grad hook"), step:
        pass


@under_every_strategy
def test_pitfall_49_a_hook_that_would_see_a_raw_gradient_is_refused(backward):
    model, seen = nn.Linear(3, 2), []
    hook = model.weight.register_hook(seen.append)
    with pytest.raises(UnsupportedModelError, match="register_hook"):
        attach(model, backward)
    hook.remove()
    step = attach(model, backward)
    model.weight.register_hook(seen.append)
    with pytest.raises(UnsupportedModelError, match="register_hook"), step:
        pass
    assert not seen


@pytest.mark.parametrize("form", ["fused", "foreach"])
def test_pitfall_42_a_fused_optimizer_after_the_batch_moves_by_the_released_gradient(form):
    models = [nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    fused = torch.optim.AdamW(
        models[0].parameters(), lr=0.1, fused=form == "fused", foreach=form == "foreach"
    )
    plain = torch.optim.AdamW(models[1].parameters(), lr=0.1, foreach=False)
    step, batch = attach(models[0], noise_multiplier=1.0), {"x": torch.randn(4, 3)}
    for _ in range(3):
        with step:
            step.backward(batch_losses(models[0], batch))
        for ours, theirs in zip(*(m.parameters() for m in models), strict=True):
            theirs.grad = ours.grad.clone()
        for optimizer in (fused, plain):
            optimizer.step()
            optimizer.zero_grad()
        for ours, theirs in zip(*(m.parameters() for m in models), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5)


@under_every_strategy
def test_pitfall_54_no_gradient_exists_that_could_be_scaled_before_the_noise(backward):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    step, batch = attach(model, backward), {"x": torch.randn(4, 3)}
    expected = gradients(step, batch_losses, batch)

    def rescaling_losses(m, part):
        assert all(p.grad is None for p in m.parameters())
        nn.utils.clip_grad_norm_(m.parameters(), 1e-3)  # as trainers do, between micro-batches
        return batch_losses(m, part)

    got = gradients(step, rescaling_losses, batch)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


class Statistics(nn.Module):
    """A layer of the user's own that remembers the mean of what it saw."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        seen = x.detach().flatten(0, -2).mean(0)
        if self.how == "in place":
            self.mean.lerp_(seen, 0.1)
        elif self.how == "through .data":
            self.mean.data.mul_(0.9).add_(seen, alpha=0.1)
        elif self.how == "as new .data":
            self.mean.data = 0.9 * self.mean + 0.1 * seen
        elif self.how == "from another library":
            self.mean.numpy()[:] = seen.numpy()
        else:
            self.mean = 0.9 * self.mean + 0.1 * seen
        return x


@pytest.mark.parametrize(
    "how", ["in place", "anew", "through .data", "as new .data", "from another library"]
)
@under_every_strategy
def test_pitfall_55_a_layer_that_keeps_statistics_of_records_is_refused(backward, how):
    model = nn.Sequential(Statistics(how), nn.Linear(3, 3))
    step = attach(model, backward)
    with pytest.raises(PrivacyError, match=r"'0.mean' was written inside the logical batch"), step:
        step.backward(square_losses(model, records(backward, 3)))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("trainable", [True, False])
def test_pitfall_55_a_parameter_written_through_its_data_is_refused(trainable, dtype):
    """As tables of codes are that follow an average of what they stand for."""
    used, codes = nn.Linear(3, 3), nn.Linear(300, 70)
    codes.to(dtype).requires_grad_(trainable and dtype is not torch.float8_e4m3fn)
    codes.weight.data = codes.weight.data.mT.contiguous().mT  # any layout
    step = attach(nn.Sequential(used, codes))
    with step:
        step.backward(square_losses(used, records("per_sample", 3)))
    step.model.zero_grad()
    with pytest.raises(PrivacyError, match=r"'1.weight' was written inside"), step:
        step.backward(square_losses(used, records("per_sample", 3)))
        codes.weight.data.mT.view(torch.uint8).bitwise_not_()


@under_every_strategy
def test_pitfall_55_parameters_that_no_optimizer_moves_still_count_in_the_norm(backward):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    batch = {"x": torch.randn(3, 3, dtype=torch.float64)}
    expected = Oracle.of(model, batch_losses, batch, clipping_for(backward))
    before = {name: p.clone() for name, p in model[0].named_parameters()}
    optimizer = torch.optim.AdamW(model[1].parameters(), lr=0.1)  # the first layer stays
    got = gradients(attach(model, backward), batch_losses, batch)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model[0].named_parameters())
    assert_close(got, expected.clipped_sum, 1e-10)


def test_pitfall_55_an_average_of_released_weights_is_left_alone():
    model, batch = nn.Linear(3, 2), {"x": torch.randn(4, 3)}
    step, optimizer = attach(model), torch.optim.SGD(model.parameters(), lr=0.1)
    average = torch.optim.swa_utils.AveragedModel(model)
    seen = []
    for _ in range(3):
        with step:
            step.backward(batch_losses(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        seen.append(model.weight.detach().clone())
    released = next(average.parameters())
    assert torch.allclose(released, torch.stack(seen).mean(0))
