"""Context parallelism for differentially private training: one sequence on many processes."""

from veilspan.parallel.active import context_parallel
from veilspan.parallel.batches import ShardedBatch, shard_batch
from veilspan.parallel.huggingface import register_attention
from veilspan.parallel.layout import Layout
from veilspan.parallel.mesh import ParallelMesh, build_mesh
from veilspan.parallel.model import shard_model
from veilspan.parallel.processes import broadcast_bytes, finish
from veilspan.parallel.replicas import ReplicaReduction
from veilspan.parallel.shards import ContextShards, ReplicaShards
from veilspan.parallel.support import check_model

__all__ = [
    "ContextShards",
    "Layout",
    "ParallelMesh",
    "ReplicaReduction",
    "ReplicaShards",
    "ShardedBatch",
    "broadcast_bytes",
    "build_mesh",
    "check_model",
    "context_parallel",
    "finish",
    "register_attention",
    "shard_batch",
    "shard_model",
]
