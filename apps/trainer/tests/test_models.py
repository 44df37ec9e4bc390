"""Models: from scratch, from a folder, with adapters; their cost; padding that means nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from veilspan.core.losses import causal_lm_losses
from veilspan.trainer.data import collate, open_records
from veilspan.trainer.errors import ModelError
from veilspan.trainer.forecast import flops_per_sequence, memory_forecast
from veilspan.trainer.model_config import model_config
from veilspan.trainer.model_cost import ModelCost, count_cost
from veilspan.trainer.models import build_model, count_parameters
from veilspan.trainer.recipe import Recipe, make_recipe
from veilspan.trainer.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def recipe(model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Recipe:
    tree: dict[str, Any] = {
        "model": {"config": LLAMA} if model is None else model,
        "data": {"train": "data", "unit": "record", "sequence_length": 64, "tokenizer": "bytes"},
        "privacy": {
            "noise_multiplier": 1.0,
            "delta": 1e-5,
            "sampling_probability": 0.1,
            "steps": 1,
        },
        "run": {"folder": "runs/test"},
    }
    for section, keys in sections.items():
        tree[section] = {**tree.get(section, {}), **keys}
    return make_recipe(copy.deepcopy(tree))


def forecast(settings: Recipe, cost: ModelCost) -> dict[str, int]:
    return memory_forecast(settings, cost, microbatch_size=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder with tokenizer, as a user would have downloaded it."""
    path = tmp_path_factory.mktemp("model")
    build_model(recipe(), TOKENIZER).save_pretrained(path)  # pyright: ignore[reportCallIssue]
    TOKENIZER.save_pretrained(path)
    return path


