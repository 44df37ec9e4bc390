"""Per-record losses against a loop, and what they refuse."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veilspan.core import losses
from veilspan.core.losses import causal_lm_losses

IGNORE = -100


def loop(logits, labels, *, reduction="mean", shifted=False, ignore_index=IGNORE):
    """One record, one token at a time: the definition."""
    result = []
    for record, targets in zip(logits, labels.tolist(), strict=True):
        total, count = (record * 0).sum(), 0  # zero, but part of the graph
        for t in range(len(targets)):
            position = t if shifted else t + 1
            target = targets[position] if position < len(targets) else ignore_index
            if target == ignore_index:
                continue
            total = total - torch.log_softmax(record[t], 0)[target]
            count += 1
        result.append(total / max(1, count) if reduction == "mean" else total)
    return torch.stack(result) if result else logits.new_zeros(0)


def gradient(compute, logits, weights):
    leaf = logits.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad((compute(leaf) * weights).sum(), leaf)
    return grad


@st.composite
def batches(draw):
    size, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    vocabulary = draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(size, length, vocabulary, generator=generator, dtype=torch.float64)
    logits = logits * draw(st.sampled_from([0.1, 3.0, 200.0]))
    labels = torch.randint(0, vocabulary, (size, length), generator=generator)
    masked = torch.rand(size, length, generator=generator) < draw(st.sampled_from([0, 0.3, 0.9, 1]))
    return (
        logits,
        labels.masked_fill(masked, IGNORE),
        torch.rand(size, generator=generator).double(),
    )


@settings(max_examples=150, deadline=None)
@given(
    batch=batches(),
    reduction=st.sampled_from(["mean", "sum"]),
    shifted=st.booleans(),
    chunk=st.sampled_from([1, 5, 2**20]),
)
def test_pitfall_53_losses_and_gradients_are_those_of_the_loop(batch, reduction, shifted, chunk):
    logits, labels, weights = batch
    options = {"reduction": reduction, "shifted": shifted}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "_CHUNK_ELEMENTS", chunk)
        result = causal_lm_losses(logits, labels, **options)
        grad = gradient(lambda x: causal_lm_losses(x, labels, **options), logits, weights)
    expected = loop(logits, labels, **options)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    wanted = gradient(lambda x: loop(x, labels, **options), logits, weights)
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)


def test_pitfall_53_the_logits_at_a_position_are_scored_on_the_next_label():
    labels = torch.tensor([[3, 1, 2]])
    sure = torch.nn.functional.one_hot(torch.tensor([[1, 2, 0]]), 4) * 100.0
    assert causal_lm_losses(sure, labels).item() == 0.0
    shifted = torch.tensor([[1, 2, IGNORE]])
    assert causal_lm_losses(sure, shifted, shifted=True).item() == 0.0


def example(size=3, length=6, vocabulary=11, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(size, length, vocabulary, generator=generator).to(dtype)
    labels = torch.randint(0, vocabulary, (size, length), generator=generator)
    labels[0, 4:] = IGNORE
    return logits, labels


@pytest.mark.parametrize(
    ("given_dtype", "result_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_losses_are_fp32_or_wider_and_gradients_have_the_dtype_of_the_logits(
    given_dtype, result_dtype
):
    logits, labels = example(dtype=given_dtype)
    logits.requires_grad_()
    result = causal_lm_losses(logits, labels)
    assert result.dtype == result_dtype
    expected = loop(logits.detach().double(), labels)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)
    result.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == given_dtype


def test_gradients_pass_the_numerical_check():
    logits, labels = example(2, 4, 5, torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: causal_lm_losses(x, labels), logits)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_pitfall_31_a_record_without_counted_tokens_has_loss_zero_and_gradient_zero(reduction):
    logits, labels = example()
    labels[1] = IGNORE
    labels[2, 1:] = IGNORE  # the first label is never scored
    logits.requires_grad_()
    result = causal_lm_losses(logits, labels, reduction=reduction)
    assert result[1:].tolist() == [0.0, 0.0]
    assert result[0] > 0
    result.sum().backward()
    assert logits.grad is not None
    assert not logits.grad[1:].any()
    assert logits.grad[0].any()


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 1, 7)])
def test_batches_without_records_or_targets_work_forward_and_backward(shape):
    logits = torch.randn(shape, requires_grad=True)
    labels = torch.zeros(shape[:2], dtype=torch.long)
    result = causal_lm_losses(logits, labels)
    assert result.tolist() == [0.0] * shape[0]
    result.sum().backward()
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("content", [0.0, 1e30, float("inf"), float("nan")])
def test_pitfall_23_content_of_tokens_that_do_not_count_cannot_matter(content):
    logits, labels = example()
    labels[1, 3:] = IGNORE
    changed = logits.clone()
    changed[0, 3:] = content  # labels[0, 4:] do not count, nor does what follows the last label
    changed[1, 2:] = content
    weights = torch.tensor([1.0, 2.0, 3.0])
    grads = [gradient(lambda x: causal_lm_losses(x, labels), x, weights) for x in (logits, changed)]
    assert torch.equal(causal_lm_losses(logits, labels), causal_lm_losses(changed, labels))
    assert torch.equal(*grads)
    assert not grads[0][0, 3:].any()


@pytest.mark.parametrize("position", [0, 2])
def test_pitfall_23_masked_labels_in_the_middle_are_skipped(position):
    logits, labels = example()
    labels[1, position + 1] = IGNORE
    changed = logits.clone()
    changed[1, position] += 100.0
    assert torch.equal(causal_lm_losses(logits, labels), causal_lm_losses(changed, labels))


def test_pitfall_22_a_record_that_is_not_finite_leaves_the_others_alone():
    logits, labels = example()
    broken = logits.clone()
    broken[1, 2] = float("nan")
    weights = torch.ones(3)
    result = causal_lm_losses(broken, labels)
    assert result[1].isnan()
    assert torch.equal(result[[0, 2]], causal_lm_losses(logits, labels)[[0, 2]])
    grads = [gradient(lambda x: causal_lm_losses(x, labels), x, weights) for x in (logits, broken)]
    assert torch.equal(grads[0][[0, 2]], grads[1][[0, 2]])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_pitfall_27_a_loss_is_the_same_in_every_batch_bit_for_bit(reduction):
    logits, labels = example(5, 33, 70)
    together = causal_lm_losses(logits, labels, reduction=reduction)
    for i in range(5):
        alone = causal_lm_losses(logits[i : i + 1], labels[i : i + 1], reduction=reduction)
        assert torch.equal(alone, together[i : i + 1])


def test_pitfall_06_no_record_changes_the_weight_of_another_one():
    logits, labels = example()
    longer = labels.clone()
    longer[0] = 1
    weights = torch.ones(3)
    before = gradient(lambda x: causal_lm_losses(x, labels), logits, weights)
    after = gradient(lambda x: causal_lm_losses(x, longer), logits, weights)
    assert torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize("cuts", [[3], [1, 5], [2, 4, 6]])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_shares_of_a_split_sequence_add_up_to_the_whole(cuts, reduction):
    logits, labels = example(3, 8, 11, torch.float64)
    whole = causal_lm_losses(logits, labels, reduction=reduction)
    shifted = torch.cat([labels[:, 1:], torch.full((3, 1), IGNORE)], 1)
    tokens_B = (shifted != IGNORE).sum(1) if reduction == "mean" else None
    edges = [0, *cuts, 8]
    shares = [
        causal_lm_losses(
            logits[:, begin:end],
            shifted[:, begin:end],
            shifted=True,
            reduction=reduction,
            num_tokens_B=tokens_B,
        )
        for begin, end in itertools.pairwise(edges)
    ]
    torch.testing.assert_close(torch.stack(shares).sum(0), whole, rtol=1e-13, atol=0)


def test_a_part_of_a_sequence_without_tokens_and_an_empty_record_have_share_zero():
    logits, labels = example(2, 3)
    result = causal_lm_losses(
        logits,
        torch.full_like(labels, IGNORE),
        shifted=True,
        num_tokens_B=torch.tensor([7, 0], dtype=torch.int32),
    )
    assert result.tolist() == [0.0, 0.0]


def test_any_label_may_be_the_ignored_one():
    logits, labels = example(dtype=torch.float64)
    labels = labels.abs() % 11
    labels[:, 3] = 0
    masked = labels.masked_fill(labels == 0, IGNORE)
    assert torch.equal(
        causal_lm_losses(logits, labels, ignore_index=0), causal_lm_losses(logits, masked)
    )


@pytest.mark.parametrize("chunk", [1, 13, 40, 2**20])
def test_the_chunk_size_changes_no_bit(chunk, monkeypatch):
    logits, labels = example(3, 9, 13)
    weights = torch.tensor([1.0, 2.0, 3.0])
    expected = causal_lm_losses(logits, labels)
    grad = gradient(lambda x: causal_lm_losses(x, labels), logits, weights)
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", chunk)
    assert torch.equal(causal_lm_losses(logits, labels), expected)
    again = gradient(lambda x: causal_lm_losses(x, labels), logits, weights)
    assert torch.equal(again, grad)


def test_nothing_of_the_size_of_the_logits_is_kept_for_the_backward_besides_them():
    logits, labels = example(2, 16, 512)
    logits.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = causal_lm_losses(logits, labels)
    big = {t.untyped_storage().data_ptr() for t in kept if t.numel() >= logits.numel()}
    assert big == {logits.untyped_storage().data_ptr()}
    result.sum().backward()


def test_logits_that_are_not_contiguous_give_the_same_losses():
    logits, labels = example(dtype=torch.float64)
    turned = logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    assert torch.equal(causal_lm_losses(turned, labels), causal_lm_losses(logits, labels))
    weights = torch.ones(3).double()
    grads = [gradient(lambda x: causal_lm_losses(x, labels), x, weights) for x in (turned, logits)]
    assert torch.equal(*grads)


def test_a_graph_that_is_kept_can_be_walked_twice():
    logits, labels = example()
    logits.requires_grad_()
    total = causal_lm_losses(logits, labels).sum()
    first, second = (torch.autograd.grad(total, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_second_derivatives_are_refused_rather_than_wrong():
    logits, labels = example()
    logits.requires_grad_()
    total = causal_lm_losses(logits, labels).sum()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(total, logits, create_graph=True)


def test_int32_labels_work_and_very_large_logits_stay_finite():
    labels = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    result = causal_lm_losses(torch.full((1, 3, 4), 1e30), labels)
    assert result.item() == pytest.approx(math.log(4))


LOGITS, LABELS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
COUNT = torch.tensor([3, 3])


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(6, 5), LABELS.view(-1), r"logits.*\[B, T, V\].*flattened"),
        (LOGITS.long(), LABELS, "logits.*floating point"),
        ("logits", LABELS, "logits is a str"),
        (LOGITS, LABELS.view(-1), "labels has shape"),
        (LOGITS, LABELS[:, 1:], "labels has shape.*shift"),
        (LOGITS[:, :-1], LABELS[:, 1:].float(), "labels.*int64"),
        (LOGITS, LABELS[:1], "labels has shape"),
        (LOGITS, LABELS + 5, "holds 5, outside of the vocabulary 0 … 4"),
        (LOGITS, LABELS - 1, "holds -1, outside"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        causal_lm_losses(logits, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "none"}, "reduction is 'none'.*'mean' or 'sum'"),
        ({"reduction": "batchmean"}, "couple"),
        ({"num_tokens_B": COUNT}, "shifted=True"),
        ({"num_tokens_B": COUNT, "shifted": True, "reduction": "sum"}, "num_tokens_B"),
        ({"num_tokens_B": COUNT[:1], "shifted": True}, r"num_tokens_B.*\[2\]"),
        ({"num_tokens_B": COUNT.float(), "shifted": True}, "num_tokens_B"),
        ({"num_tokens_B": COUNT - 1, "shifted": True}, "num_tokens_B is smaller"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        causal_lm_losses(LOGITS, LABELS, **options)
