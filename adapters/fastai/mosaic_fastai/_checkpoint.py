"""What mosaic puts into the files of ``learn.save``, and how ``learn.load`` takes it out.

The file's model holds the weights to evaluate, for whoever loads it. What training needs lies in
the optimizer's part, so a file that is saved or loaded without the optimizer begins a new run, and
a Learner without mosaic loads both parts as ever.
"""

from typing import Any

from fastai.torch_core import get_model

from mosaic_core import Run
from mosaic_core.shadow import Shadows
from mosaic_core.surgery import sentinel

__all__ = ["load", "save"]

_ENTRY = "mosaic"
_LOAD_WITH = "load them in a Learner with cbs=MosaicCallback(recipe)"


def save(
    run: Run, resume: dict[str, Any] | None, learn: Any, file: Any, options: dict[str, Any]
) -> Any:
    """Save the Learner's model, optimizer and run.

    Args:
        run: The run.
        resume: State of a run that was loaded and has not gone on since.
        learn: The Learner.
        file: Name of the file, as for ``learn.save``.
        options: Keyword arguments of ``learn.save``.

    Returns:
        What ``learn.save`` returns.
    """
    model, opt, shadows = get_model(learn.model), learn.opt, Shadows()
    with run.evaluation():
        state = run.state_dict() if run.started else resume
        weights = model.state_dict
        told = sentinel(run.report, _LOAD_WITH)
        if told:
            shadows.put(model, "state_dict", lambda *a, **kw: {**weights(*a, **kw), **told})
        if opt is not None and state is not None:
            of_opt = opt.state_dict
            shadows.put(opt, "state_dict", lambda: {**of_opt(), _ENTRY: state})
        try:
            return type(learn).save(learn, file, **options)
        finally:
            shadows.undo()


def load(
    learn: Any, file: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, dict[str, Any] | None]:
    """Load a file into the Learner.

    Args:
        learn: The Learner.
        file: Name of the file, as for ``learn.load``.
        args: Further arguments of ``learn.load``.
        options: Its keyword arguments.

    Returns:
        What ``learn.load`` returns, and the state of the run if the file has one.
    """
    if learn.opt is None:
        learn.create_opt()
    found: list[dict[str, Any]] = []
    restore, shadows = learn.opt.load_state_dict, Shadows()

    def load_state_dict(state: dict[str, Any]) -> None:
        own = {name: value for name, value in state.items() if name != _ENTRY}
        restore(own)
        if _ENTRY in state:
            found.append(state[_ENTRY])

    shadows.put(learn.opt, "load_state_dict", load_state_dict)
    try:
        loaded = type(learn).load(learn, file, *args, **options)
    finally:
        shadows.undo()
    return loaded, found[-1] if found else None
