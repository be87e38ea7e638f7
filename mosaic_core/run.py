"""One training run of a recipe: the only thing adapters talk to.

An adapter translates its trainer's hooks into these calls, in this order::

    run = Run(recipe, model=model, ...)      surgery, before the optimizer is made
    run.start(optimizers, total_steps=...)   when the model is on its device
    batch = run.on_batch(batch)              each training micro-batch
    run.check_loss()                         before backward
    run.on_gradients()                       full window, unscaled, before clipping
    run.end_step(applied=True)               after the optimizer step
    run.end_epoch()
    with run.evaluation(): ...               averaged weights in, training weights back
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mosaic_core import checkpoint, random
from mosaic_core.adoption import NewParameters
from mosaic_core.algorithm import Algorithm
from mosaic_core.averaged import AveragedWeights
from mosaic_core.batch import Batch, Key, Locator, describe, select_examples
from mosaic_core.batchnorm import batch_norms
from mosaic_core.errors import UnsupportedError
from mosaic_core.mixture import Mixture
from mosaic_core.parameters import Parameters, ReplicatedParameters, replicated_parameters
from mosaic_core.progress import Progress
from mosaic_core.recipe import Recipe
from mosaic_core.second_pass import SecondPass
from mosaic_core.surgery import Report, accept_sentinel
from mosaic_core.target import MixedTarget, unconsumed

__all__ = ["Run"]

_CARRIERS = ("target", "proxy")
_CHANGED_BY = "mosaic_changed_by"  # attribute of a model: algorithms by name


class Run:
    """One training run of a recipe.

    Args:
        recipe: Algorithms, in any order, or a recipe.
        model: The model, on any device; surgery is done in place, here.
        optimizer: Optimizers of a plain loop; with it the run starts at once.
        total_steps: Optimizer steps of the whole run, for durations such as ``"0.3dur"``.
        steps_per_epoch: Optimizer steps of an epoch, for durations in fractional epochs.
        seed: Seed of all that is drawn.
        rank: Rank of this process among those that train together.
        world_size: Number of these processes.
        input_key: Where the input lies in a batch: an index, a name or a (getter, setter) pair;
            None finds it by convention, and the report says where.
        target_key: The same of the target.
        carrier: ``"target"`` lets the target carry a mixture of labels to the loss;
            ``"proxy"`` leaves the labels plain and the mixture in ``run.mixture``.
        forward: Runs the model on one training batch, and the loss where that is not in a loop,
            and returns the model's output or None; None calls ``model(input)``.
        parameters: View of the parameters where they are sharded; None for replicated ones.

    Attributes:
        recent: The latest transformed micro-batches, newest last, as many as an algorithm keeps;
            none where the model has no batch norms.
        frozen_norms: Names of the batch norms that were in evaluation mode in the latest of them.

    Raises:
        ValueError: If ``carrier`` is neither.
        UnsupportedError: If the parameters are sharded and no view was given, or the model was
            changed before by an algorithm with other settings.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> run = Run([], model=model, optimizer=optimizer, total_steps=10)
        >>> x, y = run.on_batch(torch.randn(8, 4), torch.randint(2, (8,)))
        >>> nn.functional.cross_entropy(model(x), y).backward()
        >>> run.step()
        >>> run.progress.step
        1
    """

    def __init__(
        self,
        recipe: Iterable[Algorithm] | Recipe | None = (),
        *,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        input_key: Key | None = None,
        target_key: Key | None = None,
        carrier: Literal["target", "proxy"] = "target",
        forward: Callable[[Any], Any] | None = None,
        parameters: Parameters | None = None,
    ) -> None:
        if carrier not in _CARRIERS:
            raise ValueError(f"Run: carrier must be one of {_CARRIERS}, got {carrier!r}")
        self.recipe = recipe if isinstance(recipe, Recipe) else Recipe(recipe)
        self.model, self.seed, self.rank, self.world_size = model, seed, rank, world_size
        self.report, self.new_parameters = Report(), NewParameters()
        self.progress = Progress()
        self.metrics: dict[str, float | Tensor] = {}
        self.mixture: Mixture | None = None
        self.optimizers: list[Optimizer] = []
        self.locator = Locator(input_key, target_key)
        self.parameters = replicated_parameters(model) if parameters is None else parameters
        self._carrier, self._forward = carrier, forward
        self.recipe_text = self.recipe.to_yaml()  # now, so that the first checkpoint can't fail
        self.averaged, self.two_passes = AveragedWeights(self), SecondPass(self)
        self._states: dict[str, Any] = {}
        self._pending: list[Mixture] = []
        self.whole: Any = None  # the trainer's batch while it is being transformed

        def acting(point: str) -> list[Algorithm]:
            return [a for a in self.recipe if a.acts_at(point)]

        self._on_batch = acting("on_batch")
        self._on_gradients = acting("on_gradients")
        self._on_step_end = acting("on_step_end")
        self._on_epoch_end = acting("on_epoch_end")
        self._labels = any(a.changes_labels or a.reads_labels for a in self.recipe)

        changed = vars(model).setdefault(_CHANGED_BY, {})
        for algorithm in acting("prepare_model"):
            before = changed.setdefault(algorithm.name, algorithm)
            if before != algorithm:
                raise UnsupportedError(
                    f"mosaic: the model was changed by {before!r} before, so it can't be changed by"
                    f" {algorithm!r}; make the model anew"
                )
            algorithm.prepare_model(model, self)
        if any(self.report.changes.values()):
            accept_sentinel(model)
        kept = max((a.replays() for a in self.recipe), default=0) if batch_norms(model) else 0
        self.recent: deque[Any] = deque(maxlen=kept)
        self.frozen_norms: set[str] = set()
        self._norms: dict[str, nn.Module] = {}
        if optimizer is not None:
            optimizers = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
            self.start(optimizers, total_steps=total_steps, steps_per_epoch=steps_per_epoch)

    def start(
        self,
        optimizers: Sequence[Optimizer],
        *,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        """Begin or go on training; the model is on its device and its weights are loaded.

        Args:
            optimizers: All optimizers of the run.
            total_steps: Optimizer steps of the whole run, None when unknown.
            steps_per_epoch: Optimizer steps of an epoch, None when unknown.

        Raises:
            UnsupportedError: If the optimizers do not train what surgery made new parameters for.
        """
        if self.in_evaluation and not self.averaged.held():
            self.reset()  # other weights were loaded meanwhile: they win
        self.leave_evaluation()
        self.progress.total_steps, self.progress.steps_per_epoch = total_steps, steps_per_epoch
        self.progress.micro_batch = 0
        self._pending.clear()
        if self.recent.maxlen:  # by now trainers have put synchronised ones in their place
            self._norms = dict(batch_norms(self.model))
        self.parameters.start()
        if isinstance(self.parameters, ReplicatedParameters):  # others are flat in their optimizer
            self.new_parameters.join(optimizers)
        for optimizer in optimizers:
            if optimizer not in self.optimizers:
                for algorithm in self.recipe:
                    algorithm.prepare_optimizer(optimizer, self)
        self.optimizers = list(optimizers)
        for algorithm in self.recipe:
            if algorithm.name not in self._states:
                self._states[algorithm.name] = algorithm.init_state(self)

    @property
    def started(self) -> bool:
        """Whether training has started."""
        return bool(self.optimizers)

    def reset(self) -> None:
        """Forget all state: training will start again, from the weights in the model."""
        self.averaged.forget()
        self.mixture, self.optimizers = None, []
        self.progress, self.metrics = Progress(), {}
        self._states.clear()
        self._pending.clear()
        self.recent.clear()

    # What algorithms ask of the run.

    def state(self, algorithm: Algorithm) -> Any:
        """Return the state that the algorithm's ``init_state`` made.

        Raises:
            RuntimeError: If training has not started.
        """
        try:
            return self._states[algorithm.name]
        except KeyError:
            raise RuntimeError(
                f"Run: {algorithm.name} has no state before training; give Run the optimizer, or"
                " call run.start([optimizer])"
            ) from None

    def seed_for(
        self, algorithm: Algorithm, *key: int | str, shared: bool = False, lasting: bool = False
    ) -> int:
        """Return the seed of this algorithm for this micro-batch, in [0, 2**63).

        Args:
            algorithm: Who draws.
            key: What is drawn, where an algorithm draws more than one thing.
            shared: Whether all ranks draw the same.
            lasting: Whether it is the same at every step.
        """
        at = (-1, -1) if lasting else (self.progress.step, self.progress.micro_batch)
        rank = -1 if shared else self.rank
        return random.derive_seed(self.seed, algorithm.name, *at, rank, *key)

    def generator(
        self, algorithm: Algorithm, *key: int | str, shared: bool = False
    ) -> torch.Generator:
        """Return a fresh CPU generator of this algorithm for this micro-batch."""
        return torch.Generator().manual_seed(self.seed_for(algorithm, *key, shared=shared))

    def log(self, name: str, value: float | Tensor) -> None:
        """Set a value for the trainer's logger, under ``mosaic/name``; a tensor is not read."""
        self.metrics[f"mosaic/{name}"] = value

    def forward(self, batch: Any) -> Any:
        """Run the model forward on one training batch, as the trainer does; return its output."""
        if self._forward is None:
            return self.model(self.locator.read(batch, "input"))
        return self._forward(batch)

    # What adapters, and plain loops, call.

    @overload
    def on_batch(self, batch: Any, /) -> Any: ...
    @overload
    def on_batch(self, input: Tensor, target: Any, /) -> tuple[Tensor, Any]: ...
    def on_batch(self, *batch: Any) -> Any:
        """Transform one training micro-batch, on the device, outside autocast.

        Args:
            batch: A batch of any structure, or input and target.

        Returns:
            A batch of the same structure; the given one is not changed.

        Raises:
            BatchError: If the input or the target is needed and was not found.
        """
        whole = batch[0] if len(batch) == 1 else batch
        if self._on_batch:
            whole = self._transform(whole)
        if self.recent.maxlen:
            self.recent.append(whole)
            frozen = (name for name, norm in self._norms.items() if not norm.training)
            self.frozen_norms = set(frozen) if self.model.training else set()
        self.progress.micro_batch += 1
        return whole

    def _transform(self, whole: Any) -> Any:
        first = not self.locator.found
        input, plain = self.locator.read(whole, "input"), None
        if not input.dim():
            raise ValueError(
                f"mosaic: the input must have shape (N, ...), got {describe(input)}; if it is not"
                " what it should be, set input_key"
            )
        if self._labels:
            target = self.locator.read(whole, "target")
            if target.shape[:1] != input.shape[:1]:
                raise ValueError(
                    "mosaic: the target must have the length of the input, got input"
                    f" {describe(input)} and target {describe(target)}; if they are not what they"
                    " should be, set input_key and target_key"
                )
            plain = Mixture.of(target)
        if first:
            where = (f"{role} at {_key_name(key)}" for role, key in self.locator.found.items())
            self.report.notes.append(f"batch: {', '.join(where)}")
        self.progress.samples += len(input) * self.world_size
        if not input.is_floating_point():
            self.progress.tokens += input.numel() * self.world_size

        batch, self.whole = Batch(input, plain), whole
        for algorithm in self._on_batch:
            batch = algorithm.on_batch(batch, self)
        self.whole = None
        if batch.kept is not None:
            whole = select_examples(whole, batch.kept, len(input))

        values: dict[str, Any] = {} if batch.input is input else {"input": batch.input}
        if plain is not None:
            self.mixture = batch.labels
            if batch.labels is not plain:
                values["target"] = batch.labels.label
                if not batch.labels.trivial:
                    self._pending.append(batch.labels)
                    if self._carrier == "target":
                        values["target"] = MixedTarget.of(batch.labels)
        return self.locator.write(whole, values)

    def check_loss(self) -> None:
        """Check that the losses since the last check computed the mixtures they were given.

        Raises:
            LossError: If one did not.
        """
        pending, self._pending = self._pending, []
        for mixture in pending:
            if not mixture.receipt.consumed:
                raise unconsumed(mixture)

    def skip_batch(self) -> None:
        """Forget what the last micro-batch asked of the loss: the trainer may have skipped it."""
        self._pending.clear()

    def on_gradients(self) -> None:
        """Let the algorithms act on the gradients of a full window."""
        for algorithm in self._on_gradients:
            algorithm.on_gradients(self)

    def end_step(self, applied: bool = True) -> None:
        """Count an optimizer step and let the algorithms act on the new weights.

        Args:
            applied: False if a gradient scaler skipped it.
        """
        self.progress.step += 1
        self.progress.micro_batch = 0
        if applied:
            for algorithm in self._on_step_end:
                algorithm.on_step_end(self)
        elif self.two_passes.taken:  # forward still has the weights of the second pass
            self.parameters.publish()

    def end_epoch(self) -> None:
        """Count an epoch."""
        self.progress.epoch += 1
        for algorithm in self._on_epoch_end:
            algorithm.on_epoch_end(self)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Take one optimizer step of a plain loop, after backward.

        Args:
            closure: Runs forward and backward again on the same transformed micro-batches; only
                two-pass algorithms need it. Batch-norm statistics and the like move once.

        Raises:
            LossError: If the loss ignored mixed labels.
            RuntimeError: If the run has no optimizer.
            UnsupportedError: If a two-pass algorithm is in the recipe and there is no closure.
        """
        if not self.started:
            raise RuntimeError(
                "Run.step: there is no optimizer to step; give Run the optimizer, or call"
                " run.start([optimizer])"
            )
        self.check_loss()
        self.second_pass(closure)
        self.on_gradients()
        for optimizer in self.optimizers:
            optimizer.step()
        self.end_step()

    def second_pass(self, closure: Callable[[], Any] | None, scale: float = 1.0) -> None:
        """Let two-pass algorithms act on the gradients and run the window again.

        Batch-norm statistics and the like move once, and the global random streams as if there
        had been one pass. If the closure raises, the weights go back to where the step began.

        Args:
            closure: Runs forward and backward again on the same transformed micro-batches.
            scale: Factor a gradient scaler put on the loss; the algorithms see gradients without
                it, and those of the second pass still have it.

        Raises:
            UnsupportedError: If an algorithm takes two passes now and there is no closure.
        """
        due = self.two_passes.due
        if not due:
            return
        if closure is None:
            raise UnsupportedError(
                f"Run.step: {due[0].name} runs forward and backward twice; give"
                " run.step(closure) a function that does it for the same batches"
            )
        self.two_passes.begin(scale)
        try:
            closure()
        except BaseException:
            self.two_passes.end()
            self.parameters.publish()
            raise
        self.two_passes.end()

    # Evaluation.

    @property
    def in_evaluation(self) -> bool:
        """Whether the model holds the evaluation weights."""
        return self.averaged.parked is not None

    def enter_evaluation(self) -> None:
        """Put the averaged weights into the model, if there are any."""
        if self.started:
            self.averaged.enter()

    def leave_evaluation(self) -> None:
        """Put the training weights back."""
        self.averaged.leave()

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Hold the averaged weights inside the block; nests."""
        outermost = not self.in_evaluation
        try:
            self.enter_evaluation()
            yield
        finally:
            if outermost:
                self.leave_evaluation()

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Return what to save beside ``model.state_dict()`` taken at the same moment.

        Inside :meth:`evaluation` the model's file holds the averaged weights, and this the
        training weights; so the file that people load is the one to evaluate.
        """
        return checkpoint.state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; the model's state dict is loaded and the run has started.

        Raises:
            UnsupportedError: If the checkpoint is of another recipe, seed or version.
        """
        checkpoint.restore(self, state)


def _key_name(key: Key) -> str:
    return "its getter" if isinstance(key, tuple) else repr(key)
