"""What is put in the place of something else, and that all of it goes again."""

import gc
import weakref
from typing import Any

import pytest
from torch import nn

from mosaic_core.shadow import Shadows


class Trainer:
    """A trainer with a method, an attribute of its own and a class attribute."""

    devices = 1

    def __init__(self) -> None:
        self.callback = "theirs"

    def step(self) -> str:
        return "step"


def test_a_method_is_shadowed_on_one_instance_and_comes_back() -> None:
    trainer, other, shadows = Trainer(), Trainer(), Shadows()
    before = vars(trainer).copy()
    own = trainer.step
    shadows.put(trainer, "step", lambda: f"our {own()}")
    assert trainer.step() == "our step"
    assert other.step() == "step"
    assert vars(Trainer)["step"] is Trainer.step  # the class is never touched
    shadows.undo()
    assert trainer.step() == "step"
    assert vars(trainer) == before  # no attribute is left that the class has


@pytest.mark.parametrize("name", ["callback", "devices", "unheard_of"])
def test_an_attribute_is_replaced_and_comes_back(name: str) -> None:
    trainer, shadows = Trainer(), Shadows()
    before = vars(trainer).copy()
    shadows.put(trainer, name, "ours")
    assert getattr(trainer, name) == "ours"
    shadows.undo()
    assert vars(trainer) == before
    assert hasattr(trainer, "unheard_of") is False


def test_none_is_a_value_that_comes_back() -> None:
    trainer, shadows = Trainer(), Shadows()
    trainer.callback = None
    shadows.put(trainer, "callback", "ours")
    shadows.undo()
    assert vars(trainer) == {"callback": None}


def test_a_module_keeps_its_parameters_and_children() -> None:
    module, shadows = nn.Linear(1, 1), Shadows()
    keys, own = list(vars(module)), module.forward
    shadows.put(module, "forward", lambda x: own(x) * 0)
    assert not module(module.weight).any()
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]
    shadows.undo()
    assert list(vars(module)) == keys


def test_one_thing_shadowed_twice_is_undone_in_reverse() -> None:
    trainer, shadows = Trainer(), Shadows()
    for word in ("first", "second"):
        own = trainer.step
        shadows.put(trainer, "step", lambda own=own, word=word: f"{word} {own()}")
    assert trainer.step() == "second first step"
    shadows.undo()
    assert trainer.step() == "step"
    assert "step" not in vars(trainer)


def test_functions_are_called_in_their_place_the_latest_first() -> None:
    trainer, shadows = Trainer(), Shadows()
    seen: list[Any] = []
    shadows.on_undo(lambda: seen.append(("first", trainer.callback)))
    shadows.put(trainer, "callback", "ours")
    shadows.on_undo(lambda: seen.append(("last", trainer.callback)))
    shadows.undo()
    assert seen == [("last", "ours"), ("first", "theirs")]


def test_hooks_are_removed() -> None:
    module, shadows = nn.Linear(1, 1), Shadows()
    shadows.on_undo(module.register_forward_hook(lambda *_: None).remove)
    assert module._forward_hooks
    shadows.undo()
    assert not module._forward_hooks


def test_a_second_undo_does_nothing() -> None:
    trainer, shadows, calls = Trainer(), Shadows(), []
    shadows.on_undo(lambda: calls.append(1))
    shadows.put(trainer, "step", "ours")
    shadows.undo()
    trainer.step = "somebody else's"  # type: ignore[method-assign, assignment]
    shadows.undo()
    assert trainer.step == "somebody else's"
    assert calls == [1]


def test_what_was_taken_away_meanwhile_is_no_error() -> None:
    trainer, shadows = Trainer(), Shadows()
    shadows.put(trainer, "step", "ours")
    del trainer.step
    shadows.undo()
    assert trainer.step() == "step"


def test_shadows_can_be_used_again() -> None:
    trainer, shadows = Trainer(), Shadows()
    for _ in range(2):
        shadows.put(trainer, "step", "ours")
        assert trainer.step == "ours"
        shadows.undo()
        assert trainer.step() == "step"


def test_after_a_failure_the_rest_is_still_there_to_undo() -> None:
    trainer, shadows = Trainer(), Shadows()

    def fail() -> None:
        raise ZeroDivisionError

    shadows.put(trainer, "step", "ours")
    shadows.on_undo(fail)
    with pytest.raises(ZeroDivisionError):
        shadows.undo()
    shadows.undo()
    assert trainer.step() == "step"


def test_nothing_is_held_after_undo() -> None:
    trainer, shadows = Trainer(), Shadows()
    shadows.put(trainer, "step", "ours")
    shadows.undo()
    held = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert held() is None
