from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from veilspan.parallel import build_mesh, register_attention, shard_model
from veilspan.parallel.huggingface import attention_forward

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def pair(config):
    torch.manual_seed(0)
    build = AutoModelForCausalLM.from_config
    mine = build(config, attn_implementation=register_attention()).double().eval()
    theirs = build(type(config)(**config.to_dict()), attn_implementation="sdpa").double().eval()
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


@pytest.mark.parametrize("config", [LlamaConfig(**SMALL), MistralConfig(**SMALL, sliding_window=5)])
def test_outside_a_region_attention_is_ordinary_and_generation_works(config):
    mine, theirs = pair(config)
    ids = torch.arange(1, 25).view(2, 12)
    torch.testing.assert_close(mine(ids).logits, theirs(ids).logits, rtol=0, atol=1e-12)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(mine.generate(ids, **options), theirs.generate(ids, **options))


def test_a_key_cache_is_refused_in_checkpointed_training_and_kept_in_generation():
    mine, theirs = pair(LlamaConfig(**SMALL))
    shard_model(mine, build_mesh(), checkpointing="full")
    ids = torch.arange(1, 9)[None]
    with pytest.raises(ValueError, match=r"key cache.*use_cache=False"):
        mine(ids, use_cache=True)
    mine(ids, use_cache=False).logits.sum().backward()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(mine.generate(ids, **options), theirs.generate(ids, **options))


def test_a_mask_that_hides_tokens_is_refused_after_sharding():
    model, _ = pair(LlamaConfig(**SMALL))
    shard_model(model, build_mesh())
    ids = torch.ones(1, 4).long()
    model(ids, attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"attention_mask hides tokens.*on the right"):
        model(ids, attention_mask=torch.tensor([[0, 1, 1, 1]]))
    with pytest.raises(ValueError, match=r"attention_mask hides tokens.*on the right"):
        model(ids, torch.tensor([[0, 1, 1, 1]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.ones(4, 4)}, "was given an attention_mask"),
        ({"is_causal": False}, "is bidirectional"),
        ({"dropout": 0.1}, "attention dropout 0.1.*set attention_dropout"),
        ({"softcap": 30.0}, r"soft-capped scores \(softcap\)"),
        ({"s_aux": torch.zeros(2)}, "attention sinks"),
        ({"position_bias": torch.zeros(2)}, "position bias"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_layer(options, message):
    operand = torch.zeros(1, 2, 4, 8)
    mask = options.pop("attention_mask", None)
    with pytest.raises(ValueError, match=r"Identity .*" + message):
        attention_forward(nn.Identity(), operand, operand, operand, mask, **options)


def test_a_bidirectional_layer_is_refused():
    class Encoder(nn.Module):
        is_causal = False

    operand = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="Encoder is bidirectional"):
        attention_forward(Encoder(), operand, operand, operand, None)
