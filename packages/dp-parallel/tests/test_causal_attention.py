import pytest
import torch
import torch.nn.functional as F

from veilspan.parallel.attention import causal, causal_attention


def dense(query, key, value, window, scale=None):
    rows, keys = query.shape[2], key.shape[2]
    position = torch.arange(keys - rows, keys)[:, None]
    distance = position - torch.arange(keys)[None, :]
    seen = (distance >= 0) & (distance < (window or keys))
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)


@pytest.mark.parametrize("rows", [1, 7, 8, 23, 40])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 20, 100])
@pytest.mark.parametrize("block", [8, 512])
def test_blocks_equal_dense_attention_in_outputs_and_gradients(monkeypatch, rows, window, block):
    monkeypatch.setattr(causal, "BLOCK_ROWS", block)
    torch.manual_seed(0)
    whole = [torch.randn(2, 4, rows, 6), torch.randn(2, 2, 40, 6), torch.randn(2, 2, 40, 5)]
    mine, theirs = ([x.double().requires_grad_() for x in whole] for _ in range(2))
    query, key, value = theirs
    found, expected = causal_attention(*mine, window=window), dense(query, key, value, window)
    weight = torch.randn_like(expected)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-12)


def test_a_given_scale_is_used():
    query, key, value = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64).unbind(0)
    found = causal_attention(query, key, value, scale=0.3)
    torch.testing.assert_close(found, dense(query, key, value, None, scale=0.3))


def test_masks_stay_one_block_wide(monkeypatch):
    """At 4096 tokens a dense mask would hold 16 million entries."""
    made = []
    band = causal._band
    monkeypatch.setattr(causal, "_band", lambda *args: made.append(band(*args)) or made[-1])
    query = torch.randn(1, 1, 2048, 8)
    key = torch.randn(1, 1, 4096, 8)
    causal_attention(query, key, key)
    causal_attention(query, key, key, window=64)
    assert [mask.shape for mask in made] == [(512, 4096), (512, 575)]


def test_whole_sequences_need_no_mask(monkeypatch):
    monkeypatch.setattr(causal, "_band", None)
    query = torch.randn(1, 2, 700, 8)
    causal_attention(query, query, query, window=700)
