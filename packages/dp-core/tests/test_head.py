"""The fused head: equal to the loss of the logits under every strategy, without the logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from veilspan.core import Flat, PerLayer, PrivacyError, PrivateStep
from veilspan.core.head import fused_causal_lm_losses, head_losses
from veilspan.core.losses import causal_lm_losses
from veilspan.core.rules.head import LogitMap
from veilspan.core.support import preflight
from veilspan.core.testing import Oracle
from veilspan.core.testing.conformance import assert_close, clipped_sum

IGNORE = -100
STRATEGIES = ["single_sample", "per_sample", "two_pass", "bookkeeping", "per_layer"]


def plain(model, batch, **options):
    return causal_lm_losses(model(input_ids=batch["ids"]).logits, batch["labels"], **options)


def fused(model, batch, **options):
    options.setdefault("chunk", 4)
    return fused_causal_lm_losses(model, batch["ids"], batch["labels"], **options)


def gradients(losses_B, tensors):
    weights = torch.linspace(1, 2, len(losses_B), dtype=losses_B.dtype)
    found = torch.autograd.grad((losses_B * weights).sum(), tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def assert_same(model, batch, tolerance=1e-10, **options):
    """Assert that the fused losses and every gradient equal those of the logits."""
    owned = [p for p in model.parameters() if p.requires_grad]
    expected, got = plain(model, batch), fused(model, batch, **options)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    pairs = zip(gradients(got, owned), gradients(expected, owned), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def assert_matches_oracle(model, batch, strategy, **options):
    """Assert that the sum which a strategy clips with fused losses is the oracle's, of logits."""
    kind = PerLayer if strategy == "per_layer" else Flat
    norm = Oracle.of(model, plain, batch, Flat(clip_norm=1.0)).norm_B.median()
    clipping = kind(clip_norm=float(norm))
    size = 1 if strategy == "single_sample" else len(batch["ids"])
    expected = Oracle.of(model, plain, batch, clipping)
    got = clipped_sum(
        model, fused, batch, clipping=clipping, size=size, backward=strategy, **options
    )
    assert_close(got, expected.clipped_sum, 1e-10)


@pytest.mark.usefixtures("genuine_float64")
@pytest.mark.parametrize(
    "family", ["llama", "llama-tied", "qwen2", "qwen3", "mistral", "gemma", "gemma3", "phi", "phi3",
               "gpt2"],
)  # fmt: skip
def test_losses_and_gradients_of_every_family_equal_those_of_the_logits(
    family, make_model, make_batch
):
    assert_same(make_model(family), make_batch(3, 9))


@pytest.mark.usefixtures("genuine_float64")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "phi"])
def test_clipped_sum_of_every_strategy_equals_the_oracle_in_fp64(
    family, strategy, make_model, make_batch
):
    assert_matches_oracle(make_model(family), make_batch(3, 9), strategy)


@pytest.mark.usefixtures("genuine_float64")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_capped_head_equals_the_oracle(strategy, make_model, make_batch):
    model = make_model("gemma3", num_hidden_layers=1, final_logit_softcapping=2.0)
    assert_matches_oracle(model, make_batch(3, 7), strategy)


@pytest.mark.usefixtures("genuine_float64")
@pytest.mark.parametrize("backward", STRATEGIES[:4])
def test_sums_of_integers_equal_the_oracle_up_to_their_grain(backward, make_model, make_batch):
    model, batch = make_model("llama-tied", num_hidden_layers=1), make_batch(3, 7)
    clipping = Flat(clip_norm=0.5)
    expected = Oracle.of(model, plain, batch, clipping).clipped_sum
    size = 1 if backward == "single_sample" else 3
    options = {"clipping": clipping, "size": size, "backward": backward, "accumulate": "exact"}
    got, logits = (clipped_sum(model, f, batch, **options) for f in (fused, plain))
    assert_close(got, logits, 1e-9)
    assert_close(got, expected, 1e-7)


