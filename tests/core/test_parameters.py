"""The view of parameters and gradients, for replicated training."""

import pytest
import torch
from torch import nn

from mosaic_core import Run, UnsupportedError
from mosaic_core.parameters import Fragment, ReplicatedParameters, replicated_parameters


def make() -> tuple[nn.Module, ReplicatedParameters]:
    """Make a model with a frozen and a shared parameter, and its view."""
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2, bias=False)})
    model["b"].weight = model["a"].weight
    model["a"].bias.requires_grad_(False)
    view = replicated_parameters(model)
    view.start()
    return model, view


def test_one_whole_fragment_a_parameter_in_the_models_order() -> None:
    model, view = make()
    fragments = list(view.fragments())
    weight, bias = model["a"].weight, model["a"].bias
    assert fragments == [
        Fragment("a.weight", weight, (2, 3), 0, 6, weight),
        Fragment("a.bias", bias, (2,), 0, 2, bias),
    ]
    assert all(f.master is f.param for f in fragments)


def test_gradients_are_read_set_and_dropped() -> None:
    model, view = make()
    weight, bias = view.fragments()
    assert view.grad(weight) is None
    model["a"](torch.ones(1, 3)).sum().backward()
    grad = view.grad(weight)
    assert grad is model["a"].weight.grad
    assert view.grad(bias) is None  # frozen
    grad.mul_(2)  # in place, a change of the gradient
    assert torch.equal(model["a"].weight.grad, torch.full((2, 3), 2.0))
    new = torch.zeros(2, 3)
    view.set_grad(weight, new)
    assert model["a"].weight.grad is new
    view.drop_grads()
    assert all(p.grad is None for p in model.parameters())


def test_a_replicated_view_has_nothing_to_reduce_or_publish() -> None:
    _, view = make()
    value = torch.ones(3)
    assert view.all_reduce(value) is value
    assert view.publish() is None


def test_start_reads_the_layout_again() -> None:
    model, view = make()
    assert len(list(view.fragments())) == 2
    model["c"] = nn.Linear(1, 1)
    view.start()
    assert [f.name for f in view.fragments()] == ["a.weight", "a.bias", "c.weight", "c.bias"]


def test_before_start_there_are_no_fragments() -> None:
    assert not list(ReplicatedParameters(nn.Linear(1, 1)).fragments())


@pytest.mark.parametrize("mark", ["device_mesh", "ds_id"])
def test_sharded_parameters_are_refused(mark: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    setattr(model[0].bias, mark, object())
    message = (
        r"mosaic: parameter '0.bias' is sharded \(Parameter\) and this trainer's adapter brings no"
        r" view of sharded parameters; use one process or DDP"
    )
    with pytest.raises(UnsupportedError, match=message):
        replicated_parameters(model)
    with pytest.raises(UnsupportedError, match=message):
        Run([], model=model)


def test_a_run_uses_the_view_it_is_given() -> None:
    model = nn.Linear(2, 2)
    model.weight.device_mesh = object()
    view = ReplicatedParameters(model)
    run = Run([], model=model, parameters=view)
    assert run.parameters is view
