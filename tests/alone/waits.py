"""Inside of a step the host waits for a GPU no more often than is documented.

A device in plain Python stands for the GPU: its tensors have their memory on the CPU, yet a device
of their own, so code goes the ways of a GPU, and whatever the host would wait for is counted.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from veilspan.core import Flat, PerLayer, PrivateStep
from veilspan.core.groups import Clipping
from veilspan.core.norms import BlockedKernel
from veilspan.core.rates import DeviceRates
from veilspan.kernels import TritonKernel, TritonNoise

KIND = "pretended"
READ = ("_local_scalar_dense", "_unique2", "equal", "masked_select", "nonzero")
"""Operators with a result that the host must know, or with a size that it must."""
RECORDS, TOKENS, WORDS, WIDTH = 3, 8, 50, 16
KEY = bytes(range(32))

waits: Counter[str] = Counter()


class Pretended(Tensor):
    """A tensor on the device."""

    memory: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():  # no result is wrapped once more
            return func(*args, **(kwargs or {}))

    @staticmethod
    def __new__(cls, memory: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(
            cls,
            memory.shape,
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            device=torch.device(KIND, 0),
        )
        made.memory = memory
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with Device():
            return func(*args, **(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Pretended({list(self.shape)})"

    def tolist(self) -> Any:
        waits["tolist"] += 1
        return self.memory.tolist()

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    def untyped_storage(self) -> Any:
        return self.memory.untyped_storage()


class Device(TorchDispatchMode):
    """Computes on the CPU what is asked of the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {id(leaf.memory): leaf for leaf in leaves if isinstance(leaf, Pretended)}
        name, stays = func._schema.name.removeprefix("aten::"), bool(known)
        if kwargs.get("device") is not None:
            stays = torch.device(kwargs["device"]).type == KIND
            kwargs["device"] = torch.device("cpu")
        kinds = {isinstance(leaf, Pretended) for leaf in leaves} | {stays}
        moved = "copy" in name and len(kinds) > 1 and not kwargs.get("non_blocking")
        places = tree_leaves(args[1:2]) if name.startswith("index") else []
        masked = any(isinstance(p, Tensor) and p.dtype == torch.bool for p in places)
        if moved or (known and (masked or name in READ)):
            waits[name] += 1
        found = func(*tree_map(_memory, args), **tree_map(_memory, kwargs))

        def placed(leaf: object) -> object:
            if id(leaf) in known:
                return known[id(leaf)]
            return Pretended(leaf) if stays and isinstance(leaf, Tensor) else leaf

        return tree_map(placed, found)


class _Module:
    """What torch asks of the module of a device; nobody else shall choose it."""

    def is_available(self) -> bool:
        return False

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        return None

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.zeros(1)


class Model(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(WORDS, WIDTH), nn.RMSNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH, bias=False)
        self.last, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        hidden = self.table(ids_BT)
        hidden = hidden + self.down(torch.relu(self.up(self.norm(hidden))))
        return self.head(self.last(hidden))


def _memory(leaf: Any) -> Any:
    return leaf.memory if isinstance(leaf, Pretended) else leaf


def _copied(source: Tensor, target: Any, non_blocking: bool = False) -> Any:
    waits["_copy_from"] += 1  # torch.tensor(…, device=…), which no mode sees
    target.memory.copy_(_memory(source))
    return target


@pytest.fixture(scope="module", autouse=True)
def _device():
    _setup_privateuseone_for_python_backend(KIND, backend_module=_Module())
    made = torch.library.Library("aten", "IMPL")
    made.impl("_copy_from", _copied, "PrivateUse1")
    made.impl(
        "empty_strided",
        lambda size, stride, *, dtype=None, **_: Pretended(
            torch.empty_strided(size, stride, dtype=dtype)
        ),
        "PrivateUse1",
    )
    yield
    made._destroy()


@pytest.fixture(autouse=True)
def _rates(monkeypatch: pytest.MonkeyPatch) -> None:
    known = DeviceRates(flops=1e12, norm_flops=1e12, bandwidth=1e11, reading=1e11)
    monkeypatch.setattr(DeviceRates, "of", lambda *_, **__: known)


