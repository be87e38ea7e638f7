"""Several workloads at once: performance profiles and the area under them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["median_times", "performance_profile", "performance_ratios", "profile_area"]


def median_times(summaries: Sequence[Path]) -> tuple[list[str], dict[str, list[float]]]:
    """Read the median time to target of the arms that several comparisons have in common.

    Args:
        summaries: Files that ``mosaic bench`` wrote as ``summary.json``, one for each workload.

    Returns:
        Names of the workloads, and by arm the seconds on each: infinite where half of the runs or
        more missed the target.

    Raises:
        ValueError: If a file is no summary, a workload comes twice, or no two arms are common.
    """
    workloads: list[str] = []
    found: list[Mapping[str, float]] = []
    for path in summaries:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            arms = {name: arm["seconds_to_target"] for name, arm in data["arms"].items()}
            name = f"{data['workload']} with {data['trainer']}"
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"median_times: {path} must be a summary: {error!r}") from error
        if name in workloads:
            raise ValueError(f"median_times: summaries must differ in workload, got {name} twice")
        workloads.append(name)
        times = {arm: [np.inf if t is None else t for t in of] for arm, of in arms.items()}
        # Of an even number the later of the middle two, as a mean with a miss would be one.
        found.append({arm: float(np.sort(of)[len(of) // 2]) for arm, of in times.items()})
    common = [arm for arm in found[0] if all(arm in of for of in found)] if found else []
    if len(common) < 2:
        raise ValueError("median_times: summaries must have two arms or more in common")
    return workloads, {arm: [of[arm] for of in found] for arm in common}


def performance_ratios(times: ArrayLike) -> NDArray[np.float64]:
    """Return how many times the best time each recipe needs: ``times / times.min(axis=0)``.

    Args:
        times: Times to target, shape ``(recipes, workloads)``, positive; infinite for a miss.

    Returns:
        Ratios of at least 1 in a new array of the same shape; infinite for a miss, so a workload
        that nobody solves counts against everybody.

    Raises:
        ValueError: If the shape is another, or a time is not positive.

    References:
        Dolan and Moré, `Benchmarking optimization software with performance profiles
        <https://arxiv.org/abs/cs/0102001>`_, 2002, section 2.
    """
    t = np.asarray(times, np.float64)
    if t.ndim != 2 or not t.size:
        raise ValueError(
            f"performance_ratios: times must have shape (recipes, workloads), got {t.shape}"
        )
    if not (t > 0).all():
        raise ValueError(f"performance_ratios: times must be positive, got {t}")
    best = t.min(axis=0)
    ratios = np.full_like(t, np.inf)
    np.divide(t, best, out=ratios, where=np.isfinite(t))
    return ratios


def performance_profile(ratios: ArrayLike, tau: ArrayLike) -> NDArray[np.float64]:
    """Return ``rho(tau)``, the share of workloads a recipe solves within ``tau`` times the best.

    Args:
        ratios: What :func:`performance_ratios` gives, shape ``(recipes, workloads)``.
        tau: Shape ``(points,)``.

    Returns:
        Shares in [0, 1], shape ``(recipes, points)``, not falling along the points.

    References:
        Dolan and Moré 2002, see :func:`performance_ratios`.
    """
    r, points = np.asarray(ratios, np.float64), np.asarray(tau, np.float64)
    return np.asarray((r[:, :, None] <= points).mean(axis=1))


def profile_area(ratios: ArrayLike, tau_max: float = 4.0) -> NDArray[np.float64]:
    """Return AlgoPerf's B, the mean of ``rho`` from 1 to ``tau_max``: its area by the width.

    The profile is a staircase, so the area needs no grid: each workload gives
    ``max(0, tau_max - ratio) / (tau_max - 1)``, and B is their mean.

    Args:
        ratios: What :func:`performance_ratios` gives, shape ``(recipes, workloads)``.
        tau_max: Ratio from which a recipe earns nothing, above 1.

    Returns:
        Scores in [0, 1], shape ``(recipes,)``; 1 for the best on every workload.

    Raises:
        ValueError: If ``tau_max`` is not above 1.

    References:
        Dahl et al., `Benchmarking neural network training algorithms
        <https://arxiv.org/abs/2306.07179>`_, 2023, section 4.
    """
    if not 1 < tau_max < np.inf:
        raise ValueError(f"profile_area: tau_max must be finite and above 1, got {tau_max}")
    earned = np.maximum(0, tau_max - np.asarray(ratios, np.float64)) / (tau_max - 1)
    return np.asarray(earned.mean(axis=1))
