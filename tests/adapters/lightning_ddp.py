"""One rank of a two-rank DDP training; run as a script, which Lightning launches a second time."""

import sys

import pytorch_lightning as pl
import torch
from lightning_common import STEPS, clone, data, module_class, recipe, trainer
from torch.utils.data import DataLoader, Subset, TensorDataset

from mosaic_core.algorithms import SAM
from mosaic_lightning import MosaicCallback

BATCH = 4
RECIPES = {"one pass": recipe(), "two passes": [*recipe(), SAM()]}


def shard(rank, examples=160):
    """Return the examples of one rank, in order."""
    return DataLoader(
        Subset(TensorDataset(*data(examples)), range(rank, examples, 2)), batch_size=BATCH
    )


class Shards(pl.LightningDataModule):
    def train_dataloader(self):
        return shard(self.trainer.global_rank)


def main(path):
    results = {}
    for name, algorithms in RECIPES.items():
        torch.manual_seed(0)
        module, callback = module_class(pl)(), MosaicCallback(algorithms, seed=3)
        fit = trainer(
            pl,
            [callback],
            strategy="ddp",
            devices=2,
            max_steps=STEPS,
            accumulate_grad_batches=2,
            use_distributed_sampler=False,
        )
        fit.fit(module, datamodule=Shards())
        averaged = clone(dict(module.named_parameters()))
        callback.run.leave_evaluation()
        weights = clone(dict(module.named_parameters()))
        results[name] = {"averaged": averaged, "weights": weights}
    torch.save(results, f"{path}.{fit.global_rank}")


if __name__ == "__main__":
    main(sys.argv[1])
