"""Layers beyond linear maps: convolutions, attention, mixtures of experts, adapters, your own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from veilspan.core import (
    Flat,
    PerLayer,
    PrivacyError,
    PrivateStep,
    RecordsAlone,
    UnsupportedModelError,
    register_rule,
)
from veilspan.core.losses import causal_lm_losses
from veilspan.core.norms import BlockedKernel
from veilspan.core.rules import find_rule
from veilspan.core.rules.linear import LinearRule
from veilspan.core.testing import assert_rule_matches, assert_step_matches_oracle

TAPPED = ("per_sample", "bookkeeping", "two_pass", "per_layer")


def rule_of(module):
    return find_rule("module", module, BlockedKernel())


def assert_exact(model, losses, batch, backward="two_pass", *, size=2):
    kind = PerLayer if backward == "per_layer" else Flat
    assert_step_matches_oracle(
        model, losses, batch, clipping=kind(clip_norm=2.0), size=size, backward=backward
    )


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(4, 6, 3), (3, 4, 9)),
        (nn.Conv1d(4, 4, 4, padding=3, groups=4), (2, 4, 7)),  # depthwise and causal, as in Mamba
        (nn.Conv2d(3, 4, 2, stride=2, bias=False), (3, 3, 6, 4)),  # patches of an image
        (nn.Conv2d(4, 6, (3, 1), padding=(1, 0), dilation=(2, 1), groups=2), (2, 4, 7, 3)),
        (nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 3)),
    ],
)
def test_convolutions_have_a_rule_of_their_own(module, shape):
    assert rule_of(module).name == "convolution"
    assert_rule_matches(module, [shape, (1, *shape[1:])])


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(3, 4, 3, padding="same"), (3, 3, 8)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 5)),
        (nn.GroupNorm(2, 4), (3, 4, 5)),
        (nn.PReLU(5), (3, 5)),
        (nn.ConvTranspose1d(3, 4, 2), (2, 3, 5)),
    ],
)
def test_other_layers_run_their_records_one_at_a_time(module, shape):
    assert rule_of(module) == RecordsAlone()
    assert_rule_matches(module, [shape, (1, *shape[1:])])


def test_an_unbatched_convolution_is_refused():
    step = make_step(nn.Conv1d(2, 3, 1), backward="per_sample")
    with pytest.raises(ValueError, match="records, channels"), step:
        step.model(torch.randn(2, 5))


def make_step(model, **options):
    settings = {"clipping": Flat(clip_norm=1.0), "noise_multiplier": 0.0, "expected_batch_size": 2}
    return PrivateStep(model, **settings, **options)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_with_records_first_are_exact(kind):
    torch.manual_seed(0)
    states = nn.Sequential(nn.Linear(3, 3), Recurrent(kind), nn.Linear(4, 2)).double()
    batch = {"x": torch.randn(4, 5, 3, dtype=torch.float64)}
    assert_exact(states, lambda model, b: model(b["x"])[:, -1].square().sum(1), batch)


@pytest.mark.parametrize("layer", [nn.LSTM(3, 4), nn.MultiheadAttention(4, 2)])
def test_layers_with_positions_first_are_refused_by_name(layer):
    with pytest.raises(UnsupportedModelError, match="batch_first=True"):
        make_step(nn.Sequential(layer), backward="two_pass")


class Attention(nn.Module):
    """Attention over as many positions as records, so that a mask could be taken for records."""

    def __init__(self, *, dropout=0.0, mask="positions"):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, 8)
        self.attend = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.mask = mask

    def forward(self, x, padding=None):
        hidden = self.embed(x)
        length = x.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        mask = causal if self.mask == "positions" else None
        attended, weights = self.attend(
            hidden, hidden, hidden, key_padding_mask=padding, attn_mask=mask
        )
        return self.head(attended + hidden) + weights.sum()[None, None, None] * 0


def attention_losses(model, batch):
    return model(batch["x"], batch["padding"]).square().flatten(1).sum(1)


@pytest.mark.parametrize("backward", TAPPED)
@pytest.mark.parametrize("mask", ["positions", "none"])
def test_multihead_attention_is_exact_with_masks(backward, mask):
    model = Attention(mask=mask).double()
    torch.manual_seed(1)
    padding = torch.zeros(4, 4, dtype=torch.bool)
    padding[1, 3] = padding[2, 2:] = True
    batch = {"x": torch.randn(4, 4, 6, dtype=torch.float64), "padding": padding}
    assert_exact(model, attention_losses, batch, backward, size=4)


class ShortConvolution(nn.Module):
    """Uses the weight of a convolution by function, as LFM2 does."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(6, 6, 3, groups=6, bias=False)

    def forward(self, x):
        padded = nn.functional.pad(x.mT, (2, 0))
        return nn.functional.conv1d(padded, self.conv.weight, groups=6).mT


