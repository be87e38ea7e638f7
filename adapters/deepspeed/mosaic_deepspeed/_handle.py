"""``engine.mosaic``: translates what a DeepSpeed loop calls into calls of a :class:`Run`.

DeepSpeed has no hooks for users. So methods of the one engine are shadowed by instance attributes,
which ``engine.mosaic.detach()`` takes away again.
"""

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from mosaic_core import Need, Run, UnsupportedError
from mosaic_core.shadow import Shadows
from mosaic_deepspeed import _checkpoint
from mosaic_deepspeed._loader import Loader, to_device
from mosaic_deepspeed._second_pass import SecondPass

__all__ = ["Handle"]


class Handle:
    """What a loop may ask of the recipe, as ``engine.mosaic``.

    ``engine.backward``, ``engine.step``, ``engine.save_checkpoint`` and ``engine.load_checkpoint``
    are called as always. In a ``with`` statement it detaches itself at the end of the block.

    Attributes:
        run: The run.
        replay: Runs a window forward and backward again; None leaves that to the loader.
    """

    def __init__(
        self,
        engine: Any,
        run: Run,
        total_steps: int | None,
        steps_per_epoch: int | None,
        replay: Callable[[], Any] | None,
    ) -> None:
        self.run, self._engine, self.replay = run, engine, replay
        self._reads = any(Need.BATCH in a.needs() for a in run.recipe) or run.recent.maxlen
        self._settle = any(Need.GRADIENTS in a.needs() for a in run.recipe) and getattr(
            run.parameters, "settle", None
        )
        self._given = False  # whether the recipe saw a batch since the last engine.step
        self._second_pass, self._shadows = SecondPass(engine, run), Shadows()
        self._start = functools.partial(
            run.start,
            [] if engine.basic_optimizer is None else [engine.basic_optimizer],
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
        )
        self._start()
        shadows: dict[str, Callable[..., Any]] = {
            "backward": self._backward,
            "step": self._step,
            "save_checkpoint": self._save,
            "save_16bit_model": self._export,
            "load_checkpoint": self._load,
            "module_state_dict": functools.partial(_checkpoint.module_state_dict, run),
        }
        for name, shadow in shadows.items():
            self._shadows.put(engine, name, functools.partial(shadow, getattr(engine, name)))
        self._shadows.put(engine, "mosaic", self)

    # What the user's loop calls.

    def loader(self, batches: Iterable[Any]) -> Loader:
        """Return a loader that transforms each batch; an end of it is the end of an epoch."""
        return Loader(self, batches)

    def batch(self, *batch: Any) -> Any:
        """Transform one training micro-batch, on its device, just before it is run forward.

        Args:
            batch: A batch of any structure, or input and target.

        Returns:
            A batch of the same structure.
        """
        self._refuse_between("engine.mosaic.batch")
        if self._given:  # the loop skipped the last one, or has a loss of several batches
            self.run.skip_batch()
        self._given = True
        return self.run.on_batch(*batch)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Do what ``engine.step()`` does, in a loop that does not use the loader.

        Args:
            closure: Runs the window again: for each of its transformed micro-batches, forward,
                ``engine.backward(loss)`` and ``engine.step()``, the last of which does nothing.
                Only two-pass algorithms need it.
        """
        before, self.replay = self.replay, closure or self.replay
        try:
            self._engine.step()
        finally:
            self.replay = before

    def end_epoch(self) -> None:
        """Tell of the end of an epoch, before its evaluation; the loader does it by itself."""
        self.run.end_epoch()

    def evaluation(self) -> AbstractContextManager[None]:
        """Hold the averaged weights inside a ``with`` block; training goes on from its own."""
        self._refuse_between("engine.mosaic.evaluation")
        return self.run.evaluation()

    def detach(self) -> None:
        """End training: undo all changes of the engine; the model keeps the averaged weights."""
        self.release()
        self.run.enter_evaluation()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.detach()
        else:
            self.release()
            self.run.leave_evaluation()

    def release(self) -> None:
        """Undo all changes of the engine, and leave the weights as they are."""
        self._shadows.undo()
        self._second_pass.abandon()

    # What the loader calls.

    def _next(self, batch: Any) -> Any:
        batch = self.batch(to_device(batch, self._engine.device))
        self._second_pass.yielded(batch)
        return batch

    def _again(self) -> Iterable[Any]:
        return self._second_pass.again()

    def _refuse_between(self, what: str) -> None:
        if self._second_pass.running:
            raise UnsupportedError(
                f"{what}: the weights are moved between the two passes of a step; go on with the"
                " loop until engine.was_step_applied()"
            )

    # What stands in for the engine's methods.

    def _backward(self, backward: Callable[..., Any], loss: Any, *args: Any, **kwargs: Any) -> Any:
        if self._reads and not self._given and not self._second_pass.running:
            raise UnsupportedError(
                "engine.backward: the recipe has not seen this batch, so training would silently"
                " be without it; iterate over the loader of mosaic_deepspeed.initialize or"
                " engine.mosaic.loader(batches), or call engine.mosaic.batch(batch)"
            )
        self.run.check_loss()
        self._second_pass.backward()
        return backward(loss, *args, **kwargs)

    def _step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        engine, run, second_pass = self._engine, self.run, self._second_pass
        run.check_loss()  # where the loop called loss.backward() itself
        self._given = False
        if not engine.is_gradient_accumulation_boundary():
            return step(*args, **kwargs)
        if second_pass.in_closure:
            return None
        if second_pass.running:
            second_pass.end()
        elif run.two_passes.due:
            if self.replay is None:
                return second_pass.begin()
            second_pass.run(self.replay)
        run.on_gradients()
        if self._settle:
            self._settle()
        result = step(*args, **kwargs)
        run.end_step(applied=engine.was_step_applied())
        second_pass.clear()
        if run.metrics and engine.monitor.enabled and engine.global_rank == 0:
            samples = engine.global_samples
            events = [(name, float(value), samples) for name, value in run.metrics.items()]
            engine.monitor.write_events(events)
        return result

    def _save(
        self, save: Callable[..., Any], save_dir: Any, tag: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        self._refuse_between("engine.save_checkpoint")
        return _checkpoint.save(self._engine, self.run, save, save_dir, tag, *args, **kwargs)

    def _export(self, export: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.evaluation():
            return export(*args, **kwargs)

    def _load(self, load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._refuse_between("engine.load_checkpoint")
        return _checkpoint.load(self._engine, self.run, self._start, load, *args, **kwargs)
