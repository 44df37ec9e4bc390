"""Wrong recipes explained: each key, its value, what is allowed, what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

Location = tuple[int | str, ...]


def explain(error: ValidationError, schema: type[BaseModel], source: str) -> str:
    """Return one message that lists every wrong key once.

    Args:
        error: What pydantic found.
        schema: Model that was validated against.
        source: What to call the origin of the settings.
    """
    reasons: dict[str, list[str]] = {}
    for item in error.errors():
        path, fields = _walk(schema, item["loc"])
        lines = reasons.setdefault(".".join(path) or schema.__name__.lower(), [])
        reason = _reason(item, path, fields)
        if reason not in lines:
            lines.append(reason)
    count = "1 mistake" if len(reasons) == 1 else f"{len(reasons)} mistakes"
    listed = (f"  {key}: {_either(lines)}." for key, lines in reasons.items())
    return "\n".join([f"{count} in {source}:", *listed])


def _either(reasons: Sequence[str]) -> str:
    """Join what each allowed type of one key says, naming the given value once."""
    subject, _, _ = reasons[0].partition("; ")
    return " or ".join([reasons[0], *(line.removeprefix(f"{subject}; ") for line in reasons[1:])])


def _reason(item: Any, path: Sequence[str], schema: type[BaseModel]) -> str:
    kind, given = item["type"], item["input"]
    if kind == "extra_forbidden":
        return _unknown(path[-1], schema)
    if kind == "missing":
        return f"missing; {_meaning(path[-1], schema)}"
    if kind == "value_error":
        message = str(item["ctx"]["error"])
        return message if isinstance(given, dict) else f"is {given!r}; {message}"
    allowed = item["msg"].replace("Input should", "must").replace("tuple", "list")
    return f"is {given!r}; {allowed}"


def _unknown(key: str, schema: type[BaseModel]) -> str:
    near = difflib.get_close_matches(key, schema.model_fields, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown key; {hint}known keys are {', '.join(schema.model_fields)}"


def _meaning(key: str, schema: type[BaseModel]) -> str:
    field = schema.model_fields.get(key)
    text = (field.description or "") if field else ""
    return text.rstrip(".") or "it is required"


def _walk(schema: type[BaseModel], location: Location) -> tuple[list[str], type[BaseModel]]:
    """Split off the part of a location that names keys, and find the section of the last key."""
    path: list[str] = []
    owner = schema
    current: type[BaseModel] | None = schema
    for part in location:
        if current is None:
            break
        owner = current
        path.append(str(part))
        field = current.model_fields.get(str(part))
        current = next(_sections(field.annotation), None) if field else None
    return path, owner


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            yield candidate
