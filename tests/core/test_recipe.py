"""Order, conflicts and YAML of recipes."""

import itertools
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mosaic_core import Algorithm, ConflictError, Place, Recipe, Run, plugins
from mosaic_core.algorithms import (
    EMA,
    Backdrop,
    BlurPool,
    ChannelsLast,
    LabelSmoothing,
    MixUp,
    NoOp,
)

DEMO = [ChannelsLast(), BlurPool(), MixUp(alpha=0.2), LabelSmoothing(0.1), EMA("100ba")]
ORDERED = [BlurPool(), MixUp(alpha=0.2), LabelSmoothing(0.1), ChannelsLast(), EMA("100ba")]

# Settings an algorithm can't do without, and others that YAML could get wrong.
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "Backdrop": [
        {"layers": "layer4"},
        {"layers": ["layer3", "blocks.*.mlp"], "p": 0.25, "mode": "patch", "patch_size": 3},
    ],
    "BlurPool": [{}, {"replace_convs": False, "blur_first": False, "min_channels": 1}],
    "EMA": [
        {},
        {"half_life": "2ep", "update_interval": "1ep", "ema_start": "0.5dur"},
        {"smoothing": 0.999, "recompute_batchnorm": 3},
    ],
    "LabelSmoothing": [{}, {"smoothing": 0}, {"smoothing": 1e-7}],
    "MixUp": [{}, {"alpha": 1}, {"alpha": 1e20}],
}
CASES = [
    pytest.param(cls, settings, id=f"{name}-{i}")
    for name, cls in plugins.algorithms().items()
    for i, settings in enumerate(EXAMPLES.get(name, [cls.example().settings]))
]


@dataclass(frozen=True)
class Placed(Algorithm):
    """Stands wherever it is put."""

    label: Any = ""
    place = Place.SURGERY  # type: ignore[assignment]  # a property in subclasses


def algorithm(name: str, where: Place, **members: Any) -> Algorithm:
    """Make an algorithm of a class of its own."""
    cls = type(name, (Placed,), {"place": where, **members})
    return cls()


# Order.


@pytest.mark.parametrize("given", list(itertools.permutations(DEMO)), ids=lambda _: "")
def test_the_order_is_by_place_whatever_the_given_order(given: tuple[Algorithm, ...]) -> None:
    assert list(Recipe(given)) == ORDERED


def test_places_run_from_structure_to_measuring() -> None:
    names = [place.name for place in sorted(Place)]
    assert names == [
        *("STRUCTURE", "SURGERY", "SELECTION", "AUGMENTATION", "MIXING", "SMOOTHING", "LAYOUT"),
        *("GRADIENTS", "WEIGHTS", "MEASURING"),
    ]
    every = [algorithm(place.name.title(), place) for place in reversed(Place)]
    assert [a.place for a in Recipe(every)] == sorted(Place)


def test_within_a_place_the_given_order_holds() -> None:
    a, b, c = (algorithm(name, Place.GRADIENTS) for name in "ABC")
    first, last = algorithm("First", Place.SURGERY), algorithm("Last", Place.WEIGHTS)
    for given in itertools.permutations([a, b, c]):
        one, two, three = given
        assert list(Recipe([last, one, two, first, three])) == [first, *given, last]


def test_a_recipe_of_a_recipe_is_equal() -> None:
    recipe = Recipe(DEMO)
    assert Recipe(recipe) == recipe
    assert Recipe(iter(DEMO)) == recipe
    assert len(recipe) == 5


@pytest.mark.parametrize("nothing", [None, [], (), {}, Recipe()])
def test_an_empty_recipe(nothing: Any) -> None:
    recipe = Recipe(nothing)
    assert len(recipe) == 0
    assert recipe == Recipe()
    assert recipe.explain() == "an empty recipe"
    assert repr(recipe) == "Recipe([])"
    assert recipe.to_yaml() == "[]\n"


def test_explain_says_the_order_and_why() -> None:
    assert Recipe(DEMO).explain().splitlines() == [
        "1. BlurPool: surgery",
        "2. MixUp: mixing",
        "3. LabelSmoothing: smoothing",
        "4. ChannelsLast: layout",
        "5. EMA: weights",
    ]


