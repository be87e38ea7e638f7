"""What an algorithm is: frozen settings, the points of a run where it acts, and its card."""

import dataclasses
import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin

import torch

from mosaic_core.batch import Batch

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["Algorithm", "Card", "Need", "Place"]


class Need(StrEnum):
    """What an algorithm needs of a trainer; an adapter declares which of these it delivers."""

    SURGERY = "graph surgery"
    OPTIMIZER = "optimizer"
    SELECTION = "selection of examples"
    BATCH = "batch"
    LOSS = "loss"
    GRADIENTS = "gradients"
    WEIGHTS = "weights"
    SECOND_PASS = "second pass"


class Place(IntEnum):
    """Where an algorithm stands in a recipe; within a place the user's order holds.

    ``STRUCTURE`` is for surgery that replaces parameters, before surgery that changes how the
    layers, old and new, compute.
    """

    STRUCTURE = -10
    SURGERY = 0
    SELECTION = 10
    AUGMENTATION = 20
    MIXING = 30
    SMOOTHING = 40
    LAYOUT = 50
    GRADIENTS = 60
    WEIGHTS = 70
    MEASURING = 80


@dataclass(frozen=True)
class Card:
    """What a person should know before using an algorithm; the catalogue is made of these.

    Attributes:
        category: Field of use, such as ``"vision"`` or ``"any"``.
        summary: What it is, in one sentence.
        effect: What it does to the run: memory, time per step, what changes in evaluation.
        use_when: When to use it, and when not.
        interactions: Known interactions with other algorithms and trainer features.
        reference: Authors and year of the source.
        url: Address of the source.
    """

    category: str
    summary: str
    effect: str
    use_when: str
    interactions: str
    reference: str
    url: str


# The methods by which an algorithm acts, and what each needs of the trainer.
_POINTS: dict[str, Need] = {
    "prepare_model": Need.SURGERY,
    "prepare_optimizer": Need.OPTIMIZER,
    "on_batch": Need.BATCH,
    "on_first_pass": Need.SECOND_PASS,
    "on_second_pass": Need.SECOND_PASS,
    "on_gradients": Need.GRADIENTS,
    "on_step_end": Need.WEIGHTS,
    "on_epoch_end": Need.WEIGHTS,
    "evaluation_weights": Need.WEIGHTS,
}


