"""Changing modules without losing parameters, names, hooks or checkpoints."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from mosaic_core import NoEffectWarning, Run
from mosaic_core.algorithms import Backdrop, BlurPool, ChannelsLast
from mosaic_core.surgery import (
    Mixin,
    Report,
    accept_sentinel,
    is_sentinel,
    matching,
    original_class,
    sentinel,
    swap_class,
    warn_no_effect,
)


class Doubled(nn.Linear):
    """A linear layer that doubles and shifts its output."""

    shift: torch.Tensor
    factor: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.factor * super().forward(input) + self.shift


def swapped(model: nn.Sequential) -> nn.Sequential:
    """Swap the first layer."""
    swap_class(model[0], Doubled, factor=2.0, shift=torch.ones(()))
    return model


def test_swap_class_keeps_parameters_names_hooks_and_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).eval()
    layer, calls = model[0], []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.weight.register_hook(lambda grad: calls.append("grad"))
    layer.note = "mine"
    x = torch.randn(4, 3)
    before = layer(x)
    parameters, keys = list(model.parameters()), list(model.state_dict())
    calls.clear()

    swapped(model)

    assert model[0] is layer
    assert isinstance(layer, Doubled)
    assert isinstance(layer, nn.Linear)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys  # the tensor became a buffer outside of it
    assert [name for name, _ in model.named_buffers()] == ["0.shift"]
    assert layer.note == "mine"
    assert not layer.training
    torch.testing.assert_close(layer(x), 2 * before + 1)
    layer(x).sum().backward()
    assert calls == ["forward", "forward", "grad"]


def test_an_optimizer_made_before_goes_on_training_a_swapped_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    swapped(model)
    before = model[0].weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model[0].weight, before - 0.2)


def test_swapped_attributes_move_copy_and_convert_with_the_module() -> None:
    model = swapped(nn.Sequential(nn.Linear(3, 2)))
    twin = copy.deepcopy(model)
    assert isinstance(twin[0], Doubled)
    assert twin[0].shift is not model[0].shift
    assert twin.double()[0].shift.dtype == torch.float64
    assert twin.to("meta")[0].shift.device.type == "meta"


class Negated(nn.Linear):
    """A linear layer with the sign of its output changed."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return -super().forward(input)


class Own(nn.Linear):
    """A class of the user's."""


@pytest.mark.parametrize("kind", [nn.Linear, Own])
@pytest.mark.parametrize(("order", "sign"), [((Doubled, Negated), -1), ((Negated, Doubled), 1)])
def test_swaps_stack_the_last_outermost(
    kind: type[nn.Module], order: tuple[type[nn.Module], ...], sign: int
) -> None:
    model, x = nn.Sequential(kind(3, 2)), torch.randn(4, 3)
    before = model(x)
    assert original_class(model[0]) is kind
    attributes = {"factor": 2.0, "shift": torch.ones(())}
    for new in order:
        swap_class(model[0], new, **(attributes if new is Doubled else {}))
    assert all(isinstance(model[0], cls) for cls in (Doubled, Negated, kind))
    assert original_class(model[0]) is kind
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other[0]) is type(model[0])
        # -(2y + 1), or 2(-y) + 1
        torch.testing.assert_close(other(x), -2 * before + sign)
    state = nn.Linear(3, 2).state_dict()
    assert model[0].state_dict().keys() == state.keys()


class Twice(Mixin):
    """Whatever the module is, its output twice."""

    def forward(self, *args: object) -> object:
        return 2 * super().forward(*args)


@pytest.mark.parametrize("kind", [nn.Linear, Own, Negated])
def test_a_mixin_extends_any_class_and_acts_once(kind: type[nn.Module]) -> None:
    layer, x = kind(3, 2), torch.randn(4, 3)
    expected = 2 * layer(x)
    for _ in range(2):
        swap_class(layer, Twice)
    assert isinstance(layer, Twice)
    assert isinstance(layer, kind)
    assert original_class(layer) is kind
    assert (type(layer).__name__, type(layer).__module__) == (kind.__name__, kind.__module__)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (layer, copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected)
        assert type(other) is type(layer)


def test_a_class_that_others_made_of_a_swapped_one_stays() -> None:
    layer = nn.Linear(3, 2)
    swap_class(layer, Twice)
    x = torch.randn(4, 3)
    expected = layer(x)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    swap_class(layer, type("Outer", (Mixin,), {}))
    torch.testing.assert_close(layer(x), expected)


def test_a_mixin_stacks_with_other_swaps() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    expected = -2 * layer(x)
    for new in (Twice, Negated, Twice):
        swap_class(layer, new)
    assert torch.equal(layer(x), expected)
    assert type(copy.deepcopy(layer)) is type(layer)


