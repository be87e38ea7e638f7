"""Finding and replacing the input and the target in whatever a loader yields."""

import copy
import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from mosaic_core import BatchError, Run
from mosaic_core.algorithms import ChannelsLast, LabelSmoothing, MixUp
from mosaic_core.batch import Batch, Locator, describe
from mosaic_core.mixture import Mixture

X, Y, EXTRA = torch.randn(4, 3), torch.arange(4), torch.full((4,), 7.0)
NEW_X, NEW_Y = X + 1, Y + 10


# What users' loaders yield.


class Positional(NamedTuple):
    """A named tuple whose names are not the usual ones."""

    first: Any
    second: Any
    extra: Any


Named = namedtuple("Named", ["extra", "image", "label"])


class TupleSubclass(tuple):
    """A plain tuple by another name."""


class ListSubclass(list):
    """A list by another name."""


class FrozenMapping(Mapping[str, Any]):
    """An immutable mapping that is made from a mapping."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = dict(data)

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)


class SharingMapping(FrozenMapping, MutableMapping[str, Any]):
    """A mutable mapping without ``__copy__``: a shallow copy shares its storage."""

    def __setitem__(self, key: str, value: Any) -> None:
        self._data[key] = value

    def __delitem__(self, key: str) -> None:
        del self._data[key]


class BatchEncodingLike(UserDict):
    """What ``transformers.BatchEncoding`` does: a UserDict with attribute access."""

    def __init__(self, data: Mapping[str, Any] | None = None) -> None:
        super().__init__(data)
        self._encodings = None

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, str):
            return self.data[item]
        raise KeyError("Indexing with integers is not available when using Python tokenizers.")

    def __getattr__(self, item: str) -> Any:
        try:
            return self.data[item]
        except KeyError:
            raise AttributeError from None

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "encodings": self._encodings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.data, self._encodings = state["data"], state["encodings"]


@dataclass
class ModelOutputLike(OrderedDict):
    """What ``transformers.utils.ModelOutput`` does: a dataclass that is an ordered dictionary."""

    pixel_values: Any = None
    labels: Any = None
    extra: Any = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                self[field.name] = value

    def __delitem__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("You cannot use ``__delitem__`` on a ModelOutput instance.")

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("You cannot use ``update`` on a ModelOutput instance.")

    def __getitem__(self, key: Any) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else tuple(self.values())[key]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.keys() and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self) -> Any:
        function, _, *rest = super().__reduce__()
        return function, tuple(getattr(self, f.name) for f in dataclasses.fields(self)), *rest


@dataclass
class Plain:
    """A dataclass."""

    x: Any
    y: Any
    extra: Any


@dataclass(frozen=True)
class Frozen:
    """A frozen dataclass."""

    x: Any
    y: Any
    extra: Any


@dataclass(slots=True)
class Slotted:
    """A dataclass with slots."""

    x: Any
    y: Any
    extra: Any


@dataclass(frozen=True, slots=True)
class FrozenSlotted:
    """A frozen dataclass with slots."""

    x: Any
    y: Any
    extra: Any


@dataclass
class Derived:
    """A dataclass that can't be remade from its fields."""

    x: Any
    y: Any
    extra: Any
    size: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.size = len(self.x)


class Sharing:
    """Attributes that live in a store of the object, which a shallow copy shares."""

    def __init__(self, **values: Any) -> None:
        self.__dict__["_store"] = values

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__dict__["_store"][name]

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["_store"][name] = value


class Storing(Sharing):
    """The same with copies of their own, as in graph libraries."""

    def __copy__(self) -> "Storing":
        return Storing(**self._store)


def named(make: Any, x: str = "x", y: str = "y") -> Any:
    """Make a container from names."""
    return make({"extra": EXTRA, x: X, y: Y})