@pytest.mark.parametrize("backward", TAPPED)
def test_the_way_out_for_a_weight_used_by_function_is_exact(backward):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), ShortConvolution(), nn.Linear(6, 2)).double()
    batch = {"x": torch.randn(4, 5, 6, dtype=torch.float64)}

    def losses(model, batch):
        return model(batch["x"]).square().flatten(1).sum(1)

    with pytest.raises(PrivacyError, match=r"'1.conv.weight' received .* register_rule\(type"):
        assert_exact(model, losses, batch, backward)
    handle = register_rule(ShortConvolution, RecordsAlone())
    try:
        assert_exact(model, losses, batch, backward)
    finally:
        handle.remove()


class InPlace(nn.Module):
    """Writes into what its layers return, as many models do to save memory."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        hidden = self.down(self.act(self.norm(self.act(self.up(x)))))
        hidden += x
        hidden[..., 0] = 0.0
        return hidden


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6)])
@pytest.mark.parametrize("backward", TAPPED)
def test_what_a_layer_returns_may_be_written_in_place(backward, shape):
    torch.manual_seed(0)
    batch = {"x": torch.randn(shape, dtype=torch.float64)}
    model = InPlace().double()
    assert_exact(model, lambda m, b: m(b["x"]).square().flatten(1).sum(1), batch, backward)


def test_transformer_encoder_layers_are_exact():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 3)).double()
    batch = {"x": torch.randn(5, 4, 6, dtype=torch.float64)}
    assert_exact(model, lambda m, b: m(b["x"]).square().flatten(1).sum(1), batch, "bookkeeping")


def test_randomness_inside_is_drawn_once():
    """The two backward passes differentiate the very masks of the one forward pass."""
    model = Attention(dropout=0.5).double()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    sums = []
    for backward in ("per_sample", "two_pass"):
        step = make_step(model, backward=backward)
        torch.manual_seed(7)
        with step:
            step.backward(model(x).square().flatten(1).sum(1))
        sums.append([p.grad.clone() for p in model.parameters()])
        step.detach()
        model.zero_grad()
    for one, other in zip(*sums, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


class Recomputing(nn.Module):
    def __init__(self, inner, *, use_reentrant):
        super().__init__()
        self.embed, self.inner, self.use_reentrant = nn.Linear(6, 8), inner, use_reentrant

    def forward(self, x):
        hidden = self.embed(x)
        return checkpoint(self.inner, hidden, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backward", ["per_sample", "two_pass", "bookkeeping"])
def test_records_alone_work_under_checkpointing(use_reentrant, backward):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.GroupNorm(1, 4), nn.Linear(8, 8), nn.PReLU(4))
    model = Recomputing(inner, use_reentrant=use_reentrant).double()
    batch = {"x": torch.randn(4, 4, 6, dtype=torch.float64)}

    def losses(model, batch):
        if not any("forward" in vars(m) for m in model.modules()):  # the oracle's own loop
            return model.inner(model.embed(batch["x"])).square().flatten(1).sum(1)
        return model(batch["x"]).square().flatten(1).sum(1)

    assert_exact(model, losses, batch, backward)


class InParts(nn.Module):
    """A model whose parts are called, and which is not called itself."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)