@pytest.mark.parametrize("new", [nn.Conv2d, nn.Module, nn.Bilinear])
def test_swapping_to_what_is_no_subclass_is_refused(new: type[nn.Module]) -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=rf"swap_class: {new.__name__} is no subclass of Linear"):
        swap_class(layer, new)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("layer4", ["layer4"]),
        ("layer4.*", ["layer4.0", "layer4.1", "layer4.1.mlp"]),
        ("*.mlp", ["layer4.1.mlp"]),
        (["head", "layer?"], ["layer3", "layer4", "head"]),
        (("layer[34]",), ["layer3", "layer4"]),
        (iter(["head", "head"]), ["head"]),
        ("Head", []),
        ([], []),
        ("", [""]),
    ],
)
def test_matching_by_shell_patterns_in_the_models_order(patterns: object, names: list[str]) -> None:
    inner = nn.Sequential()
    inner.mlp = nn.Identity()
    model = nn.ModuleDict(
        {
            "layer3": nn.Identity(),
            "layer4": nn.Sequential(nn.Identity(), inner),
            "head": nn.Linear(1, 1),
        }
    )
    found = list(matching(model, patterns))
    assert [name for name, _ in found] == names
    assert all(model.get_submodule(name) is module for name, module in found)


# Sentinel.


def cnn() -> nn.Sequential:
    """Make a network with something to blur."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 16, 3, stride=2), nn.MaxPool2d(2), nn.Conv2d(16, 4, 1))


def saved(run: Run) -> dict[str, torch.Tensor]:
    """Save a run's model as adapters do."""
    return {**run.model.state_dict(), **sentinel(run.report, "load it with mosaic_x.load()")}


def test_strict_loading_into_an_unchanged_model_fails_and_says_why() -> None:
    state = saved(Run([BlurPool()], model=cnn()))
    with pytest.raises(
        RuntimeError,
        match=r"mosaic: these weights belong to a model changed by BlurPool, and would silently"
        r" compute something else in this one; load it with mosaic_x.load\(\)",
    ):
        cnn().load_state_dict(state)


def test_a_changed_model_loads_it_strictly_and_computes_the_same() -> None:
    run = Run([BlurPool()], model=cnn())
    nn.init.ones_(run.model[0].bias)
    state = saved(run)
    other = Run([BlurPool()], model=cnn()).model
    result = other.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    x = torch.randn(2, 16, 9, 9)
    assert torch.equal(other(x), run.model(x))
    assert any(is_sentinel(key) for key in state)  # the caller's dictionary is whole


def test_other_surplus_keys_still_fail_in_a_changed_model() -> None:
    state = saved(Run([BlurPool()], model=cnn())) | {"surplus": torch.zeros(())}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*: "surplus"'):
        Run([BlurPool()], model=cnn()).model.load_state_dict(state)


def test_a_changed_model_may_lie_within_another() -> None:
    inner = cnn()
    run = Run([BlurPool()], model=inner)
    outer = nn.ModuleDict({"net": inner})
    state = outer.state_dict() | {
        f"net.{key}": value for key, value in sentinel(run.report, "").items()
    }
    outer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="changed by BlurPool"):
        nn.ModuleDict({"net": cnn()}).load_state_dict(state)


def test_the_sentinel_survives_a_file() -> None:
    state = sentinel(Report({"BlurPool": ["0"], "Other": ["1"]}), "do this")
    (key,) = state
    assert is_sentinel(key)
    assert "changed by BlurPool, Other" in key
    assert not is_sentinel("model.0.weight")
    assert isinstance(state[key], torch.Tensor)


def test_no_sentinel_where_nothing_was_changed() -> None:
    assert sentinel(Report(), "") == {}
    assert sentinel(Report({"BlurPool": []}), "") == {}
    with pytest.warns(NoEffectWarning):
        run = Run([BlurPool()], model=nn.Linear(1, 1))
    assert sentinel(run.report, "") == {}


def test_surgery_that_keeps_what_is_computed_needs_no_sentinel() -> None:
    run = Run([ChannelsLast(), Backdrop(layers="0")], model=cnn())
    assert sentinel(run.report, "") == {}
    cnn().load_state_dict(saved(run))


def test_accepting_twice_is_accepting_once() -> None:
    model = nn.Linear(1, 1)
    accept_sentinel(model)
    accept_sentinel(model)
    model.load_state_dict(model.state_dict() | sentinel(Report({"A": ["b"]}), ""))


# Report.


def test_a_report_reads_as_text() -> None:
    report = Report()
    assert str(report) == ""
    report.changed("BlurPool", ["conv1", "pool"])
    report.changed("Empty", [])
    report.notes.append("batch: input at 0, target at 1")
    assert str(report) == "BlurPool changed conv1, pool\nbatch: input at 0, target at 1"


def test_a_module_is_reported_once() -> None:
    report = Report()
    report.changed("BlurPool", iter(["a", "b"]))
    report.changed("BlurPool", ["b", "c"])
    assert report.changes == {"BlurPool": ["a", "b", "c"]}


def test_a_second_run_on_the_same_model_reports_the_same_changes() -> None:
    model = cnn()
    first, second = Run([BlurPool()], model=model), Run([BlurPool()], model=model)
    assert first.report.changes == second.report.changes == {"BlurPool": ["0", "1"]}


def test_the_root_module_has_a_name_in_the_report() -> None:
    report = Report()
    report.changed("BlurPool", [""])
    assert str(report) == "BlurPool changed the model itself"


def test_no_effect_is_a_warning_that_names_what_was_looked_for() -> None:
    with pytest.warns(
        NoEffectWarning,
        match=r"^apply_x: the model has no strided convolutions; nothing was changed$",
    ) as caught:
        warn_no_effect("apply_x", "strided convolutions", stacklevel=2)
    assert caught[0].filename == __file__


def test_an_effect_is_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Run([BlurPool(), ChannelsLast()], model=cnn())
