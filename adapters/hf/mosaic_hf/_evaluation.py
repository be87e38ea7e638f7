"""Averaged weights wherever the Trainer evaluates or saves while it trains, and values in its log.

Shadowing the methods instead of acting on events needs no place in the order of the callbacks, and
serves a callback that itself evaluates or saves.
"""

from collections.abc import Callable
from typing import Any

from mosaic_core import Run
from mosaic_hf import _checkpoint
from mosaic_hf._step import Steps

__all__ = ["shadows"]


def shadows(run: Run, trainer: Any, steps: Steps) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Return what to shadow while training: owner, method name, and the function to put there."""

    def averaged(method: Callable[..., Any]) -> Callable[..., Any]:
        def with_averaged_weights(*args: Any, **kwargs: Any) -> Any:
            with run.evaluation():
                return method(*args, **kwargs)

        return with_averaged_weights

    save_model, save = trainer.save_model, trainer._save
    load_best_model, log = trainer._load_best_model, trainer.log
    engine = trainer.is_deepspeed_enabled  # whose checkpoints carry the run

    def saving(output_dir: str | None = None, _internal_call: bool = False) -> None:
        with run.evaluation():
            save_model(output_dir, _internal_call=_internal_call)
            # Before the Trainer's own state, which makes a folder one to resume from.
            args = trainer.args
            if _internal_call and args.should_save and not args.save_only_model and not engine:
                _checkpoint.save_run(run, output_dir or args.output_dir)

    def saving_weights(output_dir: str | None = None, state_dict: Any = None) -> None:
        # A model without save_pretrained goes to safetensors as it is, which asks for contiguous
        # tensors; one that was changed gets the sentinel.
        plain = not hasattr(trainer.model, "save_pretrained")
        if state_dict:  # which an engine has gathered
            state_dict = _checkpoint.saved_state(run, state_dict)
        elif state_dict is None and (plain or any(run.report.changes.values())):
            state_dict = _checkpoint.saved_state(run, trainer.model.state_dict())
        save(output_dir, state_dict=state_dict)

    def loading_best(*args: Any, **kwargs: Any) -> None:
        if not engine:  # one loads its run with the weights
            run.enter_evaluation()  # another training then sees that other weights were loaded
        load_best_model(*args, **kwargs)

    def logging(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if steps.replaying:
            return
        if "loss" in logs:  # of training; the Trainer returns those of an evaluation
            logs.update({name: float(value) for name, value in run.metrics.items()})
        log(logs, *args, **kwargs)

    return [
        (trainer, "evaluate", averaged(trainer.evaluate)),
        (trainer, "predict", averaged(trainer.predict)),
        (trainer, "save_model", saving),
        (trainer, "_save", saving_weights),
        (trainer, "_load_best_model", loading_best),
        (trainer, "log", logging),
    ]
