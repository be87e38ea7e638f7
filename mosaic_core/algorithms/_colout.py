"""ColOut: drop random rows and columns of the images."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.batch import Batch, describe
from mosaic_core.random import to_device

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["ColOut", "colout_batch"]

_Resize = bool | Literal["auto"]


def colout_batch(
    sample: Any,
    p_row: float = 0.15,
    p_col: float = 0.15,
    resize_target: _Resize = "auto",
    generator: torch.Generator | None = None,
) -> Any:
    """Drop random rows and columns of an image, or of all images of a batch alike.

    Of H rows ``max(1, int((1 - p_row) * H))`` stay, in their order; of the columns likewise.

    Args:
        sample: Images, or a pair of images and targets. Images are a PIL image of any mode, or a
            tensor of any dtype, shape ``(C, H, W)`` or ``(N, C, ..., H, W)``; so are targets that
            follow them, and they may lack C.
        p_row: Share of the rows to drop, in [0, 1).
        p_col: Share of the columns to drop, in [0, 1).
        resize_target: Whether targets lose the same rows and columns; ``"auto"`` says yes where
            they have the height and width of the images, as in segmentation.
        generator: CPU generator to draw from; None draws from torch's default one.

    Returns:
        New images of the type, mode, dtype and memory format of the given ones; for a pair, a
        pair. Targets that do not follow the images are returned as they are.

    Raises:
        TypeError: If the images are neither a tensor nor a PIL image.
        ValueError: If an argument is out of range, or ``resize_target`` is true and the targets
            have another height or width.

    Example:
        >>> images, masks = torch.zeros(8, 3, 32, 32), torch.zeros(8, 32, 32)
        >>> [t.shape for t in colout_batch((images, masks))]
        [torch.Size([8, 3, 27, 27]), torch.Size([8, 27, 27])]

    References:
        Stephenson, `ColOut
        <https://docs.mosaicml.com/projects/composer/en/latest/method_cards/colout.html>`_, 2021.
    """
    _check("colout_batch", p_row, p_col, resize_target)
    pair = isinstance(sample, tuple | list)
    images, targets = sample if pair else (sample, None)
    kept = _draw("colout_batch", images, p_row, p_col, generator)
    if pair and _follows("colout_batch", targets, images, resize_target):
        targets = _keep(targets, *kept)
    images = _keep(images, *kept)
    return (images, targets) if pair else images


def _check(where: str, p_row: float, p_col: float, resize_target: _Resize) -> None:
    for name, p in (("p_row", p_row), ("p_col", p_col)):
        if not 0 <= p < 1:
            raise ValueError(f"{where}: {name} must be in [0, 1), got {p}")
    if resize_target not in (True, False, "auto"):
        raise ValueError(
            f"{where}: resize_target must be True, False or 'auto', got {resize_target!r}"
        )


def _draw(
    where: str, images: Any, p_row: float, p_col: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw the rows and the columns that stay, int64, sorted, on the CPU."""
    if isinstance(images, Tensor) and images.dim() < 3:
        raise ValueError(f"{where}: images must have shape (..., C, H, W), got {describe(images)}")
    if not _size(images):
        raise TypeError(f"{where}: images must be a tensor or PIL image, got {describe(images)}")
    rows, columns = (
        torch.randperm(n, generator=generator)[: max(1, int((1 - p) * n))].sort().values
        for n, p in zip(_size(images), (p_row, p_col), strict=True)
    )
    return rows, columns


def _size(image: Any) -> tuple[int, ...]:
    """Return height and width; of what is neither a tensor nor a PIL image, nothing."""
    if isinstance(image, Tensor):
        return tuple(image.shape[-2:])
    return (image.height, image.width) if hasattr(image, "crop") else ()


def _follows(where: str, targets: Any, images: Any, resize_target: _Resize) -> bool:
    """Tell whether the targets lose the rows and columns that the images lose."""
    same = _size(targets) == _size(images)
    if isinstance(targets, Tensor) and isinstance(images, Tensor) and images.dim() > 3:
        same = same and targets.dim() > 2  # (N, classes) may happen to equal (H, W)
    if resize_target is True and not same:
        raise ValueError(
            f"{where}: resize_target must be False or 'auto' for targets without the height and"
            f" width of the images, got {describe(targets)} for {describe(images)}"
        )
    return same and resize_target is not False


def _keep(image: Any, rows: Tensor, columns: Tensor) -> Any:
    """Return the part of an image that lies in some rows and some columns."""
    if isinstance(image, Tensor):
        rows, columns = (to_device(kept, image.device) for kept in (rows[:, None], columns))
        if image.dim() == 4 and image.is_contiguous(memory_format=torch.channels_last):
            return image.movedim(1, 3)[:, rows, columns].movedim(3, 1)
        return image[..., rows, columns]
    output = image.crop((0, 0, image.width, len(rows)))  # keeps the mode and the palette
    for i, row in enumerate(rows.tolist()):
        output.paste(image.crop((0, row, image.width, row + 1)), (0, i))
    image, output = output, output.crop((0, 0, len(columns), len(rows)))
    for i, column in enumerate(columns.tolist()):
        output.paste(image.crop((column, 0, column + 1, len(rows))), (i, 0))
    return output


@dataclass(frozen=True)
class ColOut(Algorithm):
    """Drop random rows and columns of the images.

    Args:
        p_row: Share of the rows to drop, in [0, 1).
        p_col: Share of the columns to drop, in [0, 1).
        resize_target: Whether targets lose the same rows and columns. ``"auto"`` says yes where
            they have the height and width of the images, as in segmentation, and leaves class
            labels; True makes other targets an error; False never looks for a target.

    Raises:
        ValueError: If a setting is out of range.
    """

    p_row: float = 0.15
    p_col: float = 0.15
    resize_target: _Resize = "auto"

    place = Place.AUGMENTATION
    card = Card(
        category="vision",
        summary="Drops random rows and columns of the images, the same in a whole batch.",
        effect="Smaller images, so less memory and time per step: 28% fewer pixels by default."
        " Evaluation sees whole images.",
        use_when="Models that take images of any size, where a little accuracy may be given for"
        " speed; of little use for small images.",
        interactions="Acts before mixing. Targets with a value for each pixel lose the same rows"
        " and columns.",
        reference="Stephenson 2021",
        url="https://docs.mosaicml.com/projects/composer/en/latest/method_cards/colout.html",
    )

    def __post_init__(self) -> None:
        """Check the settings."""
        _check("ColOut", self.p_row, self.p_col, self.resize_target)

    @property
    def reads_labels(self) -> bool:
        """Whether a target may follow the images."""
        return self.resize_target is not False

    def on_batch(self, batch: Batch, run: "Run") -> Batch:
        """Drop the rows and columns, of the targets too if they follow."""
        images, labels = batch.input, None
        if images.dim() < 4:
            raise ValueError(
                f"ColOut: the input must have shape (N, C, ..., H, W), got {describe(images)}"
            )
        rows, columns = _draw("ColOut", images, self.p_row, self.p_col, run.generator(self))
        resize = self.resize_target
        if self.reads_labels and _follows("ColOut", batch.labels.label, images, resize):
            labels = batch.labels.map(lambda label: _keep(label, rows, columns))
        return batch.replace(_keep(images, rows, columns), labels)
