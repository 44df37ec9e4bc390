"""Tokenizers: bytes as tokens, local folders, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from veilspan.trainer.errors import ModelError
from veilspan.trainer.recipe import Recipe, make_recipe
from veilspan.trainer.tokenizer import BEGIN, byte_tokenizer, load_tokenizer

TOKENIZER = byte_tokenizer()


def recipe(**data: object) -> Recipe:
    return make_recipe(
        {
            "model": {"config": {"model_type": "llama"}},
            "data": {"train": "data", "unit": "record", "sequence_length": 64, **data},
            "privacy": {
                "noise_multiplier": 1.0,
                "delta": 1e-5,
                "sampling_probability": 0.1,
                "steps": 1,
            },
            "run": {"folder": "runs/test"},
        }
    )


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=50))
def test_tokens_are_the_bytes_of_the_text_and_decode_to_it(text: str):
    tokens = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokens == list(text.encode())
    decoded = TOKENIZER.decode(tokens, clean_up_tokenization_spaces=False)
    assert decoded == text


def test_the_vocabulary_is_every_byte_and_three_special_tokens():
    assert len(TOKENIZER) == 259
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(259))
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (
        256,
        257,
        258,
    )


def test_text_that_spells_a_special_token_stays_text():
    assert (
        256
        not in TOKENIZER(BEGIN, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    )


def test_a_saved_byte_tokenizer_loads_without_this_package(tmp_path: Path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = "def naïve():\n\treturn '€😀'\n"
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text


def test_pitfall_56_the_built_in_tokenizer_is_the_same_whatever_the_data():
    again = byte_tokenizer()
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_a_local_folder_is_loaded(tmp_path: Path):
    TOKENIZER.save_pretrained(tmp_path)
    assert len(load_tokenizer(recipe(tokenizer=str(tmp_path)))) == 259


def test_a_folder_that_is_missing_is_named(tmp_path: Path):
    with pytest.raises(ModelError, match=r"data\.tokenizer is .*none.*no folder"):
        load_tokenizer(recipe(tokenizer=str(tmp_path / "none")))


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(ModelError, match=r"without a tokenizer .*tokenizer\.json"):
        load_tokenizer(recipe(tokenizer=str(tmp_path)))


def test_a_broken_tokenizer_is_named(tmp_path: Path):
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="does not load"):
        load_tokenizer(recipe(tokenizer=str(tmp_path)))


def test_pitfall_45_code_in_a_tokenizer_folder_is_never_run(tmp_path: Path):
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    file.write_text(json.dumps(settings), encoding="utf-8")
    try:
        loaded = load_tokenizer(recipe(tokenizer=str(tmp_path)))
    except ModelError:
        return
    assert type(loaded).__name__ != "Evil"
