"""Durations and how far a run has come."""

import pytest

from mosaic_core.progress import Duration, Progress


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("0.3dur", 0.3, "dur"),
        ("0.0dur", 0, "dur"),
        ("1dur", 1, "dur"),
        (".5dur", 0.5, "dur"),
        ("2ep", 2, "ep"),
        ("0.5ep", 0.5, "ep"),
        ("500ba", 500, "ba"),
        ("1e3ba", 1000, "ba"),
        ("10000sp", 10_000, "sp"),
        ("1e6tok", 1e6, "tok"),
        ("1E+6TOK", 1e6, "tok"),
        ("2.5e-1dur", 0.25, "dur"),
        ("  7 ba ", 7, "ba"),
        ("3EP", 3, "ep"),
    ],
)
def test_parse(text: str, value: float, unit: str) -> None:
    duration = Duration.parse(text)
    assert (duration.value, duration.unit) == (value, unit)
    assert Duration.parse(str(duration)) == duration


def test_a_duration_parses_to_itself() -> None:
    duration = Duration(3, "ep")
    assert Duration.parse(duration) is duration
    assert str(duration) == "3ep"


@pytest.mark.parametrize(
    "text",
    [
        *("", "ba", "5", 5, 0.5, None, "five ba", "5 batches", "5it", "-1ba", "1.2.3ba", ".ba"),
        *("ba5", "5ba 3ep", "1e", "1e6", "nanba", "infep", "5 b a", "0x5ba"),
    ],
)
def test_a_text_that_is_no_duration_lists_the_units(text: object) -> None:
    with pytest.raises(ValueError, match=r"^Duration must be a number and a unit of dur \(") as e:
        Duration.parse(text)  # type: ignore[arg-type]  # what is not a text is refused alike
    for unit in ("dur", "ep", "ba", "sp", "tok"):
        assert f"{unit} (" in str(e.value)
    assert str(e.value).endswith(f"got {text!r}")


def test_the_argument_opens_the_message() -> None:
    with pytest.raises(ValueError, match=r"^EMA: half_life must be a number and a unit of"):
        Duration.parse("soon", "EMA: half_life")
    with pytest.raises(ValueError, match=r"^EMA: ema_start must be at most 1dur, .*got '1.5dur'"):
        Duration.parse("1.5dur", "EMA: ema_start")


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_a_duration_is_finite_and_not_negative(value: float) -> None:
    with pytest.raises(ValueError, match=r"Duration: value must be finite and at least 0, got"):
        Duration(value, "ba")


def test_a_duration_of_an_unknown_unit() -> None:
    with pytest.raises(ValueError, match=r"Duration: unit must be one of dur, ep, ba, .*'weeks'"):
        Duration(1, "weeks")


def test_a_duration_too_large_for_a_float() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        Duration.parse("1e999ba")


# Progress.


@pytest.mark.parametrize(
    ("text", "steps"), [("0.3dur", 60), ("1dur", 200), ("2ep", 100), ("0.5ep", 25), ("7ba", 7)]
)
def test_steps(text: str, steps: float) -> None:
    progress = Progress(total_steps=200, steps_per_epoch=50)
    assert progress.steps(Duration.parse(text)) == pytest.approx(steps)


@pytest.mark.parametrize(("text", "total"), [("0.07dur", 100), ("0.28dur", 25), ("0.7dur", 90)])
def test_a_fraction_that_is_a_whole_number_of_steps_is_one(text: str, total: int) -> None:
    """As floats, 0.07 * 100 is more than 7 and 0.7 * 90 less than 63."""
    duration, just = Duration.parse(text), round(float(text[:-3]) * total)
    assert Progress(total_steps=total).steps(duration) == just
    assert not Progress(total_steps=total, step=just - 1).reached(duration)
    assert Progress(total_steps=total, step=just).reached(duration)
    assert Progress(total_steps=100).steps(Duration.parse("1e-9dur")) == pytest.approx(1e-7)


@pytest.mark.parametrize("text", ["10sp", "1e6tok"])
def test_samples_and_tokens_have_no_fixed_number_of_steps(text: str) -> None:
    with pytest.raises(ValueError, match=r"Progress: .* has no fixed number of steps; use ba, ep"):
        Progress(total_steps=200, steps_per_epoch=50).steps(Duration.parse(text))


@pytest.mark.parametrize(
    ("text", "attribute", "just"),
    [
        ("0.25dur", "step", 50),
        ("10ba", "step", 10),
        ("0.5ep", "step", 25),
        ("1.5ep", "step", 75),
        ("2ep", "epoch", 2),
        ("640sp", "samples", 640),
        ("1e3tok", "tokens", 1000),
    ],
)
def test_reached_exactly_when_it_is(text: str, attribute: str, just: int) -> None:
    duration = Duration.parse(text)
    progress = Progress(total_steps=200, steps_per_epoch=50)
    assert not progress.reached(duration)
    setattr(progress, attribute, just - 1)
    assert not progress.reached(duration)
    setattr(progress, attribute, just)
    assert progress.reached(duration)
    setattr(progress, attribute, just + 1)
    assert progress.reached(duration)


@pytest.mark.parametrize("unit", ["dur", "ep", "ba", "sp", "tok"])
def test_nothing_is_reached_at_once_even_where_no_length_is_known(unit: str) -> None:
    assert Progress().reached(Duration(0, unit))


def test_whole_epochs_need_no_length() -> None:
    assert Progress(epoch=2).reached(Duration.parse("2ep"))
    assert not Progress(epoch=1, step=10_000).reached(Duration.parse("2ep"))


def test_fraction() -> None:
    assert Progress(total_steps=200).fraction == 0
    assert Progress(step=50, total_steps=200).fraction == 0.25
    assert Progress(step=200, total_steps=200).fraction == 1
    assert Progress(step=300, total_steps=200).fraction == 1  # a trainer that goes on


@pytest.mark.parametrize("total", [None, 0])
def test_an_unknown_length_says_what_to_give(total: int | None) -> None:
    progress = Progress(total_steps=total, steps_per_epoch=total)
    message = r"Progress: {} must be known for durations in dur or ep, got {}; give the run a fixed"
    with pytest.raises(ValueError, match=message.format("total_steps", total)):
        _ = progress.fraction
    with pytest.raises(ValueError, match=message.format("total_steps", total)):
        progress.reached(Duration.parse("0.5dur"))
    with pytest.raises(ValueError, match=message.format("total_steps", total)):
        progress.steps(Duration.parse("0.5dur"))
    with pytest.raises(ValueError, match=message.format("steps_per_epoch", total)):
        progress.reached(Duration.parse("0.5ep"))
    with pytest.raises(ValueError, match=message.format("steps_per_epoch", total)):
        progress.steps(Duration.parse("1ep"))
