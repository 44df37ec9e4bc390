"""Errors that stop a run before a false privacy statement can be made."""

from __future__ import annotations


class PrivacyError(RuntimeError):
    """Continuing would make the stated guarantee untrue.

    Raised for stale gradients, coupled records, parameters that changed after attach, and the like.
    The message names the module path or argument, its value, what is allowed, and one way out.
    """


class UnsupportedModelError(PrivacyError):
    """The model holds something whose per-sample gradient the chosen backward cannot produce."""