@pytest.mark.parametrize("backward", TAPPED)
def test_parts_of_a_model_may_be_checkpointed_without_the_model_around_them(backward):
    torch.manual_seed(0)
    model, batch = InParts().double(), {"x": torch.randn(2, 4, 6, dtype=torch.float64)}

    def losses(model, batch):
        if "forward" not in vars(model.first):  # the oracle's own loop
            return model.last(model.first(batch["x"])).square().flatten(1).sum(1)
        with torch.no_grad():
            model.last(model.first(batch["x"][:1]))  # for something else, and of another size
        hidden = checkpoint(model.first, batch["x"].requires_grad_(), use_reentrant=True)
        return model.last(hidden).square().flatten(1).sum(1)

    assert_exact(model, losses, batch, backward)


MOE = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12,
    "decoder_sparse_step": 1,
    "head_dim": 8,
}


@pytest.mark.parametrize("backward", ["single_sample", *TAPPED])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.usefixtures("genuine_float64")
def test_dropless_mixtures_of_experts_are_exact(
    family, backward, make_model, make_batch, compute_losses
):
    model, batch = make_model(family, **MOE), make_batch(4, 7)
    model.set_experts_implementation("eager")  # grouped products know no fp64
    size = 1 if backward == "single_sample" else 2
    assert_exact(model, compute_losses, batch, backward, size=size)


def test_grouped_products_of_experts_agree_in_fp32(make_model, make_batch, compute_losses):
    model, batch = make_model("mixtral", dtype=torch.float32, **MOE), make_batch(4, 7)
    assert_exact(model, compute_losses, batch, "bookkeeping")


def test_a_mixture_of_experts_names_its_rule(make_model):
    step = make_step(make_model("mixtral", **MOE), backward="two_pass")
    text = step.explain()
    assert "model.layers.0.mlp " in text
    assert "records alone" in text
    assert "experts" not in text


def adapted(make_model, **settings):
    peft = pytest.importorskip("peft")
    model = make_model("llama")
    config = peft.LoraConfig(r=3, lora_alpha=4, lora_dropout=0.0, **settings)
    model = peft.get_peft_model(model, config).double()
    torch.manual_seed(3)
    with torch.no_grad():  # a factor that starts at zero would hide the other's gradient
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("backward", ["single_sample", *TAPPED])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"target_modules": ["embed_tokens"], "use_dora": True},
    ],
    ids=["lora", "dora", "embedding", "embedding-dora"],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own
@pytest.mark.usefixtures("genuine_float64")
def test_adapters_of_peft_are_exact(settings, backward, make_model, make_batch, compute_losses):
    model, batch = adapted(make_model, **settings), make_batch(4, 7)
    size = 1 if backward == "single_sample" else 2
    assert_exact(model, compute_losses, batch, backward, size=size)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_prompts_of_peft_train_one_record_at_a_time(kind, make_model, make_batch):
    """PEFT makes one prompt, and repeats it for all records of a batch."""
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, batch = peft.get_peft_model(make_model("llama"), config).double(), make_batch(3, 7)

    def losses(model, batch):
        logits = model(input_ids=batch["ids"]).logits[:, -7:]
        return causal_lm_losses(logits, batch["labels"])

    with pytest.raises(UnsupportedModelError, match=r"makes one prompt.*'single_sample'"):
        make_step(model, backward="per_sample")
    assert_exact(model, losses, batch, "auto", size=1)
    step = make_step(model, backward="auto")
    with pytest.raises(ValueError, match="micro-batches of one record"), step:
        step.backward(losses(model, batch))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own
@pytest.mark.parametrize("backward", ["single_sample", *TAPPED])
@pytest.mark.usefixtures("genuine_float64")
def test_lora_on_the_weights_of_experts_is_exact(backward, make_model, make_batch, compute_losses):
    """PEFT parametrizes frozen weights in every forward pass, which writes nothing into them."""
    peft = pytest.importorskip("peft")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names)
    model = peft.get_peft_model(make_model("qwen3_moe", **MOE), config).double()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    size = 1 if backward == "single_sample" else 2
    assert_exact(model, compute_losses, make_batch(2, 7), backward, size=size)
    step = make_step(model, backward="single_sample")
    with pytest.raises(PrivacyError, match="written inside the logical batch"), step:
        step.backward(compute_losses(model, make_batch(1, 7)))
        model.get_parameter(next(n for n, _ in model.named_parameters() if "gate_up" in n)).mul_(2)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own
