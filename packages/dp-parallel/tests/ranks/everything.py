"""All properties that need several ranks, in one start."""

from __future__ import annotations

from typing import Any

import attention
import families
import sharding
import torch.distributed as dist

from veilspan.parallel.testing import rank_main


def body(arguments: list[str]) -> dict[str, Any]:
    found = {"attention": attention.body(), "sharding": sharding.body()}
    chosen = families.FAMILIES if dist.get_world_size() == 2 else families.MOST_DIFFERENT
    return {**found, "families": families.body(chosen)}


if __name__ == "__main__":
    rank_main(body)