@pytest.mark.usefixtures("genuine_float64")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("frozen", ["lm_head", "embed_tokens", "wte", "lm_head.weight"])
def test_frozen_parts_get_no_gradient_and_the_rest_is_exact(
    frozen, strategy, make_model, make_batch
):
    family = {"wte": "gpt2", "lm_head.weight": "phi"}.get(frozen, "llama")
    model, batch = make_model(family, num_hidden_layers=1), make_batch(3, 7)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    assert_matches_oracle(model, batch, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_clipped_sum_equals_the_oracle_in_fp32(strategy, make_model, make_batch):
    model, batch = make_model("llama-tied", dtype=torch.float32), make_batch(4, 33)
    clipping = (PerLayer if strategy == "per_layer" else Flat)(clip_norm=0.5)
    size = 1 if strategy == "single_sample" else 2
    expected = Oracle.of(model, plain, batch, clipping)
    got = clipped_sum(model, fused, batch, clipping=clipping, size=size, backward=strategy)
    assert_close(got, expected.clipped_sum, 1e-5)


@pytest.mark.parametrize("chunk", [*range(1, 9), None])
def test_the_size_of_a_chunk_changes_nothing(chunk, make_model, make_batch):
    model, batch = make_model("phi", num_hidden_layers=1), make_batch(2, 5)
    assert_same(model, batch, 1e-6, chunk=chunk)
    torch.manual_seed(0)
    head, hidden = nn.Linear(6, 11).double(), torch.randn(2, 5, 6).double()
    labels = torch.tensor([[1, 2, IGNORE, 4, 5], [0, 10, 3, IGNORE, IGNORE]])
    inputs = [hidden.requires_grad_(), head.weight, head.bias]
    expected = causal_lm_losses(head(hidden), labels)
    got = head_losses(hidden, head, labels, chunk=chunk)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"shifted": True},
        {"shifted": True, "num_tokens_B": torch.tensor([9, 20, 11])},
        {"ignore_index": 7},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_mean_what_they_mean_for_logits(options, make_model, make_batch):
    model, batch = make_model("llama", num_hidden_layers=1), make_batch(3, 6)
    batch["labels"] = batch["labels"].masked_fill(
        batch["labels"] == IGNORE, options.get("ignore_index", IGNORE)
    )
    owned = list(model.parameters())
    expected, got = plain(model, batch, **options), fused(model, batch, **options)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(gradients(got, owned), gradients(expected, owned), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def example(size=3, length=6, dtype=torch.float64):
    torch.manual_seed(5)
    head = nn.Linear(8, 11).to(dtype)
    hidden = torch.randn(size, length, 8, dtype=dtype)
    labels = torch.randint(0, 11, (size, length))
    labels[:1, 4:] = IGNORE
    return hidden, head, labels


@pytest.mark.parametrize("logit_map", [LogitMap(), LogitMap(scale=0.5), LogitMap(scale=3, cap=2)])
def test_gradients_pass_the_numerical_check(logit_map):
    hidden, head, labels = example(2, 4)

    def losses(hidden, weight, bias):
        part = nn.Linear(8, 11).double()
        del part.weight, part.bias
        part.weight, part.bias = weight, bias
        return head_losses(hidden, part, labels, chunk=3, logit_map=logit_map)

    leaves = [t.detach().requires_grad_() for t in (hidden, head.weight, head.bias)]
    assert torch.autograd.gradcheck(losses, leaves)


@pytest.mark.parametrize("content", [1e30, math.inf, math.nan])
def test_pitfall_23_content_of_tokens_that_do_not_count_cannot_matter(content):
    hidden, head, labels = example()
    labels[1, 3:] = IGNORE
    changed = hidden.clone()
    changed[0, 3:] = content
    changed[1, 2:] = content
    results = []
    for given in (hidden, changed):
        leaf = given.requires_grad_()
        losses_B = head_losses(leaf, head, labels, chunk=4)
        results.append([losses_B, *gradients(losses_B, [leaf, head.weight, head.bias])])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert not results[0][1][0, 3:].any()


def test_pitfall_22_a_record_that_is_not_finite_leaves_the_others_alone():
    hidden, head, labels = example()
    broken = hidden.clone()
    broken[1, 2] = math.nan
    expected, got = head_losses(hidden, head, labels), head_losses(broken, head, labels)
    assert got[1].isnan()
    assert torch.equal(got[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 1), (1, 5)])
def test_batches_without_records_or_targets_work_forward_and_backward(shape):
    hidden, head, labels = example(*shape)
    leaf = hidden.requires_grad_()
    losses_B = head_losses(leaf, head, labels)
    assert losses_B.shape == shape[:1]
    grads = gradients(losses_B, [leaf, head.weight, head.bias])
    assert all(bool(g.any()) == (shape == (1, 5)) for g in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gives_fp32_losses_close_to_those_of_the_logits(
    dtype, make_model, make_batch
):
    model, batch = make_model("llama", dtype=dtype), make_batch(2, 9)
    got = fused(model, batch)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, plain(model, batch), rtol=1e-3, atol=1e-3)
    assert_same(model, batch, 2e-2)


