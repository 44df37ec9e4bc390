"""Whether all ranks of a run are about to release the same thing, under the same noise."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from veilspan.core.backward import Workspace
from veilspan.core.errors import PrivacyError
from veilspan.core.protocols import GradientReduction
from veilspan.core.reduction import processes
from veilspan.core.release import GaussianMechanism, Release


def reduce_alike(
    work: Workspace, reduction: GradientReduction, release: Release, mechanism: GaussianMechanism
) -> None:
    """Sum over replicas, and refuse a release that is not the same on all ranks.

    Args:
        work: The step's parts, with the sums of this rank.
        reduction: Sum over replicas.
        release: What this rank is about to release.
        mechanism: Its noise.

    Raises:
        PrivacyError: On every rank, naming what differs.
    """
    extra = [] if work.within_M is None else [work.within_M]
    if processes() == 1:
        work.sums.reduce(reduction, extra)
        return
    device = next(iter(work.owned.values())).device
    told = {
        "the step": str(release.step),
        # A batch that failed on one rank alone: its next draw would join this one of the others.
        "the batches that failed": str(work.discarded),
        "noise_multiplier": _text(release.noise_multiplier),
        "the thresholds of clipping": " ".join(map(_text, work.groups.clip_norms)),
        "expected_batch_size": _text(release.expected_batch_size),
        "the trainable parameters": str([(n, tuple(p.shape)) for n, p in work.owned.items()]),
        "the key of noise": " ".join(map(_text, mechanism.sign(release, device).tolist())),
    }
    votes = work.shards.sum_scalars(_votes(told, device))
    work.sums.reduce(reduction, [*extra, votes])
    _require_one(told, votes)


def _text(number: float) -> str:
    return f"{number:.6g}"  # machines of several kinds may differ in the last bits


def _votes(told: Mapping[str, str], device: torch.device) -> Tensor:
    """Return 1, then h and h² for a hash of everything told: what sums can compare, in fp64.

    All ranks have the same h if and only if n·Σh² = (Σh)².
    """
    hashes = [hashlib.sha256(value.encode()).digest() for value in told.values()]
    numbers = [int.from_bytes(digest[:3], "big") >> 4 for digest in hashes]  # exact up to 2¹³ ranks
    votes = [1, *(power for h in numbers for power in (h, h * h))]
    return torch.tensor(votes, dtype=torch.float64, device=device)


def _require_one(told: Mapping[str, str], votes: Tensor) -> None:
    ranks, *sums = map(int, votes.tolist())
    pairs = zip(sums[::2], sums[1::2], strict=True)
    apart = [n for n, (h, square) in zip(told, pairs, strict=True) if ranks * square != h * h]
    if apart:
        raise PrivacyError(
            f"The {ranks} ranks of this run are not about to release the same: they differ in "
            f"{', '.join(apart)}. Models that part have less noise than is counted. Build "
            "PrivateStep with the same numbers on every rank, and its noise from one key: draw "
            "new_key() on one of them and send it (veilspan.parallel.broadcast_bytes). After a "
            "batch that failed on some ranks alone, end the run and go on from a checkpoint."
        )
