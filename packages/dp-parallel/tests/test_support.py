import pytest
from transformers import Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Qwen3NextConfig

from veilspan.parallel import Layout, ParallelMesh, check_model
from veilspan.parallel.huggingface import ATTENTION_NAME


def mesh_of(context: int) -> ParallelMesh:
    return ParallelMesh(
        replicate_degree=1,
        context_degree=context,
        replicate_rank=0,
        context_rank=0,
        device_type="cpu",
        device_mesh=None,
    )


def check(config, *, context=2, length=64, implementation=ATTENTION_NAME, **options):
    config._attn_implementation = implementation
    layout = Layout(length=length, ranks=context)
    check_model(config, mesh_of(context), layout, **options)


def changed(config, **settings):
    for name, value in settings.items():
        setattr(config, name, value)
    return config


def rope(rope_type: str) -> dict[str, object]:
    factors = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    return {
        "rope_type": rope_type,
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        **(factors if rope_type == "longrope" else {}),
    }


def test_ordinary_models_pass():
    check(LlamaConfig())
    check(MistralConfig(sliding_window=8))
    check(GPT2Config(attn_pdrop=0.0))
    check(LlamaConfig(rope_parameters=rope("yarn")))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Gemma2Config(), "attn_logit_softcapping is 50.0.*set it to None"),
        (Gemma2Config(), "model_type is 'gemma2'; tested are gemma, .*allow_untested=True"),
        (GPT2Config(), "attn_pdrop is 0.1; scores cannot be dropped: set it to 0"),
        (LlamaConfig(attention_dropout=0.1), "attention_dropout is 0.1"),
        (LlamaConfig(rope_parameters=rope("dynamic")), "rope type is 'dynamic'"),
        (LlamaConfig(rope_parameters=rope("longrope")), "rope type is 'longrope'"),
        (Qwen3NextConfig(), "layer_types contains 'linear_attention'"),
        (
            changed(LlamaConfig(), use_bidirectional_attention=True),
            "use_bidirectional_attention is on",
        ),
        (LlamaConfig(max_position_embeddings=32), "length is 64 but max_position_embeddings is 32"),
    ],
)
def test_what_context_parallelism_cannot_give_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        check(config)


def test_rope_types_per_layer_type_are_looked_into():
    kinds = {"full_attention": rope("dynamic"), "sliding_attention": rope("yarn")}
    config = changed(LlamaConfig(), rope_parameters=kinds)
    with pytest.raises(ValueError, match="'dynamic'"):
        check(config)


def test_heads_that_do_not_divide_are_refused_for_ulysses_only():
    config = LlamaConfig(num_attention_heads=6, hidden_size=48)
    with pytest.raises(ValueError, match=r"6 attention heads.*4 context ranks.*'allgather'"):
        check(config, context=4, attention="ulysses")
    check(config, context=4, attention="auto")


def test_attention_that_sees_local_tokens_only_is_refused():
    with pytest.raises(ValueError, match=r"attn_implementation is 'sdpa'.*register_attention"):
        check(LlamaConfig(), implementation="sdpa")


def test_an_untested_family_can_be_allowed():
    config = changed(LlamaConfig(), model_type="my-llama")
    with pytest.raises(ValueError, match="'my-llama'"):
        check(config)
    check(config, allow_untested=True)


def test_one_context_rank_accepts_every_attention():
    check(Gemma2Config(), context=1, implementation="eager")


def test_all_reasons_are_given_at_once():
    config = GPT2Config(n_positions=32)
    with pytest.raises(ValueError, match=r"(?s)max_position_embeddings.*attn_pdrop"):
        check(config)