class Algorithm:
    """One training algorithm: the base of all settings classes.

    A subclass is a frozen dataclass of settings, checked in ``__post_init__``. It overrides the
    points where it acts and nothing else; what it needs of a trainer follows from that. It holds
    no state: what changes during a run is returned by :meth:`init_state`, belongs to the run and
    is reached by ``run.state(self)``.
    """

    card: ClassVar[Card]
    place: ClassVar[Place]
    changes_labels: ClassVar[bool] = False
    """Whether it turns labels into mixtures, which the loss must compute."""
    draws_in_forward: ClassVar[bool] = False
    """Whether what it draws acts inside forward, where a second pass would not find it again."""
    excludes: ClassVar[frozenset[str]] = frozenset()
    """Names of algorithms, and of trainer features, that contradict it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Algorithm":
        """Check what no subclass should have to: that it is whole, and the types of settings.

        Raises:
            TypeError: For the base class, which would be a silent no-op in a recipe, a subclass
                without a place, and a setting of another type than its field.
        """
        if cls is Algorithm:
            raise TypeError("Algorithm is abstract: use one of mosaic_core.algorithms")
        if not hasattr(cls, "place"):
            raise TypeError(f"{cls.__name__}: an algorithm must set place, a member of Place")
        fields: tuple[dataclasses.Field[Any], ...] = ()
        if dataclasses.is_dataclass(cls):
            fields = dataclasses.fields(cls)
        names = list(inspect.signature(cls.__init__).parameters)[1:]  # not all are fields
        given = dict(zip(names, args, strict=False)) | kwargs
        for f in fields:
            if f.name in given and not _fits(given[f.name], f.type):
                kinds = " or ".join(_WORDS.get(kind, str(kind)) for kind in _union(f.type))
                raise TypeError(f"{cls.__name__}: {f.name} must be {kinds}, got {given[f.name]!r}")
        return super().__new__(cls)

    @property
    def name(self) -> str:
        """Name in recipes, reports and logs."""
        return type(self).__name__

    @property
    def settings(self) -> dict[str, Any]:
        """Hyper-parameters by name."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)  # type: ignore[arg-type]  # subclasses are dataclasses
        }

    @property
    def reads_labels(self) -> bool:
        """Whether ``on_batch`` reads, moves or drops labels, though it does not mix them."""
        return False

    @classmethod
    def acts_at(cls, point: str) -> bool:
        """Tell whether it overrides a point, such as ``"on_batch"``."""
        return getattr(cls, point) is not getattr(Algorithm, point)

    @classmethod
    def needs(cls) -> frozenset[Need]:
        """What it needs of a trainer, derived from the points it overrides."""
        found = {need for point, need in _POINTS.items() if cls.acts_at(point)}
        if cls.changes_labels:
            found.add(Need.LOSS)
        if cls.acts_at("on_batch") and cls.place is Place.SELECTION:
            found.add(Need.SELECTION)
        return frozenset(found)

    @classmethod
    def example(cls) -> "Algorithm":
        """Return an instance for the contract suites, which train it on a small network.

        It acts within the first three steps; the network's layers are called ``conv1``,
        ``norm1``, ``conv2``, ``norm2``, ``drop`` and ``head``, perhaps inside another module.
        """
        return cls()

    # The points of a run, in the order in which they come.

    def prepare_model(self, model: torch.nn.Module, run: "Run") -> None:
        """Change the model in place, before the optimizer is made and the model is wrapped."""

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, run: "Run") -> None:
        """Change the optimizer in place, once, before the first step."""

    def init_state(self, run: "Run") -> Any:
        """Return the state of one run, made when training starts."""

    def on_batch(self, batch: Batch, run: "Run") -> Batch:
        """Return the training micro-batch to use instead; it lies on the device of training."""
        return batch

    def second_pass_due(self, run: "Run") -> bool:
        """Tell whether a two-pass algorithm takes two passes in this step."""
        return True

    def on_first_pass(self, run: "Run") -> None:
        """Act on the gradients of the window, which is then run forward and backward again.

        What it does to the master weights is published before the second pass.
        """

    def on_second_pass(self, run: "Run") -> None:
        """Act on the gradients of the second pass, before ``on_gradients``.

        Afterwards the master weights are again those the optimizer is to update. It is also called
        when the second pass failed, then perhaps without gradients.
        """

    def on_gradients(self, run: "Run") -> None:
        """Act on the gradients of a full window, unscaled, before the trainer clips them."""

    def on_step_end(self, run: "Run") -> None:
        """Act after an optimizer step that was really applied."""

    def on_epoch_end(self, run: "Run") -> None:
        """Act after an epoch."""

    def evaluation_weights(self, run: "Run") -> Mapping[str, torch.Tensor] | None:
        """Return the parameters to evaluate and keep, by name; None for the training weights."""

    def on_evaluation(self, run: "Run") -> None:
        """Act when the evaluation weights have just been put into the model."""

    # State across a checkpoint.

    def state_dict(self, run: "Run") -> dict[str, Any]:
        """Return the state to save beside the model: tensors, numbers and texts only."""
        return {}

    def load_state_dict(self, state: dict[str, Any], run: "Run") -> None:
        """Restore what :meth:`state_dict` returned; the model's weights are already loaded."""

    def replays(self) -> int:
        """Number of latest micro-batches to keep, to recompute batch-norm statistics on them."""
        return 0


_WORDS: dict[Any, str] = {
    bool: "True or False",
    float: "a number",
    int: "a whole number",
    str: "a text",
    type(None): "None",
}


def _union(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _fits(value: Any, kind: Any) -> bool:
    """Tell whether a setting may have a value; choices among texts are checked by the algorithm."""
    if isinstance(kind, types.UnionType):
        return any(_fits(value, member) for member in get_args(kind))
    if kind in (float, int):  # numbers of NumPy too, but True is no number
        return isinstance(value, Real if kind is float else Integral) and not isinstance(
            value, bool
        )
    origin = get_origin(kind) or kind
    if origin in (Any, Literal) or not isinstance(origin, type):
        return True
    return isinstance(value, origin)