@pytest.mark.parametrize("backward", ["per_sample", "two_pass"])
def test_prompts_per_task_are_exact(backward, make_model, make_batch):
    peft = pytest.importorskip("peft")
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2, num_ranks=2
    )
    model = peft.get_peft_model(make_model("llama"), config).double()
    batch = make_batch(4, 7) | {"tasks": torch.tensor([0, 1, 1, 0])}

    def losses(model, batch):
        logits = model(input_ids=batch["ids"], task_ids=batch["tasks"]).logits[:, -7:]
        return causal_lm_losses(logits, batch["labels"])

    assert_exact(model, losses, batch, backward)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own
@pytest.mark.parametrize("kind", ["LilyConfig", "PeanutConfig"])
@pytest.mark.usefixtures("genuine_float64")
def test_adapters_that_use_what_they_hold_by_function_are_exact(
    kind, make_model, make_batch, compute_losses
):
    peft = pytest.importorskip("peft")
    if not hasattr(peft, kind):
        pytest.skip(f"this PEFT has no {kind}")
    config = getattr(peft, kind)(r=2, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(make_model("llama"), config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert_exact(model, compute_losses, make_batch(2, 7), "two_pass")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("TinyLoraConfig", {"u": 3}), ("VBLoRAConfig", {"num_vectors": 5, "vector_length": 8})],
)
@pytest.mark.usefixtures("genuine_float64")
def test_adapters_that_share_what_the_model_around_them_keeps_are_exact(
    kind, settings, task, make_model, make_batch, compute_losses
):
    """PEFT's model passed for their only user: it ran whole for each record, or was refused."""
    peft = pytest.importorskip("peft")
    if not hasattr(peft, kind):
        pytest.skip(f"this PEFT has no {kind}")
    config = getattr(peft, kind)(
        r=2, target_modules=["q_proj", "o_proj"], task_type=task, **settings
    )
    model = peft.get_peft_model(make_model("llama"), config).double()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    for backward in ("two_pass", "bookkeeping"):
        assert_exact(model, compute_losses, make_batch(2, 7), backward)
    step = make_step(model, backward="per_sample")
    alone = [line for line in step.explain().splitlines() if "records alone" in line]
    assert any("q_proj" in line for line in alone)
    assert all("_proj" in line for line in alone)
    step.detach()


def test_experts_in_a_list_run_with_the_module_that_holds_the_list():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 6, 6))

        def forward(self, flat):
            return flat @ self.weight[0] + (flat @ self.weight[1]).tanh()

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([Experts(), Experts()])

        def forward(self, x):
            flat = x.flatten(0, 1)
            return torch.stack([expert(flat) for expert in self.experts]).sum(0).view_as(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Block()).double()
    batch = {"x": torch.randn(4, 5, 6, dtype=torch.float64)}
    assert_exact(model, lambda m, b: m(b["x"]).square().flatten(1).sum(1), batch)


def test_a_list_with_a_value_for_each_record_is_refused_where_records_run_alone():
    class Offset(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, x, offsets):
            return x * self.factor + torch.tensor(offsets)[: len(x), None]

    step = make_step(Offset(), backward="two_pass")
    with pytest.raises(PrivacyError, match=r"offsets=a list of 2 values"), step:
        step.model(torch.randn(2, 3), [1.0, 2.0])


