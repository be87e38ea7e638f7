"""An ordered, checked composition of algorithms."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mosaic_core.algorithm import Algorithm, Need
from mosaic_core.errors import ConflictError, nearest

__all__ = ["Recipe"]


class Recipe:
    """Algorithms in the order in which they act.

    The order follows each algorithm's place: surgery, then the batch (selection, augmentation,
    mixing, smoothing, memory layout), then gradients, then weights. Within a place the given order
    holds.

    Args:
        algorithms: Algorithms in any order, or a recipe.

    Raises:
        TypeError: If something in it is not an algorithm.
        ConflictError: If an algorithm is in it twice, or two exclude each other or would both
            choose the weights to evaluate.

    Example:
        >>> from mosaic_core.algorithms import LabelSmoothing, MixUp
        >>> Recipe([LabelSmoothing(), MixUp(alpha=0.4)])
        Recipe([MixUp(alpha=0.4), LabelSmoothing(smoothing=0.1)])
    """

    def __init__(self, algorithms: "Iterable[Algorithm] | Recipe | None" = ()) -> None:
        if isinstance(algorithms, str | Algorithm | type):
            read = ""
            if isinstance(algorithms, str):
                read = "; read a recipe with Recipe.from_yaml(Path('recipe.yaml'))"
            raise TypeError(
                f"Recipe: algorithms must be a list of algorithms, got {algorithms!r}{read}"
            )
        given = [] if algorithms is None else list(algorithms)
        for item in given:
            if not isinstance(item, Algorithm):
                home = type(item).__module__  # a trainer may have one of the same name
                hint = "" if home == "builtins" else f", of {home}"
                if isinstance(item, type) and issubclass(item, Algorithm):
                    hint = f"; write {item.__name__}()"
                raise TypeError(f"Recipe: every member must be an algorithm, got {item!r}{hint}")
        self.algorithms: tuple[Algorithm, ...] = tuple(sorted(given, key=lambda a: a.place))
        names = [a.name for a in self.algorithms]
        for name in names:
            if names.count(name) > 1:
                raise ConflictError(f"Recipe: {name} is in it {names.count(name)} times; keep one")
        self.check({name: f"{name} in the recipe" for name in names})
        self._check_second_pass()
        averaging = [a.name for a in self.algorithms if a.acts_at("evaluation_weights")]
        if len(averaging) > 1:
            raise ConflictError(
                f"Recipe: {' and '.join(averaging)} would each choose the weights to evaluate;"
                " keep one"
            )

    def _check_second_pass(self) -> None:
        twice = [a.name for a in self.algorithms if Need.SECOND_PASS in a.needs()]
        for algorithm in self.algorithms:
            if twice and algorithm.draws_in_forward:
                raise ConflictError(
                    f"Recipe: {algorithm.name} can't be combined with {twice[0]}: a second pass"
                    " would not repeat what it draws for each micro-batch; remove one"
                )

    def check(self, features: Mapping[str, str]) -> None:
        """Refuse features beside this recipe that contradict an algorithm in it.

        Args:
            features: Names an algorithm may exclude, with words for where each was found.

        Raises:
            ConflictError: If an algorithm excludes one of them.
        """
        for algorithm in self.algorithms:
            for feature in sorted(algorithm.excludes & features.keys()):
                raise ConflictError(
                    f"Recipe: {algorithm.name} can't be combined with {features[feature]}: both"
                    " would act on the same thing; remove one"
                )

    def explain(self) -> str:
        """Say in which order the algorithms act, a line each with the reason."""
        lines = [
            f"{i}. {a.name}: {a.place.name.lower()}" for i, a in enumerate(self.algorithms, start=1)
        ]
        return "\n".join(lines) or "an empty recipe"

    def brief(self) -> str:
        """Return the recipe in a line: names, and the settings that are not the default."""
        texts = []
        for algorithm in self:
            changed = (
                f"{field.name}={algorithm.settings[field.name]!r}"
                for field in dataclasses.fields(algorithm)  # type: ignore[arg-type]  # a dataclass
                if algorithm.settings[field.name] != field.default
            )
            texts.append(f"{algorithm.name}({', '.join(changed)})")
        return ", ".join(texts) or "no algorithm"

    # YAML.

    def to_yaml(self) -> str:
        """Write the recipe: a list of names with their settings.

        Raises:
            TypeError: If a setting is nothing that YAML can hold, such as a function.
        """
        entries = [{a.name: a.settings} if a.settings else a.name for a in self.algorithms]
        try:
            return yaml.dump(entries, Dumper=_Dumper, sort_keys=False)
        except yaml.representer.RepresenterError as error:
            raise TypeError(
                "Recipe.to_yaml: settings must be numbers, texts, booleans, None, or lists and"
                f" mappings of them, got {error.args[-1]!r} in {self!r}"
            ) from error

    @classmethod
    def from_yaml(cls, source: "str | Path") -> "Recipe":
        """Read a recipe from YAML text or from a file.

        Args:
            source: A path, or the text: a list whose entries are names, or one name with settings.

        Raises:
            ValueError: If it is not such a list, or a setting is out of range.
            TypeError: If a setting is missing or of another type.
            LookupError: If an algorithm or a setting is unknown; the nearest name is suggested.

        Example:
            >>> Recipe.from_yaml("[MixUp: {alpha: 0.4}, LabelSmoothing]")
            Recipe([MixUp(alpha=0.4), LabelSmoothing(smoothing=0.1)])
        """
        text = source.read_text() if isinstance(source, Path) else source
        try:
            entries = yaml.load(text, Loader=_Loader)  # a safe one
        except yaml.YAMLError as error:
            raise ValueError(f"Recipe.from_yaml: not valid YAML: {error}") from error
        if not isinstance(entries, list):
            hint = "nothing; write [] for an empty one"
            if entries is not None:
                hint = f"{type(entries).__name__}: {text[:80]!r}"
            if isinstance(entries, str):
                hint += "; to read a file, give a pathlib.Path"
            raise ValueError(f"Recipe.from_yaml: a recipe must be a list of algorithms, got {hint}")
        return cls([_algorithm(entry) for entry in entries])

    def __iter__(self) -> Iterator[Algorithm]:
        return iter(self.algorithms)

    def __len__(self) -> int:
        return len(self.algorithms)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.algorithms == other.algorithms

    def __hash__(self) -> int:
        return hash(self.algorithms)

    def __repr__(self) -> str:
        return f"Recipe([{', '.join(map(repr, self.algorithms))}])"


class _Loader(yaml.SafeLoader):
    """Reads ``1e-3`` as a number, as everybody but YAML 1.1 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+"), list("-+0123456789")
)


