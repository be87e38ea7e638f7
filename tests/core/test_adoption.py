"""New parameters join the optimizer group of the parameter they follow."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from mosaic_core import Run, UnsupportedError
from mosaic_core.algorithm import Algorithm, Place


@dataclass(frozen=True)
class Adds(Algorithm):
    """Gives the model new parameters beside, or instead of, the first one's."""

    instead: bool = False
    place = Place.SURGERY

    def prepare_model(self, model, run):
        model.new = nn.Linear(2, 2)
        if self.instead:
            run.new_parameters.replace(model.first.weight, model.new.parameters())
            model.first.weight = None
        else:
            run.new_parameters.add(model.new.parameters(), beside=model.first.weight)


def make_model():
    model = nn.Module()
    model.first, model.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
    return model


def groups_of(model):
    return [
        {"params": [model.first.weight, model.second.weight], "weight_decay": 0.1},
        {"params": [model.second.bias], "weight_decay": 0.0},
    ]


def ids(group):
    return [id(parameter) for parameter in group["params"]]


@pytest.mark.parametrize("late", [False, True], ids=["constructor", "start"])
@pytest.mark.parametrize("instead", [False, True])
def test_they_join_the_group_of_the_parameter(instead, late):
    model = make_model()
    optimizer = torch.optim.SGD(groups_of(model), lr=0.1)
    first, second = model.first.weight, model.second.weight
    if late:
        Run([Adds(instead)], model=model).start([optimizer])
    else:
        Run([Adds(instead)], model=model, optimizer=optimizer)
    new = list(model.new.parameters())
    expected = [*([] if instead else [first]), *new, second]
    assert ids(optimizer.param_groups[0]) == list(map(id, expected))
    assert ids(optimizer.param_groups[1]) == [id(model.second.bias)]


def test_groups_of_an_optimizer_made_after_surgery_stay():
    model = make_model()
    run = Run([Adds()], model=model)
    groups = [{"params": list(model.new.parameters())}, {"params": [model.first.weight]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    before = [ids(group) for group in optimizer.param_groups]
    run.start([optimizer])
    assert [ids(group) for group in optimizer.param_groups] == before


def test_several_optimizers_each_keep_their_own():
    model = make_model()
    first = torch.optim.SGD([model.first.weight], lr=0.1)
    second = torch.optim.SGD(model.second.parameters(), lr=0.1)
    Run([Adds()], model=model, optimizer=[second, first])
    assert len(first.param_groups[0]["params"]) == 3
    assert len(second.param_groups[0]["params"]) == 2


def test_state_of_a_replaced_parameter_is_forgotten():
    model = make_model()
    optimizer = torch.optim.SGD(groups_of(model), lr=0.1, momentum=0.9)
    old = model.first.weight
    optimizer.state[old]["momentum_buffer"] = torch.zeros_like(old)
    Run([Adds(True)], model=model, optimizer=optimizer)
    assert old not in optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())


def test_starting_again_adds_nothing():
    model = make_model()
    optimizer = torch.optim.SGD(groups_of(model), lr=0.1)
    run = Run([Adds()], model=model, optimizer=optimizer)
    before = ids(optimizer.param_groups[0])
    run.start([optimizer])
    assert ids(optimizer.param_groups[0]) == before


@pytest.mark.parametrize("instead", [False, True])
def test_parameters_that_nobody_would_train_are_refused(instead):
    model = make_model()
    optimizer = torch.optim.SGD(model.second.parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match=r"no optimizer trains the one they belong to"):
        Run([Adds(instead)], model=model, optimizer=optimizer)


@pytest.mark.parametrize("instead", [False, True])
def test_frozen_parameters_join_where_theirs_is_held(instead):
    for held in (True, False):
        model = make_model()
        model.first.requires_grad_(False)
        parameters = model.parameters() if held else model.second.parameters()
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        run = Run([Adds(instead)], model=model)
        new = set(map(id, model.new.requires_grad_(False).parameters()))
        run.start([optimizer])
        assert new & set(ids(optimizer.param_groups[0])) == (new if held else set())


@pytest.mark.parametrize("instead", [False, True])
def test_what_was_added_and_replaced_is_known(instead):
    model = make_model()
    weight = model.first.weight
    run = Run([Adds(instead)], model=model)
    assert run.new_parameters.added == set(map(id, model.new.parameters()))
    assert run.new_parameters.replaced == ({id(weight)} if instead else set())


@pytest.mark.parametrize("instead", [False, True])
def test_heirs_are_those_of_parameters_that_are_held(instead):
    model = make_model()
    first, second = model.first.weight, model.second.weight
    run = Run([Adds(instead)], model=model)
    assert run.new_parameters.heirs([first, second]) == set(model.new.parameters())
    assert run.new_parameters.heirs([second]) == set()
