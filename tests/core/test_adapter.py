"""What an adapter tells of itself, mode by mode, and what it refuses."""

import dataclasses

import pytest

from mosaic_core import Algorithm, Need, Recipe, UnsupportedError
from mosaic_core.adapter import Adapter, Mode
from mosaic_core.algorithms import EMA, SAM, BlurPool, MixUp, NoOp
from mosaic_core.plain import PLAIN

FP32 = Mode("fp32")
SHARDED = Mode("ZeRO-3", withheld=frozenset({Need.SECOND_PASS, Need.WEIGHTS}), options={"stage": 3})


def make(**changes: object) -> Adapter:
    adapter = Adapter(
        name="theirs",
        title="Theirs",
        delivers=frozenset(Need) - {Need.LOSS},
        trainers=("theirs",),
        trainer="math:sqrt",
        overhead="math:exp",
        modes=(FP32, SHARDED),
    )
    return dataclasses.replace(adapter, **changes)


@pytest.mark.parametrize(
    ("algorithm", "mode", "missing"),
    [
        (BlurPool, None, ()),
        (BlurPool, FP32, ()),
        (BlurPool, SHARDED, ()),
        (EMA, None, ()),
        (EMA, FP32, ()),
        (EMA, SHARDED, (Need.WEIGHTS,)),
        (SAM, FP32, ()),
        (SAM, SHARDED, (Need.SECOND_PASS,)),
        (MixUp, None, (Need.LOSS,)),
        (MixUp, FP32, (Need.LOSS,)),
        (MixUp, SHARDED, (Need.LOSS,)),
        (Algorithm, SHARDED, ()),
    ],
)
def test_what_is_missing(
    algorithm: type[Algorithm], mode: Mode | None, missing: tuple[Need, ...]
) -> None:
    assert make().missing(algorithm, mode) == missing
    assert make().supports(algorithm, mode) is (not missing)


def test_all_that_is_missing_is_told_in_a_fixed_order() -> None:
    adapter = make(delivers=frozenset())
    assert adapter.missing(MixUp) == (Need.BATCH, Need.LOSS)
    missing = adapter.missing(NoOp, SHARDED)
    assert list(missing) == sorted(NoOp.needs())
    assert len(missing) > 1


def test_what_is_withheld_need_not_have_been_delivered() -> None:
    mode = Mode("odd", withheld=frozenset({Need.LOSS}))
    assert make().missing(MixUp, mode) == (Need.LOSS,)
    assert make().missing(EMA, mode) == ()


def test_check_passes_what_is_delivered() -> None:
    make().check(Recipe([EMA(), SAM(), BlurPool()]))
    make().check(Recipe([EMA(), SAM(), BlurPool()]), FP32)
    make().check(Recipe([BlurPool()]), SHARDED)
    make(delivers=frozenset()).check(Recipe(), SHARDED)


def test_check_names_the_mode_that_withholds() -> None:
    with pytest.raises(
        UnsupportedError,
        match=r"^mosaic: EMA needs weights, which the adapter for Theirs does not deliver in the"
        r" mode ZeRO-3; take it out of the recipe, or use a plain loop with mosaic_core.Run$",
    ):
        make().check(Recipe([BlurPool(), EMA()]), SHARDED)


def test_check_names_all_needs_of_the_first_algorithm_that_misses_one() -> None:
    with pytest.raises(
        UnsupportedError,
        match=r"^mosaic: MixUp needs batch and loss, which the adapter for Theirs does not"
        r" deliver; take",
    ):
        make(delivers=frozenset()).check(Recipe([EMA(), MixUp()]))


def test_a_mode_is_a_value() -> None:
    again = Mode("ZeRO-3", frozenset({Need.WEIGHTS, Need.SECOND_PASS}), options={"stage": 3})
    assert again == SHARDED
    assert hash(again) == hash(SHARDED)  # options may hold anything
    assert Mode("ZeRO-3", SHARDED.withheld, options={"stage": 2}) != SHARDED
    with pytest.raises(dataclasses.FrozenInstanceError):
        SHARDED.accumulate = 2  # type: ignore[misc]


def test_the_defaults_are_one_plain_process() -> None:
    assert (FP32.withheld, FP32.accumulate, FP32.precision, FP32.processes) == (
        frozenset(),
        1,
        "fp32",
        1,
    )
    assert FP32.options == {}
    assert Adapter("a", "A", frozenset(), (), "a:b", "a:b").modes == (FP32,)


def test_load_imports_what_is_named() -> None:
    assert make().load("trainer")(9) == 3
    assert make().load("overhead")(0) == 1
    with pytest.raises(ModuleNotFoundError, match="not_there"):
        make(trainer="not_there:train").load("trainer")


def test_the_plain_loop_delivers_everything() -> None:
    assert PLAIN.delivers == frozenset(Need)
    assert all(PLAIN.supports(algorithm) for algorithm in (EMA, SAM, MixUp, BlurPool, NoOp))
    assert callable(PLAIN.load("trainer"))
    assert callable(PLAIN.load("overhead"))
