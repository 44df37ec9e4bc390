"""Modules whose records run through them one at a time: autograd gives each record's gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

# Of PEFT, which may not be installed.
_PROMPTS = {
    "peft.tuners.prompt_tuning.model.PromptEmbedding",
    "peft.tuners.p_tuning.model.PromptEncoder",
    "peft.tuners.cpt.model.CPTEmbedding",
}
_PROMPT_PER_TASK = {"peft.tuners.multitask_prompt_tuning.model.MultitaskPromptEmbedding"}
_ADAPTER = {"peft.tuners.tuners_utils.BaseTunerLayer"}
_TAPPED_ADAPTERS = {
    "peft.tuners.lora.layer.LoraLayer",
    "peft.tuners.ln_tuning.layer.LNTuningLayer",
}
_ADAPTED_PARAMETER = {"peft.tuners.lora.layer.ParamWrapper"}


@dataclass(frozen=True, kw_only=True)
class RecordsAlone:
    """Rule of any module that keeps records apart: each runs alone, forward and backward.

    It serves the module with all that it contains, whatever happens inside: weights used by
    function, experts that receive flattened tokens, state along the sequence. Nothing is computed
    twice; what is lost is the speed of a batch. The gradient is the one that autograd forms for the
    record, so the norm is taken of the very numbers that are added. Records cannot couple inside of
    the module, unless it keeps something of one call for the next.

    Tensors that the module receives are cut along dimension 0 where that is the number of records,
    and given to each record whole where it is not. Tensors that it returns are joined along
    dimension 0.

    Args:
        shared: Names of arguments of the module's `forward` that every record gets whole, even
            where dimension 0 happens to be the number of records: masks between positions, say.
        ndim: Dimensions that the first input must have; None for two or more.
    """

    shared: tuple[str, ...] = ()
    ndim: int | None = None

    @property
    def name(self) -> str:
        """Family name."""
        return "records alone"


def whole_rule(module: nn.Module) -> RecordsAlone | None:
    """Return how to run `module` and all that it contains, where its parts cannot be tapped."""
    if is_parametrized(module):  # its weight is a function of parameters further inside
        return RecordsAlone()
    if isinstance(module, nn.MultiheadAttention):  # uses its output projection by function
        return RecordsAlone(shared=("attn_mask",), ndim=3)
    if getattr(module, "lora_variant", None) or len(getattr(module, "lora_embedding_A", ())):
        return RecordsAlone()  # PEFT: DoRA and its like, embeddings: factors used by function
    if _is_a(module, _ADAPTER) and not _is_a(module, _TAPPED_ADAPTERS):
        return RecordsAlone()  # other adapters may use what they hold by function
    serving = () if _is_container(module) else filter(_serves_its_parent, _parts(module))
    if any(not _adapters_hold(part, module) for part in serving):
        return RecordsAlone()
    return None


def obstacle_to_taps(module: nn.Module) -> str | None:
    """Return why the records of a batch cannot be told apart in `module`, or None."""
    if getattr(module, "batch_first", True) is False:  # PyTorch's own layers unless it is True
        return "has positions first (batch_first=False)"
    if makes_one_prompt(module):
        return "makes one prompt, which PEFT repeats for all records"
    return None


def makes_one_prompt(module: nn.Module) -> bool:
    """Return whether `module` is the encoder of PEFT's prompt tuning or p-tuning."""
    return _is_a(module, _PROMPTS) and not _is_a(module, _PROMPT_PER_TASK)


def is_adapted_parameter(module: nn.Module) -> bool:
    """Return whether `module` is PEFT's LoRA of a bare parameter, such as the weights of experts.

    In every forward pass it puts a parametrization on its base layer and takes it off again.
    """
    return _is_a(module, _ADAPTED_PARAMETER)


def _is_a(module: nn.Module, names: set[str]) -> bool:
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__}
    return not kinds.isdisjoint(names)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield what `module` may call: its children, and those that its lists and dicts hold."""
    for child in module.children():
        yield child
        if _is_container(child):
            yield from _parts(child)


def _is_container(module: nn.Module) -> bool:
    """Return whether nobody can call `module`, as `nn.ModuleList`."""
    return type(module).forward is nn.Module.forward


def _adapters_hold(part: nn.Module, module: nn.Module) -> bool:
    """Return whether adapters between the two hold all that `part` does, and use it there.

    PEFT's model around a base model keeps what its TinyLoRA and VB-LoRA layers share.
    """
    wanted, ends = {id(p) for p in part.parameters()}, {module, *part.modules()}
    adapters = (inner for inner in module.modules() if _is_a(inner, _ADAPTER) and inner not in ends)
    return any(wanted <= {id(p) for p in adapter.parameters()} for adapter in adapters)


def _serves_its_parent(child: nn.Module) -> bool:
    """Return whether a trainable child is only a holder, or the experts of a mixture.

    Experts hold weights of three dimensions and receive the tokens of all records, flattened.
    """
    if is_adapted_parameter(child):
        return any(p.requires_grad for p in child.parameters())
    own = [p for p in child.parameters(recurse=False) if p.requires_grad]
    experts = any(p.ndim == 3 for p in own) and not isinstance(child, nn.modules.conv._ConvNd)
    return bool(own) and (_is_container(child) or (experts and not _is_a(child, _PROMPTS)))
