"""Bad input: every mistake ends before training, names what is wrong and says what to do."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from datasets import Dataset, DatasetDict

from veilspan.trainer.budget import privacy_plan
from veilspan.trainer.data import open_heldout, open_records
from veilspan.trainer.errors import DataError, ModelError, RecipeError
from veilspan.trainer.model_config import model_config
from veilspan.trainer.recipe import Recipe, load_recipe, make_recipe
from veilspan.trainer.tokenizer import byte_tokenizer, load_tokenizer

TOKENIZER = byte_tokenizer()
BASE: dict[str, Any] = {
    "model": {"config": {"model_type": "llama"}},
    "data": {"train": "data", "unit": "record", "sequence_length": 64, "tokenizer": "bytes"},
    "privacy": {"target_epsilon": 8.0, "delta": 1e-5, "sampling_probability": 0.1, "steps": 10},
    "run": {"folder": "runs/test"},
}


def tree(**sections: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(BASE)
    for section, keys in sections.items():
        target = result.setdefault(section, {})
        target.update(keys)
        for key in [key for key, value in keys.items() if value is None]:
            del target[key]
    return result


def recipe(**sections: dict[str, Any]) -> Recipe:
    return make_recipe(tree(**sections))


def open_data(path: Path, **data: Any) -> object:
    return open_records(recipe(data={"train": str(path), **data}), TOKENIZER)


@pytest.mark.parametrize(
    ("sections", "messages"),
    [
        ({"privacy": {"stepz": 3}}, ["privacy.stepz: unknown key; did you mean steps?"]),
        ({"privcy": {"steps": 3}}, ["privcy: unknown key; did you mean privacy?"]),
        ({"model": {"lora": {"ranks": 3}}}, ["model.lora.ranks: unknown key; did you mean rank?"]),
        ({"data": {"unit": None}}, ["data.unit: missing", "What one guarantee covers"]),
        ({"data": {"unit": "row"}}, ["data.unit: is 'row'", "'record', 'document' or 'user'"]),
        ({"privacy": {"steps": 0}}, ["privacy.steps: is 0", "greater than or equal to 1"]),
        ({"privacy": {"steps": True}}, ["privacy.steps: is True; true and false stand for no"]),
        ({"privacy": {"clip_norm": True}}, ["privacy.clip_norm: is True; true and false"]),
        ({"compute": {"microbatch_size": True}}, ["compute.microbatch_size: is True; true and"]),
        ({"model": {"lora": {"rank": True}}}, ["model.lora.rank: is True; true and false"]),
        ({"optimizer": {"betas": [False, 0.9]}}, ["optimizer.betas: is [False, 0.9]; true and"]),
        (
            {"model": {"config": {"model_type": "mistral", "sliding_window": None}}},
            ["config.sliding_window is None, which a recipe file cannot hold; leave it out"],
        ),
        ({"privacy": {"steps": "many"}}, ["privacy.steps: is 'many'", "valid integer"]),
        ({"compute": {"microbatch_size": 0}}, ["compute.microbatch_size: is 0", "'auto'"]),
        ({"compute": {"microbatch_size": -1}}, ["is -1", "greater than or equal to 1", "'auto'"]),
        ({"compute": {"microbatch_size": "automatic"}}, ["is 'automatic'", "integer", "'auto'"]),
        ({"privacy": {"delta": "small"}}, ["privacy.delta: is 'small'", "number", "'auto'"]),
        ({"privacy": {"delta": 1.0}}, ["privacy.delta: is 1.0", "above 0 and below 1"]),
        ({"privacy": {"delta": None}}, ["privacy.delta: missing"]),
        ({"privacy": {"clip_norm": float("inf")}}, ["privacy.clip_norm: is inf", "finite"]),
        ({"privacy": {"target_epsilon": -1}}, ["privacy.target_epsilon: is -1", "greater than 0"]),
        (
            {"privacy": {"noise_multiplier": 1.0}},
            ["privacy: give exactly one of target_epsilon and noise_multiplier"],
        ),
        (
            {"privacy": {"expected_batch_size": 3}},
            ["privacy: give exactly one of sampling_probability and expected_batch_size"],
        ),
        ({"model": {"path": "somewhere"}}, ["model: give exactly one of path and config"]),
        ({"model": {"config": {"hidden_size": 8}}}, ["model: config needs model_type"]),
        ({"data": {"unit": "user"}}, ['user_column belongs to unit = "user"']),
        ({"data": {"user_column": "who"}}, ['user_column belongs to unit = "user"']),
        (
            {"data": {"unit": "user", "user_column": "who", "format": "text"}},
            ["needs rows with a user column"],
        ),
        (
            {"data": {"sequences_per_unit": 2}},
            ["sequences_per_unit is 2", 'unit is "record"', '"document" or "user"'],
        ),
        (
            {"data": {"unit": "document", "sequences_per_unit": 0}},
            ["data.sequences_per_unit: is 0", "greater than or equal to 1"],
        ),
        (
            {
                "data": {"unit": "document", "sequences_per_unit": 2},
                "privacy": {"norm_probes": 64},
            },
            ["data.sequences_per_unit is 2, but privacy.norm_probes is set", "need 1"],
        ),
        ({"data": {"tokenizer": "auto"}}, ['set data.tokenizer to "bytes"']),
        ({"optimizer": {"warmup_steps": 11}}, ["optimizer.warmup_steps is 11", "privacy.steps"]),
        ({"optimizer": {"betas": [0.9, 1.0]}}, ["optimizer.betas", "below 1"]),
        ({"run": {"folder": None}}, ["run.folder: missing"]),
        ({"run": {"folder": ""}}, ["run.folder: is ''; give the name", 'folder is "."']),
        ({"data": {"train": " "}}, ["data.train: is ' '; give the name of a file or folder"]),
        ({"data": {"heldout": "", "heldout_is_public": True}}, ["data.heldout: is ''; give"]),
        ({"data": {"tokenizer": ""}}, ["data.tokenizer: is ''"]),
        ({"model": {"path": "", "config": None}}, ["model.path: is ''; give the name"]),
        ({"privacy": {"key_file": ""}}, ["privacy.key_file: is ''; give the name"]),
        ({"run": {"folder": "a\0b"}}, ["run.folder: is 'a\\x00b'; no name of a file"]),
        ({"parallel": {"context": 3}}, ["data.sequence_length is 64", "cannot divide"]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(
    sections: dict[str, Any], messages: list[str]
):
    with pytest.raises(RecipeError) as caught:
        recipe(**sections)
    for message in messages:
        assert message in str(caught.value)


def test_all_mistakes_are_listed_at_once():
    with pytest.raises(RecipeError) as caught:
        recipe(privacy={"steps": 0, "stepz": 3}, data={"unit": "row"}, other={"a": 1})
    text = str(caught.value)
    assert text.startswith("4 mistakes in the recipe:")
    for key in ("privacy.steps", "privacy.stepz", "data.unit", "other"):
        assert f"\n  {key}: " in text


def test_a_missing_section_is_named():
    broken = tree()
    del broken["data"]
    with pytest.raises(RecipeError, match=r"data: missing; What is learned from"):
        make_recipe(broken)


def test_a_missing_recipe_is_named(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"Cannot read the recipe .*none\.toml: No such file"):
        load_recipe(tmp_path / "none.toml")


def test_a_recipe_that_is_no_toml_is_named(tmp_path: Path):
    file = tmp_path / "broken.toml"
    file.write_text("[model\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"broken\.toml is not valid TOML"):
        load_recipe(file)


def test_a_recipe_with_a_byte_order_mark_is_read(tmp_path: Path):
    file = tmp_path / "recipe.toml"
    file.write_text("\ufeff" + recipe().to_toml(), encoding="utf-8")
    assert load_recipe(file) == recipe()


def test_missing_data_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"data\.train is .*none.*does not exist"):
        open_data(tmp_path / "none")


def test_missing_held_out_data_is_named(tmp_path: Path):
    settings = recipe(data={"heldout": str(tmp_path / "none"), "heldout_is_public": True})
    with pytest.raises(DataError, match=r"data\.heldout is .*none.*does not exist"):
        open_heldout(settings, TOKENIZER)


def test_held_out_data_without_rows_is_named(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    settings = recipe(
        data={"train": str(tmp_path), "heldout_pattern": "b*", "heldout_is_public": True}
    )
    with pytest.raises(DataError, match=r"b\*' has no rows"):
        open_heldout(settings, TOKENIZER)


def test_held_out_data_without_a_token_to_predict_is_named(tmp_path: Path):
    for name in ("a.txt", "b1.txt", "b2.txt"):
        (tmp_path / name).write_text("a" if name == "a.txt" else "", encoding="utf-8")
    settings = recipe(
        data={"train": str(tmp_path), "heldout_pattern": "b*", "heldout_is_public": True}
    )
    with pytest.raises(DataError, match=r"b\*'.* holds a token to predict"):
        open_heldout(settings, TOKENIZER)


def test_a_folder_of_another_format_asks_for_it(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"holds \*\*/\*\.jsonl: set data\.format to jsonl"):
        open_data(tmp_path)


def test_a_file_of_unknown_format_is_named(tmp_path: Path):
    file = tmp_path / "rows.csv"
    file.write_text("text\na\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.csv.*set data\.format"):
        open_data(file)


def test_a_folder_without_matching_files_is_named_with_the_pattern(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    with pytest.raises(DataError, match=r"no row is left.*\*\*/\*\.py"):
        open_data(tmp_path, pattern="**/*.py")


@pytest.mark.parametrize("pattern", ["/etc/*", ""])
def test_a_pattern_that_is_not_relative_is_named(tmp_path: Path, pattern: str):
    with pytest.raises(DataError, match=r"no relative pattern such as \*\*/\*\.py"):
        open_data(tmp_path, exclude=[pattern])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_file_without_rows_is_named(tmp_path: Path, name: str):
    file = tmp_path / name
    if name.endswith("jsonl"):
        file.write_text("\n \n", encoding="utf-8")
    else:
        schema = arrow.schema([("text", arrow.string())])
        parquet.write_table(arrow.Table.from_pylist([], schema=schema), file)
    with pytest.raises(DataError, match="has no rows"):
        open_data(file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "line 2: no valid JSON"),
        ('{"text": ' + "[" * 100_000, "line 2: no valid JSON"),
        ('["a"]', "line 2: each line must be an object"),
        ('{"body": "a"}', "line 2: no column 'text'; its columns are body"),
        ('{"text": 3}', "line 2: column 'text' must hold text"),
    ],
)
def test_a_wrong_line_is_named_by_file_and_number(tmp_path: Path, line: str, message: str):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"rows\.jsonl, {message}"):
        open_data(file)


def test_a_missing_column_is_named_with_those_that_exist(tmp_path: Path):
    table = arrow.Table.from_pylist([{"body": "a", "number": 1}])
    parquet.write_table(table, tmp_path / "rows.parquet")
    Dataset.from_list([{"body": "a", "number": 1}]).save_to_disk(str(tmp_path / "rows"))
    for path in (tmp_path / "rows.parquet", tmp_path / "rows"):
        with pytest.raises(DataError, match=r"no column 'text'; its columns are body, number"):
            open_data(path)
        with pytest.raises(DataError, match="'number' holds int64; it must hold text"):
            open_data(path, text_column="number")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_a_missing_user_column_is_named(tmp_path: Path, kind: str):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps({"text": "a"}), encoding="utf-8")
    elif kind == "parquet":
        parquet.write_table(arrow.Table.from_pylist([{"text": "a"}]), path)
    else:
        Dataset.from_list([{"text": "a"}]).save_to_disk(str(path))
    with pytest.raises(DataError, match="no column 'who'; its columns are text"):
        open_data(path, format=kind, unit="user", user_column="who")


def test_text_files_have_no_users(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    with pytest.raises(DataError, match="text files have no columns"):
        open_data(tmp_path, unit="user", user_column="who")


def test_a_broken_parquet_file_is_named(tmp_path: Path):
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"rows\.parquet is no Parquet file"):
        open_data(file)


def test_a_parquet_file_with_a_broken_page_is_named(tmp_path: Path):
    file = tmp_path / "rows.parquet"
    parquet.write_table(arrow.table({"text": ["alpha", "beta"]}), file)
    content = file.read_bytes()
    file.write_bytes(content[:4] + b"\xff" * 30 + content[34:])
    records: Any = open_data(file)
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read"):
        records[0]


def test_a_folder_of_splits_asks_for_one(tmp_path: Path):
    rows = Dataset.from_list([{"text": "a"}])
    DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match=r"holds the splits train, test"):
        open_data(tmp_path / "both")
    assert open_data(tmp_path / "both" / "train")


def test_a_folder_that_is_no_dataset_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="does not load as a datasets folder"):
        open_data(tmp_path, format="dataset")


def test_a_file_that_vanishes_is_named(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    records = open_records(recipe(data={"train": str(tmp_path)}), TOKENIZER)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt cannot be read: No such file"):
        records[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read: No such file"), (b'{"text": 1234}\n', "byte 0: column 'text' must")],
)
def test_lines_that_vanish_or_change_are_named(tmp_path: Path, content: bytes | None, message: str):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "ab"}\n', encoding="utf-8")
    records = open_records(recipe(data={"train": str(file)}), TOKENIZER)
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(DataError, match=rf"rows\.jsonl,? {message}"):
        records[0]


def test_a_vocabulary_that_does_not_fit_is_named():
    settings = recipe(model={"config": {"model_type": "llama", "vocab_size": 100}})
    with pytest.raises(ModelError, match=r"token ids up to 258.*vocab_size is 100"):
        model_config(settings, TOKENIZER)


def test_a_sequence_longer_than_the_model_allows_is_named():
    config = {"model_type": "gpt2", "n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 1}
    settings = recipe(model={"config": config})
    with pytest.raises(ModelError, match=r"data\.sequence_length is 64.*only 32 positions"):
        model_config(settings, TOKENIZER)


@pytest.mark.parametrize("make", [False, True])
def test_a_model_folder_that_is_missing_or_empty_is_named(tmp_path: Path, make: bool):
    path = tmp_path / "model"
    if make:
        path.mkdir()
    settings = recipe(model={"config": None, "path": str(path)}, data={"tokenizer": "auto"})
    with pytest.raises(ModelError, match=r"model\.path is .*model"):
        load_tokenizer(settings)
    with pytest.raises(ModelError, match=r"model\.path is .*no config\.json"):
        model_config(settings, TOKENIZER)


def test_an_epsilon_that_no_noise_fits_is_named():
    with pytest.raises(RecipeError, match=r"privacy\.target_epsilon = 1e\+09: "):
        privacy_plan(recipe(privacy={"target_epsilon": 1e9}), 100)


def test_a_delta_that_protects_nobody_is_refused():
    settings = recipe(privacy={"delta": 0.01})
    assert privacy_plan(settings, 99).delta == 0.01
    with pytest.raises(
        RecipeError, match=r"privacy\.delta is 0\.01.*below 1/N = 0\.01 for N = 100"
    ):
        privacy_plan(settings, 100)


def test_a_batch_larger_than_the_data_is_refused():
    settings = recipe(privacy={"sampling_probability": None, "expected_batch_size": 101})
    with pytest.raises(RecipeError, match=r"expected_batch_size is 101.*only 100 units"):
        privacy_plan(settings, 100)


def test_a_batch_larger_than_all_sequences_is_refused():
    settings = recipe(
        data={"unit": "document", "sequences_per_unit": 3},
        privacy={"sampling_probability": None, "expected_batch_size": 301},
    )
    with pytest.raises(RecipeError, match=r"expected_batch_size is 301.*only 300 records of units"):
        privacy_plan(settings, 100)


def test_a_delta_protects_units_not_their_sequences():
    settings = recipe(data={"unit": "document", "sequences_per_unit": 3}, privacy={"delta": 0.009})
    plan = privacy_plan(settings, 100)
    assert plan.delta == 0.009  # below 1/100, though above 1/300
    assert plan.records_per_unit == 3
    with pytest.raises(RecipeError, match=r"below 1/N = 0\.00893 for N = 112"):
        privacy_plan(settings, 112)


def test_a_single_unit_has_nobody_to_hide_among():
    for delta in ("auto", 0.5):
        with pytest.raises(RecipeError, match="only 1 unit"):
            privacy_plan(recipe(privacy={"delta": delta}), 1)