def test_equality_hash_and_repr() -> None:
    one, other = Recipe(DEMO), Recipe(reversed(DEMO))
    assert one == other
    assert hash(one) == hash(other)
    assert len({one, other, Recipe()}) == 2
    assert one != Recipe(DEMO[:-1])
    assert one != Recipe([*DEMO[:-1], EMA("99ba")])
    assert one != list(one)
    assert repr(Recipe([MixUp(0.3)])) == "Recipe([MixUp(alpha=0.3)])"
    assert hash(Recipe([Backdrop(layers=["a", "b"])])) == hash(Recipe([Backdrop(("a", "b"))]))


# What is refused.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([MixUp], r"Recipe: every member must be an algorithm, got <class .*>; write MixUp\(\)$"),
        ([MixUp(), "EMA"], r"Recipe: every member must be an algorithm, got 'EMA'$"),
        ([None], r"Recipe: every member must be an algorithm, got None$"),
        ([[MixUp()]], r"Recipe: every member must be an algorithm, got \[MixUp\(alpha=0.2\)\]$"),
        ([torch.nn.ReLU], r"Recipe: every member must be an algorithm, got <class .*ReLU'>$"),
        ([torch.nn.ReLU()], r"Recipe: every member .*, got ReLU\(\), of torch.nn.modules.activ"),
        (MixUp(), r"Recipe: algorithms must be a list of algorithms, got MixUp\(alpha=0.2\)$"),
        (MixUp, r"Recipe: algorithms must be a list of algorithms, got <class"),
        (
            "MixUp",
            r"Recipe: algorithms must be a list of algorithms, got 'MixUp'; read .*yaml",
        ),
    ],
)
def test_what_is_no_algorithm_is_refused(given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Recipe(given)


def test_the_base_class_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"Algorithm is abstract: use one of mosaic_core.algorithms"
    ):
        Algorithm()


def test_duplicates_are_refused() -> None:
    with pytest.raises(ConflictError, match=r"^Recipe: MixUp is in it 2 times; keep one$"):
        Recipe([MixUp(0.1), LabelSmoothing(), MixUp(0.2)])


@pytest.mark.parametrize("flip", [False, True])
def test_algorithms_that_exclude_each_other_are_refused(flip: bool) -> None:
    one = algorithm("One", Place.MIXING, excludes=frozenset({"Two", "absent"}))
    two = algorithm("Two", Place.SMOOTHING)
    given = [two, one] if flip else [one, two]
    with pytest.raises(
        ConflictError,
        match=r"^Recipe: One can't be combined with Two in the recipe: both would act on the same"
        r" thing; remove one$",
    ):
        Recipe(given)
    assert len(Recipe([one])) == 1


def test_two_choices_of_evaluation_weights_are_refused() -> None:
    other = algorithm("Polyak", Place.WEIGHTS, evaluation_weights=lambda self, run: None)
    with pytest.raises(
        ConflictError,
        match=r"^Recipe: EMA and Polyak would each choose the weights to evaluate; keep one$",
    ):
        Recipe([EMA(), other])


@pytest.mark.parametrize(
    ("member", "feature"),
    [
        (LabelSmoothing(), "trainer label smoothing"),
        (MixUp(), "trainer mixing"),
        (EMA(), "trainer weight averaging"),
        (EMA(), "SWA"),
    ],
)
def test_features_of_a_trainer_are_refused_by_name(member: Algorithm, feature: str) -> None:
    recipe = Recipe([NoOp(), member])
    features = {"harmless": "harmless=1", feature: "an_argument=0.1 of the trainer"}
    with pytest.raises(
        ConflictError,
        match=rf"^Recipe: {member.name} can't be combined with an_argument=0.1 of the trainer: ",
    ):
        recipe.check(features)
    recipe.check({"harmless": "harmless=1"})
    Recipe([NoOp()]).check(features)


# YAML.


@pytest.mark.parametrize(("cls", "settings"), CASES)
def test_yaml_round_trip_of_every_registered_algorithm(
    cls: type[Algorithm], settings: dict[str, Any]
) -> None:
    recipe = Recipe([cls(**settings)])
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert again.to_yaml() == recipe.to_yaml()
    for mine, theirs in zip(recipe, again, strict=True):
        for f in fields(mine):
            assert type(getattr(mine, f.name)) is type(getattr(theirs, f.name))


def test_every_registered_algorithm_is_in_a_round_trip() -> None:
    assert {case.values[0] for case in CASES} == set(plugins.algorithms().values())
    assert {MixUp, EMA, NoOp} <= set(plugins.algorithms().values())


