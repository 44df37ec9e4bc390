import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.parametrize("ranks", [2, 4])]


def of(reports, ranks, property_):
    return [report["sharding"][property_] for report in reports[ranks]]


def test_local_parts_at_their_offsets_rebuild_every_parameter(reports, ranks):
    assert all(found["rebuilt"] for found in of(reports, ranks, "shards"))


def test_every_element_has_exactly_one_owner(reports, ranks):
    assert all(found["one owner"] for found in of(reports, ranks, "shards"))


def test_a_mesh_that_fits_is_not_looked_at_again(reports, ranks):
    assert not any(found["listed again"] for found in of(reports, ranks, "shards"))


def test_restore_is_the_inverse_of_local(reports, ranks):
    found = of(reports, ranks, "shards")
    assert all(shards["restored"] for shards in found)
    assert all("(99,)" in shards["wrong shape"] for shards in found)


def test_pitfall_34_the_norm_of_the_parts_is_the_norm_of_the_whole(reports, ranks):
    assert max(found["norm error"] for found in of(reports, ranks, "shards")) <= 1e-12


def test_checkpointing_and_sharding_leave_the_names_of_parameters(reports, ranks):
    assert all(found["names"] for found in of(reports, ranks, "shards"))


def test_pitfall_35_a_parameter_that_every_rank_holds_is_refused(reports, ranks):
    for found in of(reports, ranks, "refusals"):
        assert f"counted {ranks} times" in found["whole parameter"]
        assert f"counted {ranks} times" in found["whole parameter offset"]
        assert "Replicate()" in found["replicated"]
        assert "Shard(dim=1)" in found["columns"]


def test_wrong_use_is_refused_with_a_way_out(reports, ranks):
    for found in of(reports, ranks, "refusals"):
        assert "must be torch.float64" in found["narrow scalars"]
        assert "is a DTensor" in found["twice sharded"]
        assert "already open" in found["nested"]
        assert found["region after an error"]
        assert "ranks=mesh.context_degree" in found["layout of others"]
        assert "value is None" in found["no key"]
    for message in of(reports, ranks, "wrong product"):
        assert f"= {ranks + 1}, but this run has {ranks} process(es)" in message


def test_pitfall_32_replicas_start_bitwise_equal(reports, ranks):
    found = of(reports, ranks, "replicas")
    assert all(replica["equal"] for replica in found)
    if ranks == 4:
        grid = {tuple(g["rank"]): g["checksum"] for g in of(reports, ranks, "grid")}
        assert grid[0, 0] == grid[1, 0]
        assert grid[0, 1] == grid[1, 1]


def test_replicas_are_summed_and_never_averaged(reports, ranks):
    found = of(reports, ranks, "replicas")
    if ranks == 4:
        found += of(reports, ranks, "grid")
    assert all(replica["sums"] for replica in found)
    assert all("bfloat16 cannot be summed" in replica["narrow"] for replica in found)


def test_the_key_of_the_first_rank_reaches_all(reports, ranks):
    keys = {replica["key"] for replica in of(reports, ranks, "replicas")}
    assert keys == {bytes(range(32)).hex()}


@pytest.mark.parametrize("axis", ["narrow context", "narrow replicas"])
def test_narrow_compute_keeps_parameters_and_gradients_wide(reports, ranks, axis):
    for found in of(reports, ranks, axis):
        assert found == {
            "output": "torch.bfloat16",
            "parameters": ["torch.float32"],
            "gradients": ["torch.float32"],
        }
