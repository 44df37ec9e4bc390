"""Settings written as TOML text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def dumps(tree: Mapping[str, Any]) -> str:
    """Return `tree` (mappings, lists, texts, numbers, truth values) as TOML.

    A mapping below a section becomes a section of its own; lists stay on one line.

    Raises:
        TypeError: If a value has no TOML form.
    """
    return "\n".join(_section((), tree)).strip() + "\n"


def _section(path: tuple[str, ...], tree: Mapping[str, Any]) -> list[str]:
    lines = [f"{_key(key)} = {_value(value)}" for key, value in tree.items() if not _nested(value)]
    if path and (lines or not tree):
        lines = ["", f"[{'.'.join(map(_key, path))}]", *lines]
    for key, value in tree.items():
        if _nested(value):
            lines += _section((*path, key), value)
    return lines


def _nested(value: Any) -> bool:
    return isinstance(value, Mapping)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, str):
        # JSON strings are TOML basic strings, except that TOML also escapes DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool | int | float):
        return str(value).lower() if isinstance(value, bool) else repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        pairs = (f"{_key(key)} = {_value(item)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    raise TypeError(f"{value!r} has no TOML form.")
