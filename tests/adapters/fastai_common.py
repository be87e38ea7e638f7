"""What the tests of fastai share: quiet imports, Learners of the contract's network, a loop."""

import functools
import warnings

with warnings.catch_warnings():
    # Of fastai itself, which scripts functions when it is imported.
    warnings.simplefilter("ignore")
    from fastai.callback.fp16 import AMPMode, MixedPrecision
    from fastai.callback.progress import ProgressCallback
    from fastai.data.core import DataLoaders, Datasets
    from fastai.data.load import DataLoader
    from fastai.distributed import DistributedDL, DistributedTrainer
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    from fastai.optimizer import OptimWrapper
    from fastai.torch_core import TensorCategory, TensorImage

import torch
import torch.nn.functional as F

from mosaic_core.testing._network import examples, network

__all__ = [
    "CPUMixedPrecision",
    "Examples",
    "Learner",
    "batches",
    "dataloaders",
    "difference",
    "distribute",
    "learner",
    "quiet",
    "state",
    "typed_dataloaders",
    "wrapped",
]

SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)


class Examples:
    """The examples of some batches; with several processes, where this rank looks for them."""

    def __init__(self, batches, processes=1):
        self.batches, self.processes = batches, processes

    def __len__(self):
        return 8 * len(self.batches) * self.processes

    def __getitem__(self, index):  # DistributedDL gives each rank a stretch of the indices
        index %= 8 * len(self.batches)
        images, classes = self.batches[index // 8]
        return images[index % 8], classes[index % 8]


def dataloaders(batches, evaluation=(), processes=1):
    loaders = (
        DataLoader(Examples(list(data), processes), bs=8, num_workers=0)
        for data in (batches, evaluation)
    )
    return DataLoaders(*loaders, device=torch.device("cpu"))


class CPUMixedPrecision(MixedPrecision):
    """fastai's MixedPrecision for the CPU, where its own asks for CUDA."""

    def before_fit(self):
        half = self.amp_mode == AMPMode.FP16
        dtype = torch.float16 if half else torch.bfloat16
        self.autocast = torch.autocast("cpu", dtype)
        self.learn.scaler = torch.amp.GradScaler("cpu", enabled=half, **self.kwargs)
        self.scales = []

    name = "mixed_precision"


def distribute(learn):
    """Train in several processes of the CPU; as it comes, fastai broadcasts by way of CUDA."""

    def broadcast(self, values, rank):
        values = torch.tensor(values)
        torch.distributed.broadcast(values, rank)
        return values.tolist()

    DistributedDL._broadcast = broadcast
    learn.add_cb(DistributedTrainer(sync_bn=False, cpu=True))


def quiet(learn):
    """Print nothing."""
    learn.remove_cb(ProgressCallback)
    learn.logger = ignore
    return learn


def ignore(*args, **kwargs):
    pass


def wrapped(optimizer=SGD):
    """An ``opt_func`` that makes a torch optimizer."""
    return functools.partial(OptimWrapper, opt=optimizer)


def batches(count=10, first=0):
    return [examples(first + i) for i in range(count)]


def learner(path, cbs=None, count=10, **options):
    """A Learner of the contract's network, with one batch to validate on."""
    options = {"loss_func": CrossEntropyLossFlat(), "opt_func": wrapped(), "lr": 0.05, **options}
    loaders = options.pop("dls", None) or dataloaders(batches(count), batches(1, 1000))
    return quiet(
        Learner(loaders, options.pop("model", None) or network(), cbs=cbs, path=path, **options)
    )


def image(index):
    return TensorImage(examples(index // 8)[0][index % 8])


def category(index):
    return TensorCategory(examples(index // 8)[1][index % 8])


def typed_dataloaders(count=4):
    """Images and categories in fastai's own tensor types, from its own data sets."""
    items = list(range(8 * count))
    splits = [items[:-8], items[-8:]]
    data = Datasets(items, [[image], [category]], splits=splits)
    loaders = data.dataloaders(bs=8, shuffle=False, drop_last=False, num_workers=0)
    return loaders.to(torch.device("cpu"))


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def difference(a, b):
    """The largest relative difference of two state dicts of the same names."""
    assert a.keys() == b.keys()
    pairs = ((a[n].double(), b[n].double()) for n in a)
    return max(float((x - y).norm() / y.norm().clamp_min(1e-12)) for x, y in pairs)


def cross_entropy(pred, target):
    return F.cross_entropy(pred, target)
