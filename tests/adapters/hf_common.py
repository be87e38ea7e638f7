"""Tiny transformers made from configurations, data for them, and ways to train them."""

import contextlib
import logging
from types import SimpleNamespace

import torch
import transformers as hf
from torch import nn
from torch.utils.data import Dataset

from mosaic_core import Run
from mosaic_hf import MosaicCallback

logging.getLogger("transformers").setLevel(logging.ERROR)

CLASSES, VOCABULARY, STEPS = 5, 40, 6
IMAGES, SEQUENCES, CAUSAL = ("vit", "resnet"), ("bert",), ("gpt2", "llama")


def make(name, dropout=0.0):
    """Return a model with the same weights every time."""
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "vit":
            config = hf.ViTConfig(
                **small,
                intermediate_size=32,
                image_size=8,
                patch_size=4,
                num_labels=CLASSES,
                hidden_dropout_prob=dropout,
            )
            return hf.ViTForImageClassification(config)
        if name == "resnet":
            config = hf.ResNetConfig(
                embedding_size=16,
                hidden_sizes=[16, 16],
                depths=[1, 1],
                layer_type="basic",
                num_labels=CLASSES,
            )
            return hf.ResNetForImageClassification(config)
        if name == "bert":
            config = hf.BertConfig(
                **small,
                intermediate_size=32,
                vocab_size=VOCABULARY,
                num_labels=CLASSES,
                max_position_embeddings=16,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
            )
            return hf.BertForSequenceClassification(config)
        if name == "gpt2":
            drop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
            config = hf.GPT2Config(
                n_embd=16, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=16, **drop
            )
            config.bos_token_id = config.eos_token_id = 0
            return hf.GPT2LMHeadModel(config)
        config = hf.LlamaConfig(
            **small,
            num_key_value_heads=1,
            intermediate_size=32,
            vocab_size=VOCABULARY,
            max_position_embeddings=16,
        )
        return hf.LlamaForCausalLM(config)


class Data(Dataset):
    """Examples for one of the models; texts have ignored positions, differently many each."""

    def __init__(self, name, count=32, dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.items = []
        for i in range(count):
            image = torch.randn(3, 8, 8, generator=g).to(dtype)
            text, label = (
                torch.randint(VOCABULARY, (10,), generator=g),
                torch.randint(5, (), generator=g),
            )
            if name in IMAGES:
                self.items.append({"pixel_values": image, "labels": label})
            elif name in CAUSAL:
                labels = text.where(torch.arange(10) >= i % 5, -100)
                self.items.append({"input_ids": text, "labels": labels})
            else:
                self.items.append({"input_ids": text, "labels": label})

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def batches(self, size=4):
        """Return the batches in the order of a sequential loader."""
        return [
            {k: torch.stack([item[k] for item in self.items[i : i + size]]) for k in self.items[0]}
            for i in range(0, len(self), size)
        ]


def trainer(model, data, folder, callbacks=(), cls=hf.Trainer, objects=None, **options):
    """Return a Trainer with plain SGD, unless the options say otherwise."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "learning_rate": 0.02,
        "optim": "sgd",
        "max_grad_norm": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    args = hf.TrainingArguments(**{**defaults, **options})
    given = {"model_init": model} if callable(model) and not isinstance(model, nn.Module) else {}
    given = given or {"model": model}
    return cls(**given, args=args, train_dataset=data, callbacks=list(callbacks), **(objects or {}))


def fit(name, algorithms, folder, *, dtype=torch.float32, seed=3, **options):
    """Train one of the models; return the training weights, the averaged ones and the objects."""
    model = make(name).to(dtype)
    callback = None if algorithms is None else MosaicCallback(algorithms, seed=seed)
    t = trainer(model, Data(name, dtype=dtype), folder, [callback] if callback else [], **options)
    t.train()
    averaged = clone(dict(t.model.named_parameters()))
    if callback:
        callback.run.leave_evaluation()
    return SimpleNamespace(
        weights=clone(t.model.state_dict()), averaged=averaged, trainer=t, callback=callback
    )


def by_hand(name, algorithms, loss, *, dtype=torch.float32, accumulate=1, steps=STEPS):
    """Train with a loop and a loss written out; the loss is ``loss(logits, labels, items)``."""
    model = make(name).to(dtype).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    run = Run(algorithms, model=model, optimizer=optimizer, total_steps=steps, seed=3)
    batches = Data(name, dtype=dtype).batches()
    for step in range(steps):
        window = [batches[(step * accumulate + i) % len(batches)] for i in range(accumulate)]
        # What the Trainer 5.24 divides by: GPT-2's class says of its loss not that it shifts the
        # labels, and ResNet and BERT take the number of items and then use their own mean.
        labels = [b["labels"][:, 1:] if name == "llama" else b["labels"] for b in window]
        items = sum(int((label != -100).sum()) for label in labels)
        for batch in window:
            if name in ("resnet", "bert"):
                items = len(batch["labels"])
            inputs = dict(run.on_batch(batch))
            loss(model(**inputs | {"labels": None}).logits, inputs["labels"], items).backward()
        run.on_gradients()
        optimizer.step()
        run.end_step()
        optimizer.zero_grad()
    return SimpleNamespace(weights=clone(model.state_dict()), model=model, run=run)


def clone(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def difference(a, b):
    """Return the largest relative difference of two sets of tensors."""
    names = [name for name in b if b[name].is_floating_point()]
    return max(
        ((a[name] - b[name]).norm() / b[name].norm().clamp_min(1e-9)).item() for name in names
    )


@contextlib.contextmanager
def unchanged(model):
    """Check that the weights of a model are in the end what they were."""
    before = clone(model.state_dict())
    yield
    assert difference(clone(model.state_dict()), before) == 0
