"""The user's model while a private step holds it: patched sites, the micro-batch in progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.distributed.tensor import DTensor
from torch.utils.weak import TensorWeakRef

from veilspan.core.compiled import keep_saved_tensors, site_of
from veilspan.core.errors import PrivacyError, UnsupportedModelError
from veilspan.core.fsdp import show_shards
from veilspan.core.lone import LoneSite
from veilspan.core.marks import Mark, first_written, marks_of
from veilspan.core.micro_batch import MicroBatch
from veilspan.core.rules import RecordsAlone
from veilspan.core.survey import OwnedModule, trainable_parameters
from veilspan.core.taps import FactorSite, Site

CLEAR_GRADIENTS = (
    "It is left of an earlier release or of another backward pass. Call model.zero_grad() with "
    "set_to_none=True, its default: zeros are a .grad too."
)
NO_OTHER_BACKWARD = "Use step.backward(losses_B) and no other backward."


class Attachment:
    """Instance-level patch of a model, undone exactly by `detach`.

    Args:
        model: The model; names, state dict and classes stay as they are.
        owned: Trainable parameters by name.
        modules: Modules to tap, each with a rule; empty when the strategy needs no taps.
        tapped: Name of the tapped strategy of a micro-batch of (records, tokens), or None.
        begin: Called with the number of records when a micro-batch begins.
    """

    def __init__(
        self,
        model: nn.Module,
        owned: dict[str, nn.Parameter],
        modules: Sequence[OwnedModule],
        *,
        tapped: Callable[[int, int], str | None],
        begin: Callable[[int], None] | None = None,
    ) -> None:
        self.model = model
        self.owned = owned
        self.micro_batch: MicroBatch | None = None
        self._tapped = tapped
        self._announce = begin
        self._active = False
        self._decided = False  # the model's own input has told the size of this micro-batch
        self._inference = 0
        self._before: dict[str, Mark] = {}
        self.looks_outside = 0  # in this logical batch, for what is trained beside the model
        self.met_outside: list[TensorWeakRef] = []  # tensors that may be trained, or inputs
        self.broken = False  # a micro-batch of this logical batch failed half-way
        self._names = {id(p): name for name, p in owned.items()}
        self.sites = [self._patch(module) for module in modules]
        self._handles = [
            # First of all hooks: before FSDP gathers parameters, ranks must agree to go on.
            model.register_forward_pre_hook(self._enter_model, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._leave_model, always_call=True),
        ]

    def _patch(self, owned: OwnedModule) -> Site:
        assert owned.rule is not None
        if isinstance(owned.module.__dict__.get("forward"), Site):
            raise UnsupportedModelError(
                f"Module '{owned.name}' is patched by another PrivateStep, which would lose "
                "sight of it. Call detach() of that step first."
            )
        parts: dict[str, Any] = {
            "name": owned.name,
            "module": owned.module,
            "owned": {local: self._names[id(p)] for local, p in owned.parameters.items()},
            "progress": self,
            "forward": owned.module.forward,
        }
        if isinstance(owned.rule, RecordsAlone):
            site = LoneSite(rule=owned.rule, everything=self.owned, **parts)
        else:
            site = FactorSite(rule=owned.rule, **parts)
        owned.module.forward = site  # pyright: ignore[reportAttributeAccessIssue]
        return site

    def detach(self) -> None:
        """Give the model back exactly as it was."""
        self.end_micro_batch()
        for site in self.sites:
            if site.module.__dict__.get("forward") is site:
                del site.module.forward
        for handle in self._handles:
            handle.remove()
        self.sites = []

    def activate(self, active: bool) -> None:
        """Let forward passes count as micro-batches, or stop it."""
        self._active = active
        if active:
            self._before, self.broken, self.looks_outside = marks_of(self.model), False, 0
            self._inference = 0  # an interrupt, as in a notebook, may have left it behind
        self.end_micro_batch()
        if self.sites:
            keep_saved_tensors(active)

    def end_micro_batch(self) -> None:
        """Forget the taps of the micro-batch in progress."""
        if self.micro_batch is not None:
            self.micro_batch.running = None  # a graph that is left reaches no finished pass
        self.micro_batch = None
        self._decided = False

    def _enter_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            self._inference += 1
            return
        if self._active:
            lead = _lead_tensor(args, kwargs)
            if lead is not None and not (self.micro_batch and self.micro_batch.running):
                if not self._decided:
                    self.end_micro_batch()  # its parts ran without gradients, for something else
                self._begin(lead)

    def _leave_model(self, *_: Any) -> None:
        if not torch.is_grad_enabled():
            self._inference = max(0, self._inference - 1)

    def batch_of(self, inputs: Tensor) -> MicroBatch | None:
        """Return the micro-batch that a site's call belongs to; None to pass it through."""
        if not self._active or self._inference:
            return None
        if not self._decided:  # a submodule was called without the model around it
            self._begin(inputs)
        return self.micro_batch

    @_disable_dynamo  # a micro-batch is an object of its own, and its strategy is logged
    def _begin(self, lead: Tensor) -> None:
        # Without gradients, what runs may be no part of it, or the first run of a checkpointed one.
        self._decided = torch.is_grad_enabled()
        size = lead.shape[0] if lead.ndim else 1
        length = lead.shape[1] if lead.ndim > 1 else 1
        if self.micro_batch is not None and self.micro_batch.size == size:
            return  # a second forward pass of the same micro-batch
        if self._announce is not None:
            self._announce(size)
        strategy = self._tapped(size, length)
        if strategy is None:
            self.micro_batch = None
            return
        device = next(iter(self.owned.values())).device
        self.micro_batch = MicroBatch(size=size, strategy=strategy, device=device, sites=self.sites)

    def require_same_parameters(self) -> None:
        """Refuse parameters that changed after attach.

        Raises:
            PrivacyError: Naming a parameter that was added, replaced, frozen or unfrozen, or that
                FSDP2 still holds whole.
        """
        show_shards(self.model)
        now, before = trainable_parameters(self.model), self.owned
        changed = [
            name
            for name in sorted(now.keys() | before.keys())
            if now.get(name) is not before.get(name)
        ]
        if changed and all(
            isinstance(before.get(name), DTensor) and type(now.get(name)) is nn.Parameter
            for name in changed  # one that is not there any more was frozen
        ):
            raise PrivacyError(
                f"Parameter '{changed[0]}' is still gathered whole: an error stopped FSDP2 in the "
                "middle of a pass, and this torch cannot begin another, as torch 2.13 can. Restart "
                "from a checkpoint."
            )
        if changed:
            raise PrivacyError(
                f"Parameter '{changed[0]}' was added, replaced, frozen or unfrozen after "
                "PrivateStep was attached, so it would train outside of the mechanism. Call "
                "step.detach() and build a new PrivateStep."
            )

    def require_no_gradients(self, when: str, way_out: str) -> None:
        """Refuse a `.grad` that would join the private gradient, or move what is frozen.

        Raises:
            PrivacyError: Naming a parameter that holds one.
        """
        frozen = (pair for pair in self.model.named_parameters() if not pair[1].requires_grad)
        for name, parameter in (*self.owned.items(), *frozen):
            if parameter.grad is not None:
                joined = "be added to" if parameter.requires_grad else "move it beside"
                raise PrivacyError(
                    f"Parameter '{name}' holds a .grad {when}, which would {joined} the private "
                    f"gradient. {way_out}"
                )

    def require_whole_batch(self) -> None:
        """Refuse to release a logical batch that was not made by `step.backward` alone.

        Raises:
            PrivacyError: If a micro-batch failed half-way, parameters changed, a `.grad` is there
                that the step did not make, or the model was written to.
        """
        if self.broken:
            raise PrivacyError(
                "step.backward raised an error inside of this logical batch, so a part of that "
                "micro-batch may be in the sum, and a second try would count its records twice. "
                "Let the error leave the `with` block, and run the batch again in a new one."
            )
        self.require_same_parameters()
        self.require_no_gradients("inside the logical batch", NO_OTHER_BACKWARD)
        self._require_nothing_written()

    def _require_nothing_written(self) -> None:
        written = first_written(self._before, marks_of(self.model))
        if written is not None:
            raise PrivacyError(
                f"'{written}' was written inside the logical batch: what it took from the "
                "records, as a statistic or by an optimizer, had no noise yet. Step the optimizer "
                "after the `with` block; let no layer keep statistics, or register what is no "
                "statistic with persistent=False."
            )

    def require_owned_gradients_only(self) -> None:
        """Refuse gradients that reached a parameter around its taps.

        Raises:
            PrivacyError: If a parameter was used outside of its module's forward.
        """
        stray = [name for name, p in self.owned.items() if p.grad is not None]
        if stray:
            for parameter in self.owned.values():
                parameter.grad = None
            raise PrivacyError(
                f"Parameter '{stray[0]}' received a gradient from outside of its module's forward "
                "(functional use such as F.linear(h, emb.weight)), so no per-sample norm covers "
                "it. Call the owning module instead; or let the module that holds both run its "
                "records one at a time, register_rule(type(that_module), RecordsAlone()); or use "
                "backward='single_sample'."
            )


def detach_copies(model: nn.Module) -> None:
    """Undo the patches that a deep copy of an attached model took along: no step holds them."""
    for module in model.modules():
        site = vars(module).get("forward")
        if isinstance(site, Site) and site_of(site.number) is not site:
            site.progress.detach()


def _lead_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the tensor whose dimension 0 is the records: the ids, or the first tensor given."""
    for name in ("input_ids", "inputs_embeds"):
        if torch.is_tensor(kwargs.get(name)):
            return kwargs[name]
    return next((v for v in (*args, *kwargs.values()) if torch.is_tensor(v)), None)
