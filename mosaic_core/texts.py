"""Text to train a character-level language model on: found, read and cut into windows."""

import functools
import struct
import zlib
from pathlib import Path

import torch

from mosaic_core.datasets import Data, MissingError, given_folders

__all__ = ["GROUP", "LENGTH", "TOKENS", "characters"]

LENGTH = 128  # characters that a window holds
GROUP = 128  # windows: of whole groups, any text makes an epoch that evaluations divide
TOKENS = 256  # a character is a byte of the UTF-8 form of the text, whatever its language

# Where Debian, and R itself, put the package janeaustenr.
_R_LIBRARIES = (
    "/usr/lib/R/site-library",
    "/usr/local/lib/R/site-library",
    "/usr/lib/R/library",
    "/usr/local/lib/R/library",
)


def characters(data_dir: Path | None) -> Data:
    """Read a text: its first nine tenths to train on, the rest to evaluate.

    Inputs are windows of the text, int64 ``(N, LENGTH)``, that do not overlap; labels, of the same
    shape, hold the character after each. Those to train on are as many whole groups of ``GROUP`` as
    there are.

    Args:
        data_dir: A UTF-8 text file, or a folder with ``char-lm.txt``. Without one in it or in
            ``MOSAIC_DATA``, the text is Jane Austen's Emma, from the R package janeaustenr.

    Raises:
        MissingError: If there is no text.
        ValueError: If it is too short, or not in UTF-8.
    """
    given = [p if p.is_file() else p / "char-lm.txt" for p in given_folders(data_dir)]
    text = next((path for path in given if path.is_file()), None)
    if text is not None:
        return _characters(text)
    books = [Path(folder) / "janeaustenr/data/Rdata.rdb" for folder in _R_LIBRARIES]
    book = next((path for path in books if path.is_file()), None)
    if book is None:
        raise MissingError(
            "mosaic: workload char-lm needs a text and found none; get one with"
            " apt install r-cran-janeaustenr (Jane Austen's novels), or set --data-dir or"
            " MOSAIC_DATA to a UTF-8 text file or to a folder with char-lm.txt"
        )
    return _characters(book)


@functools.lru_cache(maxsize=1)
def _characters(path: Path) -> Data:
    raw = "\n".join(_read_rdb(path)).encode() if path.suffix == ".rdb" else path.read_bytes()
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"mosaic: {path} must be text in UTF-8, got {error}") from error
    tokens = torch.frombuffer(bytearray(raw.replace(b"\r\n", b"\n")), dtype=torch.uint8).long()
    split = len(tokens) * 9 // 10
    parts = []
    for part, group in ((tokens[:split], GROUP), (tokens[split:], 1)):
        count = (len(part) - 1) // LENGTH // group * group
        if count < 1:
            least = -(-10 * (GROUP * LENGTH + 1) // 9)
            raise ValueError(
                f"mosaic: {path} must have at least {least} characters, got {len(tokens)}"
            )
        parts += [part[s : s + count * LENGTH].view(count, LENGTH) for s in (0, 1)]
    return Data(*parts)


def _read_rdb(path: Path) -> list[str]:
    """Read the first object of an R package's data, which must be a character vector.

    The file holds a big-endian size and a zlib stream per object, in R's XDR serialization: "X",
    a version, from the third on an encoding, and then items of flags, size and content.
    """
    raw = path.read_bytes()
    try:
        data = zlib.decompressobj().decompress(raw[4:])
        version = struct.unpack_from(">2xi", data)[0]
        at = 14
        if version == 3:
            at += 4 + struct.unpack_from(">i", data, at)[0]
        kind, count = struct.unpack_from(">ii", data, at)
        if data[:2] != b"X\n" or version not in (2, 3) or kind & 0xFF != 16:
            raise ValueError("something else")
        at += 8
        lines = []
        for _ in range(count):
            size = max(0, struct.unpack_from(">4xi", data, at)[0])  # a missing value has -1
            lines.append(struct.unpack_from(f"{size}s", data, at + 8)[0].decode())
            at += 8 + size
    except (zlib.error, struct.error, ValueError) as error:
        raise ValueError(
            f"mosaic: {path} must begin with a character vector of R, compressed with zlib,"
            f" got {error}"
        ) from error
    return lines
