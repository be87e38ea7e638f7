"""Short trainings: as long as a run in epochs, and of few steps."""

import pytest

from mosaic_core import Recipe
from mosaic_core.algorithms import SWA, SelectiveBackprop
from mosaic_core.bench.phases import PHASES
from mosaic_core.bench.probe import probe, shortened
from mosaic_core.training import train
from mosaic_core.workloads import WORKLOADS

DIGITS = next(w for w in WORKLOADS if w.name == "digits")


def test_a_workload_is_shortened():
    short = shortened(DIGITS, None, 3)
    data = short.load(None)
    assert len(data.train_inputs) == len(data.train_labels) == 3 * DIGITS.batch_size
    assert len(data.eval_inputs) == len(data.eval_labels) == DIGITS.batch_size
    assert len(short.loaders(data, 0)[0]) == 3


@pytest.mark.parametrize(("epochs", "steps"), [(1, 15), (4, 20), (30, 30)])
def test_it_has_the_epochs_of_a_run_and_few_steps(epochs, steps):
    seen = []

    def counted(workload, recipe, **options):
        def report(update):
            seen.append(update.step)

        return train(workload, recipe, report=report, **options)

    found = probe(counted, DIGITS, Recipe(), epochs=epochs)
    assert max(seen) == steps
    assert tuple(found.phases) == PHASES
    assert found.memory > 2**16


def test_what_acts_late_in_a_run_acts_in_it():
    plain = probe(train, DIGITS, Recipe(), epochs=10)
    assert probe(train, DIGITS, Recipe([SWA()]), epochs=10).memory > 1.1 * plain.memory
    chosen = probe(train, DIGITS, Recipe([SelectiveBackprop(interrupt=1)]), epochs=10)
    assert chosen.phases["algorithm"] >= 0
