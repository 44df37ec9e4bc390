"""Every layer rule is exact, found by what a module computes, and refuses what it must."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from veilspan.core import RecordsAlone, UnsupportedModelError
from veilspan.core.contributions import RowSums
from veilspan.core.norms import BlockedKernel
from veilspan.core.rules import find_rule
from veilspan.core.rules.linear import LinearRule
from veilspan.core.rules.norm import NormRule, Standard
from veilspan.core.testing import assert_rule_matches


def rule_of(module):
    return find_rule("module", module, BlockedKernel())


class RootMeanSquare(nn.Module):
    """An RMSNorm as Hugging Face writes it; `offset` 1 as in Gemma."""

    def __init__(self, width, offset=0.0):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.randn(width)), offset

    def forward(self, hidden_states):
        unit = hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + 1e-6)
        return unit * (self.offset + self.weight)


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return x * self.weight


class Transposed(nn.Module):
    """GPT-2's Conv1D by formula: x W + b."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


def shifted_norm(kind):
    norm = kind(5)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    return norm


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.Linear(5, 3), "linear"),
        (nn.Linear(5, 3, bias=False), "linear"),
        (Transposed(5, 3), "linear (transposed)"),
        (Transposed(5, 5), "linear (transposed)"),
        (shifted_norm(nn.LayerNorm), "norm"),
        (shifted_norm(nn.RMSNorm), "norm"),
        (RootMeanSquare(5), "norm"),
        (RootMeanSquare(5, offset=1.0), "norm"),
        (LayerScale(5), "norm"),
    ],
)
@pytest.mark.parametrize("shape", [(1, 5), (3, 5), (2, 1, 5), (3, 7, 5), (2, 3, 4, 5)])
def test_rules_are_exact_on_inputs_of_two_to_four_dimensions(module, name, shape):
    torch.manual_seed(0)
    assert rule_of(module).name == name
    assert_rule_matches(module.double(), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("module", "standard"),
    [
        (shifted_norm(nn.LayerNorm), Standard(centred=True, eps=1e-5)),
        (nn.LayerNorm(5, eps=1e-3, bias=False), Standard(centred=True, eps=1e-3)),
        (nn.RMSNorm(5, eps=1e-6), Standard(centred=False, eps=1e-6)),
        (LlamaRMSNorm(5, eps=1e-5), Standard(centred=False, eps=1e-5)),
        (GemmaRMSNorm(5), Standard(centred=False, eps=1e-6)),
        (RootMeanSquare(5), None),  # its eps is no number of the module
        (nn.RMSNorm(5), None),  # nor this one, which depends on the dtype
        (LayerScale(5), None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_norm_that_is_standard_is_known_by_its_numbers(module, standard, dtype):
    if dtype == torch.float64 and isinstance(module, (LlamaRMSNorm, GemmaRMSNorm)):
        standard = None  # they compute in fp32, so their gradient is not that of the formula
    rule = rule_of(copy.deepcopy(module).to(dtype))
    assert isinstance(rule, NormRule)
    assert rule.standard == standard


class Damped(Transposed):
    """A map that bf16 can hardly tell from a linear one."""

    def forward(self, x):
        return super().forward(x) * 0.98


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_module_computes_is_found_out_in_fp32_whatever_its_dtype(dtype):
    torch.manual_seed(0)
    gemma, transposed = GemmaRMSNorm(5).to(dtype), Transposed(5, 3).to(dtype)
    kernel = BlockedKernel()
    standard = Standard(centred=False, eps=1e-6)
    assert rule_of(gemma) == NormRule(offset=1.0, kernel=kernel, standard=standard)
    assert rule_of(transposed) == LinearRule(kernel=kernel, transposed=True)
    assert rule_of(Damped(5, 3).to(dtype)) == RecordsAlone()


@pytest.mark.parametrize("make", [nn.LayerNorm, LlamaRMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_standard_norm_has_the_gradients_of_autograd(make, dtype):
    torch.manual_seed(0)
    module = make(64)
    module.weight.data.normal_()
    x, grad = 3 * torch.randn(2, 7, 3, 64) + 1, torch.randn(2, 7, 3, 64)
    exact = copy.deepcopy(module).double()
    leaf = x.to(dtype).double().requires_grad_()
    exact(leaf).backward(grad.to(dtype).double())
    module = module.to(dtype)
    rule = rule_of(module)
    assert isinstance(rule, NormRule)
    found, parts = rule.backward(module, x.to(dtype), grad.to(dtype), needs_input=True)
    assert isinstance(found, torch.Tensor)
    assert isinstance(parts["weight"], RowSums)
    if rule.standard is not None:  # a book keeps no vector per token
        assert parts["weight"].rows_BTn.shape == (2, 1, 64)
    limit = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert found.dtype == dtype  # Hugging Face's norms compute in fp32, fp64 input or not
    torch.testing.assert_close(found.double(), leaf.grad, rtol=limit, atol=limit)
    weight = parts["weight"].per_sample().sum(0).double()
    torch.testing.assert_close(weight, exact.weight.grad, rtol=limit, atol=10 * limit)


class ScaledEmbedding(nn.Embedding):
    def forward(self, input):
        return super().forward(input) * 2.5


@pytest.mark.parametrize("kind", [nn.Embedding, ScaledEmbedding])
def test_embeddings_with_repeated_tokens_are_exact(kind):
    torch.manual_seed(0)
    ids = torch.tensor([[1, 1, 1, 4], [0, 4, 0, 4]])
    assert_rule_matches(kind(6, 3).double(), ids)


def test_pitfall_23_padding_idx_receives_no_gradient():
    torch.manual_seed(0)
    module = nn.Embedding(6, 3, padding_idx=0).double()
    assert_rule_matches(module, torch.tensor([[0, 1, 0], [2, 0, 0]]))


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embedding_options_that_break_clipping_are_refused(option):
    with pytest.raises(UnsupportedModelError, match=next(iter(option))):
        rule_of(nn.Embedding(4, 3, **option))


class Dropping(nn.Linear):
    def forward(self, input):
        return nn.functional.dropout(super().forward(input), 0.5, self.training)


class Twice(nn.Linear):
    def forward(self, input):
        return super().forward(super().forward(input))


class Holding(nn.Module):
    """A layer with another one in it: before the layer, beside it, or after it."""

    def __init__(self, inner, *, where):
        super().__init__()
        self.weight, self.inner, self.where = nn.Parameter(torch.randn(5, 5)), inner, where

    def forward(self, x):
        if self.where == "before":
            return self.inner(x) @ self.weight
        return x @ self.weight + self.inner(x)


class Gated(nn.Module):
    """Not elementwise in what it trains: its own weight scales what another layer makes."""

    def __init__(self):
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(5)), nn.Linear(5, 5)

    def forward(self, x):
        return self.inner(x) * self.weight


class DroppingLookup(nn.Embedding):
    def __init__(self):
        super().__init__(7, 5)
        self.drop = nn.Dropout(0.5)

    def forward(self, input):
        return self.drop(super().forward(input))


class DroppingNorm(nn.LayerNorm):
    def __init__(self):
        super().__init__(5)
        self.drop = nn.Dropout(0.5)

    def forward(self, input):
        return super().forward(self.drop(input))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grad_outputs):
        return -0.5 * grad_outputs[0]


class OneWay(nn.Linear):
    """Computes one map, differentiates another: `how` says where."""

    def __init__(self, how):
        super().__init__(5, 5)
        self.how = how

    def forward(self, input):
        if self.how == "input detached":
            return super().forward(input.detach())
        if self.how == "input reversed":
            return super().forward(Reversed.apply(input))
        return nn.functional.linear(input, self.weight.detach(), self.bias)


class OneWayNorm(nn.LayerNorm):
    def forward(self, input):
        return super().forward(Reversed.apply(input))


class ShrunkLookup(nn.Embedding):
    """Takes a tenth of its gradient, as some large models do to keep training stable."""

    def forward(self, input):
        rows = super().forward(input)
        return 0.1 * rows + 0.9 * rows.detach()


def adapter():
    """Return an adapter that is nothing yet, as one is before training."""
    up = nn.Linear(2, 5)
    with torch.no_grad():
        up.weight.zero_()
        up.bias.zero_()
    return nn.Sequential(nn.Linear(5, 2), up)


@pytest.mark.parametrize(
    "module",
    [
        Dropping(5, 3),
        Dropping(5, 3).eval(),
        Holding(nn.Dropout(0.5), where="before").eval(),
        DroppingLookup().eval(),
        DroppingNorm().eval(),
        Holding(adapter(), where="beside"),
        Gated(),
        OneWay("input detached"),
        OneWay("input reversed"),
        OneWay("weight detached"),
        OneWayNorm(5),
        ShrunkLookup(7, 5),
        Twice(4, 4),
        nn.GroupNorm(2, 4),
        nn.PReLU(5),
        nn.Bilinear(3, 3, 2),
    ],
)
def test_a_module_that_computes_something_else_runs_its_records_alone(module):
    assert rule_of(module) == RecordsAlone()


@pytest.mark.parametrize("make", [lambda: Holding(adapter(), where="beside"), Gated])
def test_what_is_trained_inside_of_another_layer_gets_its_gradient(make):
    torch.manual_seed(0)
    assert_rule_matches(make, [(3, 4, 5)])


@pytest.mark.parametrize("how", ["input detached", "input reversed", "weight detached"])
def test_gradients_are_those_of_autograd_also_where_they_are_not_those_of_the_formula(how):
    torch.manual_seed(0)
    assert_rule_matches(OneWay(how), [(3, 4, 5)])


def test_a_lookup_that_takes_a_part_of_its_gradient_is_exact():
    assert_rule_matches(ShrunkLookup(7, 5), torch.tensor([[0, 1, 0], [2, 6, 0]]))


@pytest.mark.parametrize("start", ["zero", "identity"])
def test_a_weight_that_looks_the_same_both_ways_gets_the_gradient_of_its_own(start):
    module = Transposed(5, 5)
    with torch.no_grad():
        module.weight.copy_(torch.eye(5) if start == "identity" else torch.zeros(5, 5))
    assert rule_of(module).name == "linear (transposed)"
    assert_rule_matches(module, [(3, 4, 5)])


def test_a_frozen_weight_may_be_detached():
    module = OneWay("weight detached")
    module.weight.requires_grad_(False)
    assert isinstance(rule_of(module), LinearRule)


def test_an_experiment_leaves_the_mode_of_every_part_as_it_was():
    module = DroppingNorm()
    module.drop.eval()
    assert rule_of(module) == RecordsAlone()
    assert (module.training, module.drop.training) == (True, False)


class Centred(nn.Module):
    """A norm whose x̂ is of no standard form, so that its rule runs the module itself."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5))

    def forward(self, x):
        return (x - x.mean(-1, keepdim=True)) * self.weight


@pytest.mark.parametrize("make", [Centred, lambda: Transposed(5, 5), lambda: ShrunkLookup(7, 5)])
def test_hooks_act_around_a_layer_once_and_see_no_experiment(make):
    torch.manual_seed(0)
    module, calls = make(), []
    seen = module.register_forward_pre_hook(lambda *_: calls.append(1))
    rule_of(module)
    assert not calls
    seen.remove()
    module.register_forward_hook(lambda module, inputs, output: 2.0 * output)
    table = isinstance(module, nn.Embedding)
    assert_rule_matches(module, torch.tensor([[0, 1], [2, 6]]) if table else [(3, 4, 5)])
