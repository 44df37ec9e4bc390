"""What all sections of a recipe have in common."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """Immutable settings in which an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # in model.config, where some models have infinite limits
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: object, info: ValidationInfo) -> object:
        """Refuse true and false for numbers, which Python counts as 1 and 0."""
        if cls.model_fields[str(info.field_name)].annotation is bool:
            return value
        if any(
            isinstance(v, bool) for v in (value if isinstance(value, list | tuple) else [value])
        ):
            raise ValueError("true and false stand for no number or text here")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _named_path(cls, value: object, info: ValidationInfo) -> object:
        """Read ~ as the home folder; refuse a name that is empty, which would mean the current one.

        A shell does not expand the ~ of `--set run.folder=~/runs`; a folder of that name would be
        made, with the key in it.
        """
        kind = cls.model_fields[str(info.field_name)].annotation
        if Path not in (kind, *get_args(kind)) or not isinstance(value, str | Path):
            return value
        if not str(value).strip():
            raise ValueError('give the name of a file or folder; the current folder is "."')
        if "\0" in str(value):
            raise ValueError("no name of a file or folder holds the character 0")
        try:
            return Path(value).expanduser()
        except RuntimeError as error:
            raise ValueError(f"the home folder is not known ({error}); write it out") from error
