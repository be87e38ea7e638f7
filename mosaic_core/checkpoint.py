"""What of a run goes into a checkpoint, and how a run goes on from one."""

from typing import TYPE_CHECKING, Any

import yaml

from mosaic_core.errors import UnsupportedError

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["check", "restore", "state_of"]

_VERSION = 1


def state_of(run: "Run") -> dict[str, Any]:
    """Return the state of a run: see :meth:`mosaic_core.Run.state_dict`."""
    return {
        "version": _VERSION,
        "recipe": run.recipe_text,
        "seed": run.seed,
        "progress": vars(run.progress).copy(),
        "states": {a.name: a.state_dict(run) for a in run.recipe},
        "training_weights": run.averaged.parked,
    }


def check(run: "Run", state: dict[str, Any]) -> None:
    """Check that a run may go on from a state, before anything is loaded.

    Raises:
        UnsupportedError: If the state is of another recipe, seed or version.
    """
    if state.get("version") != _VERSION:
        raise UnsupportedError(
            f"Run: unknown checkpoint version {state.get('version')}, this is {_VERSION}; to"
            " begin a new run, load the model's weights only"
        )
    # Compared as values: MixUp(1) is MixUp(1.0).
    same = yaml.safe_load(state["recipe"]) == yaml.safe_load(run.recipe_text)
    if not same or state["seed"] != run.seed:
        raise UnsupportedError(
            "Run: a run must go on with the recipe and seed it began with. The checkpoint has"
            f" seed {state['seed']} and\n{state['recipe']}this run has seed {run.seed} and\n"
            f"{run.recipe_text}To begin a new run, load the model's weights only"
        )


def restore(run: "Run", state: dict[str, Any]) -> None:
    """Give a run that has started the state of another: see :meth:`mosaic_core.Run.state_dict`.

    Raises:
        UnsupportedError: If the state is of another recipe, seed or version.
    """
    check(run, state)
    for name in ("step", "epoch", "samples", "tokens"):
        setattr(run.progress, name, state["progress"][name])
    run.progress.micro_batch = 0
    run.recent.clear()  # they are not of this training
    run.averaged.forget()
    for algorithm in run.recipe:
        algorithm.load_state_dict(state["states"][algorithm.name], run)
    if state["training_weights"] is not None:
        run.averaged.load(state["training_weights"])
