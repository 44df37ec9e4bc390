"""Recipes: what is read, what is filled in, what is refused."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veilspan.trainer.errors import RecipeError
from veilspan.trainer.recipe import Recipe, load_recipe, make_recipe
from veilspan.trainer.recipe_section import Section
from veilspan.trainer.recipe_toml import dumps

DOCS = Path(__file__).parents[3] / "docs/api/trainer.md"
RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))

SMALL: dict[str, Any] = {
    "model": {"config": {"model_type": "llama"}},
    "data": {"train": "data", "unit": "record", "sequence_length": 64, "tokenizer": "bytes"},
    "privacy": {
        "noise_multiplier": 1.0,
        "delta": 1e-5,
        "sampling_probability": 0.1,
        "steps": 10,
    },
    "run": {"folder": "runs/test"},
}


def changed(**sections: dict[str, Any]) -> dict[str, Any]:
    """Return the small recipe with keys set, or removed where the value is None."""
    tree = copy.deepcopy(SMALL)
    for section, keys in sections.items():
        target = tree.setdefault(section, {})
        target.update(keys)
        for key in [key for key, value in keys.items() if value is None]:
            del target[key]
    return tree


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(dumps(tree), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"context": 2, "shard": "replicate"}}, "parallel.context is 2"),
        (
            {"parallel": {"shard": "replicate"}, "compute": {"backward": "per_sample"}},
            'compute.backward is "per_sample"',
        ),
    ],
)
def test_a_model_is_split_over_copies_only_where_clipped_sums_can_be_scattered(sections, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        make_recipe(changed(**sections))


def test_defaults_are_filled_in_and_the_rest_is_kept():
    recipe = make_recipe(SMALL)
    assert recipe.privacy.steps == 10
    assert recipe.privacy.clip_norm == 1.0
    assert recipe.parallel.context == 1
    assert recipe.processes == 1
    assert recipe.data.train == Path("data")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A shell leaves it as it is in `--set run.folder=~/runs`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = {"data": {"train": "~/data"}, "privacy": {"key_file": Path("~/key")}}
    file = write(tmp_path / "recipe.toml", SMALL)
    assert load_recipe(file, ["run.folder=~/runs"]).run.folder == tmp_path / "runs"
    recipe = make_recipe(changed(**keys))
    assert (recipe.data.train, recipe.privacy.key_file) == (tmp_path / "data", tmp_path / "key")
    with pytest.raises(RecipeError, match=r"run\.folder: is '~nobody-here/runs'; the home folder"):
        make_recipe(changed(run={"folder": "~nobody-here/runs"}))


def test_a_recipe_cannot_be_changed():
    recipe = make_recipe(SMALL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.privacy.steps = 11  # pyright: ignore[reportAttributeAccessIssue]


def test_a_model_with_an_infinite_limit_reads_back_as_itself(tmp_path: Path):
    config = {"model_type": "mamba2", "time_step_limit": [0.0, float("inf")]}
    recipe = make_recipe(changed(model={"config": config}))
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert load_recipe(tmp_path / "recipe.toml").model.config == config


def test_a_resolved_recipe_reads_back_as_itself(tmp_path: Path):
    tree = changed(
        model={"lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"]}},
        data={"train": 'with "quotes", \\ and é\x7f\n', "exclude": ["a/**", "b"]},
        parallel={"context": 2},
    )
    recipe = make_recipe(tree)
    file = tmp_path / "resolved.toml"
    file.write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(file) == recipe


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_that_is_shipped_is_valid(file: Path):
    assert load_recipe(file).privacy.steps > 0


def test_there_are_recipes_to_ship():
    assert {file.stem for file in RECIPES} >= {"demo-stdlib", "finetune-llama-lora"}


def sections(schema: type[Section], path: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Yield every section below a model, with its dotted name."""
    for name, field in schema.model_fields.items():
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, Section):
                yield f"{path}{name}", candidate
                yield from sections(candidate, f"{path}{name}.")


def test_every_key_is_described():
    found = dict(sections(Recipe))
    assert set(found) == {*Recipe.model_fields, "model.lora"}
    for name, section in [("", Recipe), *found.items()]:
        nameless = [key for key, field in section.model_fields.items() if not field.description]
        assert not nameless, name


def test_overrides_are_read_as_toml_and_as_text_where_they_are_none(tmp_path: Path):
    file = write(tmp_path / "r.toml", SMALL)
    recipe = load_recipe(
        file,
        [
            "privacy.steps=20",
            "data.train=/some/folder",
            'data.exclude=["a", "b"]',
            "model.config.hidden_size = 32",
            "model.lora.rank=2",
        ],
    )
    assert recipe.privacy.steps == 20
    assert recipe.data.train == Path("/some/folder")
    assert recipe.data.exclude == ("a", "b")
    assert recipe.model.config == {"model_type": "llama", "hidden_size": 32}
    assert recipe.model.lora is not None
    assert recipe.model.lora.rank == 2


