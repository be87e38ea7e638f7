"""Reading, finding and downloading data, from files in the formats that they really have."""

import gzip
import io
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mosaic_core import datasets
from mosaic_core.datasets import MissingError


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_DEBIAN", ())
    monkeypatch.delenv("MOSAIC_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Python2Pickler(pickle._Pickler):
    """Writes byte strings as Python 2 does, which is how CIFAR-10 was written."""

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_bytes}  # noqa: RUF012  # as the base has it


def python2_pickle(value):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def write_cifar10(folder, images=4):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for n, name in enumerate(datasets._CIFAR10):
        pixels = rng.integers(0, 256, (images, 3072), dtype=np.uint8)
        labels = [(n + i) % 10 for i in range(images)]
        batch = {b"batch_label": b"a batch", b"labels": labels, b"data": pixels}
        (folder / name).write_bytes(python2_pickle(batch))


def write_fashion_mnist(folder):
    folder.mkdir(parents=True)
    for role, name in datasets._FASHION_MNIST.items():
        shape = (5, 28, 28) if role.endswith("inputs") else (5,)
        values = np.arange(np.prod(shape)).astype(np.uint8)
        header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(header + values.tobytes()))


def fake_torchvision(monkeypatch, download):
    """Let ``download(folder)`` stand for all downloads of torchvision."""

    def dataset(folder, download):
        calls(folder)

    calls = download
    module = SimpleNamespace(FashionMNIST=dataset, CIFAR10=dataset)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)


# CIFAR-10.


def test_cifar10_is_read_from_the_pickles_of_python_2(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    data = datasets.cifar10(tmp_path)
    assert data.train_inputs.shape == (20, 3, 32, 32)
    assert data.eval_inputs.shape == (4, 3, 32, 32)
    assert data.train_inputs.dtype == torch.float32
    assert data.train_labels.tolist() == [(n + i) % 10 for n in range(5) for i in range(4)]
    assert data.eval_labels.tolist() == [5, 6, 7, 8]
    assert data.train_labels.dtype == torch.int64
    flat = data.train_inputs.movedim(1, 0).flatten(1)  # each channel by itself
    assert torch.allclose(flat.mean(1), torch.zeros(3), atol=1e-5)
    assert torch.allclose(flat.std(1), torch.ones(3), atol=1e-4)
    # Pixels are planes of red, green, blue, each row by row.
    raw = pickle.loads(
        (tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes(), encoding="bytes"
    )[b"data"]
    expected = torch.tensor(raw[2, 1024 + 32 * 3 + 7] > raw[2, 1024 + 32 * 9 + 1])
    assert (data.eval_inputs[2, 1, 3, 7] > data.eval_inputs[2, 1, 9, 1]) == expected


def test_cifar10_runs_nothing_that_a_pickle_holds(tmp_path):
    write_cifar10(tmp_path / "c")
    (tmp_path / "c" / "data_batch_3").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match=r"data_batch_3 must be a batch.*a pickle with os\.system"):
        datasets.cifar10(tmp_path / "c")
    for wrong in (b"", b"\x80\x02}.", b"nonsense"):
        (tmp_path / "c" / "data_batch_3").write_bytes(wrong)
        with pytest.raises(ValueError, match="data_batch_3 must be a batch of CIFAR-10"):
            datasets.cifar10(tmp_path / "c")


# Downloads.


LOADERS = {
    "FashionMNIST/raw": (datasets.fashion_mnist, write_fashion_mnist),
    "cifar-10-batches-py": (datasets.cifar10, write_cifar10),
}


@pytest.mark.parametrize("place", LOADERS)
@pytest.mark.parametrize("given", [True, False], ids=["given", "cache"])
def test_a_download_goes_to_the_folder_named_or_to_the_cache(tmp_path, monkeypatch, place, given):
    load, write = LOADERS[place]
    fake_torchvision(monkeypatch, lambda folder: write(datasets.Path(folder) / place))
    data = load(tmp_path / "data" if given else None)
    folder = tmp_path / "data" if given else tmp_path / "cache" / "mosaic"
    assert [p.name for p in folder.iterdir()] == [place.partition("/")[0]]  # no scratch is left
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)  # it is there the next time
    assert load(tmp_path / "data" if given else None) is data


@pytest.mark.parametrize("place", LOADERS)
def test_a_download_that_fails_leaves_nothing(tmp_path, monkeypatch, place):
    load, write = LOADERS[place]

    def breaks(folder):
        write(datasets.Path(folder) / place)
        raise RuntimeError("mirror down")

    fake_torchvision(monkeypatch, breaks)
    with pytest.raises(MissingError, match=r"could not be downloaded \(mirror down\); get it with"):
        load(tmp_path / "data")
    assert not (tmp_path / "data").exists()
    fake_torchvision(
        monkeypatch, lambda folder: (datasets.Path(folder) / place).mkdir(parents=True)
    )
    with pytest.raises(MissingError, match="is not whole; get it with"):
        load(tmp_path / "data")


@pytest.mark.parametrize("place", LOADERS)
def test_without_torchvision_it_says_where_it_looked(tmp_path, monkeypatch, place):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    monkeypatch.setenv("MOSAIC_DATA", str(tmp_path / "b"))
    with pytest.raises(MissingError, match="torchvision is not installed; get it with") as caught:
        LOADERS[place][0](tmp_path / "a")
    assert f"{tmp_path / 'a'}, {tmp_path / 'b'}, {tmp_path / 'cache'}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
