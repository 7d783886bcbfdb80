"""Which modules are linear layers, by what they do."""

import pytest
import torch
from cases import tiny
from torch import nn
from torch.nn.utils import prune
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from hf_accel_patch.families.weights import Weight, linear_weights, multiplies_plainly


class Doubling(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Returning(nn.Linear):
    def forward(self, input):
        return super().forward(input), None


class Wanting(nn.Linear):
    def forward(self, input):
        return super().forward(input) * self.factor


class Scaled(nn.Linear):
    scale = 1.0

    def forward(self, input):
        return super().forward(input) * self.scale


class Clamped(nn.Linear):
    def forward(self, input):
        return super().forward(input).clamp(-50, 50)


class Plain(nn.Linear):
    def forward(self, input):
        return input @ self.weight.T + self.bias


class Inheriting(nn.Linear):
    pass


@pytest.mark.parametrize("kind", (nn.Linear, FalconLinear, Plain, Inheriting))
def test_subclasses_that_multiply_plainly(kind):
    module, state = kind(6, 5), torch.get_rng_state()
    assert multiplies_plainly(module) and torch.equal(torch.get_rng_state(), state), "it draws random numbers"
    assert linear_weights(module) == ("linear", (Weight("weight", (5, 6)),))


@pytest.mark.parametrize("kind", (Doubling, Returning, Wanting, Clamped))
def test_subclasses_that_do_not(kind):
    assert linear_weights(kind(6, 5)) == f"{kind.__name__} may use its weight in its own way"


def test_what_an_instance_adds_counts():
    module = Scaled(6, 5)
    assert multiplies_plainly(module)
    module.scale = 3.0
    assert not multiplies_plainly(module)


def test_it_is_found_on_the_meta_device():
    with torch.device("meta"):
        assert multiplies_plainly(Plain(6, 5)) and not multiplies_plainly(Doubling(6, 5))


@pytest.mark.parametrize("make", (nn.utils.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.3)))
def test_weights_that_are_computed(make):
    layer = nn.Linear(6, 5)
    make(layer)
    assert linear_weights(layer) == "its weight is computed from other parameters"


def test_other_modules():
    assert linear_weights(Conv1D(5, 6)) == ("transposed", (Weight("weight", (5, 6), transposed=True),))
    assert (
        linear_weights(nn.Embedding(4, 3))
        == linear_weights(nn.Conv1d(4, 3, 2))
        == linear_weights(nn.LayerNorm(3))
        == ""
    )
    packed = nn.Linear(6, 5)
    packed._parameters["weight"] = nn.Parameter(torch.zeros(5, 6, dtype=torch.int8), requires_grad=False)
    assert linear_weights(packed) == "its weight is torch.int8 already"


@pytest.mark.parametrize("family, transposed", (("mixtral", False), ("gpt_oss", True)))
def test_experts(family, transposed):
    mlp = tiny(family).model.layers[0].mlp
    role, (into, out) = linear_weights(mlp.experts)
    assert role == "experts" and (into.name, out.name) == ("gate_up_proj", "down_proj")
    assert into.transposed == out.transposed == transposed and into.experts == mlp.experts.num_experts
    assert into.shape[1] == out.shape[0] == 64 and into.shape[0] == 2 * out.shape[1]
    router = next(module for module in mlp.children() if "Router" in type(module).__name__)
    assert "may use its weight in its own way" in linear_weights(router)
