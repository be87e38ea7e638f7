"""The data of the shipped workloads: found, read and normalised, or a word on how to get them."""

import contextlib
import functools
import gzip
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["Data", "MissingError", "digits", "fashion_mnist"]


class MissingError(RuntimeError):
    """A package or a data set is not there; the message says how to get it."""


@dataclass(frozen=True)
class Data:
    """What a workload trains and evaluates on.

    Attributes:
        train_inputs: Images, float32 with about zero mean and unit variance, ``(N, C, H, W)``.
        train_labels: Classes, int64, ``(N,)``.
        eval_inputs: The same, never trained on.
        eval_labels: The same.
    """

    train_inputs: Tensor
    train_labels: Tensor
    eval_inputs: Tensor
    eval_labels: Tensor


@functools.lru_cache(maxsize=1)
def digits(data_dir: Path | None) -> Data:
    """Read scikit-learn's digits: 50 images of each class to train on, the rest to evaluate."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingError(
            "mosaic: workload digits needs scikit-learn, which is not installed; get it with"
            ' pip install "mosaic-core[demo]"'
        ) from error
    pixels, classes = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    labels = torch.from_numpy(classes).long()
    # The first of each class, as the images come sorted by writer: evaluation is on new writers.
    rank = torch.zeros_like(labels)
    for members in (labels == c for c in range(10)):
        rank[members] = torch.arange(int(members.sum()))
    train = rank < 50
    return _normalised(images[train], labels[train], images[~train], labels[~train])


_FASHION_MNIST = {
    "train_inputs": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "eval_inputs": "t10k-images-idx3-ubyte",
    "eval_labels": "t10k-labels-idx1-ubyte",
}
_DEBIAN = ("/usr/share/datasets/fashion-mnist", "/usr/share/dataset-fashion-mnist")


def fashion_mnist(data_dir: Path | None) -> Data:
    """Read Fashion-MNIST, 60,000 images to train on and 10,000 to evaluate, or download it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mosaic"
    given = [Path(p) for p in (data_dir, os.environ.get("MOSAIC_DATA")) if p]
    folders = [*given, *map(Path, _DEBIAN), cache]
    tails = ("", "fashion-mnist", "FashionMNIST/raw")  # the last is torchvision's
    places = [folder / tail for folder in folders for tail in tails]
    found = next((files for place in places if (files := _files(place))), None)
    if found is None:
        found = _download((given or [cache])[0], folders[:-1])
    return _fashion_mnist(*(found[role] for role in _FASHION_MNIST))


@functools.lru_cache(maxsize=1)
def _fashion_mnist(*paths: Path) -> Data:
    """Read the four files, in the order of ``_FASHION_MNIST``."""
    train, labels, evaluation, eval_labels = (torch.from_numpy(_read_idx(p)) for p in paths)
    train, evaluation = (images.float().unsqueeze(1) / 255 for images in (train, evaluation))
    return _normalised(train, labels.long(), evaluation, eval_labels.long())


def _normalised(train: Tensor, labels: Tensor, evaluation: Tensor, eval_labels: Tensor) -> Data:
    mean, std = train.mean(), train.std()
    return Data((train - mean) / std, labels, (evaluation - mean) / std, eval_labels)


def _files(folder: Path) -> dict[str, Path] | None:
    """Return the four files of a folder by role, None if one is missing."""
    found = {}
    for role, name in _FASHION_MNIST.items():
        path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
        if path is None:
            return None
        found[role] = path
    return found


def _read_idx(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Read an idx file of bytes: a magic number with the rank, the sizes, the values."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"mosaic: {path} must be an idx file of unsigned bytes, it is not")
    sizes = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes).copy()


def _download(folder: Path, looked: list[Path]) -> dict[str, Path]:
    """Let torchvision download the files, into place only when they are complete."""
    ways = (
        "get it with apt install dataset-fashion-mnist, or pip install torchvision to have it"
        " downloaded, or set --data-dir or MOSAIC_DATA to a folder with its idx-ubyte files"
    )
    missing = f"mosaic: fashion-mnist is not in {', '.join(map(str, looked))}"
    try:
        from torchvision.datasets import FashionMNIST
    except ImportError as error:
        raise MissingError(f"{missing} and torchvision is not installed; {ways}") from error
    target = folder / "FashionMNIST" / "raw"
    made = [path for path in (target.parent, *target.parent.parents) if not path.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            FashionMNIST(scratch, download=True)
            (Path(scratch) / "FashionMNIST" / "raw").rename(target)
    except (OSError, RuntimeError) as error:  # no network, no room, or a mirror that fails
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise MissingError(f"{missing} and could not be downloaded ({error}); {ways}") from error
    return _files(target) or {}
