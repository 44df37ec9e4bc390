"""All properties that need several ranks, in one start."""

from __future__ import annotations

from typing import Any

import adapters
import attention
import families
import sharding
import torch.distributed as dist

from veilspan.parallel import build_mesh
from veilspan.parallel.testing import rank_main


def body(arguments: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"attention": attention.body(), "sharding": sharding.body()}
    chosen = families.FAMILIES if dist.get_world_size() == 2 else families.MOST_DIFFERENT
    # Families first: they make fp64 models stay in fp64 for those that follow.
    found["families"] = families.body(chosen)
    mesh = build_mesh(context=dist.get_world_size())
    found["local views"], found["gathers"] = families.local_views(mesh), families.gathers(mesh)
    return {**found, "adapters": adapters.body()}


if __name__ == "__main__":
    rank_main(body)
