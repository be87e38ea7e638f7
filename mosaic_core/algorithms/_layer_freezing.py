"""LayerFreezing: stop training the first layers as the run goes on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.batch import Batch
from mosaic_core.errors import UnsupportedError
from mosaic_core.surgery import warn_no_effect

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["LayerFreezing", "freeze_layers"]

_MARK = "_mosaic_frozen"  # by which a later run finds what an interrupted one left frozen


def freeze_layers(
    model: nn.Module,
    optimizers: Optimizer | Sequence[Optimizer],
    current_duration: float,
    freeze_start: float = 0.5,
    freeze_level: float = 1.0,
) -> tuple[int, float]:
    """Freeze the first layers of a model, in place, as many as the schedule says.

    The share of frozen layers is ``freeze_level * (d - freeze_start) / (1 - freeze_start)`` once
    the duration ``d`` is past ``freeze_start``; it is rounded down, and the last layer is not
    counted. A layer is a module with parameters of its own, in the order in which the modules were
    registered; a parameter that several layers share is frozen with the last of them. Frozen
    parameters require no gradient and have none, so backward ends where they begin.

    Args:
        model: The model.
        optimizers: Those that train it. They stay as they are: they skip a parameter without a
            gradient, and go on holding its state for checkpoints.
        current_duration: Share of the training that is done, in [0, 1].
        freeze_start: Share after which freezing begins, in [0, 1).
        freeze_level: Share of the layers that is frozen at the end, in [0, 1].

    Returns:
        The number of frozen layers, and the share of the schedule.

    Raises:
        ValueError: If a share is out of range.
        UnsupportedError: If an optimizer moves parameters that have no gradient.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> freeze_layers(model, optimizer, current_duration=0.75)
        (1, 0.5)
        >>> [p.requires_grad for p in model.parameters()]
        [False, False, True, True, True, True]

    References:
        Brock et al., `FreezeOut <https://arxiv.org/abs/1706.04983>`_, 2017; Raghu et al., `SVCCA
        <https://arxiv.org/abs/1706.05806>`_, 2017, section 4.2.
    """
    _check("freeze_layers", freeze_start, freeze_level)
    if not 0 <= current_duration <= 1:
        raise ValueError(
            f"freeze_layers: current_duration must be in [0, 1], got {current_duration}"
        )
    for optimizer in [optimizers] if isinstance(optimizers, Optimizer) else optimizers:
        _refuse(optimizer)
    layers, share = _layers(model), _share(current_duration, freeze_start, freeze_level)
    frozen = _first(layers, share)
    for parameter in (p for layer in frozen for p in layer):
        parameter.requires_grad_(False)
        parameter.grad = None
    return len(frozen), share


def _layers(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters of each layer, shared ones in the last layer that has them."""
    own = [list(module.parameters(recurse=False)) for module in model.modules()]
    own = [parameters for parameters in own if parameters]
    last = {p: i for i, parameters in enumerate(own) for p in parameters}
    return [[p for p in parameters if last[p] == i] for i, parameters in enumerate(own)]


def _share(duration: float, start: float, level: float) -> float:
    return max(0.0, level * (duration - start) / (1 - start))


def _first(layers: list[list[nn.Parameter]], share: float) -> list[list[nn.Parameter]]:
    return layers[: int(share * (len(layers) - 1))]


def _refuse(optimizer: Any) -> None:
    if isinstance(optimizer, LBFGS):
        raise UnsupportedError(
            "LayerFreezing: LBFGS moves parameters that have no gradient, along directions it"
            " remembers, so frozen layers would move; use an optimizer that skips them, such as"
            " SGD or AdamW"
        )


def _check(where: str, start: float, level: float) -> None:
    if not 0 <= start < 1:
        raise ValueError(f"{where}: freeze_start must be in [0, 1), got {start}")
    if not 0 <= level <= 1:
        raise ValueError(f"{where}: freeze_level must be in [0, 1], got {level}")