# (batch, input_key, target_key, where both should be found)
FOUND = {
    "tuple": ((X, Y, EXTRA), None, None, (0, 1)),
    "tuple subclass": (TupleSubclass((X, Y, EXTRA)), None, None, (0, 1)),
    "tuple by index": ((EXTRA, Y, X), 2, 1, (2, 1)),
    "tuple from the end": ((EXTRA, X, Y), -2, -1, (-2, -1)),
    "list": ([X, Y, EXTRA], None, None, (0, 1)),
    "list subclass": (ListSubclass([X, Y, EXTRA]), None, None, (0, 1)),
    "list from the end": ([EXTRA, X, Y], -2, -1, (-2, -1)),
    "named tuple by position": (Positional(X, Y, EXTRA), None, None, (0, 1)),
    "named tuple by usual name": (Named(EXTRA, X, Y), None, None, ("image", "label")),
    "named tuple by name": (Positional(EXTRA, X, Y), "second", "extra", ("second", "extra")),
    "named tuple from the end": (Positional(EXTRA, X, Y), -2, -1, (-2, -1)),
    "dict": (named(dict), None, None, ("x", "y")),
    "dict by name": (named(dict, "foo", "bar"), "foo", "bar", ("foo", "bar")),
    "dict by number": ({0: EXTRA, 5: X, 7: Y}, 5, 7, (5, 7)),
    "ordered dict": (named(OrderedDict), None, None, ("x", "y")),
    "immutable mapping": (named(FrozenMapping), None, None, ("x", "y")),
    "mapping that shares": (named(SharingMapping), None, None, ("x", "y")),
    "batch encoding": (
        named(BatchEncodingLike, "input_ids", "labels"),
        None,
        None,
        ("input_ids", "labels"),
    ),
    "model output": (ModelOutputLike(X, Y, EXTRA), None, None, ("pixel_values", "labels")),
    "dataclass": (Plain(X, Y, EXTRA), None, None, ("x", "y")),
    "dataclass by name": (Plain(EXTRA, Y, X), "extra", "y", ("extra", "y")),
    "frozen dataclass": (Frozen(X, Y, EXTRA), None, None, ("x", "y")),
    "slotted dataclass": (Slotted(X, Y, EXTRA), None, None, ("x", "y")),
    "frozen slotted dataclass": (FrozenSlotted(X, Y, EXTRA), None, None, ("x", "y")),
    "derived dataclass": (Derived(X, Y, EXTRA), None, None, ("x", "y")),
    "object with a store": (Storing(x=X, y=Y, extra=EXTRA), "x", "y", ("x", "y")),
}


def contents(batch: Any) -> list[Any]:
    """List the values of a batch, whatever its structure."""
    if isinstance(batch, Mapping):
        return [*batch.values()]
    if dataclasses.is_dataclass(batch):
        return [getattr(batch, f.name) for f in dataclasses.fields(batch)]
    return [*batch._store.values()] if isinstance(batch, Storing) else [*batch]


@pytest.mark.parametrize(
    ("batch", "input_key", "target_key", "where"), FOUND.values(), ids=FOUND.keys()
)
def test_input_and_target_are_found_and_replaced_in_a_copy(
    batch: Any, input_key: Any, target_key: Any, where: tuple[Any, Any]
) -> None:
    locator = Locator(input_key, target_key)
    assert locator.read(batch, "input") is X
    assert locator.read(batch, "target") is Y
    assert (locator.found["input"], locator.found["target"]) == where
    before = contents(batch)

    new = locator.write(batch, {"input": NEW_X, "target": NEW_Y})

    assert type(new) is type(batch)
    assert new is not batch
    swap = {id(X): NEW_X, id(Y): NEW_Y}
    for mine, old, still in zip(contents(new), before, contents(batch), strict=True):
        assert mine is swap.get(id(old), old)  # replaced, or kept as it was
        assert still is old  # the user's own batch is untouched
    fresh = Locator(input_key, target_key)
    assert fresh.read(new, "input") is NEW_X
    assert fresh.read(new, "target") is NEW_Y


def test_a_model_output_keeps_attribute_and_entry_alike() -> None:
    batch = ModelOutputLike(X, Y, EXTRA)
    locator = Locator()
    locator.read(batch, "input")
    new = locator.write(batch, {"input": NEW_X})
    assert new.pixel_values is new["pixel_values"] is NEW_X
    assert batch.pixel_values is batch["pixel_values"] is X
    assert list(new) == ["pixel_values", "labels", "extra"]


def test_a_batch_encoding_keeps_attribute_access_and_its_encodings() -> None:
    batch = named(BatchEncodingLike, "input_ids", "labels")
    batch._encodings = marker = object()
    locator = Locator()
    locator.read(batch, "target")
    new = locator.write(batch, {"target": NEW_Y})
    assert new.labels is NEW_Y
    assert new._encodings is marker
    assert batch.labels is Y


def test_an_object_with_a_store_gets_the_value_into_its_store() -> None:
    batch = Storing(x=X, y=Y)
    locator = Locator("x", "y")
    locator.read(batch, "input")
    new = locator.write(batch, {"input": NEW_X})
    assert new._store["x"] is NEW_X
    assert "x" not in vars(new)