def copied(folder: Path, target: Path, **changes: Any) -> Path:
    """Return a copy of a model folder with changes to its config.json."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return target


def test_a_model_from_scratch_follows_tokenizer_and_sequence_length():
    model = build_model(recipe(), TOKENIZER)
    config: Any = model.config
    assert config.vocab_size == 259
    assert config.max_position_embeddings == 64
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, 257, 258)
    assert config.use_cache is False
    assert model.training


def test_the_seed_decides_the_initial_weights_and_nothing_else_does():
    torch.manual_seed(1)
    first = build_model(recipe(), TOKENIZER).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = build_model(recipe(), TOKENIZER).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_model(recipe(run={"seed": 1}), TOKENIZER).state_dict()
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_a_local_folder_is_loaded_as_it_is(folder: Path):
    loaded = build_model(recipe({"path": str(folder)}), TOKENIZER).state_dict()
    original = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).state_dict()
    assert loaded.keys() == original.keys()
    assert all(torch.equal(loaded[name], original[name]) for name in original)


def test_trained_parameters_are_float32_whatever_the_dtype():
    model = build_model(recipe({"config": LLAMA, "dtype": "bfloat16"}), TOKENIZER)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_adapters_are_trained_in_float32_and_the_rest_is_frozen():
    settings = {"config": LLAMA, "dtype": "bfloat16", "lora": {"rank": 4}}
    model = build_model(recipe(settings), TOKENIZER)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    everything, trainable = count_parameters(model)
    assert trainable == sum(p.numel() for p in trained.values()) < everything


def test_adapters_that_fit_no_module_are_refused_with_those_that_exist():
    settings = {"config": LLAMA, "lora": {"target_modules": ["query"]}}
    with pytest.raises(ModelError, match=r"target_modules is \('query',\).*q_proj"):
        build_model(recipe(settings), TOKENIZER)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
def test_an_adapter_of_a_weight_that_two_modules_share_is_refused(end: str):
    lora = {"target_modules": ["q_proj", end]}
    with pytest.raises(ModelError, match=f"target_modules is .*'{end}'.* share their weight"):
        build_model(
            recipe({"config": {**LLAMA, "tie_word_embeddings": True}, "lora": lora}), TOKENIZER
        )


def test_adapters_without_peft_say_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ModelError, match=r"veilspan-trainer\[lora\]"):
        build_model(recipe({"config": LLAMA, "lora": {}}), TOKENIZER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 3}, "hiden_size: a llama configuration has no such key.*hidden_size"),
        ({"model_type": "lama"}, "model_type is 'lama', which transformers does not know"),
        ({"hidden_size": 33}, "does not describe a llama model"),
        ({"hidden_size": "big"}, "does not describe a llama model"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide"),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(ModelError, match=message):
        build_model(recipe({"config": LLAMA | change}), TOKENIZER)


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_key_value_heads"])
def test_a_model_without_a_layer_or_head_is_named(name: str):
    with pytest.raises(ModelError, match=f"{name} is 0; it must be at least 1"):
        model_config(recipe({"config": {**LLAMA, name: 0}}), TOKENIZER)


def test_a_model_that_is_no_decoder_is_refused():
    with pytest.raises(ModelError, match="t5 is no decoder"):
        build_model(recipe({"config": {"model_type": "t5"}}), TOKENIZER)


def test_dropout_is_refused_where_processes_share_a_sequence():
    model = {"config": LLAMA | {"attention_dropout": 0.1}}
    build_model(recipe(model), TOKENIZER)
    with pytest.raises(ModelError, match=r"attention_dropout.*parallel\.context = 2"):
        build_model(recipe(model, parallel={"context": 2}), TOKENIZER)


def test_pitfall_45_weights_in_pickle_files_are_refused(folder: Path, tmp_path: Path):
    target = copied(folder, tmp_path / "model")
    (target / "model.safetensors").unlink()
    torch.save({}, target / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*safetensors"):
        build_model(recipe({"path": str(target)}), TOKENIZER)


def test_pitfall_45_code_in_a_model_folder_is_refused(folder: Path, tmp_path: Path):
    target = copied(folder, tmp_path / "model", auto_map={"AutoModelForCausalLM": "evil.Evil"})
    with pytest.raises(ModelError, match=r"auto_map.*never run"):
        build_model(recipe({"path": str(target)}), TOKENIZER)


def test_weights_that_would_start_at_random_are_refused(folder: Path, tmp_path: Path):
    target = copied(folder, tmp_path / "model", num_hidden_layers=3)
    with pytest.raises(
        ModelError, match=r"lack 9 of the model's parameters, first model\.layers\.2"
    ):
        build_model(recipe({"path": str(target)}), TOKENIZER)


def test_a_model_that_could_not_be_saved_after_training_is_refused_before(
    folder: Path, tmp_path: Path
):
    target = copied(folder, tmp_path / "model")
    (target / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    with pytest.raises(ModelError, match=r"generation_config\.json contradicts itself"):
        build_model(recipe({"path": str(target)}), TOKENIZER)


def test_pitfall_23_the_content_of_padding_changes_no_gradient(tmp_path: Path):
    for name, content in {"a": "some text", "b": "x", "c": ""}.items():
        (tmp_path / f"{name}.txt").write_text(content, encoding="utf-8")
    settings = recipe(data={"train": str(tmp_path)})
    records = open_records(settings, TOKENIZER)
    model = build_model(settings, TOKENIZER)

    def gradients(pad: int) -> list[torch.Tensor]:
        batch = collate(records, [0, 1, 2], pad_token_id=pad, multiple_of=16)
        losses_B = causal_lm_losses(model(input_ids=batch.input_ids).logits, batch.labels)
        return list(torch.autograd.grad(losses_B.sum(), list(model.parameters())))

    for one, other in zip(gradients(0), gradients(101), strict=True):
        assert torch.equal(one, other)


def test_a_unit_without_text_contributes_exactly_zero(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    settings = recipe(data={"train": str(tmp_path)})
    batch = collate(open_records(settings, TOKENIZER), [0], multiple_of=8)
    model = build_model(settings, TOKENIZER)
    losses_B = causal_lm_losses(model(input_ids=batch.input_ids).logits, batch.labels)
    assert losses_B.tolist() == [0.0]
    for gradient in torch.autograd.grad(losses_B.sum(), list(model.parameters())):
        assert not gradient.any()


def test_the_counted_cost_is_what_a_real_forward_pass_keeps():
    settings = recipe(data={"sequence_length": 256})
    cost = count_cost(settings, TOKENIZER)
    model = build_model(settings, TOKENIZER)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    held: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=torch.zeros(1, 256, dtype=torch.int64), use_cache=False)
    assert cost.saved_bytes == pytest.approx(sum(kept.values()), rel=0.05)
    assert (cost.parameters, cost.trainable) == count_parameters(model)


def test_counted_operations_match_the_textbook():
    length = 512
    cost = count_cost(recipe(data={"sequence_length": length}), TOKENIZER)
    matrices = cost.parameters - 259 * 32  # the embedding is looked up, not multiplied
    attention = 2 * 2 * length * length * 32 * 2 / 2  # two products, two blocks, causal half
    assert cost.forward_flops == pytest.approx(2 * matrices * length + attention, rel=0.02)


def test_more_processes_per_sequence_need_less_memory_each():
    def total(**parallel: Any) -> int:
        settings = recipe(data={"sequence_length": 512}, parallel=parallel)
        return sum(forecast(settings, count_cost(settings, TOKENIZER)).values())

    assert total(context=4) < total(context=2) < total()


def test_embedding_and_head_are_whole_on_every_process_that_holds_a_part_of_them():
    settings = recipe(parallel={"context": 2})
    model: Any = build_model(settings, TOKENIZER)
    outside = [model.model.embed_tokens, model.model.norm, model.lm_head]
    numbers = sum(
        p.numel() for module in (*outside, model.model.layers[0]) for p in module.parameters()
    )
    gathered = forecast(settings, count_cost(settings, TOKENIZER))["gathered weights"]
    assert gathered == 2 * 4 * numbers  # weights and gradients


def test_checkpointing_saves_memory_and_costs_a_forward_pass():
    plain, full = recipe(), recipe(compute={"checkpointing": "full"})
    cost = count_cost(plain, TOKENIZER)
    assert forecast(full, cost)["activations"] < forecast(plain, cost)["activations"]
    extra = flops_per_sequence(full, cost) - flops_per_sequence(plain, cost)
    assert extra == cost.forward_flops


def test_adapters_need_less_state_and_less_arithmetic():
    plain, adapted = recipe(), recipe({"config": LLAMA, "lora": {"rank": 2}})
    one, other = count_cost(plain, TOKENIZER), count_cost(adapted, TOKENIZER)
    assert other.trainable < one.trainable
    for purpose in ("gradients", "clipped sums", "optimizer"):
        assert forecast(adapted, other)[purpose] < forecast(plain, one)[purpose]
    assert flops_per_sequence(adapted, other) < flops_per_sequence(plain, one)
