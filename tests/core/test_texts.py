"""Windows of text, and R's file of a novel."""

import struct
import zlib

import pytest
import torch

from mosaic_core import texts
from mosaic_core.datasets import MissingError
from mosaic_core.texts import GROUP, LENGTH, characters


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "_R_LIBRARIES", (str(tmp_path / "library"),))
    monkeypatch.delenv("MOSAIC_DATA", raising=False)


def r_characters(lines, version=3):
    """Return what R serializes for a character vector, None for a missing value."""
    out = b"X\n" + struct.pack(">iii", version, 0x00040201, 0x00030500)
    if version == 3:
        out += struct.pack(">i", 5) + b"UTF-8"
    out += struct.pack(">ii", 16, len(lines))
    for line in lines:
        raw = None if line is None else line.encode()
        out += struct.pack(">ii", 0x00040009, -1 if raw is None else len(raw)) + (raw or b"")
    return out


def write_rdb(path, *objects):
    path.parent.mkdir(parents=True, exist_ok=True)
    records = (struct.pack(">i", len(o)) + zlib.compress(o) for o in objects)
    path.write_bytes(b"".join(records))


def test_windows_do_not_overlap_and_labels_come_one_later(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(50_000))
    path = tmp_path / "some text"
    path.write_text(text)
    data = characters(path)
    raw = torch.tensor(list(text.encode()))
    assert data.train_inputs.shape == data.train_labels.shape == (2 * GROUP, LENGTH)  # of 351
    assert data.eval_inputs.shape == (4999 // LENGTH, LENGTH)
    assert data.train_inputs.dtype == data.train_labels.dtype == torch.int64
    flat = data.train_inputs.flatten()
    assert torch.equal(flat, raw[: len(flat)])
    assert torch.equal(data.train_labels.flatten(), raw[1 : len(flat) + 1])
    # What is evaluated begins after the last label that is trained on.
    assert torch.equal(data.eval_inputs.flatten(), raw[45_000 : 45_000 + data.eval_inputs.numel()])
    assert len(flat) + 1 <= 45_000


def test_a_character_is_a_byte_in_any_language(tmp_path):
    (tmp_path / "char-lm.txt").write_bytes("Größe\r\n犬".encode() * 2000)
    data = characters(tmp_path)
    expected = list("Größe\n犬".encode())
    assert data.train_inputs[0, : len(expected)].tolist() == expected
    assert data.train_inputs.max() < texts.TOKENS


def test_the_environment_names_a_folder_too(tmp_path, monkeypatch):
    (tmp_path / "char-lm.txt").write_text("abc " * 5000)
    monkeypatch.setenv("MOSAIC_DATA", str(tmp_path))
    assert characters(None).train_inputs.shape == (GROUP, LENGTH)
    assert characters(tmp_path / "nothing here").train_inputs.shape == (GROUP, LENGTH)


@pytest.mark.parametrize("version", [2, 3])
def test_a_novel_is_read_without_r(tmp_path, version):
    lines = ["EMMA", "", None, "By Jane Austen", *(f"Line {n}: é." for n in range(2000))]
    emma = r_characters(lines, version)
    path = tmp_path / "library/janeaustenr/data/Rdata.rdb"
    write_rdb(path, emma, r_characters(["another novel"]))
    assert texts._read_rdb(path) == ["EMMA", "", "", *lines[3:]]
    begin = bytes(characters(None).train_inputs[0].tolist()).decode()
    assert begin.startswith("EMMA\n\n\nBy Jane Austen\nLine 0: é.\nLine 1")


@pytest.mark.parametrize(
    "object",
    [
        r_characters(["a", "b"])[:-1],  # cut off
        b"X\n" + struct.pack(">iiiii", 2, 0, 0, 13, 1) + bytes(4),  # integers
        b"A\n",
        r_characters(["a"], version=4),
    ],
    ids=["short", "integers", "ASCII", "a new version"],
)
def test_another_object_of_r_is_refused(tmp_path, object):
    write_rdb(tmp_path / "x.rdb", object)
    with pytest.raises(ValueError, match=r"x\.rdb must begin with a character vector of R"):
        characters(tmp_path / "x.rdb")
    (tmp_path / "x.rdb").write_bytes(b"\0\0\0\4BZh9nothing")
    with pytest.raises(ValueError, match=r"x\.rdb must begin with a character vector of R"):
        characters(tmp_path / "x.rdb")


def test_a_text_that_will_not_do_is_refused(tmp_path):
    path = tmp_path / "char-lm.txt"
    path.write_text("too short")
    with pytest.raises(ValueError, match="must have at least 18206 characters, got 9"):
        characters(path)
    path.write_text("a" * 18_205)
    with pytest.raises(ValueError, match="must have at least 18206 characters, got 18205"):
        characters(path)
    (tmp_path / "enough.txt").write_text("a" * 18_206)
    assert characters(tmp_path / "enough.txt").train_inputs.shape == (GROUP, LENGTH)
    path.write_bytes(b"\xff\xfe" * 1000)
    with pytest.raises(ValueError, match="must be text in UTF-8, got"):
        characters(path)


def test_a_missing_text_is_told_in_a_line(tmp_path):
    with pytest.raises(
        MissingError, match=r"apt install r-cran-janeaustenr .*--data-dir"
    ) as caught:
        characters(tmp_path)
    assert "\n" not in str(caught.value)