def test_yaml_as_people_write_it() -> None:
    recipe = Recipe.from_yaml(
        """
        # strong regularisation
        - EMA: {half_life: 100ba}
        - MixUp:
            alpha: 0.4
        - BlurPool:
        - LabelSmoothing
        """
    )
    assert list(recipe) == [BlurPool(), MixUp(0.4), LabelSmoothing(), EMA("100ba")]


def test_yaml_is_readable() -> None:
    assert Recipe([EMA("100ba"), MixUp(), NoOp(), Backdrop(["a", "b"])]).to_yaml() == (
        "- Backdrop:\n    layers:\n    - a\n    - b\n    p: 0.5\n    mode: sample\n"
        "    patch_size: 1\n"
        "- MixUp:\n    alpha: 0.2\n"
        "- EMA:\n    half_life: 100ba\n    smoothing: null\n    ema_start: 0.0dur\n"
        "    update_interval: null\n    recompute_batchnorm: 0\n"
        "- NoOp\n"
    )


def test_yaml_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(Recipe(DEMO).to_yaml())
    assert Recipe.from_yaml(path) == Recipe(DEMO)
    with pytest.raises(FileNotFoundError, match=r"missing\.yaml"):
        Recipe.from_yaml(tmp_path / "missing.yaml")


def test_yaml_of_an_empty_recipe() -> None:
    assert Recipe.from_yaml("[]") == Recipe()


@pytest.mark.parametrize("text", ["", "# only a comment", "null"])
def test_an_empty_file_is_no_recipe(text: str) -> None:
    with pytest.raises(ValueError, match=r"got nothing; write \[\] for an empty one"):
        Recipe.from_yaml(text)


def test_a_path_given_as_a_text_is_explained() -> None:
    with pytest.raises(ValueError, match=r"to read a file, give a pathlib.Path"):
        Recipe.from_yaml("recipe.yaml")


@pytest.mark.parametrize("number", ["1e-1", "0.1", "1.0e-1", "+1E-1", ".1"])
def test_numbers_with_an_exponent_are_numbers(number: str) -> None:
    assert Recipe.from_yaml(f"[MixUp: {{alpha: {number}}}]") == Recipe([MixUp(0.1)])


@pytest.mark.parametrize("number", [np.float64(0.25), np.float32(0.25), np.int64(1)])
def test_numbers_of_numpy_are_numbers(number: Any) -> None:
    text = Recipe([MixUp(number)]).to_yaml()
    assert text == Recipe([MixUp(number.item())]).to_yaml()
    assert Recipe.from_yaml(text) == Recipe([MixUp(number)])