class _Dumper(yaml.SafeDumper):
    """Writes NumPy's numbers, as hyper-parameter searches yield them, as plain ones."""


_Dumper.add_multi_representer(
    np.generic,  # type: ignore[type-abstract]  # types-PyYAML forbids it, PyYAML does not
    lambda dumper, value: dumper.represent_data(value.item()),
)


def _algorithm(entry: Any) -> Algorithm:
    # Late, so that the plugins, which import the algorithms, may themselves use recipes.
    from mosaic_core.plugins import algorithms

    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ValueError(
            f"Recipe.from_yaml: an entry must be a name, or one name with settings, got {entry!r}"
        )
    name, settings = next(iter(entry.items()))
    known = algorithms()
    if name not in known:
        raise LookupError(f"Recipe.from_yaml: unknown algorithm {name!r}{nearest(name, known)}")
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(
            f"Recipe.from_yaml: settings of {name} must be a mapping, got {settings!r}"
        )
    settings = settings or {}
    fields = known[name].__dataclass_fields__  # type: ignore[attr-defined]  # a dataclass
    for key in settings:
        if key not in fields:
            raise LookupError(
                f"Recipe.from_yaml: {name} has no setting {key!r}{nearest(key, fields)}"
            )
    try:
        return known[name](**settings)
    except TypeError as error:  # one is missing, or of another type
        raise TypeError(f"Recipe.from_yaml: {name} with settings {settings!r}: {error}") from error
