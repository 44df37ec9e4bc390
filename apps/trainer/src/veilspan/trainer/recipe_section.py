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
    def _no_empty_path(cls, value: object, info: ValidationInfo) -> object:
        """Refuse an empty name of a file or folder, which would mean the current folder."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, str) and not value.strip() and Path in (kind, *get_args(kind)):
            raise ValueError('give the name of a file or folder; the current folder is "."')
        return value
