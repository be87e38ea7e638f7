"""What errors are made of: their kinds, and the nearest known name."""

import pytest

from mosaic_core.errors import (
    BatchError,
    ConflictError,
    LossError,
    NoEffectWarning,
    UnsupportedError,
    nearest,
)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UnsupportedError, RuntimeError),
        (LossError, RuntimeError),
        (ConflictError, ValueError),
        (BatchError, LookupError),
        (NoEffectWarning, UserWarning),
    ],
)
def test_each_is_of_the_builtin_kind_that_people_catch(
    error: type[Exception], kind: type[Exception]
) -> None:
    assert issubclass(error, kind)
    assert error.__doc__


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("MixUpp", ["EMA", "MixUp"], "; did you mean 'MixUp'? Known: EMA, MixUp"),
        ("mixup", ["EMA", "MixUp"], "; did you mean 'MixUp'? Known: EMA, MixUp"),
        ("ema", {"EMA": 1, "MixUp": 2}, "; did you mean 'EMA'? Known: EMA, MixUp"),
        (
            "label_smoothing",
            ["LabelSmoothing"],
            "; did you mean 'LabelSmoothing'? Known: LabelSmoothing",
        ),
        ("zzz", ["MixUp", "EMA"], ". Known: EMA, MixUp"),
        ("zzz", [], ". Known: none"),
        (5, ["MixUp"], ". Known: MixUp"),
        (None, ["MixUp"], ". Known: MixUp"),
    ],
)
def test_nearest(name: object, known: list[str], message: str) -> None:
    assert nearest(name, known) == message
    assert nearest(name, iter(known)) == message