def test_a_setting_that_yaml_can_not_hold_is_refused_before_training() -> None:
    recipe = Recipe([Placed(label=print)])  # type: ignore[arg-type]  # the point of the test
    message = r"Recipe.to_yaml: settings must be .* got <built-in function print> in Recipe\("
    with pytest.raises(TypeError, match=message):
        recipe.to_yaml()
    with pytest.raises(TypeError, match=message):
        Run(recipe, model=torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("[MixUpp]", LookupError, r"unknown algorithm 'MixUpp'; did you mean 'MixUp'\? Known: Au"),
        ("[mixup]", LookupError, r"unknown algorithm 'mixup'; did you mean 'MixUp'\?"),
        ("[{label_smoothing: {}}]", LookupError, r"did you mean 'LabelSmoothing'\?"),
        ("[zzz]", LookupError, r"unknown algorithm 'zzz'\. Known: AugMix, Backdrop, "),
        ("[{5: {}}]", LookupError, r"unknown algorithm 5\. Known: "),
        ("[Algorithm]", LookupError, r"unknown algorithm 'Algorithm'"),
        (
            "[MixUp: {alpa: 0.2}]",
            LookupError,
            r"MixUp has no setting 'alpa'; did you mean 'alpha'\? Known: alpha",
        ),
        ("[NoOp: {x: 1}]", LookupError, r"NoOp has no setting 'x'\. Known: none"),
        ("[MixUp: {1: 2}]", LookupError, r"MixUp has no setting 1\. Known: alpha"),
        ("[EMA: {place: 1}]", LookupError, r"EMA has no setting 'place'"),
        ("MixUp: {alpha: 1}", ValueError, r"must be a list of algorithms, got dict: 'MixUp: {alp"),
        ("MixUp", ValueError, r"must be a list of algorithms, got str: 'MixUp'"),
        ("7", ValueError, r"must be a list of algorithms, got int"),
        ("[5]", ValueError, r"an entry must be a name, or one name with settings, got 5"),
        ("[null]", ValueError, r"an entry must be a name, or one name with settings, got None"),
        ("[[MixUp]]", ValueError, r"an entry must be a name, .* got \['MixUp'\]"),
        ("[{MixUp: {}, EMA: {}}]", ValueError, r"an entry must be a name, .* got {'MixUp': {}"),
        ("[{}]", ValueError, r"an entry must be a name, .* got {}"),
        ("[MixUp: 0.2]", ValueError, r"settings of MixUp must be a mapping, got 0.2"),
        ("[MixUp: [0.2]]", ValueError, r"settings of MixUp must be a mapping, got \[0.2\]"),
        ("[MixUp: {alpha: 1", ValueError, r"not valid YAML: while parsing"),
        ("[!!python/object/apply:os.getcwd []]", ValueError, r"not valid YAML: could not det"),
        ("\t- MixUp", ValueError, r"not valid YAML"),
        ("[Backdrop]", TypeError, r"Backdrop with settings {}: .* missing .*'layers'"),
        ("[MixUp: {alpha: '1'}]", TypeError, r"MixUp: alpha must be a number, got '1'"),
    ],
)
def test_what_is_wrong_in_yaml_is_said(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^Recipe\.from_yaml: .*{message}"):
        Recipe.from_yaml(text)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("[MixUp: {alpha: -1}]", ValueError, r"^MixUp: alpha must be above 0, got -1"),
        ("[MixUp, MixUp]", ConflictError, r"^Recipe: MixUp is in it 2 times"),
        ("[EMA: {half_life: soon}]", ValueError, r"^EMA: half_life must be a number and a unit"),
    ],
)
def test_yaml_is_checked_as_code_is(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Recipe.from_yaml(text)


def test_masks_drawn_in_forward_beside_a_second_pass_are_refused():
    class Twice(NoOp):
        def on_first_pass(self, run):
            """Do nothing."""

    with pytest.raises(ConflictError, match=r"Backdrop can't be combined with Twice.*remove one"):
        Recipe([Twice(), Backdrop("layer")])


# The types of settings, which no algorithm has to check itself.


@dataclass(frozen=True)
class Typed(NoOp):
    share: float = 0.5
    count: int = 1
    switch: bool = False
    text: str = ""
    maybe: float | None = None
    names: str | Sequence[str] = ()


@pytest.mark.parametrize(
    "settings",
    [
        {"share": 1, "count": np.int64(3), "switch": True, "text": "a", "maybe": None},
        {"share": np.float32(0.5), "maybe": 2, "names": ("a", "b")},
        {"share": np.int64(1), "names": "a"},
        {"names": ["a"]},
    ],
)
def test_settings_of_the_right_type(settings: dict[str, Any]) -> None:
    assert {name: getattr(Typed(**settings), name) for name in settings} == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": "0.2"}, r"Typed: share must be a number, got '0.2'"),
        ({"share": True}, r"share must be a number, got True"),
        ({"share": torch.tensor(0.2)}, r"share must be a number, got tensor"),
        ({"count": 1.5}, r"count must be a whole number, got 1.5"),
        ({"count": False}, r"count must be a whole number, got False"),
        ({"switch": 3}, r"switch must be True or False, got 3"),
        ({"text": 100}, r"text must be a text, got 100"),
        ({"maybe": "x"}, r"maybe must be a number or None, got 'x'"),
        ({"names": 2.0}, r"names must be a text or collections.abc.Sequence\[str\], got 2.0"),
    ],
)
def test_settings_of_a_wrong_type(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Typed(**settings)
    with pytest.raises(TypeError, match=r"Typed: share must be a number"):
        Typed("positional")


@dataclass(frozen=True)
class Ordered(Typed):
    share: float = field(default=0.5, kw_only=True)
    scale: InitVar[str] = "1"
    size: int = 0

    def __post_init__(self, scale: str) -> None:
        """Take what is no field."""


def test_arguments_by_position_need_not_be_fields() -> None:
    made = Ordered(2, True, "a", None, "b", "3", 4)
    assert (made.count, made.names, made.share, made.size) == (2, "b", 0.5, 4)
    with pytest.raises(TypeError, match=r"Ordered: size must be a whole number, got '4'"):
        Ordered(2, True, "a", None, "b", "3", "4")


def test_an_algorithm_needs_a_place() -> None:
    class Nowhere(Algorithm):
        pass

    with pytest.raises(TypeError, match=r"Nowhere: an algorithm must set place, a member of Place"):
        Nowhere()
