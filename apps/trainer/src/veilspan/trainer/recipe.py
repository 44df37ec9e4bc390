"""A whole training run as one validated, immutable value.

A recipe is a TOML file. Relative paths in it start at the current folder. Read one with
`load_recipe`, look a setting up as `recipe.privacy.steps`, and write it back with `to_toml`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from veilspan.trainer.errors import RecipeError
from veilspan.trainer.recipe_errors import explain
from veilspan.trainer.recipe_section import Section
from veilspan.trainer.recipe_toml import dumps
from veilspan.trainer.sections import (
    Compute,
    Data,
    Model,
    Optimizer,
    Parallel,
    Privacy,
    Run,
)


class Recipe(Section):
    """Everything that decides a run, except the data and the secret key themselves."""

    model: Model = Field(description="What is trained.")
    data: Data = Field(description="What is learned from.")
    privacy: Privacy = Field(description="How much may become known about one unit.")
    optimizer: Optimizer = Field(default_factory=Optimizer, description="AdamW.")
    parallel: Parallel = Field(default_factory=Parallel, description="Processes.")
    compute: Compute = Field(default_factory=Compute, description="How gradients are computed.")
    run: Run = Field(description="Where the results go.")

    @model_validator(mode="after")
    def _sections_fit(self) -> Recipe:
        self._check_tokenizer()
        self._check_context()
        self._check_shard()
        self._check_groups()
        self._check_norms()
        self._check_key_file()
        if self.optimizer.warmup_steps > self.privacy.steps:
            raise ValueError(
                f"optimizer.warmup_steps is {self.optimizer.warmup_steps}, more than "
                f"privacy.steps, {self.privacy.steps}; warm-up has to end within the run"
            )
        return self

    def _check_tokenizer(self) -> None:
        if self.model.path is None and self.data.tokenizer == "auto":
            raise ValueError(
                'data.tokenizer is "auto", which takes the tokenizer of model.path, but the model '
                'starts from model.config; set data.tokenizer to "bytes" or to a local folder'
            )

    def _check_context(self) -> None:
        context, layout = self.parallel.context, self.parallel.layout
        if context == 1:
            return
        pieces = 2 * context if layout == "zigzag" else context
        if self.data.sequence_length % pieces:
            nearest = max(1, round(self.data.sequence_length / pieces)) * pieces
            raise ValueError(
                f"data.sequence_length is {self.data.sequence_length}, which parallel.context = "
                f"{context} with layout {layout} cannot divide into {pieces} equal pieces; "
                f"set data.sequence_length to {nearest} or change parallel.context"
            )
        if self.privacy.norm_probes is not None:
            return  # processes add up projections, of several sequences at a time
        if self.compute.microbatch_size not in (1, "auto"):
            raise ValueError(
                f"compute.microbatch_size is {self.compute.microbatch_size}; with "
                f"parallel.context = {context} the processes share one sequence at a time, so it "
                'must be 1 or "auto"'
            )
        if self.compute.backward not in ("auto", "single_sample"):
            raise ValueError(
                f'compute.backward is "{self.compute.backward}"; with parallel.context = '
                f'{context} it must be "auto" or "single_sample"'
            )

    def _check_shard(self) -> None:
        context, backward = self.parallel.context, self.compute.backward
        if self.parallel.shard == "context":
            return
        if context > 1:
            raise ValueError(
                f'parallel.shard is "replicate" and parallel.context is {context}; with sequences '
                'that are split it must be "context". Set it, or parallel.context = 1'
            )
        if backward not in ("auto", "bookkeeping", "per_layer"):
            raise ValueError(
                f'compute.backward is "{backward}"; with parallel.shard = "replicate" it must be '
                '"auto", "bookkeeping" or "per_layer", which add up clipped sums in parts'
            )

    def _check_groups(self) -> None:
        groups = self.privacy.groups
        if self.compute.backward == "per_layer" and groups not in ("layer", "parameter"):
            raise ValueError(
                f'compute.backward is "per_layer" and privacy.groups is "{groups}"; a layer can be '
                'clipped on its own only where privacy.groups is "layer" or "parameter". Set it, '
                'or compute.backward = "auto"'
            )

    def _check_norms(self) -> None:
        if self.privacy.norm_probes is None:
            return
        split = self.parallel.context > 1
        for name, value, allowed in (
            ("privacy.groups", self.privacy.groups, ("flat",)),
            ("data.sequences_per_unit", self.data.sequences_per_unit, (1,)),
            ("compute.norms", self.compute.norms, ("auto",)),
            ("compute.backward", self.compute.backward, ("auto", "two_pass", "bookkeeping")),
            ("privacy.sums", self.privacy.sums, ("fp32",) if split else ("fp32", "exact")),
        ):
            if value not in allowed:
                choices = " or ".join(f'"{a}"' if isinstance(a, str) else str(a) for a in allowed)
                raise ValueError(
                    f"{name} is {value!r}, but privacy.norm_probes is set; estimated norms need "
                    f"{choices}. Set it, or remove privacy.norm_probes for exact norms"
                )

    def _check_key_file(self) -> None:
        key_file, folder = self.privacy.key_file, self.run.folder
        if key_file is not None and key_file.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"privacy.key_file is {str(key_file)!r}, inside of run.folder, which may be "
                "published as a whole; name a file outside of it, or leave it out"
            )

    @property
    def shards(self) -> int:
        """Number of processes that hold one copy of the parameters together."""
        parallel = self.parallel
        return parallel.context if parallel.shard == "context" else parallel.replicate

    @property
    def processes(self) -> int:
        """Number of processes the run needs."""
        return self.parallel.replicate * self.parallel.context

    def with_microbatch(self, size: int) -> Recipe:
        """Return the recipe with the size of micro-batches settled."""
        compute = self.compute.model_copy(update={"microbatch_size": size})
        return self.model_copy(update={"compute": compute})

    def to_toml(self) -> str:
        """Return the recipe with every default filled in; `load_recipe` reads it back."""
        return dumps(self.model_dump(mode="json", exclude_none=True))


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply overrides and validate the result.

    Args:
        path: TOML file.
        overrides: `section.key=value` texts; a value is read as TOML where it can be and as plain
            text where it cannot. An empty value removes the key.

    Returns:
        The validated recipe.

    Raises:
        RecipeError: If the file is missing or no TOML, or if any key is wrong; the message lists
            every wrong key at once.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a mark
    except OSError as error:
        raise RecipeError(f"Cannot read the recipe {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} is not valid TOML: {error}.") from error
    for override in overrides:
        _apply(tree, override)
    return make_recipe(tree, source=str(path))


def make_recipe(tree: Mapping[str, Any], *, source: str = "the recipe") -> Recipe:
    """Validate settings given as nested mappings.

    Args:
        tree: Section name → key → value.
        source: What error messages call the origin of the settings.

    Raises:
        RecipeError: If any key is wrong; the message lists every wrong key at once.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe, source)) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    """Put one `section.key=value` into `tree`."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys) or len(keys) < 2:
        raise RecipeError(
            f"--set {override!r} is not understood; write section.key=value, "
            "for example --set privacy.steps=100."
        )
    section = tree
    for key in keys[:-1]:
        if key not in section and not text.strip():
            return  # nothing to remove; a section [model.lora] would turn adapters on
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise RecipeError(f"--set {override!r}: {key} is a value and has no keys below it.")
    if text.strip():
        section[keys[-1]] = _value(text.strip())
    else:
        section.pop(keys[-1], None)


def _value(text: str) -> Any:
    try:
        tree = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return tree["value"] if len(tree) == 1 else text