def test_nested_structures_by_getter_and_setter() -> None:
    def set_image(batch: Any, value: Any) -> Any:
        (views, meta), label = batch
        return (({**views, "image": value}, meta), label)

    batch = (({"image": X, "mask": EXTRA}, "meta"), [Y])
    locator = Locator(
        (lambda b: b[0][0]["image"], set_image), (lambda b: b[1][0], lambda b, v: (b[0], [v]))
    )
    assert locator.read(batch, "input") is X
    assert locator.read(batch, "target") is Y
    new = locator.write(batch, {"input": NEW_X, "target": NEW_Y})
    assert new[0][0]["image"] is NEW_X
    assert new[0][0]["mask"] is EXTRA
    assert new[0][1] == "meta"
    assert new[1][0] is NEW_Y
    assert batch[0][0]["image"] is X
    assert batch[1][0] is Y


def test_a_setter_that_forgets_to_return_the_batch_is_an_error() -> None:
    batch = {"a": X}
    locator = Locator((lambda b: b["a"], lambda b, value: b.update(a=value)))
    locator.read(batch, "input")
    with pytest.raises(
        TypeError, match=r"Locator: the setter of input_key must return the new batch"
    ):
        locator.write(batch, {"input": NEW_X})


class ReadOnly:
    """An object whose input can't be set."""

    x = property(lambda self: X)


class Unmade(FrozenMapping):
    """A mapping that is made from something else than a mapping."""

    def __init__(self, *, data: Mapping[str, Any]) -> None:
        super().__init__(data)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (Unmade(data={"x": X}), r"takes 1 positional argument.* is Unmade\(x: float32\(4, 3\)\)"),
        (ReadOnly(), r"property 'x' .* has no setter. The batch is ReadOnly"),
        (Sharing(x=X), r"its shallow copy shares its values.* The batch is Sharing"),
    ],
)
def test_a_batch_that_can_not_be_copied_asks_for_a_pair(batch: Any, reason: str) -> None:
    locator = Locator("x")
    locator.read(batch, "input")
    with pytest.raises(BatchError, match=rf"input of a copy .* could not be .*{reason}") as caught:
        locator.write(batch, {"input": NEW_X})
    assert "Set input_key to a pair (get(batch), set(batch, value) -> batch)" in str(caught.value)


def test_nothing_to_write_returns_the_batch_itself() -> None:
    batch = (X, Y)
    assert Locator().write(batch, {}) is batch


# Conventions.


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ("pixel_values", "labels"),
        ("input_ids", "labels"),
        ("inputs_embeds", "labels"),
        ("input_values", "labels"),
        ("input_features", "labels"),
        ("image", "label"),
        ("images", "labels"),
        ("img", "label"),
        ("input", "target"),
        ("inputs", "targets"),
        ("x", "y"),
        ("data", "target"),
        ("features", "label"),
    ],
)
def test_the_usual_names_of_a_mapping(x: str, y: str) -> None:
    batch = {"attention_mask": EXTRA, "id": ["a"] * 4, y: Y, x: X}
    locator = Locator()
    assert locator.read(batch, "input") is X
    assert locator.read(batch, "target") is Y
    assert locator.found == {"input": x, "target": y}


def test_a_usual_name_that_holds_no_tensor_is_passed_over() -> None:
    batch = {"input": "a path", "image": X, "label": ["cat"], "labels": Y}
    locator = Locator()
    assert locator.read(batch, "input") is X
    assert locator.read(batch, "target") is Y


def test_a_lone_tensor_is_the_input() -> None:
    locator = Locator()
    assert locator.read(X, "input") is X
    assert locator.write(X, {"input": NEW_X}) is NEW_X
    with pytest.raises(BatchError, match=r"target .* not found.* The batch is float32\(4, 3\)"):
        locator.read(X, "target")


def test_what_was_found_once_serves_the_batches_that_follow() -> None:
    locator = Locator()
    locator.read({"x": X, "labels": Y}, "input")
    assert locator.read({"input": EXTRA, "x": NEW_X}, "input") is NEW_X


# What can't be found.