def moved(model: nn.Module) -> nn.Module:
    """Move parameters to the device."""
    found: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in found:
                found[parameter] = nn.Parameter(Pretended(parameter.detach().clone()))
            setattr(module, name, found[parameter])
    return model


def trained(
    kernel: Any,
    *,
    clipping: Clipping,
    tied: bool = False,
    dtype: torch.dtype,
    on_device: bool,
    **how: Any,
) -> tuple[dict[str, Tensor], list[Counter[str]]]:
    """Return the gradients of one step, and the waits of its micro-batches and of its release."""
    torch.manual_seed(0)
    model = Model(tied=tied).to(dtype)
    size = 1 if how["backward"] == "single_sample" else RECORDS
    parts = torch.randint(0, WORDS, (3, size, TOKENS))
    found = []
    with Device():
        step = PrivateStep(
            moved(model) if on_device else model,
            clipping=clipping,
            noise_multiplier=1.0,
            expected_batch_size=4,
            kernel=kernel,
            noise=TritonNoise(KEY),
            memory_budget=1e9,
            **how,
        )
        with step:
            for part in parts:
                ids = Pretended(part) if on_device else part
                logits = model(ids).float()
                losses_BT = F.cross_entropy(logits.mT, ids, reduction="none")
                waits.clear()
                step.backward(losses_BT.mean(1))
                found.append(Counter(waits))
            waits.clear()
        found.append(Counter(waits))
        step.detach()
    return {n: _memory(p.grad) for n, p in model.named_parameters()}, found


WAYS = {
    "one record": {"backward": "single_sample"},
    "one record, exact sums": {"backward": "single_sample", "accumulate": "exact"},
    "gradients of records": {"backward": "per_sample", "norms": "direct"},
    "books, direct norms": {"backward": "bookkeeping", "norms": "direct"},
    "books, Gram norms": {"backward": "bookkeeping", "norms": "gram"},
    "books, exact sums": {"backward": "bookkeeping", "norms": "gram", "accumulate": "exact"},
    "two passes": {"backward": "two_pass", "norms": "gram"},
    "two passes, tied": {"backward": "two_pass", "norms": "gram", "tied": True},
    "layer by layer": {"backward": "per_layer"},
}


@pytest.fixture(params=WAYS.values(), ids=list(WAYS))
def how(request: pytest.FixtureRequest) -> dict[str, Any]:
    kind = PerLayer if request.param["backward"] == "per_layer" else Flat
    return {"clipping": kind(clip_norm=0.5), **request.param}


def compared(how: dict[str, Any]) -> int:
    """How often two backward passes are compared."""
    return int(how["backward"] == "two_pass")


def waited(times: int) -> Counter[str]:
    return Counter({"_local_scalar_dense": times} if times else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_kernels_only_two_passes_are_waited_for(
    how: dict[str, Any], dtype: torch.dtype
) -> None:
    _, (_, *later, release) = trained(TritonKernel(), dtype=dtype, on_device=True, **how)
    assert later == [waited(compared(how))] * 2  # the first micro-batch is probed
    assert not release


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_them_a_gram_norm_is_waited_for_once(
    how: dict[str, Any], dtype: torch.dtype
) -> None:
    _, (_, *later, release) = trained(BlockedKernel(), dtype=dtype, on_device=True, **how)
    maps = 0 if how.get("norms") != "gram" else 2 if how.get("tied") else 3
    assert later == [waited(maps + compared(how))] * 2
    assert not release


@pytest.mark.parametrize("kernel", [BlockedKernel(), TritonKernel()], ids=["blocked", "triton"])
def test_what_is_not_waited_for_changes_no_gradient(how: dict[str, Any], kernel: Any) -> None:
    here, _ = trained(kernel, dtype=torch.float32, on_device=False, **how)
    there, _ = trained(kernel, dtype=torch.float32, on_device=True, **how)
    assert there.keys() == here.keys()
    for name, gradient in here.items():
        torch.testing.assert_close(there[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