class _Reach(torch.autograd.Function):
    """Copy tensors, and let backward reach parameters without bringing them a gradient."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.reached = len(tensors) - count
        return tuple(tensor.clone() for tensor in tensors[:count])  # a view can't be written into

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *grads, *[None] * ctx.reached)


@dataclass
class _State:
    layers: list[list[nn.Parameter]]
    frozen: list[nn.Parameter] = field(default_factory=list)  # in this window
    hook: RemovableHandle | None = None
    reached: bool | None = None  # whether backward reaches the frozen, None without DDP

    def freeze(self, layers: list[list[nn.Parameter]]) -> None:
        # Others are frozen by the user, and stay so.
        self.frozen = [p for layer in layers for p in layer if p.requires_grad]
        for parameter in self.frozen:
            parameter.requires_grad_(False)
            vars(parameter)[_MARK] = True

    def thaw(self) -> None:
        _thaw(self.frozen)
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    def reach(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Let backward from the output reach the frozen parameters: a forward hook.

        DDP reduces the gradients of all parameters that it found when it wrapped the model, and
        waits until backward has reached each of them. Its private attribute is the one way to see
        that it is at work; without it DDP raises an error of its own.
        """
        if DistributedDataParallel._active_ddp_module is None or not torch.is_grad_enabled():
            return output
        leaves, structure = tree_flatten(output)
        tensors = {i: v for i, v in enumerate(leaves) if isinstance(v, Tensor) and v.requires_grad}
        self.reached = bool(self.reached or tensors)
        if not (tensors and self.frozen):
            return output
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        copies = _Reach.apply(len(tensors), *tensors.values(), *self.frozen)
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        replaced = dict(zip(tensors, copies, strict=True))
        return tree_unflatten([replaced.get(i, v) for i, v in enumerate(leaves)], structure)


def _thaw(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        if vars(parameter).pop(_MARK, False):
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class LayerFreezing(Algorithm):
    """Freeze the first layers one after the other, until ``freeze_level`` of them at the end.

    At the beginning of each step the layers of :func:`freeze_layers` stop requiring gradients, and
    when their gradients are complete they require them again: between steps every parameter is as
    you set it, and what you froze yourself stays frozen and counts as no layer. After an exception
    inside a step the frozen ones stay so until the model is trained with this algorithm again.

    Args:
        freeze_start: Share of the run after which freezing begins, in [0, 1).
        freeze_level: Share of the layers that is frozen at the end, in [0, 1].

    Raises:
        ValueError: If a setting is out of range.
    """

    freeze_start: float = 0.5
    freeze_level: float = 1.0

    place = Place.GRADIENTS
    card = Card(
        category="any",
        summary="Stops training the first layers, one after the other, as the run goes on.",
        effect="A step saves the backward work of the frozen layers; forward stays. Frozen"
        " parameters move neither by momentum nor by weight decay, and their state stays in the"
        " optimizer, so a run resumes. Batch norms in frozen layers go on moving their statistics.",
        use_when="Fine-tuning, or the last part of a long training, where some accuracy may be"
        " given for time; not where the first layers still learn.",
        interactions="Backward ends below the first layer that still trains, so an embedding shared"
        " with the last layer, which is never frozen, saves less. DDP works; it goes on reducing"
        " zeros for frozen layers, and copies the outputs of the model. torch.compile compiles"
        " anew at each freezing.",
        reference="Brock et al. 2017",
        url="https://arxiv.org/abs/1706.04983",
    )

    @classmethod
    def example(cls) -> "LayerFreezing":
        """Return one that acts on the network of the contract suites."""
        return cls(freeze_start=0.0)

    def __post_init__(self) -> None:
        """Check the settings."""
        _check("LayerFreezing", self.freeze_start, self.freeze_level)

    def prepare_optimizer(self, optimizer: Optimizer, run: "Run") -> None:
        """Make sure that it leaves parameters without a gradient alone."""
        _refuse(optimizer)

    def init_state(self, run: "Run") -> _State:
        """Begin with nothing frozen; a run of unknown length is refused here."""
        _ = run.progress.fraction
        state = _State(_layers(run.model))
        if len(state.layers) < 2:
            warn_no_effect("LayerFreezing", "layer before the last")
        _thaw(run.model.parameters())
        return state

    def on_batch(self, batch: Batch, run: "Run") -> Batch:
        """Freeze for a window; the batch stays."""
        state: _State = run.state(self)
        if run.progress.micro_batch == 0:
            state.thaw()  # where the last window was given up
            share = _share(run.progress.fraction, self.freeze_start, self.freeze_level)
            # What the user froze does not count, or the last layer that trains would go too.
            training = [la for la in state.layers if not la or any(p.requires_grad for p in la)]
            layers = _first(training, share)
            state.freeze(layers)
            run.log("LayerFreezing/layers_frozen", len(layers))
            if run.world_size > 1:
                state.reached = None
                state.hook = run.model.register_forward_hook(state.reach)
        return batch

    def on_gradients(self, run: "Run") -> None:
        """Drop what gradients frozen parameters have: zeros of DDP or of ``zero_grad``.

        And those of a second optimizer, which a module may step with a backward of its own.
        """
        state: _State = run.state(self)
        for parameter in state.frozen:
            parameter.grad = None
        state.thaw()
        if state.reached is False:
            raise UnsupportedError(
                "LayerFreezing: in DDP the model must return a tensor that requires grad, alone or"
                " in tuples, lists and dicts, through which backward reaches the parameters that"
                " are frozen; return one, or take LayerFreezing out of the recipe"
            )
