"""A callback and the Learner it belongs to: what lasts from ``add_cb`` to ``remove_cb``."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.torch_core import get_model, num_distrib, rank_distrib

from mosaic_core import Algorithm, Recipe, Run
from mosaic_core.batch import Key
from mosaic_core.shadow import Shadows
from mosaic_fastai import _checkpoint
from mosaic_fastai._optimizer import adopt
from mosaic_fastai._second_pass import Window, precision

__all__ = ["Belonging"]

_SHADOWED = ("fit", "save", "load")
_OF_A_BATCH = frozenset(
    [
        *("before_batch", "after_cancel_batch", "before_backward", "after_cancel_backward"),
        *("before_step", "after_cancel_step", "after_step"),
    ]
)


class Belonging(Callback):  # type: ignore[misc]  # fastai has no types
    """Changes the model of its Learner and shadows three methods that have no event.

    ``fit``, because none comes after an exception; ``save`` and ``load``, because a file also holds
    the state of the run. An exported Learner takes the shadows along, bound to its own callback.
    """

    _learn: Any = None
    _stateattrs = ("run", "_shadows", "_loss", "_window", "_resume", "_made")  # not exported

    def __init__(
        self,
        recipe: Iterable[Algorithm] | Recipe | None,
        seed: int,
        input_key: Key | None,
        target_key: Key | None,
    ) -> None:
        self.recipe = recipe if isinstance(recipe, Recipe) else Recipe(recipe)
        self.seed, self.input_key, self.target_key = seed, input_key, target_key
        super().__init__()
        self._init_state()

    def _init_state(self) -> None:  # also of a callback that comes out of an exported Learner
        # Every attribute is set here: missing ones are looked up in the Learner and the model.
        super()._init_state()
        self.run: Run | None = None
        self._resume: dict[str, Any] | None = None
        self._made: set[Any] = set()
        self._window: Window | None = None
        self._shadows, self._loss = Shadows(), Shadows()
        self._active = self._epoch_open = self._cancelled = False
        self._depth, self._inputs = 0, 1
        if self._learn is not None:
            self._shadows.on_undo(self._drop_shadows)

    def _drop_shadows(self) -> None:
        for name in _SHADOWED:
            vars(self._learn).pop(name, None)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; fastai's version warns where the model has one of that name."""
        if name == "run" and isinstance(value, bool):  # fastai's switch
            raise TypeError(
                f"MosaicCallback: run must be the run of the recipe, got {value}; to train without"
                " it, write `with learn.removed_cbs(learn.mosaic)`"
            )
        object.__setattr__(self, name, value)

    def __call__(self, event_name: str) -> None:
        """Answer an event; fastai's version takes ``run`` for a switch and rewrites errors."""
        training = self._active and self._learn.training
        handler = getattr(type(self), event_name, None)
        if handler is not None and (training or event_name not in _OF_A_BATCH):
            handler(self)

    @property
    def learn(self) -> Any:
        """The Learner; fastai sets it in ``add_cb``, and to None in ``remove_cb``."""
        return self._learn

    @learn.setter
    def learn(self, learner: Any) -> None:
        failed = sys.exc_info()[0] is not None or getattr(self._learn, "training", False)
        if learner is None and failed:  # else perhaps for a moment, as by FetchPredsCallback
            self._abort()
        self._shadows.undo()
        self._learn = learner
        if learner is None or learner._grab_cbs(Belonging):  # two are refused in time
            return
        self._change()
        for name in _SHADOWED:
            self._shadows.put(learner, name, getattr(self, f"_{name}"))

    def _change(self) -> Run:
        """Make the run of the model, and with it the surgery, unless it has been made."""
        learn, model = self._learn, get_model(self._learn.model)
        if self.run is None or self.run.model is not model:
            self._release()
            before, target_key = set(model.parameters()), self.target_key
            self.run = Run(
                self.recipe,
                model=model,
                seed=self.seed,
                rank=rank_distrib(),
                world_size=max(1, num_distrib()),
                input_key=0 if self.input_key is None else self.input_key,
                target_key=getattr(learn.dls, "n_inp", -1) if target_key is None else target_key,
                carrier="proxy",
                forward=self._forward,
            )
            self._made = set(model.parameters()) - before
            adopt(learn, self._made, self.run.new_parameters)
        return self.run

    def _forward(self, batch: Any) -> None:
        learn, targets = self._learn, batch[self._inputs :]
        with precision(learn):
            prediction = get_model(learn.model)(*batch[: self._inputs])
            mixture = getattr(targets[0], "mixture", None) if targets else None
            if mixture is None or mixture.receipt.elements is None:
                return  # nobody asks for losses
            learn.loss_func(prediction, *targets)
            if not mixture.receipt.elements:  # a loss of fastai's, which takes its label alone
                with learn.loss_not_reduced():
                    losses = learn.loss_func(prediction, mixture.label)
                mixture.receipt.elements.append((losses, torch.ones_like(losses)))

    def _fit(self, *args: Any, **kwargs: Any) -> Any:
        self._depth = 0  # an evaluation may have raised between its events
        try:
            return type(self._learn).fit(self._learn, *args, **kwargs)
        except BaseException:
            self._abort()
            raise

    def _save(self, file: Any, **kwargs: Any) -> Any:
        return _checkpoint.save(self._change(), self._resume, self._learn, file, kwargs)

    def _load(self, file: Any, *args: Any, **kwargs: Any) -> Any:
        loaded, self._resume = _checkpoint.load(self._learn, file, args, kwargs)
        self._change().reset()
        if self._active and self._epoch_open:  # in the middle of an epoch
            self._begin()
        elif self._active:  # the next epoch begins it
            self._release()
        return loaded

    def _begin(self) -> None:
        """Start the run, or go on."""

    def _release(self) -> None:
        """Put back what was shadowed for the fit, which is over."""
        self._loss.undo()
        if self._window is not None:
            self._window.close()
        self._window, self._active, self._epoch_open = None, False, False

    def _abort(self) -> None:
        """Put back what was shadowed for the fit, and the training weights."""
        self._depth = 0
        if self._active:
            self._release()
            self._change().leave_evaluation()
