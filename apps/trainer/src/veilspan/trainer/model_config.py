"""Configuration of the model, checked against tokenizer, sequence length and processes."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from veilspan.trainer.errors import ModelError
from veilspan.trainer.recipe import Recipe

_OLD_NAMES = {"rope_theta", "rope_scaling"}  # accepted by every rotary model of Hugging Face


def model_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Return the configuration of the model that a recipe describes.

    A model from scratch takes what the recipe leaves open from the rest of the recipe: vocab_size
    and special tokens from the tokenizer, max_position_embeddings from data.sequence_length.

    Raises:
        ModelError: If a key, the vocabulary, the sequence length or dropout does not fit.
    """
    if recipe.model.path is not None:
        config = _from_folder(recipe.model.path)
    else:
        assert recipe.model.config is not None  # Model refuses neither path nor config
        config = _from_scratch(recipe.model.config, recipe.data.sequence_length, tokenizer)
    config.use_cache = False
    _check_vocabulary(config, tokenizer, recipe)
    _check_positions(config, recipe)
    _check_heads(config)
    if recipe.parallel.context > 1:
        _check_dropout(config, recipe.parallel.context)
    return config


def _from_folder(folder: Path) -> PreTrainedConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(
            f"model.path is {str(folder)!r}, which has no config.json; give a local Hugging Face "
            "model folder (download one first, nothing is fetched from the network here)."
        )
    try:
        needs_code = "auto_map" in json.loads(file.read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken file fails in as many ways as there are models
        raise ModelError(f"{file} does not load: {error}") from error
    if needs_code:
        raise ModelError(
            f"{file} needs Python code from the model folder (auto_map), which is never run; "
            "use a model that transformers itself supports."
        )
    return _decoder(config, "model.path")


def _from_scratch(
    settings: dict[str, Any], sequence_length: int, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedConfig:
    settings = dict(settings)
    kind = settings.pop("model_type")
    try:
        default = AutoConfig.for_model(kind)
    except ValueError as error:
        raise ModelError(
            f"model.config.model_type is {kind!r}, which transformers does not know; "
            'use for example "llama", "qwen3", "mistral", "gemma" or "gpt2".'
        ) from error
    _check_keys(settings, default)
    filled = settings | {
        name: value
        for name, value in _defaults(default, sequence_length, tokenizer).items()
        if name not in settings and default.attribute_map.get(name) not in settings
    }
    try:
        return _decoder(AutoConfig.for_model(kind, **filled), "model.config")
    except ModelError:
        raise
    except Exception as error:  # each model checks its settings in its own way
        raise ModelError(f"model.config does not describe a {kind} model: {error}") from error


def _defaults(
    default: PreTrainedConfig, sequence_length: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    names = {"vocab_size": len(tokenizer)}
    if hasattr(default, "max_position_embeddings"):
        names["max_position_embeddings"] = sequence_length
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        names[name] = getattr(tokenizer, name)
    return names


def _check_keys(settings: dict[str, Any], default: PreTrainedConfig) -> None:
    """Refuse unknown keys, which transformers would store and ignore."""
    known = {*default.to_dict(), *default.attribute_map, *_OLD_NAMES}
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else "."
            raise ModelError(
                f"model.config.{key}: a {default.model_type} configuration has no such key{hint}"
            )


def _decoder(config: PreTrainedConfig, key: str) -> PreTrainedConfig:
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(
            f"{key}: {config.model_type} is no decoder that predicts the next token; "
            "only causal language models can be trained."
        )
    return config


def _check_vocabulary(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, recipe: Recipe
) -> None:
    largest = max(tokenizer.get_vocab().values())
    size = config.get_text_config().vocab_size
    if largest >= size:
        raise ModelError(
            f"The tokenizer (data.tokenizer = {recipe.data.tokenizer!r}) has token ids up to "
            f"{largest}, but the model's vocab_size is {size}. Use the tokenizer that belongs to "
            "the model, or, for a model from scratch, leave model.config.vocab_size out."
        )


def _check_positions(config: PreTrainedConfig, recipe: Recipe) -> None:
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and recipe.data.sequence_length > longest:
        raise ModelError(
            f"data.sequence_length is {recipe.data.sequence_length}, but the model has only "
            f"{longest} positions (max_position_embeddings); set data.sequence_length to at most "
            f"{longest} or use a model for longer sequences."
        )


def _check_heads(config: PreTrainedConfig) -> None:
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    groups = getattr(text, "num_key_value_heads", None)
    for name in ("num_hidden_layers", "num_key_value_heads"):
        if isinstance(count := getattr(text, name, None), int) and count < 1:
            raise ModelError(f"model.config.{name} is {count}; it must be at least 1.")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise ModelError(
            f"model.config.num_key_value_heads is {groups}, which does not divide "
            f"num_attention_heads, {heads}."
        )


def _check_dropout(config: PreTrainedConfig, context: int) -> None:
    rates = {
        name: value
        for name, value in config.get_text_config().to_dict().items()
        if "drop" in name and not name.startswith(("summary_", "classifier_"))  # other heads
    }
    active = [name for name, rate in rates.items() if isinstance(rate, int | float) and rate > 0]
    if active:
        raise ModelError(
            f"{', '.join(active)} of the model is above 0. With parallel.context = {context} each "
            "process would drop other units of the same sequence; set it to 0."
        )