def test_an_empty_override_removes_a_key(tmp_path: Path):
    file = write(tmp_path / "r.toml", SMALL)
    recipe = load_recipe(file, ["privacy.noise_multiplier=", "privacy.target_epsilon=8"])
    assert recipe.privacy.noise_multiplier is None
    assert recipe.privacy.target_epsilon == 8.0


def test_an_empty_override_makes_no_section(tmp_path: Path):
    assert load_recipe(write(tmp_path / "r.toml", SMALL), ["model.lora.rank="]).model.lora is None


def test_a_key_inside_of_the_run_folder_is_refused(tmp_path: Path):
    overrides = ["run.folder=runs/a", "privacy.key_file=runs/a/deep/my.key"]
    with pytest.raises(RecipeError, match=r"privacy.key_file.*inside of run.folder"):
        load_recipe(write(tmp_path / "r.toml", SMALL), overrides)


def test_an_override_never_injects_further_keys(tmp_path: Path):
    file = write(tmp_path / "r.toml", SMALL)
    with pytest.raises(RecipeError, match=r"run\.seed"):
        load_recipe(file, ["run.seed=1\nother = 2"])


@pytest.mark.parametrize("text", ["privacy.steps", "steps=3", "=3", "privacy..steps=3", ".=3"])
def test_an_override_without_section_key_or_value_is_refused(tmp_path: Path, text: str):
    file = write(tmp_path / "r.toml", SMALL)
    with pytest.raises(RecipeError, match=r"section\.key=value"):
        load_recipe(file, [text])


def test_an_override_below_a_value_is_refused(tmp_path: Path):
    file = write(tmp_path / "r.toml", SMALL)
    with pytest.raises(RecipeError, match="is a value and has no keys"):
        load_recipe(file, ["privacy.steps.more=3"])


def test_a_context_must_divide_the_sequence_into_equal_pieces():
    for layout, length, context in [("zigzag", 64, 3), ("zigzag", 66, 2), ("contiguous", 65, 2)]:
        tree = changed(
            data={"sequence_length": length}, parallel={"context": context, "layout": layout}
        )
        with pytest.raises(RecipeError, match="cannot divide"):
            make_recipe(tree)
    make_recipe(
        changed(data={"sequence_length": 66}, parallel={"context": 2, "layout": "contiguous"})
    )


def test_the_length_that_a_context_error_proposes_is_accepted():
    with pytest.raises(RecipeError, match=r"set data\.sequence_length to 60 ") as caught:
        make_recipe(changed(data={"sequence_length": 64}, parallel={"context": 6}))
    assert "parallel.context = 6" in str(caught.value)
    make_recipe(changed(data={"sequence_length": 60}, parallel={"context": 6}))


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        ({"microbatch_size": 2}, r"compute\.microbatch_size is 2"),
        ({"backward": "two_pass"}, r'compute\.backward is "two_pass"'),
    ],
)
def test_split_sequences_need_one_sample_at_a_time(compute: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        make_recipe(changed(parallel={"context": 2}, compute=compute))


def test_pitfall_50_no_schedule_depends_on_a_loss():
    with pytest.raises(RecipeError, match="'cosine' or 'constant'"):
        make_recipe(changed(optimizer={"schedule": "plateau"}))


def test_pitfall_01_no_sampling_but_poisson_can_be_asked_for():
    for key in ("shuffle", "batch_size", "drop_last", "sampler", "epochs"):
        with pytest.raises(RecipeError, match=f"{key}: unknown key"):
            make_recipe(changed(privacy={key: 1}))


def test_pitfall_30_no_padding_or_dropping_of_batches_can_be_asked_for():
    for key in ("drop_last", "packing", "group_by_length", "stride"):
        with pytest.raises(RecipeError, match=f"{key}: unknown key"):
            make_recipe(changed(data={key: True}))


def test_pitfall_49_held_out_data_must_be_declared_public():
    for key in ("heldout", "heldout_pattern"):
        with pytest.raises(RecipeError, match="heldout_is_public = true"):
            make_recipe(changed(data={key: "held"}))
        recipe = make_recipe(changed(data={key: "held", "heldout_is_public": True}))
        assert recipe.data.has_heldout


def test_a_truth_value_is_never_guessed_from_text():
    with pytest.raises(RecipeError, match="heldout_is_public"):
        make_recipe(changed(data={"heldout": "held", "heldout_is_public": "yes"}))


toml_values = st.recursive(
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), toml_values, max_size=4))
def test_what_is_written_as_toml_reads_back_equal(tree: dict[str, Any]):
    assert tomllib.loads(dumps(tree)) == tree


@pytest.mark.skipif(not DOCS.is_file(), reason="the documentation is not in the wheel")
def test_every_key_is_in_the_documentation_with_its_meaning():
    page = DOCS.read_text(encoding="utf-8").replace("`", "")
    for name, section in sections(Recipe):
        assert f"### [{name}]" in page
        for key, field in section.model_fields.items():
            if not any(other == f"{name}.{key}" for other, _ in sections(Recipe)):
                assert re.search(
                    rf"^\| {key} \| [^|]+ \| {re.escape(field.description or '')}", page, re.M
                ), f"{name}.{key}"
