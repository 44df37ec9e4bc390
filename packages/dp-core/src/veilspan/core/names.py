"""Names of parameters and groups: which layer is meant, and which name, where one is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

_BLOCK = re.compile(r"(?:^|.*?\.)\d+(?=\.)")


def block_of(parameter: str) -> str:
    """Return the path up to the first number; the layer of a parameter outside of blocks."""
    block = _BLOCK.match(parameter)
    return block.group() if block else layer_of(parameter)


def layer_of(parameter: str) -> str:
    """Return the path of the module that owns a parameter; of a bare one, its own name."""
    return parameter.rpartition(".")[0] or parameter


def require_same_names(budgets: Mapping[str, float], names: Sequence[str]) -> None:
    """Refuse budgets of groups that there are not, and groups without one.

    Raises:
        ValueError: Naming the group.
    """
    unknown = [name for name in budgets if name not in names]
    if unknown:
        raise ValueError(
            f"budgets names group {unknown[0]!r}, which the model does not have."
            f"{nearest(unknown[0], names)}"
        )
    missing = [name for name in names if name not in budgets]
    if missing:
        raise ValueError(
            f"budgets has no number for group {missing[0]!r} ({len(missing)} of {len(names)} "
            "groups have none); give one for every group, or use budgets='equal'."
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a sentence with the known names that look most like `name`; empty without any."""
    plain = name.replace("*", "")
    close = difflib.get_close_matches(plain, list(known), n=3, cutoff=0.3)
    return f" Nearest names: {', '.join(close)}." if close else ""
