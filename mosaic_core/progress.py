"""How far a run has come, and durations such as ``"500ba"`` to compare it with."""

import math
import re
from dataclasses import dataclass

__all__ = ["Duration", "Progress"]

_UNITS = {
    "dur": "fraction of the whole run",
    "ep": "epochs",
    "ba": "optimizer steps",
    "sp": "samples",
    "tok": "tokens",
}
_PATTERN = re.compile(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*(dur|ep|ba|sp|tok)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Duration:
    """An amount of training: ``"0.3dur"``, ``"2ep"``, ``"500ba"``, ``"10000sp"``, ``"1e6tok"``.

    Args:
        value: Amount, at least 0; in texts at most 1 for the unit ``dur``.
        unit: ``dur`` (fraction of the whole run), ``ep`` (epochs), ``ba`` (optimizer steps),
            ``sp`` (samples over all ranks) or ``tok`` (tokens over all ranks).

    Raises:
        ValueError: If the amount is negative or not finite, or the unit is unknown.
    """

    value: float
    unit: str

    def __post_init__(self) -> None:
        """Check the amount and the unit."""
        if not (self.value >= 0 and math.isfinite(self.value)):
            raise ValueError(f"Duration: value must be finite and at least 0, got {self.value}")
        if self.unit not in _UNITS:
            raise ValueError(
                f"Duration: unit must be one of {', '.join(_UNITS)}, got {self.unit!r}"
            )

    @classmethod
    def parse(cls, text: "str | Duration", where: str = "Duration") -> "Duration":
        """Read a duration.

        Args:
            text: A duration, or its text.
            where: The argument it was given for, to open the error message.

        Raises:
            ValueError: If the text is not a number followed by a unit, or a fraction exceeds 1.

        Example:
            >>> Duration.parse("1e3ba")
            Duration(value=1000.0, unit='ba')
        """
        if isinstance(text, Duration):
            return text
        match = _PATTERN.fullmatch(str(text))
        try:
            value = float(match.group(1)) if match else None
        except ValueError:  # such as "1.2.3ba"
            value = None
        if match is None or value is None:
            units = ", ".join(f"{unit} ({meaning})" for unit, meaning in _UNITS.items())
            raise ValueError(f"{where} must be a number and a unit of {units}, got {text!r}")
        if match.group(2).lower() == "dur" and value > 1:
            raise ValueError(f"{where} must be at most 1dur, the whole run, got {text!r}")
        return cls(value, match.group(2).lower())

    def __str__(self) -> str:
        return f"{self.value:g}{self.unit}"


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: Optimizer steps taken, those a gradient scaler skipped included.
        epoch: Epochs completed.
        micro_batch: Batches seen since the last optimizer step.
        samples: Samples seen over all ranks, counted when the recipe reads the batch.
        tokens: Tokens seen over all ranks: the elements of integer inputs.
        total_steps: Optimizer steps of the whole run, or None when the trainer cannot tell.
        steps_per_epoch: Optimizer steps of an epoch, or None when the trainer cannot tell.
    """

    step: int = 0
    epoch: int = 0
    micro_batch: int = 0
    samples: int = 0
    tokens: int = 0
    total_steps: int | None = None
    steps_per_epoch: int | None = None

    @property
    def fraction(self) -> float:
        """Share of the whole run that is done, in [0, 1].

        Raises:
            ValueError: If the length of the run is unknown.
        """
        return min(1.0, self.step / self._known("total_steps"))

    def steps(self, duration: Duration) -> float:
        """Convert a duration to optimizer steps.

        Raises:
            ValueError: If that needs a length the trainer could not tell, or counts samples
                or tokens, whose number per step is not fixed.
        """
        if duration.unit == "ba":
            return duration.value
        if duration.unit == "dur":
            return _product(duration.value, self._known("total_steps"))
        if duration.unit == "ep":
            return _product(duration.value, self._known("steps_per_epoch"))
        raise ValueError(f"Progress: {duration} has no fixed number of steps; use ba, ep or dur")

    def reached(self, duration: Duration) -> bool:
        """Tell whether at least this much training is done."""
        if duration.value == 0:
            return True
        if duration.unit == "sp":
            return self.samples >= duration.value
        if duration.unit == "tok":
            return self.tokens >= duration.value
        if duration.unit == "ep" and duration.value == int(duration.value):
            return self.epoch >= duration.value
        return self.step >= self.steps(duration)

    def _known(self, name: str) -> int:
        value: int | None = getattr(self, name)
        if not value:
            raise ValueError(
                f"Progress: {name} must be known for durations in dur or ep, got {value}; give the"
                " run a fixed length (a number of steps, or epochs over a loader with a length),"
                " or write the duration in ba"
            )
        return value


def _product(share: float, steps: int) -> float:
    """Multiply; 0.07 * 100, which floats take for a little more, is 7."""
    return round(share * steps, 6) or share * steps
