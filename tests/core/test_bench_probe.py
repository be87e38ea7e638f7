"""Short trainings: as long as a run in epochs, and of few steps."""

import pytest

from mosaic_core import Recipe
from mosaic_core.algorithms import SWA, SelectiveBackprop
from mosaic_core.bench.phases import PHASES
from mosaic_core.bench.probe import probe
from mosaic_core.plain import train
from mosaic_core.workloads import WORKLOADS

DIGITS = next(w for w in WORKLOADS if w.name == "digits")


# For the memory 20 steps or one an epoch; for the phases 25 that don't follow an evaluation.
@pytest.mark.parametrize(("epochs", "steps"), [(1, {20, 25}), (4, {20, 28}), (30, {30, 60})])
def test_it_has_the_epochs_of_a_run_and_few_steps(epochs, steps):
    seen = []

    def counted(workload, recipe, **options):
        totals = set()
        history = train(
            workload, recipe, report=lambda update: totals.add(update.total_steps), **options
        )
        seen.extend(totals)
        return history

    found = probe(counted, DIGITS, Recipe(), epochs=epochs)
    assert set(seen) == steps
    assert tuple(found.phases) == PHASES
    assert found.memory > 2**16


def test_what_acts_late_in_a_run_acts_in_it():
    plain = probe(train, DIGITS, Recipe(), epochs=10)
    assert probe(train, DIGITS, Recipe([SWA()]), epochs=10).memory > 1.1 * plain.memory
    chosen = probe(train, DIGITS, Recipe([SelectiveBackprop(interrupt=1)]), epochs=10)
    assert chosen.phases["forward"] > 0


def test_what_acts_every_so_many_steps_gets_as_many():
    late = SWA(update_interval="60ba")  # of 75 steps, but not of 20
    found = probe(train, DIGITS, Recipe([late]), epochs=5)
    assert found.memory > probe(train, DIGITS, Recipe(), epochs=5).memory
    with pytest.raises(ValueError, match="an update must lie between"):
        probe(train, DIGITS, Recipe([SWA(update_interval="74ba")]), epochs=5)
