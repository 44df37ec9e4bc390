"""Train Llama-class models with differential privacy on long documents.

Most users need the command line, `python -m veilspan.trainer`, only; `make_private` is for a
training loop of your own.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veilspan.trainer.private import make_private
    from veilspan.trainer.private_batches import PrivateBatch, PrivateTraining

__all__ = ["PrivateBatch", "PrivateTraining", "make_private"]


def __getattr__(name: str) -> Any:
    """Import on demand: the command line answers a mistake before torch is there."""
    if name in __all__:
        from veilspan.trainer import private, private_batches

        return getattr(private if name == "make_private" else private_batches, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
