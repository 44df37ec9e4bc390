"""The installed Opacus, imported late: nothing else of this package needs it."""

from __future__ import annotations

import importlib
import re
from types import ModuleType

_OLDEST = (1, 6)


def opacus(submodule: str) -> ModuleType:
    """Return a submodule of Opacus.

    Raises:
        ImportError: If Opacus is missing or too old, with the command that installs it.
    """
    way_out = "pip install 'veilspan-core[opacus]'"
    try:
        found = importlib.import_module("opacus")
    except ModuleNotFoundError as error:
        if error.name != "opacus":  # a broken installation tells more in its own words
            raise
        raise ImportError(f"The bridge needs Opacus, which is not installed: {way_out}") from error
    version = tuple(int(part) for part in re.findall(r"\d+", found.__version__)[:2])
    if version < _OLDEST:
        raise ImportError(
            f"The bridge needs Opacus 1.6 or newer, and {found.__version__} is installed: {way_out}"
        )
    return importlib.import_module(f"opacus.{submodule}")
