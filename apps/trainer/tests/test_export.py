"""The exported model: an ordinary Hugging Face folder that computes the same."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from veilspan.trainer.checkpoint import CheckpointError
from veilspan.trainer.export import ExportError, export_checkpoint, export_model
from veilspan.trainer.models import build_model
from veilspan.trainer.processes import Processes
from veilspan.trainer.recipe import Recipe
from veilspan.trainer.run_folder import RunFolder
from veilspan.trainer.tokenizer import load_tokenizer

ALONE = Processes(device=torch.device("cpu"))
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _trained_by_hand(recipe: Recipe) -> torch.nn.Module:
    """Return the recipe's model with other weights than it starts from."""
    model = build_model(recipe, load_tokenizer(recipe)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model__config": {**LLAMA, "tie_word_embeddings": True}},
        {"model__lora": {"rank": 2}},
        {"model__lora": {"rank": 2, "target_modules": ["lm_head", "embed_tokens", "q_proj"]}},
    ],
    ids=["plain", "tied", "adapters", "adapters of both ends"],
)
def test_the_exported_model_computes_what_the_trained_one_does(
    tmp_path: Path, recipe_in: Callable, settings: dict
) -> None:
    recipe = recipe_in(tmp_path, **settings)
    model = _trained_by_hand(recipe)
    path = export_model(model, recipe, RunFolder(tmp_path / "run"), ALONE, note="# Note\n")
    loaded = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.randint(256, (2, 40))
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)
    assert loaded.config._attn_implementation == "sdpa"
    assert AutoTokenizer.from_pretrained(path)("ab").input_ids == [256, 97, 98]
    assert (path / "README.md").read_text() == "# Note\n"
    assert not list(path.glob("*.bin"))
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


def test_a_model_folder_mentions_none_of_our_names(tmp_path: Path, recipe_in: Callable) -> None:
    recipe = recipe_in(tmp_path)
    path = export_model(_trained_by_hand(recipe), recipe, RunFolder(tmp_path / "run"), ALONE)
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "veilspan" not in json.dumps(config).lower()


def test_an_exported_model_generates_with_a_cache(finished_run: Recipe) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished_run.run.folder / "model")
    assert model.config.use_cache
    assert model.generation_config.use_cache is not False


def test_the_newest_checkpoint_can_be_exported_later(finished_copy: Recipe) -> None:
    folder = finished_copy.run.folder
    expected = load_file(folder / "model" / "model.safetensors")
    (folder / "model" / "model.safetensors").unlink()
    path = export_checkpoint(folder)
    weights = load_file(path / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_run_without_a_checkpoint_cannot_be_exported(tmp_path: Path, recipe_in: Callable) -> None:
    recipe = recipe_in(tmp_path)
    recipe.run.folder.mkdir()
    RunFolder(recipe.run.folder).recipe.write_text(recipe.to_toml())
    with pytest.raises(CheckpointError, match="no checkpoint to export"):
        export_checkpoint(recipe.run.folder)


def test_a_full_disk_keeps_the_model_that_was_there(tmp_path: Path, recipe_in: Callable) -> None:
    recipe = recipe_in(tmp_path)
    folder = RunFolder(tmp_path / "run")
    export_model(_trained_by_hand(recipe), recipe, folder, ALONE)
    before = (folder.model / "model.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ExportError, match="free disk space"):
            export_model(_trained_by_hand(recipe), recipe, folder, ALONE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (folder.model / "model.safetensors").read_bytes() == before