def test_a_mapping_without_usual_names_says_what_it_looks_like_and_what_to_set() -> None:
    batch = {"picture": X, "views": [X.half(), (Y, "left")], "category": Y}
    with pytest.raises(BatchError) as caught:
        Locator().read(batch, "input")
    message = str(caught.value)
    assert message.startswith("mosaic: the input of the batch was not found: none of the usual")
    assert "pixel_values" in message
    assert (
        "The batch is dict(picture: float32(4, 3), views: list of 2 [float16(4, 3), tuple of 2"
        " [int64(4,), str]], category: int64(4,))." in message
    )
    assert "Set input_key to an index, a name, or a pair" in message
    with pytest.raises(BatchError, match=r"the target .* Set target_key to an index, a name"):
        Locator().read(batch, "target")


@pytest.mark.parametrize(
    ("batch", "key", "reason"),
    [
        ((X,), None, r"1 is not in it. The batch is tuple of 1 \[float32\(4, 3\)\]"),
        ((X, "cat"), None, r"1 holds str, not a tensor"),
        ((X, [Y, Y]), None, r"1 holds list of 2 \[int64\(4,\), int64\(4,\)\], not a tensor"),
        ((X, None), None, r"1 holds NoneType, not a tensor"),
        ([X, Y], 2, r"2 is not in it"),
        ((X, Y), -3, r"-3 is not in it"),
        ((X, Y), "labels", r"'labels' is not in it"),
        ((X, Y), "count", r"'count' holds builtin_function_or_method, not a tensor"),
        (Named(EXTRA, X, Y), "labels", r"'labels' is not in it. The batch is Named\(extra: "),
        (Named(EXTRA, X, Y), 3, r"3 is not in it"),
        ({"x": X, "y": Y}, "labels", r"'labels' is not in it. The batch is dict\(x: "),
        ({"x": X, "y": Y}, 1, r"1 is not in it"),
        ({"x": X, "y": [0, 1, 2, 3]}, "y", r"'y' holds list of 4 \[int, int, int, int\]"),
        (BatchEncodingLike({"input_ids": X}), 1, r"1 is not in it"),
        (ModelOutputLike(X, Y), 1, r"1 is not in it"),
        (Plain(X, Y, EXTRA), "labels", r"'labels' is not in it. The batch is Plain\(x: "),
        (Plain(X, Y, EXTRA), 1, r"1 is not in it"),
        (Plain(X, "cat", EXTRA), None, r"none of the usual names label, labels"),
        ("text", None, r"it is no tuple, list, mapping.* The batch is str"),
        (7, None, r"it is no tuple, list, mapping.* The batch is int"),
        (None, None, r"it is no tuple, list, mapping.* The batch is NoneType"),
        (None, 1, r"1 is not in it"),
        (
            ((X, Y), EXTRA),
            (lambda b: b[5], lambda b, v: b),
            r"its getter raised IndexError\('tuple index out of range'\)",
        ),
        (
            {"a": {"b": 1}},
            (lambda b: b["a"]["b"], lambda b, v: b),
            r"its getter returned int, not a tensor",
        ),
    ],
)
def test_a_target_that_is_not_there(batch: Any, key: Any, reason: str) -> None:
    with pytest.raises(BatchError, match=reason) as caught:
        Locator(target_key=key).read(batch, "target")
    assert "the target of the batch was not found" in str(caught.value)
    assert "Set target_key to" in str(caught.value)


@pytest.mark.parametrize("name", ["input_key", "target_key"])
@pytest.mark.parametrize(
    "key", [1.0, True, False, b"x", [0], ("x", "y"), (len,), (len, len, len), {"x"}, len]
)
def test_a_key_of_another_kind_is_refused(name: str, key: Any) -> None:
    with pytest.raises(
        TypeError,
        match=rf"Locator: {name} must be an index, a name or a \(getter, setter\) pair, got ",
    ):
        Locator(**{name: key})


def test_a_batch_error_is_a_lookup_error() -> None:
    assert issubclass(BatchError, LookupError)


# What a run does with it.


def run_of(*recipe: Any, **kwargs: Any) -> Run:
    """Make a run of a tiny model."""
    model = torch.nn.Linear(3, 20)
    return Run(recipe, model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), **kwargs)


