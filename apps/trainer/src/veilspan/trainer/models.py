"""Models: from a local folder of safetensors, from scratch, with or without adapters."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from veilspan.trainer.errors import ModelError
from veilspan.trainer.model_config import model_config
from veilspan.trainer.recipe import Recipe
from veilspan.trainer.sections import Lora


def build_model(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    attn_implementation: str = "sdpa",
) -> nn.Module:
    """Return the model of a recipe in training mode, on the CPU, without a key-value cache.

    Trainable parameters are float32 whatever `model.dtype` is; frozen ones have that dtype. The
    same recipe gives the same initial weights on every process, and the global random state stays
    as it was.

    Args:
        recipe: The recipe.
        tokenizer: Tokenizer of the data; its vocabulary must fit the model.
        attn_implementation: Name in the attention registry of transformers.

    Raises:
        ModelError: If the model cannot be built or loaded, or does not fit tokenizer and data.
    """
    config = model_config(recipe, tokenizer)
    dtype = _frozen_dtype(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        if recipe.model.path is not None:
            model = _load(recipe.model.path, config, dtype, attn_implementation)
        else:
            model = _create(config, dtype, attn_implementation)
        if recipe.model.lora is not None:
            model = _adapt(model, recipe.model.lora)
    return model.train()


def sketch_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, attn_implementation: str = "sdpa"
) -> nn.Module:
    """Return the model of a recipe with random weights only; meant for the meta device.

    Args:
        recipe: The recipe.
        tokenizer: Tokenizer of the data.
        attn_implementation: Name in the attention registry of transformers.

    Raises:
        ModelError: If the model cannot be built, or does not fit tokenizer and data.
    """
    config = model_config(recipe, tokenizer)
    model = _create(config, _frozen_dtype(recipe), attn_implementation)
    return model if recipe.model.lora is None else _adapt(model, recipe.model.lora)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (all, trainable) parameters; a tied parameter counts once."""
    parameters = list(model.parameters())
    trainable = (p.numel() for p in parameters if p.requires_grad)
    return sum(p.numel() for p in parameters), sum(trainable)


def _frozen_dtype(recipe: Recipe) -> torch.dtype:
    """Return the dtype to load in: without adapters nothing is frozen, so it is float32."""
    low = recipe.model.lora is not None and recipe.model.dtype == "bfloat16"
    return torch.bfloat16 if low else torch.float32


def _create(config: PreTrainedConfig, dtype: torch.dtype, attention: str) -> nn.Module:
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except Exception as error:  # each model checks its settings in its own way
        raise ModelError(
            f"model.config does not describe a {config.model_type} model: {error}"
        ) from error


def _load(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, attention: str) -> nn.Module:
    _require_safetensors(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # a broken file fails in as many ways as there are formats
        raise ModelError(f"The weights in {folder} do not load: {error}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"The weights in {folder} lack {len(missing)} of the model's parameters, first "
            f"{missing[0]}; they would start at random. Complete the folder or its config.json."
        )
    _require_saveable(folder, model)
    return model


def _require_saveable(folder: Path, model: Any) -> None:
    """Refuse before training what transformers would refuse to save after it."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        raise ModelError(
            f"{folder / 'generation_config.json'} contradicts itself, so that the trained model "
            f"could not be saved: {error} Correct or remove that file."
        ) from error


def _require_safetensors(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for file in (*folder.glob("*.bin"), *folder.glob("*.pt")))
    if pickles:
        raise ModelError(
            f"{folder} holds weights only as pickle files ({pickles[0]}), which can run code when "
            "they are loaded. Load them where you trust them and write safetensors with "
            "model.save_pretrained(folder)."
        )
    raise ModelError(f"{folder} holds no *.safetensors weights; give a complete model folder.")


def _adapt(model: nn.Module, lora: Lora) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ModelError(
            "model.lora needs PEFT, which is not installed; install veilspan-trainer[lora]."
        ) from error
    targets = lora.target_modules
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  # any number works
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers for a property under its old name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            adapted = get_peft_model(model, settings)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        linear = {
            n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)
        }
        raise ModelError(
            f"model.lora.target_modules is {targets!r}, which fits no module of the model; "
            f"its linear modules are {', '.join(sorted(linear))}."
        ) from error
    _require_own_weights(adapted, targets)
    return adapted


def _require_own_weights(model: Any, targets: object) -> None:
    """Refuse an adapter on one of two modules that share a weight: merging would change both."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    tied = ends[1] is not None and ends[0].weight is ends[1].weight
    if tied and any(hasattr(end, "base_layer") for end in ends):
        raise ModelError(
            f"model.lora.target_modules is {targets!r}, but embeddings and head of this model "
            "share their weight: the merged model would have the adapter in both. Leave them out."
        )
