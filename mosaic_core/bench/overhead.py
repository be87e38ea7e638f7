"""What mosaic itself costs a step: an empty recipe against an empty callback.

An adapter names a function ``overhead(arm, steps)`` that runs a tiny model in the real trainer and
returns the seconds of each step. The arms are

- ``"empty callback"``: the trainer with a callback that does nothing,
- ``"empty recipe"``: mosaic's callback with no algorithm,
- ``"NoOp"``: mosaic's callback with :class:`mosaic_core.algorithms.NoOp`.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["ARMS", "Arm", "measure"]

ARMS = ("empty callback", "empty recipe", "NoOp")
_BLOCK = 50  # steps; short, so that the arms of a pair see the same machine
_WARM_UP = 10  # first steps of a block, which are not counted


@dataclass(frozen=True)
class Arm:
    """What one arm costs.

    Attributes:
        name: One of ``ARMS``.
        step: Median time of a step, in microseconds.
        over: Median over the blocks of what a step costs more than with the empty callback, in
            microseconds.
        spread: First and third quartile of the same.
    """

    name: str
    step: float
    over: float
    spread: tuple[float, float]


def measure(
    overhead: Callable[[str, int], list[float]],
    steps: int = 2000,
    report: Callable[[int, int], None] | None = None,
) -> list[Arm]:
    """Time the arms in alternating blocks.

    Args:
        overhead: An adapter's function, see above.
        steps: Steps to count for each arm; rounded up to whole blocks, at least four.
        report: Called with the number of blocks done and to do.

    Returns:
        The arms in the order of ``ARMS``.
    """
    torch.set_num_threads(1)  # the model is tiny, and threads that wait for each other add noise
    blocks = max(4, -(-steps // _BLOCK))
    medians: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for arm in ARMS:  # imports, and what else only the first run of all pays for
        overhead(arm, _WARM_UP)
    for block in range(blocks):
        # Back and forth, so that a drift of the machine cancels.
        for arm in ARMS if block % 2 == 0 else reversed(ARMS):
            seconds = overhead(arm, _WARM_UP + _BLOCK)[_WARM_UP:]
            medians[arm].append(1e6 * statistics.median(seconds))
        if report is not None:
            report(block + 1, blocks)
    results = []
    for arm in ARMS:
        over = [a - b for a, b in zip(medians[arm], medians[ARMS[0]], strict=True)]
        low, middle, high = statistics.quantiles(over, n=4)
        results.append(Arm(arm, statistics.median(medians[arm]), middle, (low, high)))
    return results
