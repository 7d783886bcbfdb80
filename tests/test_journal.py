"""The journal restores the instance, in order, past inherited values, and on a deep copy."""

import copy

import pytest
import torch
from torch import nn

from hf_accel_patch.journal import ABSENT, Journal


class Other(nn.Linear):
    pass


def described(module):
    """Class, own attributes, and parameters and buffers in their order, by identity."""
    own = {name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers")}
    stores = [[(name, id(value)) for name, value in store.items()] for store in (module._parameters, module._buffers)]
    return type(module), own, stores, set(module._non_persistent_buffers_set)


@pytest.fixture
def linear():
    module = nn.Linear(4, 4)
    module.register_buffer("kept", torch.ones(2))
    return module


WRITES = {
    "new attribute": lambda journal, m: journal.set_attribute(m, "extra", 1),
    "old attribute": lambda journal, m: journal.set_attribute(m, "in_features", 9),
    "deleted attribute": lambda journal, m: journal.delete_attribute(m, "in_features"),
    "method": lambda journal, m: journal.bind_method(m, "forward", lambda self, x: x),
    "class": lambda journal, m: journal.change_class(m, Other),
    "parameter": lambda journal, m: journal.set_parameter(m, "weight", nn.Parameter(torch.zeros(1))),
    "removed parameter": lambda journal, m: journal.remove_parameter(m, "weight", keep=True),
    "new buffer": lambda journal, m: journal.set_buffer(m, "fresh", torch.zeros(1)),
    "passing buffer": lambda journal, m: journal.set_buffer(m, "fresh", torch.zeros(1), persistent=False),
    "old buffer": lambda journal, m: journal.set_buffer(m, "kept", torch.zeros(1)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_each_verb_changes_and_comes_off(linear, write):
    before, journal = described(linear), Journal()
    write(journal, linear)
    assert described(linear) != before
    journal.undo()
    assert described(linear) == before


def test_everything_together_comes_off_in_reverse(linear):
    before, journal = described(linear), Journal()
    for write in WRITES.values():
        write(journal, linear)
    journal.undo()
    assert described(linear) == before
    assert len(journal) == 0
    journal.undo()
    assert described(linear) == before


def test_an_inherited_value_is_not_pinned(linear):
    journal = Journal()
    journal.bind_method(linear, "forward", lambda self, x: x)
    journal.undo()
    assert "forward" not in vars(linear)


def test_the_order_of_parameters_comes_back(linear):
    journal = Journal()
    journal.remove_parameter(linear, "weight", keep=True)
    linear._parameters["later"] = None
    journal.undo()
    assert list(linear._parameters) == ["weight", "bias"]


def test_deleting_what_is_absent_notes_nothing(linear):
    journal = Journal()
    journal.delete_attribute(linear, "nothing")
    assert len(journal) == 0


def test_a_discarded_parameter_is_named(linear):
    journal = Journal()
    journal.remove_parameter(linear, "weight", keep=False, label="layer.weight")
    assert journal.discarded == ["layer.weight"]


def test_a_deep_copy_undoes_itself_only(linear):
    journal = Journal()
    vars(linear)["journal"] = journal
    journal.change_class(linear, Other)
    journal.set_attribute(linear, "in_features", 9)
    journal.bind_method(linear, "forward", lambda self, x: self.in_features)
    clone = copy.deepcopy(linear)
    assert clone.forward(None) == 9 and clone.forward.__self__ is clone
    vars(clone)["journal"].undo()
    assert type(clone) is nn.Linear and clone.in_features == 4
    assert type(linear) is Other and linear.in_features == 9
    assert copy.deepcopy(ABSENT) is ABSENT


def test_a_forward_that_hooks_left_in_the_instance_follows_the_class(linear):
    """As accelerate leaves it: in `_old_forward` while its hook is there, in `forward` when the hook has gone."""

    class Twice(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    x = torch.ones(1, 4)
    once = linear(x)
    linear.forward = linear.forward  # of a hook that came and went before the patch
    journal = Journal()
    journal.change_class(linear, Twice)
    assert torch.equal(linear(x), 2 * once)
    linear._old_forward = linear.forward  # of one that comes after it
    journal.undo()
    assert torch.equal(linear(x), once) and torch.equal(linear._old_forward(x), once)
    assert linear.forward.__func__ is linear._old_forward.__func__ is nn.Linear.forward