@pytest.mark.parametrize(
    ("batch", "input_key", "target_key", "where"), FOUND.values(), ids=FOUND.keys()
)
def test_a_run_keeps_the_container_and_the_users_batch(
    batch: Any, input_key: Any, target_key: Any, where: tuple[Any, Any]
) -> None:
    run = run_of(MixUp(), LabelSmoothing(), input_key=input_key, target_key=target_key)
    before, values = contents(batch), copy.deepcopy(contents(batch))
    new = run.on_batch(batch)
    assert type(new) is type(batch)
    for mine, old, value, still in zip(contents(new), before, values, contents(batch), strict=True):
        assert still is old
        assert torch.equal(torch.as_tensor(old), torch.as_tensor(value))  # nor written into
        assert (mine is old) is (old is not X and old is not Y)
    assert run.report.notes == [f"batch: input at {where[0]!r}, target at {where[1]!r}"]


def test_the_report_says_where_once() -> None:
    run = run_of(LabelSmoothing())
    for _ in range(3):
        run.on_batch({"image": X, "label": Y})
    assert str(run.report) == "batch: input at 'image', target at 'label'"
    nested = run_of(LabelSmoothing(), input_key=(lambda b: b[0][0], lambda b, v: ((v,), b[1])))
    nested.on_batch(((X,), Y))
    assert str(nested.report) == "batch: input at its getter, target at 1"


def test_a_recipe_without_labels_needs_no_target() -> None:
    with pytest.warns(match="4-d"):
        run = run_of(ChannelsLast())
    run.on_batch({"x": X})
    assert run.report.notes[-1] == "batch: input at 'x'"


def test_an_empty_recipe_looks_at_nothing() -> None:
    batch = object()
    assert run_of().on_batch(batch) is batch


def test_a_run_with_a_batch_it_can_not_read() -> None:
    with pytest.raises(BatchError, match=r"the input .* is dict\(a: int64\(4,\)\). Set input_key"):
        run_of(MixUp()).on_batch({"a": Y})
    with pytest.raises(BatchError, match=r"the target .* is dict\(x: float32\(4, 3\)\)"):
        run_of(MixUp()).on_batch({"x": X})


@pytest.mark.parametrize("target", [torch.arange(5), torch.arange(3), torch.tensor(1)])
def test_a_target_of_another_length(target: torch.Tensor) -> None:
    with pytest.raises(
        ValueError,
        match=r"mosaic: the target must have the length of the input, got input float32\(4, 3\) and"
        r" target int64\(\d?,?\); .* set input_key and target_key",
    ):
        run_of(LabelSmoothing()).on_batch((X, target))


def test_an_input_without_a_batch_dimension() -> None:
    with pytest.raises(ValueError, match=r"the input must have shape \(N, ...\), got float32\(\)"):
        run_of(LabelSmoothing()).on_batch((torch.tensor(1.0), torch.tensor(1)))


# Batch, as algorithms see it.


def test_replace_makes_the_next_batch() -> None:
    labels = Mixture.of(Y)
    batch = Batch(X, labels)
    assert batch.replace(NEW_X).input is NEW_X
    assert batch.replace(NEW_X).labels is labels
    assert batch.replace(labels=labels.smooth(0.1)).input is X
    assert batch.input is X


def test_labels_of_an_algorithm_that_did_not_say_it_reads_them() -> None:
    with pytest.raises(TypeError, match=r"Batch: .* must set changes_labels"):
        _ = Batch(X).labels


def test_describe_shows_types_dtypes_and_shapes() -> None:
    assert describe(X) == "float32(4, 3)"
    assert describe(torch.tensor(True)) == "bool()"
    assert describe((X, [Y], {"a": None})) == (
        "tuple of 3 [float32(4, 3), list of 1 [int64(4,)], dict(a: NoneType)]"
    )
    assert describe(Frozen(X, 1, "a")) == "Frozen(x: float32(4, 3), y: int, extra: str)"
    assert describe(Frozen) == "type"
    assert describe(Named(1, 2, 3)) == "Named(extra: int, image: int, label: int)"


def test_describe_of_a_large_batch_stays_short() -> None:
    batch = {"captions": ["a"] * 512, "x": X}
    captions = "list of 512 [str, str, str, str, ...]"
    assert describe(batch) == f"dict(captions: {captions}, x: float32(4, 3))"


def test_reading_leaves_a_batch_deep_equal() -> None:
    batch = {"x": X, "y": Y, "meta": {"ids": [1, 2]}}
    saved = copy.deepcopy(batch)
    locator = Locator()
    locator.read(batch, "input"), locator.read(batch, "target")
    locator.write(batch, {"input": NEW_X})
    assert batch.keys() == saved.keys()
    assert batch["meta"] == saved["meta"]
    assert torch.equal(batch["x"], saved["x"])
