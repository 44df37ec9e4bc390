import veilspan.parallel
import veilspan.parallel.attention


def test_every_public_name_exists_and_the_list_is_sorted():
    for module in (veilspan.parallel, veilspan.parallel.attention):
        assert list(module.__all__) == sorted(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)