def test_autocast_lowers_the_product_as_it_does_for_the_head(make_model, make_batch):
    model, batch = make_model("llama", dtype=torch.float32), make_batch(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = fused(model, batch), plain(model, batch)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    owned = list(model.parameters())
    for ours, theirs in zip(gradients(got, owned), gradients(expected, owned), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=2e-3)


class Largest(TorchDispatchMode):
    """Remembers the most elements that any result of an operation had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if torch.is_tensor(value):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // 8)
        return result


@pytest.mark.parametrize("backward", [None, *STRATEGIES])
def test_nothing_of_the_size_of_the_logits_is_ever_allocated(backward, make_model):
    size = 1 if backward == "single_sample" else 3
    model = make_model("llama", vocab_size=512, num_hidden_layers=1)
    ids = torch.randint(3, 512, (size, 48))
    batch = {"ids": ids, "labels": ids}
    # per-sample gradients are what per_sample keeps; no other strategy holds a [B, V, D]
    kept = 512 * 32 * (size if backward == "per_sample" else 1)
    assert kept < size * 48 * 512 if backward == "per_sample" else kept < 48 * 512
    with Largest() as seen:
        plain(model, batch).sum().backward()
    assert seen.elements >= size * 48 * 512
    model.zero_grad()
    clipping = (PerLayer if backward == "per_layer" else Flat)(clip_norm=0.5)
    with Largest() as seen:
        if backward is None:
            fused(model, batch).sum().backward()
        else:
            clipped_sum(model, fused, batch, clipping=clipping, size=size, backward=backward)
    assert seen.elements <= kept


@pytest.mark.parametrize(
    ("backward", "sweeps"),
    [
        ("single_sample", 1),
        ("per_sample", 1),
        ("per_layer", 1),
        ("bookkeeping", 2),  # once for the norm, once for the sum
        ("two_pass", 2),
    ],
)
def test_backward_passes_compute_the_logits_no_more_often_than_they_must(
    backward, sweeps, make_model, make_batch, monkeypatch
):
    """The gradient of the hidden states comes out of the sweep that something else needs."""
    model, batch = make_model("llama", num_hidden_layers=1), make_batch(2, 4)  # one chunk
    batch = {name: value[:1] for name, value in batch.items()}
    calls, linear = [], torch.nn.functional.linear

    def counted(inputs, weight, bias=None):
        calls.append(weight)
        return linear(inputs, weight, bias)

    monkeypatch.setattr("veilspan.core.rules.head.F.linear", counted)
    clipping = (PerLayer if backward == "per_layer" else Flat)(clip_norm=0.5)
    clipped_sum(model, fused, batch, clipping=clipping, size=1, backward=backward)
    rows = model.get_output_embeddings().weight.data_ptr()
    of_head = [weight for weight in calls if weight.data_ptr() == rows and len(weight) > 1]
    assert len(of_head) == 1 + sweeps  # and once forward


def test_nothing_of_the_size_of_the_logits_is_kept_for_the_backward():
    hidden, head, labels = example(2, 16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        losses_B = head_losses(hidden.requires_grad_(), head, labels, chunk=2)
    assert max(t.numel() for t in kept) == hidden.numel()
    losses_B.sum().backward()


HIDDEN, HEAD = torch.zeros(2, 3, 8), nn.Linear(8, 11)
LABELS = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("hidden", "labels", "options", "message"),
    [
        (HIDDEN[0], LABELS, {}, r"hidden_BTD.*\[B, T, 8\].*flattened"),
        (HIDDEN[..., :7], LABELS, {}, r"hidden_BTD.*\[B, T, 8\]"),
        (HIDDEN.long(), LABELS, {}, "hidden_BTD.*floating point"),
        (HIDDEN, LABELS[:, 1:], {}, "labels has shape.*hidden_BTD"),
        (HIDDEN, LABELS.float(), {}, "labels.*int64"),
        (HIDDEN, LABELS + 11, {}, "holds 11, outside of the vocabulary 0 … 10"),
        (HIDDEN, LABELS, {"reduction": "none"}, "reduction is 'none'"),
        (HIDDEN, LABELS, {"num_tokens_B": LABELS[:, 0]}, "shifted=True"),
        (HIDDEN, LABELS, {"chunk": 0}, "chunk is 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(hidden, labels, options, message):
    with pytest.raises(ValueError, match=message):
        head_losses(hidden, HEAD, labels, **options)


def test_a_graph_that_is_kept_can_be_walked_twice_but_not_differentiated_again():
    hidden, head, labels = example()
    total = head_losses(hidden.requires_grad_(), head, labels).sum()
    first, second = (torch.autograd.grad(total, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(total, hidden, create_graph=True)


@pytest.mark.parametrize("coupled", [False, True])
def test_preflight_passes_unless_records_couple(coupled, make_model, make_batch):
    model = make_model("llama-tied", num_hidden_layers=1)
    step = PrivateStep(
        model,
        clipping=Flat(clip_norm=1.0),
        noise_multiplier=0,
        expected_batch_size=1,
        backward="two_pass",
    )

    def losses(model, batch):
        losses_B = fused(model, batch)  # the second term moves gradients, but no value
        return losses_B + (losses_B - losses_B.detach()).flip(0) if coupled else losses_B

    if coupled:
        with pytest.raises(PrivacyError, match="depends on other records"):
            preflight(step, losses, make_batch(2, 7))
    else:
        assert preflight(step, losses, make_batch(2, 7)).records_probed == 2
    step.detach()
    assert "forward" not in model.lm_head.__dict__


def test_evaluation_between_forward_and_backward_changes_nothing(make_model, make_batch):
    model, batch = make_model("llama-tied", num_hidden_layers=1), make_batch(3, 7)
    expected = Oracle.of(model, plain, batch, Flat(clip_norm=0.5))

    def losses(model, batch):
        losses_B = fused(model, batch)
        with torch.no_grad():
            torch.testing.assert_close(fused(model, batch), losses_B)
        return losses_B

    got = clipped_sum(
        model, losses, batch, clipping=Flat(clip_norm=0.5), size=3, backward="two_pass"
    )
    assert_close(got, expected.clipped_sum, 1e-6)
