"""Private units and public held-out units as token sequences."""

from veilspan.trainer.data.collate import Batch, collate
from veilspan.trainer.data.opening import open_heldout, open_records
from veilspan.trainer.data.records import Records

__all__ = ["Batch", "Records", "collate", "open_heldout", "open_records"]
