"""The contract suite over every algorithm that is installed, and the suite on broken ones."""

from dataclasses import dataclass, field

import pytest
import torch

from mosaic_core import Algorithm, Card, Place, plugins
from mosaic_core.algorithms import (
    EMA,
    LAWA,
    SAM,
    SWA,
    AugMix,
    Backdrop,
    BlurPool,
    ColOut,
    CutMix,
    CutOut,
    Factorize,
    GhostBatchNorm,
    GradientClipping,
    LabelSmoothing,
    LayerFreezing,
    MixUp,
    ProgressiveResizing,
    RandAugment,
    SqueezeExcite,
    StochasticDepth,
    WeightStandardization,
)
from mosaic_core.testing import AlgorithmContract

# Beside its own example of an algorithm: settings that take another path.
EXAMPLES: dict[str, list[Algorithm]] = {
    "AugMix": [AugMix(10, width=2, depth=2, alpha=0.5)],
    "Backdrop": [
        Backdrop("conv2"),
        Backdrop(("conv1", "conv2"), p=0.3, mode="patch", patch_size=2),
    ],
    "BlurPool": [BlurPool(blur_first=False)],
    "ColOut": [ColOut(p_row=0.25, p_col=0, resize_target=False)],
    "CutMix": [CutMix(alpha=0.3, uniform_sampling=True)],
    "CutOut": [CutOut(num_holes=2, length=0.3, uniform_sampling=True)],
    "EMA": [
        EMA("2ba"),
        EMA("1ep"),
        EMA(smoothing=0.9, ema_start="0.3dur", recompute_batchnorm=2),
        EMA("0.5dur", update_interval="2ba"),
    ],
    "Factorize": [Factorize(factorize_linears=False, min_channels=16, latent_channels=3)],
    "GhostBatchNorm": [GhostBatchNorm(4)],
    "GradientClipping": [GradientClipping("norm", 0.5), GradientClipping("value", 0.01)],
    "LabelSmoothing": [LabelSmoothing(0.3)],
    "LAWA": [LAWA(2, "2ba", offload=True, recompute_batchnorm=2), LAWA(update_interval="1ep")],
    "LayerFreezing": [LayerFreezing(freeze_start=0.3, freeze_level=0.9)],
    "MixUp": [MixUp(alpha=1.0)],
    "ProgressiveResizing": [
        ProgressiveResizing("crop", initial_scale=0.75, delay_fraction=0.2, size_increment=1),
    ],
    "RandAugment": [RandAugment(4.5, depth=1)],
    "SAM": [SAM(rho=1.0, adaptive=True), SAM(interval=2)],
    "SWA": [
        SWA("1ba", "4ba", "2ba", recompute_batchnorm=0),
        SWA("0.4dur", "1dur", "1ep", True, anneal_steps=1, swa_lr=0.2),
    ],
    "SqueezeExcite": [SqueezeExcite(0.25, 3)],
    "StochasticDepth": [StochasticDepth("sample", 0.5, "uniform", target_layer_name="*norm2")],
    "WeightStandardization": [WeightStandardization(n_last_layers_ignore=1)],
}


def examples_of(name: str, cls: type[Algorithm]) -> list[Algorithm]:
    return [cls.example(), *EXAMPLES.get(name, [])]


class TestEveryAlgorithm(AlgorithmContract):
    examples = [  # noqa: RUF012  # a constant of the class
        example for name, cls in plugins.algorithms().items() for example in examples_of(name, cls)
    ]


def test_the_examples_are_of_known_algorithms():
    assert EXAMPLES.keys() <= plugins.algorithms().keys()
    assert {e.name for e in TestEveryAlgorithm.examples} == plugins.algorithms().keys()


def test_the_examples_of_an_algorithm_are_of_it():
    for name, examples in EXAMPLES.items():
        assert {e.name for e in examples} == {name}


# A suite that finds nothing is worth nothing: each kind of fault must be found.

CARD = Card("any", "Is broken.", "None.", "Never.", "None.", "-", "")


@dataclass(frozen=True)
class Fine(Algorithm):
    """Passes everything but YAML, as no plugin brings it."""

    place, card = Place.AUGMENTATION, CARD

    def on_batch(self, batch, run):
        noise = torch.randn(batch.input.shape, generator=run.generator(self))
        return batch.replace(batch.input + 0.1 * noise)


