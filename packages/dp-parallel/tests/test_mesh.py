import subprocess
import sys
from pathlib import Path

import pytest
import torch

from veilspan.parallel import (
    ContextShards,
    Layout,
    ReplicaReduction,
    broadcast_bytes,
    build_mesh,
    context_parallel,
    finish,
    shard_model,
)
from veilspan.parallel.active import current_region


def test_one_process_needs_no_process_group():
    mesh = build_mesh()
    assert not torch.distributed.is_initialized()
    assert (mesh.world_size, mesh.rank, mesh.device) == (1, 0, torch.device("cpu"))


def test_one_process_runs_every_seam_as_a_no_op():
    mesh = build_mesh()
    model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(2, 2)]))
    parameter = next(shard_model(model, mesh).parameters())
    shards = ContextShards(mesh)
    assert shards.degree == 1
    assert shards.local(parameter) is parameter
    assert shards.offset(parameter) == 0
    assert shards.restore(parameter, parameter.detach()).shape == parameter.shape
    assert shards.sum_scalars(torch.ones(2).double()).tolist() == [1, 1]
    total = torch.ones(3)
    ReplicaReduction(mesh).sum_([total])
    assert total.tolist() == [1, 1, 1]
    assert broadcast_bytes(b"secret", mesh) == b"secret"
    with context_parallel(mesh, Layout(length=4, ranks=1)):
        assert current_region() is None
    finish()


def test_one_process_has_no_groups_to_give():
    with pytest.raises(ValueError, match="one process and no process groups"):
        _ = build_mesh().context_group


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context is 0; it must be at least 1"),
        ({"replicate": -1}, "replicate is -1"),
        ({"device_type": "tpu"}, "device_type is 'tpu'.*cpu.*cuda"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"context": 2}, "not started as one of several.*torchrun --nproc-per-node 2"),
    ],
)
def test_an_impossible_mesh_names_the_value_and_the_way_out(options, message):
    with pytest.raises(ValueError, match=message):
        build_mesh(**options)


@pytest.mark.distributed
def test_under_torchrun_processes_join_and_a_wrong_product_is_refused():
    script = Path(__file__).parent / "ranks" / "launched.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("1 · 1 = 1, but this run has 2 process(es)") == 2
    assert sorted(line for line in run.stdout.splitlines() if line.startswith("rank")) == [
        "rank 0 of 2",
        "rank 1 of 2",
    ]
