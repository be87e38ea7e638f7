"""A module, data and the two ways to train them, shared by the Lightning tests."""

import itertools
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mosaic_core import Run
from mosaic_core.algorithms import EMA, BlurPool, LabelSmoothing, MixUp
from mosaic_core.loop import train_steps
from mosaic_lightning import MosaicCallback

STEPS = 20


def network():
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    )


def data(examples=160):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(examples, 3, 16, 16, generator=generator)
    return inputs, torch.randint(5, (examples,), generator=generator)


def loader(batch_size=8, examples=160):
    return DataLoader(TensorDataset(*data(examples)), batch_size=batch_size)


class Batches:
    """A loader of given batches that can go on in the middle of an epoch, as stateful ones do."""

    def __init__(self, batches):
        self.batches, self.position = list(batches), 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def recipe():
    return [EMA("2ba"), LabelSmoothing(0.1), MixUp(0.4), BlurPool()]


def module_class(pl):
    """Return an ordinary LightningModule of one of the two roots."""

    class Module(pl.LightningModule):
        def __init__(self, optimizer="sgd"):
            super().__init__()
            self.save_hyperparameters()
            self.net = network()
            self.seen = []

        def loss(self, batch):
            x, y = batch
            return F.cross_entropy(self.net(x), y)

        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            self.seen.append((batch[1], self.net[0].weight.detach().clone()))
            self.log("val_loss", self.loss(batch))

        test_step = validation_step

        def predict_step(self, batch, batch_idx):
            return self.net(batch[0])

        def configure_optimizers(self):
            if self.hparams.optimizer == "adamw":
                return torch.optim.AdamW(self.parameters(), lr=0.01)
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"},
            }

    return Module


def trainer(pl, callbacks=(), **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "max_epochs": -1,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def train_lightning(
    pl, algorithms, *, batch_size=8, optimizer="sgd", batches=None, seed=3, **options
):
    """Train with the Trainer; return the training weights, the averaged ones and the objects."""
    torch.manual_seed(0)
    module = module_class(pl)(optimizer)
    callback = MosaicCallback(algorithms, seed=seed)
    options = {"max_steps": STEPS, **options}
    fit = trainer(pl, [callback], **options)
    fit.fit(module, loader(batch_size) if batches is None else batches)
    averaged = clone(dict(module.named_parameters()))
    callback.run.leave_evaluation()
    weights = clone(module.state_dict())
    return SimpleNamespace(
        weights=weights, averaged=averaged, module=module, callback=callback, trainer=fit
    )


def train_plain(pl, algorithms, *, batch_size=8, optimizer="sgd", steps=STEPS, accumulate=1, **how):
    """Train with the plain loop on the same batches."""
    torch.manual_seed(0)
    module = module_class(pl)(optimizer).train()
    configured = module.configure_optimizers()
    scheduler = None
    if isinstance(configured, dict):
        scheduler = configured["lr_scheduler"]["scheduler"]
        configured = configured["optimizer"]
    run = Run(
        algorithms,
        model=module,
        optimizer=configured,
        total_steps=steps,
        seed=3,
        forward=lambda batch: module.loss(batch),
    )
    batches = itertools.islice(itertools.cycle(loader(batch_size)), steps * accumulate)
    train_steps(
        run,
        batches,
        lambda model, batch: model.loss(batch),
        accumulate=accumulate,
        scheduler=scheduler,
        **how,
    )
    weights = clone(module.state_dict())
    run.enter_evaluation()
    averaged = clone(dict(module.named_parameters()))
    return SimpleNamespace(weights=weights, averaged=averaged, run=run, module=module)


def clone(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def difference(a, b):
    """Return the largest relative difference of two sets of tensors."""
    names = [name for name in b if b[name].is_floating_point()]
    return max(
        ((a[name] - b[name]).norm() / b[name].norm().clamp_min(1e-12)).item() for name in names
    )