@dataclass(frozen=True)
class DrawsGlobally(Fine):
    def on_batch(self, batch, run):
        return batch.replace(batch.input + 0.1 * torch.randn(batch.input.shape))


@dataclass(frozen=True)
class WritesIntoTheBatch(Fine):
    def on_batch(self, batch, run):
        batch.input.mul_(2)
        return batch


@dataclass(frozen=True)
class ForgetsItsState(Fine):
    def init_state(self, run):
        return {"steps": 0}

    def on_batch(self, batch, run):
        run.state(self)["steps"] += 1
        return batch.replace(batch.input * run.state(self)["steps"])


@dataclass(frozen=True)
class ReplacesParameters(Fine):
    def prepare_model(self, model, run):
        model[4].weight = torch.nn.Parameter(model[4].weight.detach().clone())


@dataclass(frozen=True)
class HooksTwice(Fine):
    def prepare_model(self, model, run):
        model[4].register_forward_hook(lambda module, args, output: output * 2)


@dataclass(frozen=True)
class OperatesUnasked(Fine):
    """Surgery where the card says batch."""

    def init_state(self, run):
        run.model[4].register_forward_hook(lambda module, args, output: output * 2)

    def on_batch(self, batch, run):
        return batch


@dataclass(frozen=True)
class IncompleteCard(Fine):
    card = Card("any", "Is broken", "None.", "", "None.", "-", "")


@dataclass(frozen=True)
class KeepsEvaluationWeights(Fine):
    def evaluation_weights(self, run):
        with torch.no_grad():
            run.model[0].weight.mul_(0.5)


@dataclass
class Thawed(Algorithm):
    place, card = Place.MEASURING, CARD
    anything: int = 0
    items: list[int] = field(default_factory=list)


@pytest.mark.parametrize(
    ("algorithm", "test", "options"),
    [
        (DrawsGlobally(), "test_global_streams_are_left_alone", {}),
        (DrawsGlobally(), "test_deterministic", {}),
        (WritesIntoTheBatch(), "test_users_batches_are_left_alone", {}),
        (ForgetsItsState(), "test_resume_is_bit_equal", {"at": 3, "inside": False}),
        (ReplacesParameters(), "test_surgery_keeps_parameters_and_names", {}),
        (HooksTwice(), "test_surgery_is_idempotent_and_reported", {}),
        (HooksTwice(), "test_model_can_be_copied_and_saved_whole", {}),
        (OperatesUnasked(), "test_needs_tell_all_it_does", {}),
        (IncompleteCard(), "test_card_is_complete", {}),
        (KeepsEvaluationWeights(), "test_evaluation_gives_the_training_weights_back", {}),
        (Fine(), "test_yaml_round_trip", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_suite_finds(algorithm, test, options):
    with pytest.raises((AssertionError, LookupError, AttributeError)):
        getattr(AlgorithmContract(), test)(algorithm, **options)


def test_the_suite_finds_settings_that_are_not_frozen():
    with pytest.raises((pytest.fail.Exception, TypeError)):
        AlgorithmContract().test_settings_are_frozen_values(Thawed())


@pytest.mark.parametrize(
    "test",
    [
        *("test_settings_are_frozen_values", "test_card_is_complete", "test_trains"),
        *("test_needs_tell_all_it_does", "test_deterministic", "test_users_batches_are_left_alone"),
        *("test_global_streams_are_left_alone", "test_surgery_keeps_parameters_and_names"),
        *("test_surgery_is_idempotent_and_reported", "test_model_can_be_copied_and_saved_whole"),
        "test_evaluation_gives_the_training_weights_back",
    ],
)
def test_a_sound_algorithm_passes(test):
    getattr(AlgorithmContract(), test)(Fine())


def test_the_seed_test_is_not_fooled(monkeypatch):
    """An algorithm that asks for a seed and does not use it."""

    @dataclass(frozen=True)
    class Pretends(Fine):
        def on_batch(self, batch, run):
            run.generator(self)
            return batch

    with pytest.raises(AssertionError):
        AlgorithmContract().test_seed_matters_where_it_draws(Pretends(), monkeypatch)


def test_a_suite_without_examples_is_refused():
    """Pytest would skip it."""

    class TestForgotten(AlgorithmContract):
        pass

    with pytest.raises(TypeError, match="TestForgotten: examples must hold at least one"):
        TestForgotten().pytest_generate_tests(None)
