"""What the fused head makes of a model: the head it finds, what follows it, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from veilspan.core import Flat, PrivateStep, UnsupportedModelError
from veilspan.core.head import fused_causal_lm_losses, head_losses
from veilspan.core.losses import causal_lm_losses
from veilspan.core.rules.head import LogitMap
from veilspan.core.testing import Oracle
from veilspan.core.testing.conformance import assert_close

IGNORE = -100


def fused(model, batch):
    return fused_causal_lm_losses(model, batch["ids"], batch["labels"], chunk=4)


def assert_same(model, batch, tolerance=1e-10):
    """Assert that the fused losses and every gradient equal those of the logits."""
    owned = [p for p in model.parameters() if p.requires_grad]
    expected = causal_lm_losses(model(input_ids=batch["ids"]).logits, batch["labels"])
    got = fused(model, batch)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    pairs = zip(*(torch.autograd.grad(x.sum(), owned) for x in (got, expected)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("cohere", {"logit_scale": 0.0625}, LogitMap(scale=0.0625)),
        ("granite", {"logits_scaling": 8.0}, LogitMap(scale=0.125)),
        ("gemma2", {"final_logit_softcapping": 30.0, "head_dim": 8}, LogitMap(cap=30.0)),
        ("nanochat", {"final_logit_softcapping": 1.5}, LogitMap(cap=1.5)),
    ],
)
@pytest.mark.usefixtures("genuine_float64")
def test_scaled_and_capped_logits_are_recognised_by_what_the_model_does(
    kind, changes, expected, make_batch, monkeypatch
):
    transformers = pytest.importorskip("transformers")
    settings = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **(settings | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    maps = []
    original = head_losses

    def spy(*args, **kwargs):
        maps.append(kwargs["logit_map"])
        return original(*args, **kwargs)

    monkeypatch.setattr("veilspan.core.head.head_losses", spy)
    assert_same(model, make_batch(2, 7))
    assert maps == [expected]


class Odd(nn.Module):
    """A decoder whose treatment of the logits is given."""

    def __init__(self, change, calls=1):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.change, self.calls = change, calls

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids):
        hidden = self.embed(input_ids).tanh()
        logits = [self.head(hidden) for _ in range(self.calls)]
        if not logits:
            logits = [F.linear(hidden, self.head.weight, self.head.bias)]
        return (self.change(logits[-1]),)


@pytest.mark.parametrize("backward", ["per_sample", "two_pass", "bookkeeping"])
def test_a_micro_batch_without_records_adds_nothing(backward):
    torch.manual_seed(0)
    model, ids = Odd(lambda x: x).double(), torch.randint(0, 11, (3, 5))
    model.head.weight = model.embed.weight

    def losses(model, batch):
        return fused_causal_lm_losses(model, batch["ids"], chunk=2)

    expected = Oracle.of(model, losses, {"ids": ids}, Flat(clip_norm=0.5))
    step = PrivateStep(
        model,
        clipping=Flat(clip_norm=0.5),
        noise_multiplier=0,
        expected_batch_size=1,
        backward=backward,
    )
    with step:
        for start, stop in ((0, 1), (1, 1), (1, 3)):
            step.backward(losses(model, {"ids": ids[start:stop]}))
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close(got, expected.clipped_sum, 1e-10)


def test_a_model_that_only_returns_its_logits_in_a_tuple_works():
    torch.manual_seed(0)
    model, ids = Odd(lambda x: x * -2.0).double(), torch.randint(0, 11, (2, 5))
    expected = causal_lm_losses(model(ids)[0], ids)
    torch.testing.assert_close(fused_causal_lm_losses(model, ids), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.softmax(-1),
        lambda x: x[..., :9],
        lambda x: x + 1.0,
        lambda x: x.clamp(-30, 30),
        lambda x: 5 * torch.tanh(x / 5),  # a cap that no configuration names
        lambda x: x.masked_fill(torch.arange(11) > 9, -math.inf),
        lambda x: x.masked_fill(torch.arange(11) > 9, -1e9),
        lambda x: x.flip(-1),
    ],
)
def test_what_else_follows_a_head_is_refused(change):
    ids = torch.randint(0, 11, (2, 5))
    model = Odd(change)
    with pytest.raises(UnsupportedModelError, match=r"after its head.*causal_lm_losses"):
        fused_causal_lm_losses(model, ids)
    assert "forward" not in model.head.__dict__


def test_a_cap_that_does_not_fit_is_refused_with_its_setting(make_model, make_batch):
    model = make_model("gemma3", num_hidden_layers=1, final_logit_softcapping=5.0)
    model.register_forward_hook(lambda *a: setattr(a[2], "logits", a[2].logits + 1))
    with pytest.raises(UnsupportedModelError, match=r"'final_logit_softcapping': 5\.0"):
        fused(model, make_batch(2, 5))


@pytest.mark.parametrize("calls", [0, 2])
def test_a_head_that_is_not_called_once_is_refused(calls):
    with pytest.raises(UnsupportedModelError, match=f"called its head {calls} times"):
        fused_causal_lm_losses(Odd(lambda x: x, calls), torch.zeros(2, 5, dtype=torch.long))


def test_models_without_a_head_and_heads_that_are_more_than_linear_are_refused():
    class Other(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    ids, model = torch.zeros(2, 5, dtype=torch.long), Odd(lambda x: x)
    with pytest.raises(UnsupportedModelError, match="names no head"):
        fused_causal_lm_losses(nn.Linear(3, 3), ids)
    model.head = Other(8, 11)
    with pytest.raises(UnsupportedModelError, match="is a Other whose forward is not"):
        fused_causal_lm_losses(model, ids)
    model.head = nn.Linear(8, 11)
    model.head.forward = lambda input: input
    with pytest.raises(UnsupportedModelError, match="patched"):
        fused_causal_lm_losses(model, ids)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_on_the_head_is_refused_and_one_elsewhere_is_exact(make_model, make_batch):
    peft = pytest.importorskip("peft")
    for target, fits in (("lm_head", False), ("q_proj", True)):
        model = make_model("llama", dtype=torch.float32, num_hidden_layers=1)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[target]))
        if fits:
            assert_same(model, make_batch(2, 7), 1e-5)
        else:
            with pytest.raises(UnsupportedModelError, match=r"adapter.*target modules"):
                fused(model, make_batch(2, 7))


def test_labels_are_the_input_unless_they_were_to_be_shifted(make_model, make_batch):
    model, ids = make_model("gpt2", num_hidden_layers=1), make_batch(2, 5)["ids"]
    expected = causal_lm_losses(model(ids).logits, ids)
    torch.testing.assert_close(fused_causal_lm_losses(model, ids), expected)
    with pytest.raises(ValueError, match="labels is None with shifted=True"):
        fused_causal_lm_losses(model, ids, shifted=True)


def test_further_inputs_reach_the_model(make_model, make_batch):
    model, ids = make_model("llama", num_hidden_layers=1), make_batch(2, 5)["ids"]
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    labels = ids.masked_fill(mask == 0, IGNORE)
    expected = causal_lm_losses(model(ids, attention_mask=mask).logits, labels)
    got = fused_causal_lm_losses(model, ids, labels, attention_mask=mask)
    torch.testing.assert_close(got, expected)
