"""Mistakes of the user, each with one message that says what is wrong and what to do."""

from __future__ import annotations


class TrainerError(ValueError):
    """Something the user can put right; the command line prints it without a traceback."""


class RecipeError(TrainerError):
    """A recipe with wrong, missing, unknown or contradicting keys."""


class DataError(TrainerError):
    """Training or held-out data that is missing, empty or not in the declared form."""


class ModelError(TrainerError):
    """A model or tokenizer that cannot be loaded, or that does not fit the rest of the recipe."""
