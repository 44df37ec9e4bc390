"""Which arguments of a module whose records run alone are cut into records; which are refused."""

from __future__ import annotations

import torch
from torch import Tensor

from veilspan.core.errors import PrivacyError
from veilspan.core.rules.alone import RecordsAlone
from veilspan.core.taps import Site

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
"""Values that are the same for all records."""


def is_cut(rule: RecordsAlone, name: str, leaf: object, size: int) -> bool:
    """Return whether dimension 0 of an argument is the records."""
    return isinstance(leaf, Tensor) and name not in rule.shared and leaf.shape[:1] == (size,)


def require_usable(
    site: Site, rule: RecordsAlone, name: str, leaf: object, size: int, *, first: bool
) -> None:
    """Refuse an argument that is neither cut into records nor the same for all of them."""
    if not isinstance(leaf, Tensor):
        if isinstance(leaf, PLAIN):
            return
        raise PrivacyError(
            f"Module '{site.name}' received {name}={describe(leaf)}, which may carry something "
            "from one record to the next. Leave it out (use_cache=False for a cache), or use "
            "backward='single_sample'."
        )
    if (first and not is_cut(rule, name, leaf, size)) or (first and leaf.ndim < 2):
        site.refuse_shape(leaf, size)
    if first and rule.ndim is not None and leaf.ndim != rule.ndim:
        site.refuse_shape(leaf, size, ndim=rule.ndim)
    coupled = leaf.requires_grad and size > 1 and leaf.shape[:1] not in ((1,), (size,))
    if coupled or (leaf.requires_grad and size > 1 and name in rule.shared):
        raise PrivacyError(
            f"Module '{site.name}' received {name}={describe(leaf)}, which needs a gradient but "
            f"belongs to no one of the {size} records. Give it dimension 0 = records, or use "
            "backward='single_sample'."
        )


def refuse_lists(site: Site, name: str, value: object, size: int) -> None:
    """Refuse a list of numbers or words that may hold one for each record, as PEFT's aLoRA gives.

    Each record would get all of them, and a list may tell one record of another.
    """
    for path, leaf in value.items() if isinstance(value, dict) else [(name, value)]:
        if not isinstance(leaf, list) or not len(leaf) == size > 1:
            continue
        if all(isinstance(v, PLAIN) for v in leaf):
            raise PrivacyError(
                f"Module '{site.name}' received {path}=a list of {size} values in a micro-batch of "
                f"{size} records, so it may hold one for each record. Give a tensor whose "
                "dimension 0 is the records, a tuple where all of them share it, or use "
                "backward='single_sample'."
            )


def describe(value: object) -> str:
    """Return what `value` is, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
