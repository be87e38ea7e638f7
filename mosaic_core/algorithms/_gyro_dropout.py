"""GyroDropout: dropout that trains few subnetworks, each of them for long."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.batch import Batch
from mosaic_core.random import derive_seed, uniform, uniform_at
from mosaic_core.surgery import swap_class, warn_no_effect

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["GyroDropout", "apply_gyro_dropout", "gyro_dropout"]


def gyro_dropout(
    x: Tensor,
    p: float = 0.5,
    sigma: int = 256,
    tau: int = 16,
    mask_seed: Tensor | None = None,
    pick_seed: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drop activations with ``tau`` of ``sigma`` fixed masks: example ``i`` by number ``i % tau``.

    What is kept is divided by ``1 - p``, as in dropout.

    Args:
        x: Activations, floating-point, shape ``(N, ...)``; all but the first dimension are masked.
        p: Probability to drop an activation, in [0, 1).
        sigma: Number of masks there are, at least 1.
        tau: Number of masks at work at a time, in [1, ``sigma``].
        mask_seed: Seed that decides all masks, int64, shape ``()``; None draws it.
        pick_seed: Seed that decides which of them are at work; the same for many steps. None draws
            it.
        generator: CPU generator to draw the seeds from; None draws from torch's default one.

    Returns:
        A new tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> y = gyro_dropout(torch.ones(4, 1000), p=0.5, sigma=8, tau=2)
        >>> torch.equal(y[0], y[2]), sorted(y.unique().tolist())
        (True, [0.0, 2.0])

    References:
        Lee et al., `Gyro Dropout: Maximizing Ensemble Effect in Neural Network Training
        <https://mlsys.org/virtual/2022/poster/2032>`_, 2022.
    """
    _check("gyro_dropout", p, sigma, tau)
    if mask_seed is None:
        mask_seed = torch.randint(2**63 - 1, (), generator=generator)
    if pick_seed is None:
        pick_seed = torch.randint(2**63 - 1, (), generator=generator)
    if p == 0:
        return x.clone()
    features = math.prod(x.shape[1:])
    picks = (uniform((tau,), pick_seed, x.device) * sigma).long()
    positions = picks[:, None] * features + torch.arange(features, device=x.device)
    masks = uniform_at(positions, mask_seed) >= p
    at_work = torch.arange(len(x), device=x.device) % tau
    # Divided last: in bfloat16 the factor 1 / (1 - p) itself would be off by up to 0.4%.
    return (x * masks[at_work].view_as(x)).div_(1 - p)


class _GyroDropout(nn.Dropout):
    """``nn.Dropout`` with fixed masks."""

    sigma: int
    tau: int
    mask_seed: Tensor
    pick_seed: Tensor

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        return gyro_dropout(input, self.p, self.sigma, self.tau, self.mask_seed, self.pick_seed)


def apply_gyro_dropout(
    model: nn.Module, p: float = 0.5, sigma: int = 256, tau: int = 16
) -> list[str]:
    """Let every ``nn.Dropout`` of a model drop with fixed masks, in place.

    Names stay, and in evaluation nothing changes. Applied twice it equals applied once. Until a
    run sets the seeds, every layer works with the same masks; for a loop of your own, call
    :func:`gyro_dropout` in ``forward`` instead.

    Args:
        model: Any model.
        p: Probability to drop an activation, in [0, 1), in place of the layers' own.
        sigma: Number of masks there are.
        tau: Number of masks at work at a time.

    Returns:
        Names of the layers, in the order of the model.

    Warns:
        NoEffectWarning: If there is no ``nn.Dropout``.

    References:
        Lee et al., `Gyro Dropout <https://mlsys.org/virtual/2022/poster/2032>`_, 2022.
    """
    _check("apply_gyro_dropout", p, sigma, tau)
    names = []
    for name, module in model.named_modules():
        if type(module) is nn.Dropout:
            swap_class(module, _GyroDropout)
            # Attributes, no buffers: DDP would send those of rank 0 to all ranks.
            module.mask_seed = torch.tensor(derive_seed(name, "masks"))
            module.pick_seed = torch.tensor(derive_seed(name, "picks"))
        if isinstance(module, _GyroDropout):
            module.p, module.sigma, module.tau = p, sigma, tau  # the latest hold
            names.append(name)
    if not names:
        warn_no_effect("apply_gyro_dropout", "nn.Dropout")
    return names


def _check(where: str, p: float, sigma: int, tau: int) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"{where}: p must be in [0, 1), got {p}")
    if not 1 <= tau <= sigma:
        raise ValueError(f"{where}: tau must be in [1, sigma={sigma}], got {tau}")


@dataclass(frozen=True)
class GyroDropout(Algorithm):
    """Replace dropout by fixed masks, each of which is at work for a part of the run.

    The run is split into ``sigma / tau`` periods (at least one step each); each works with ``tau``
    masks, drawn anew for every period, layer and rank from ``sigma`` that all ranks share.

    Args:
        p: Probability to drop an activation, in [0, 1), in place of the layers' own.
        sigma: Number of masks of a layer, at least 1.
        tau: Number of masks at work at a time, in [1, ``sigma``].

    Raises:
        ValueError: If a setting is out of range.
    """

    p: float = 0.5
    sigma: int = 256
    tau: int = 16

    place = Place.SURGERY
    card = Card(
        category="any",
        summary="Trains a limited number of dropout masks, so that each subnetwork is trained"
        " properly and their ensemble gains.",
        effect="tau masks are made in every forward in place of one draw an activation; evaluation"
        " and checkpoints stay. Masks are functions of the seed, so nothing is kept.",
        use_when="Networks that rely on dropout, such as those with large fully connected layers.",
        interactions="Acts on nn.Dropout alone, not on dropout inside attention kernels or on"
        " functional calls. A second pass finds the same masks.",
        reference="Lee et al. 2022",
        url="https://mlsys.org/virtual/2022/poster/2032",
    )

    def __post_init__(self) -> None:
        """Check the settings."""
        _check("GyroDropout", self.p, self.sigma, self.tau)

    def prepare_model(self, model: nn.Module, run: "Run") -> None:
        """Replace the layers; evaluation is the same, so a checkpoint needs no warning."""
        names = apply_gyro_dropout(model, **self.settings)
        run.report.notes.append(f"GyroDropout drops in {', '.join(names)}")

    def init_state(self, run: "Run") -> dict[str, _GyroDropout]:
        """Return the layers by name; a run whose length is not known is refused here."""
        _ = run.progress.fraction
        layers = {n: m for n, m in run.model.named_modules() if isinstance(m, _GyroDropout)}
        for name, layer in layers.items():
            layer.mask_seed.fill_(run.seed_for(self, name, shared=True, lasting=True))
        return layers

    def on_batch(self, batch: Batch, run: "Run") -> Batch:
        """Tell each layer which masks are at work; the batch stays."""
        period = int(run.progress.fraction * self.sigma / self.tau)
        for name, layer in run.state(self).items():
            layer.pick_seed.fill_(run.seed_for(self, name, period, lasting=True))
        return batch
