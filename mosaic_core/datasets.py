"""The data of the shipped workloads: found, read and normalised, or a word on how to get them."""

import contextlib
import functools
import gzip
import importlib
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["Data", "MissingError", "cifar10", "digits", "fashion_mnist", "given_folders"]


class MissingError(RuntimeError):
    """A package or a data set is not there; the message says how to get it."""


@dataclass(frozen=True)
class Data:
    """What a workload trains and evaluates on.

    Attributes:
        train_inputs: Images, float32 with about zero mean and unit variance, ``(N, C, H, W)``, or
            tokens, int64, ``(N, T)``.
        train_labels: Classes, int64, ``(N,)``, or one for each token, ``(N, T)``.
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


def given_folders(data_dir: Path | None) -> list[Path]:
    """Return the folders that a user names for data: of ``--data-dir``, then of ``MOSAIC_DATA``."""
    return [Path(p) for p in (data_dir, os.environ.get("MOSAIC_DATA")) if p]


_FASHION_MNIST = {
    "train_inputs": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "eval_inputs": "t10k-images-idx3-ubyte",
    "eval_labels": "t10k-labels-idx1-ubyte",
}
_DEBIAN = ("/usr/share/datasets/fashion-mnist", "/usr/share/dataset-fashion-mnist")


def fashion_mnist(data_dir: Path | None) -> Data:
    """Read Fashion-MNIST, 60,000 images to train on and 10,000 to evaluate, or download it."""
    found = _found_or_downloaded(
        data_dir,
        name="fashion-mnist",
        kind="FashionMNIST",
        find=_files,
        installed=_DEBIAN,
        tails=("", "fashion-mnist", "FashionMNIST/raw"),
        ways="apt install dataset-fashion-mnist, or pip install torchvision to have it downloaded,"
        " or set --data-dir or MOSAIC_DATA to a folder with its idx-ubyte files",
    )
    return _fashion_mnist(*(found[role] for role in _FASHION_MNIST))


@functools.lru_cache(maxsize=1)
def _fashion_mnist(*paths: Path) -> Data:
    """Read the four files, in the order of ``_FASHION_MNIST``."""
    train, labels, evaluation, eval_labels = (torch.from_numpy(_read_idx(p)) for p in paths)
    train, evaluation = (images.float().unsqueeze(1) / 255 for images in (train, evaluation))
    return _normalised(train, labels.long(), evaluation, eval_labels.long())


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


_CIFAR10 = (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch")


def cifar10(data_dir: Path | None) -> Data:
    """Read CIFAR-10, 50,000 images to train on and 10,000 to evaluate, or download it."""
    found = _found_or_downloaded(
        data_dir,
        name="cifar10",
        kind="CIFAR10",
        find=_batches,
        tails=("", "cifar-10-batches-py"),
        ways="pip install torchvision to have it downloaded, or set --data-dir or MOSAIC_DATA to a"
        " folder with cifar-10-batches-py",
    )
    return _cifar10(*found)


@functools.lru_cache(maxsize=1)
def _cifar10(*paths: Path) -> Data:
    """Read the six files, in the order of ``_CIFAR10``."""
    parts = [_read_batch(path) for path in paths]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts[:-1], strict=True))
    return _normalised(images, labels, *parts[-1], dims=(0, 2, 3))


def _batches(folder: Path) -> list[Path] | None:
    paths = [folder / name for name in _CIFAR10]
    return paths if all(path.is_file() for path in paths) else None


def _read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Read a pickle of Python 2: bytes of shape ``(N, 3072)``, and a list of N classes."""
    try:
        with path.open("rb") as file:
            batch = _Unpickler(file, encoding="bytes").load()
        images = torch.tensor(batch[b"data"]).view(-1, 3, 32, 32)
        return images.float() / 255, torch.tensor(batch[b"labels"])
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"mosaic: {path} must be a batch of CIFAR-10, got {error}") from error


class _Unpickler(pickle.Unpickler):
    """Reads arrays, and refuses whatever else a pickle could run."""

    _allowed: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"a pickle with {module}.{name}")
        return self._allowed[module, name]


# What all of them need.


def _normalised(
    train: Tensor,
    labels: Tensor,
    evaluation: Tensor,
    eval_labels: Tensor,
    dims: tuple[int, ...] = (0, 1, 2, 3),
) -> Data:
    """Subtract the mean of the training images over ``dims``, and divide by their deviation."""
    mean, std = train.mean(dims, keepdim=True), train.std(dims, keepdim=True)
    return Data((train - mean) / std, labels, (evaluation - mean) / std, eval_labels)


_Found = TypeVar("_Found")


def _found_or_downloaded(
    data_dir: Path | None,
    *,
    name: str,
    kind: str,
    find: Callable[[Path], _Found | None],
    tails: Sequence[str],
    ways: str,
    installed: Sequence[str] = (),
) -> _Found:
    """Look for a data set, and let torchvision download it, into place only when it is complete.

    Args:
        data_dir: Folder to look into first.
        name: Name of the data set in messages.
        kind: Name of its class in torchvision.
        find: Returns the files that a folder holds, None unless it holds all.
        tails: Where in a folder to look; the last is where torchvision puts what is wanted.
        ways: How to get it.
        installed: Folders where a package puts it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mosaic"
    given = given_folders(data_dir)
    folders = [*given, *map(Path, installed), cache]
    places = (folder / tail for folder in folders for tail in tails)
    found = next((files for place in places if (files := find(place))), None)
    if found is not None:
        return found
    missing = f"mosaic: {name} is not in {', '.join(map(str, folders))}"
    ways = f"get it with {ways}"
    try:
        datasets = importlib.import_module("torchvision.datasets")
    except ImportError as error:
        raise MissingError(f"{missing} and torchvision is not installed; {ways}") from error
    target = (given or [cache])[0] / tails[-1]
    made = [path for path in (target.parent, *target.parent.parents) if not path.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            getattr(datasets, kind)(scratch, download=True)
            (Path(scratch) / tails[-1]).rename(target)
        found = find(target)
    except (OSError, RuntimeError) as error:  # no network, no room, or a mirror that fails
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise MissingError(f"{missing} and could not be downloaded ({error}); {ways}") from error
    if found is None:
        raise MissingError(f"{missing} and what was downloaded to {target} is not whole; {ways}")
    return found