class Scale(nn.Module):
    """A layer of our own: one learned factor of everything."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.factor


def test_a_registered_rule_comes_first_and_can_be_taken_back():
    class Doubled(nn.Linear):
        pass

    assert rule_of(Doubled(2, 2)).name == "linear"
    first = register_rule(Doubled, RecordsAlone())
    second = register_rule(Doubled, lambda module, kernel: LinearRule(kernel=kernel))
    third = register_rule(nn.Module, lambda module, kernel: None)
    try:
        assert rule_of(Doubled(2, 2)).name == "linear"
        second.remove()
        assert rule_of(Doubled(2, 2)) == RecordsAlone()
        assert rule_of(nn.Linear(2, 2)).name == "linear"
        assert_rule_matches(lambda: Doubled(3, 2), [(2, 3), (3, 4, 3)])
    finally:
        for handle in (first, second, third):
            handle.remove()


def test_the_kit_catches_a_wrong_rule():
    class Skewed(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    assert_rule_matches(Skewed(3, 2), [(2, 3)])
    handle = register_rule(Skewed, lambda module, kernel: LinearRule(kernel=kernel))
    try:
        with pytest.raises(AssertionError, match="relative error"):
            assert_rule_matches(Skewed(3, 2), [(2, 3)])
    finally:
        handle.remove()


@pytest.mark.parametrize(("kind", "make"), [("Linear", RecordsAlone()), (nn.Linear, "alone")])
def test_a_registration_of_the_wrong_type_is_refused(kind, make):
    with pytest.raises(TypeError, match="must be"):
        register_rule(kind, make)


class Mixture(nn.Module):
    """Experts as a list of modules: they receive the tokens of all records, flattened."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 2)
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x):
        flat = x.flatten(0, 1)
        chosen = self.gate(flat).argmax(1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(flat[rows]))
        return out.view_as(x)


def test_pitfall_7_flattened_records_are_refused_until_a_rule_is_registered():
    torch.manual_seed(0)
    mixture = Mixture()
    mixture.gate.requires_grad_(False)
    model = nn.Sequential(nn.Linear(6, 6), mixture).double()
    batch = {"x": torch.randn(3, 5, 6, dtype=torch.float64)}

    def losses(model, batch):
        return model(batch["x"]).square().flatten(1).sum(1)

    step = make_step(model, backward="per_sample")
    with pytest.raises(PrivacyError, match=r"register_rule\(type\(that_module\)"), step:
        step.backward(losses(model, batch))
    step.detach()
    handle = register_rule(Mixture, RecordsAlone())
    try:
        assert_exact(model, losses, batch, "bookkeeping", size=3)
    finally:
        handle.remove()


class Carrying(nn.Module):
    """Keeps a state from one call to the next, in an object that it is given."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x, state=None):
        return x + self.bias


def test_what_could_carry_a_record_to_the_next_is_refused():
    model = Carrying()
    step = make_step(model, backward="per_sample")
    with pytest.raises(PrivacyError, match="state=a Carrying"), step:
        model(torch.randn(2, 3), Carrying())


def test_a_gradient_that_belongs_to_no_record_is_refused():
    class Adding(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3))

        def forward(self, x, shift):
            return x + shift + self.bias

    model = Adding()
    step = make_step(model, backward="per_sample")
    with pytest.raises(PrivacyError, match="belongs to no one of the 2 records"), step:
        model(torch.randn(2, 5, 3), torch.randn(3, requires_grad=True))


def test_a_parameter_from_outside_is_refused():
    class Borrowing(nn.Module):
        def __init__(self, lender):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(4))
            self.lender = [lender]

        def forward(self, x):
            return x @ self.lender[0].weight.T + self.shift

    lender = nn.Linear(4, 4)
    model = nn.Sequential(lender, Borrowing(lender))
    step = make_step(model, backward="per_sample")
    with pytest.raises(PrivacyError, match=r"uses parameter '0\.weight'"), step:
        step.backward(model(torch.randn(2, 4)).square().sum(1))


def test_a_result_that_joins_the_records_is_refused():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return x + self.shift, (x + self.shift).square().mean()

    model = Auxiliary()
    step = make_step(model, backward="per_sample")
    with pytest.raises(PrivacyError, match="auxiliary loss"), step:
        model(torch.randn(2, 4))


def test_one_factor_of_everything_and_a_model_that_owns_a_parameter_itself():
    class Tokened(nn.Module):
        """A model whose root owns a parameter, as the class token of a vision transformer."""

        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, 4))
            self.scale, self.head = Scale(), nn.Linear(4, 2)

        def forward(self, x):
            joined = torch.cat([self.token.expand(len(x), 1, 4), x], dim=1)
            return self.head(self.scale(joined))

    torch.manual_seed(0)
    batch = {"x": torch.randn(4, 3, 4, dtype=torch.float64)}
    assert_rule_matches(Scale(), [(3, 4), (2, 3, 4)])
    model = Tokened().double()
    assert_exact(model, lambda m, b: m(b["x"]).square().flatten(1).sum(1), batch, "two_pass")
