"""The two sets of weights of a run, whole and sharded, and which of them the model holds."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mosaic_core import Algorithm, Place, Run
from mosaic_core.algorithms import EMA, MixUp
from mosaic_core.parameters import Fragment

AVERAGE = 3.0


@dataclass(frozen=True)
class Fixed(Algorithm):
    """Evaluates with constant weights, of some of the parameters."""

    names: tuple[str, ...] = ("0.weight", "1.weight", "1.bias")
    replayed: int = 0
    place = Place.WEIGHTS

    def evaluation_weights(self, run: Run) -> dict[str, Tensor] | None:
        fragments = {f.name: f.master for f in run.parameters.fragments()}
        return {name: torch.full_like(fragments[name], AVERAGE) for name in self.names}

    def on_evaluation(self, run: Run) -> None:
        run.model[1].running_mean.add_(1)

    def replays(self) -> int:
        return self.replayed


def make(*recipe: Algorithm, dtype: torch.dtype = torch.float32, **options: Any) -> Run:
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.BatchNorm1d(4)).to(dtype)
    nn.init.ones_(model[0].weight)
    run = Run(recipe, model=model, **options)
    run.start([torch.optim.SGD(model.parameters(), lr=0.1)], total_steps=10)
    return run


def values(run: Run) -> dict[str, float]:
    """Describe every parameter by the one value it consists of."""
    for parameter in run.model.parameters():
        assert (parameter == parameter.flatten()[0]).all()
    return {name: p.flatten()[0].item() for name, p in run.model.named_parameters()}


TRAINING = {"0.weight": 1.0, "1.weight": 1.0, "1.bias": 0.0}


def test_enter_and_leave() -> None:
    run = make(Fixed())
    assert run.averaged.parked is None
    run.averaged.enter()
    assert values(run) == dict.fromkeys(TRAINING, AVERAGE)
    assert run.averaged.parked is not None
    assert run.averaged.parked.keys() == TRAINING.keys()
    run.averaged.enter()  # again: the averaged weights must not be parked as those of training
    assert float(run.averaged.parked["0.weight"][0, 0]) == 1.0
    run.averaged.leave()
    assert values(run) == TRAINING
    assert run.averaged.parked is None
    run.averaged.leave()
    assert values(run) == TRAINING


def test_weights_that_are_not_averaged_stay() -> None:
    run = make(Fixed(("1.bias",)))
    run.averaged.enter()
    assert values(run) == {**TRAINING, "1.bias": AVERAGE}
    assert run.averaged.parked is not None
    assert run.averaged.parked.keys() == {"1.bias"}


@pytest.mark.parametrize("replayed", [0, 2])
def test_buffers_are_parked_only_where_they_will_be_recomputed(replayed: int) -> None:
    run = make(Fixed(replayed=replayed))
    run.averaged.enter()
    assert run.averaged.parked is not None
    assert ("1.running_mean" in run.averaged.parked) is bool(replayed)
    run.averaged.leave()
    assert float(run.model[1].running_mean[0]) == (0.0 if replayed else 1.0)


def test_gradients_and_optimizers_are_left_alone() -> None:
    run = make(Fixed())
    weight = run.model[0].weight
    weight.grad = torch.ones_like(weight)
    run.averaged.enter()
    assert run.model[0].weight is weight
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert weight.requires_grad
    assert weight.is_leaf


@pytest.mark.parametrize("recipe", [(), (MixUp(),), (EMA("4ba", ema_start="0.5dur"),)])
def test_without_averages_there_is_nothing_to_enter(recipe: tuple[Algorithm, ...]) -> None:
    run = make(*recipe)
    run.averaged.enter()
    assert run.averaged.parked is None
    assert run.averaged.held()  # nothing of the average is missing


# Which weights the model holds.


def test_held_tells_the_averaged_weights_from_others() -> None:
    run = make(Fixed())
    assert not run.averaged.held()
    run.averaged.enter()
    assert run.averaged.held()
    run.model[1].running_mean.add_(1)  # statistics are no weights
    assert run.averaged.held()
    run.averaged.leave()
    assert not run.averaged.held()


@pytest.mark.parametrize("name", sorted(TRAINING))
def test_one_bit_is_enough(name: str) -> None:
    run = make(Fixed())
    run.averaged.enter()
    with torch.no_grad():
        flat = run.model.get_parameter(name).flatten()
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))
        run.model.get_parameter(name).copy_(flat.view_as(run.model.get_parameter(name)))
    assert not run.averaged.held()


def test_a_precise_average_is_held_by_a_low_precision_model() -> None:
    run = make(EMA(smoothing=0.9), dtype=torch.bfloat16)
    for _ in range(3):
        with torch.no_grad():
            run.model[0].weight.add_(torch.randn(4, 2))
        run.end_step()
    averages = run.state(run.recipe.algorithms[0]).averages
    assert (averages["0.weight"] != averages["0.weight"].bfloat16()).any()
    assert not run.averaged.held()
    run.averaged.enter()
    assert run.averaged.held()


def test_forget_takes_what_the_model_holds_for_the_training_weights() -> None:
    run = make(Fixed())
    run.averaged.enter()
    run.averaged.forget()
    assert run.averaged.parked is None
    run.averaged.leave()
    assert values(run) == dict.fromkeys(TRAINING, AVERAGE)
    run.averaged.enter()
    assert run.averaged.parked is not None
    assert float(run.averaged.parked["0.weight"][0, 0]) == AVERAGE


def test_load_copies_weights_and_buffers_by_name() -> None:
    run = make()
    address = run.model[1].running_mean.data_ptr()
    run.averaged.load({"0.weight": torch.zeros(4, 2), "1.running_mean": torch.full((4,), 2.0)})
    assert values(run) == {**TRAINING, "0.weight": 0.0}
    assert run.model[1].running_mean.tolist() == [2.0] * 4
    assert run.model[1].running_mean.data_ptr() == address
    assert run.model[0].weight.requires_grad


def test_load_knows_no_other_names() -> None:
    with pytest.raises(KeyError, match=r"head\.weight"):
        make().averaged.load({"head.weight": torch.zeros(())})


# Sharded weights.


class Halves:
    """A view of a rank that owns the first half of every parameter, in masters of its own."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.published = 0
        self.of_others = 0.0
        self._fragments: list[Fragment] = []

    def start(self) -> None:
        assert self.model is not None
        self._fragments = []
        for name, param in self.model.named_parameters():
            half = param.numel() // 2
            master = param.detach().flatten()[:half].double()
            self._fragments.append(Fragment(name, param, tuple(param.shape), 0, half, master))

    def fragments(self) -> Iterable[Fragment]:
        return self._fragments

    def grad(self, fragment: Fragment) -> Tensor | None:
        return None

    def set_grad(self, fragment: Fragment, grad: Tensor) -> None: ...

    def drop_grads(self) -> None: ...

    def all_reduce(self, value: Tensor) -> Tensor:
        return value + self.of_others

    @torch.no_grad()
    def publish(self) -> None:
        self.published += 1
        for fragment in self._fragments:
            fragment.param.view(-1)[: fragment.numel] = fragment.master


def sharded() -> tuple[Run, Halves]:
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.BatchNorm1d(4))
    nn.init.ones_(model[0].weight)
    view = Halves()
    view.model = model
    run = Run([Fixed()], model=model, parameters=view)
    run.start([torch.optim.SGD(model.parameters(), lr=0.1)])
    return run, view


def test_sharded_weights_stay_sharded_and_are_published() -> None:
    run, view = sharded()
    run.averaged.enter()
    assert view.published == 1
    assert run.averaged.parked is not None
    assert {t.shape for t in run.averaged.parked.values()} == {(4,), (2,)}
    assert {t.dtype for t in run.averaged.parked.values()} == {
        torch.float64
    }  # those of the masters
    assert run.model[0].weight.flatten().tolist() == [AVERAGE] * 4 + [1.0] * 4
    run.averaged.leave()
    assert view.published == 2
    assert values(run) == TRAINING


def test_a_difference_on_another_rank_counts() -> None:
    run, view = sharded()
    run.averaged.enter()
    assert run.averaged.held()
    view.of_others = 1.0
    assert not run.averaged.held()
