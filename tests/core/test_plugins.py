"""What plugins bring, and how a broken one is refused."""

import inspect
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pluggy
import pytest

from mosaic_core import Algorithm, ConflictError, Need, Recipe, UnsupportedError, losses, plugins
from mosaic_core import algorithms as our_algorithms
from mosaic_core.adapter import Adapter
from mosaic_core.algorithms import EMA, MixUp
from mosaic_core.workloads import Workload


@pytest.fixture
def _fresh() -> Iterator[None]:
    plugins.manager.cache_clear()
    yield
    plugins.manager.cache_clear()


@pytest.fixture
def install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _fresh: None
) -> Callable[[str, str], None]:
    """Return a function that installs a distribution with one plugin, until the test ends."""

    def install_one(name: str, code: str, distribution: str | None = None) -> None:
        distribution = distribution or f"mosaic-{name}"
        module = distribution.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(
            "from mosaic_core.plugins import hookimpl\n" + textwrap.dedent(code)
        )
        monkeypatch.delitem(sys.modules, module, raising=False)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
        )
        (info / "entry_points.txt").write_text(f"[mosaic]\n{name} = {module}\n")
        monkeypatch.syspath_prepend(tmp_path)

    return install_one


# Our own.


def test_our_own_plugin_comes_through_the_same_door() -> None:
    assert plugins.installed()["core"].value == "mosaic_core.plugin"
    assert plugins.manager().has_plugin("core")


def test_algorithms_by_name() -> None:
    found = plugins.algorithms()
    assert list(found) == sorted(found)
    assert found["MixUp"] is MixUp
    assert found["EMA"] is EMA
    assert "Algorithm" not in found
    ours = {
        cls
        for cls in vars(our_algorithms).values()
        if isinstance(cls, type) and issubclass(cls, Algorithm)
    }
    assert ours <= set(found.values())
    assert all(name == cls.__name__ for name, cls in found.items())


def test_adapters_by_name() -> None:
    found = plugins.adapters()
    assert "lightning" in found
    for name, adapter in found.items():
        assert isinstance(adapter, Adapter)
        assert plugins.adapter(name) is not None
        assert plugins.adapter(name).name == name
        assert adapter.title
        assert adapter.trainers
        assert adapter.delivers <= frozenset(Need)


def test_recipes_by_name() -> None:
    found = plugins.recipes()
    assert list(found["none"]) == []
    assert {type(a).__name__ for a in found["demo"]} >= {"BlurPool", "MixUp", "EMA"}


def test_workloads_by_name() -> None:
    found = plugins.workloads()
    assert found
    for name, workload in found.items():
        assert isinstance(workload, Workload)
        assert plugins.workload(name).name == name


def test_unknown_names_suggest_the_nearest() -> None:
    name = next(iter(plugins.workloads()))
    with pytest.raises(
        LookupError, match=rf"mosaic: unknown workload '{name}x'; did you mean '{name}'\? Known: "
    ):
        plugins.workload(name + "x")
    with pytest.raises(
        LookupError,
        match=r"mosaic: no adapter for trainer 'lightnin' is installed; did you mean 'lightning'\?"
        r" Known: .*lightning",
    ):
        plugins.adapter("lightnin")


# Somebody else's.


def test_a_plugin_of_somebody_else_brings_everything(install: Callable[..., None]) -> None:
    install(
        "theirs",
        """
        import torch
        from dataclasses import dataclass
        from mosaic_core import Algorithm, Place
        from mosaic_core.adapter import Adapter

        @dataclass(frozen=True)
        class Sharpen(Algorithm):
            size: int = 8
            place = Place.AUGMENTATION

        def margin(input, target):
            return input.sum()

        @hookimpl
        def mosaic_algorithms():
            return [Sharpen]

        @hookimpl
        def mosaic_adapter():
            return Adapter("theirs", "Theirs", frozenset(), ("theirs",), "math:sqrt", "math:exp")

        @hookimpl
        def mosaic_recipes():
            return {"sharpen": [Sharpen(4)]}

        @hookimpl
        def mosaic_losses():
            return [margin]
        """,
    )
    known = losses.known_losses().keys()
    assert "theirs" in plugins.installed()
    sharpen = plugins.algorithms()["Sharpen"]
    assert sharpen.needs() == frozenset()
    assert plugins.recipes()["sharpen"] == [sharpen(4)]
    adapter = plugins.adapter("theirs")
    assert adapter.load("trainer")(4) == 2
    assert adapter.load("overhead")(0) == 1
    (margin,) = losses.known_losses().keys() - known
    assert margin.__name__ == "margin"
    losses._LOSSES.pop(margin)
    assert "MixUp" in plugins.algorithms()  # ours are still there


def test_a_misspelt_hook_is_refused(install: Callable[..., None]) -> None:
    install("typo", "@hookimpl\ndef mosaic_algoritms(): return []")
    with pytest.raises(
        pluggy.PluginValidationError,
        match=r"unknown hook 'mosaic_algoritms' in plugin .*mosaic_typo",
    ):
        plugins.manager()


def test_a_hook_with_other_arguments_is_refused(install: Callable[..., None]) -> None:
    install("arguments", "@hookimpl\ndef mosaic_algorithms(model): return []")
    with pytest.raises(pluggy.PluginValidationError, match=r"Argument\(s\) \{'model'\}"):
        plugins.manager()


def test_a_plugin_without_a_hook_is_refused(install: Callable[..., None]) -> None:
    install("bare", "def mosaic_algorithms(): return []")
    with pytest.raises(
        LookupError,
        match=r"mosaic: plugin 'bare' of mosaic-bare implements no hook; decorate its functions"
        r" with @mosaic_core.plugins.hookimpl",
    ):
        plugins.manager()


@pytest.mark.parametrize("code", ["import not_there_at_all", "1 / 0"])
def test_a_plugin_that_can_not_be_imported_is_named(
    install: Callable[..., None], code: str
) -> None:
    install("broken", code)
    with pytest.raises(
        ImportError,
        match=r"mosaic: plugin 'broken' of mosaic-broken could not be loaded: .*Error\(.*\); update"
        r" or uninstall it",
    ):
        plugins.manager()


def test_two_distributions_that_claim_one_name_are_refused(install: Callable[..., None]) -> None:
    install("mine", "", distribution="mosaic-first")
    install("mine", "", distribution="mosaic-second")
    with pytest.raises(
        LookupError, match=r"two plugins are called 'mine' \(mosaic-first, mosaic-second\)"
    ):
        plugins.installed()
    with pytest.raises(LookupError, match="two plugins are called 'mine'"):
        plugins.manager()


def test_a_name_that_is_ours_is_taken(install: Callable[..., None]) -> None:
    install("core", "", distribution="mosaic-impostor")
    with pytest.raises(
        LookupError, match=r"two plugins are called 'core' \(mosaic-core, mosaic-impostor\)"
    ):
        plugins.installed()


def test_one_plugin_seen_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # As with metadata of an editable install beside that of the folder itself.
    entry = EntryPoint("core", "mosaic_core.plugin", "mosaic")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry, entry])
    assert plugins.installed() == {"core": entry}


@pytest.mark.parametrize(
    ("code", "lookup", "kind"),
    [
        (
            "from mosaic_core.algorithms import MixUp\n"
            "@hookimpl\ndef mosaic_algorithms(): return [type('MixUp', (MixUp,), {})]",
            plugins.algorithms,
            "algorithms are called 'MixUp'",
        ),
        (
            "@hookimpl\ndef mosaic_recipes(): return {'demo': []}",
            plugins.recipes,
            "recipes are called 'demo'",
        ),
        (
            "from mosaic_core.adapter import Adapter\n@hookimpl\ndef mosaic_adapter():\n"
            "    return Adapter('lightning', '', frozenset(), (), '', '')",
            plugins.adapters,
            "adapters are called 'lightning'",
        ),
        (
            "from mosaic_core.workloads import WORKLOADS\n"
            "@hookimpl\ndef mosaic_workloads(): return WORKLOADS",
            plugins.workloads,
            "workloads are called '",
        ),
    ],
    ids=["algorithms", "recipes", "adapters", "workloads"],
)
def test_two_things_of_one_name_are_refused(
    install: Callable[..., None], code: str, lookup: Callable[[], Any], kind: str
) -> None:
    install("rival", code)
    with pytest.raises(LookupError, match=f"^mosaic: two {kind}"):
        lookup()


# Adapters.


def test_an_adapter_tells_what_it_supports() -> None:
    adapter = Adapter(
        "theirs", "Theirs", frozenset({Need.BATCH, Need.LOSS}), ("theirs",), "a:b", "a:b"
    )
    assert adapter.supports(MixUp)
    assert not adapter.supports(EMA)
    adapter.check(Recipe([MixUp()]))
    with pytest.raises(
        UnsupportedError,
        match=r"mosaic: EMA needs weights, which the adapter for Theirs does not deliver; take it"
        r" out of the recipe, or use a plain loop with mosaic_core.Run",
    ):
        adapter.check(Recipe([MixUp(), EMA()]))


# Hooks.


def test_every_hook_says_what_it_is_and_returns() -> None:
    hooks = {name: f for name, f in vars(plugins.Hooks).items() if inspect.isfunction(f)}
    assert hooks
    for name, hook in hooks.items():
        assert name.startswith("mosaic_")
        assert inspect.getdoc(hook)
        assert "return" in inspect.get_annotations(hook)
        assert getattr(hook, "mosaic_spec", None) is not None  # marked, or pluggy ignores it


def test_listing_imports_no_trainer() -> None:
    code = """
    import json, sys
    from mosaic_core import plugins
    found = [*plugins.installed(), *plugins.algorithms(), *plugins.adapters(), *plugins.recipes()]
    found += [*plugins.workloads()]
    roots = {name.partition(".")[0] for name in sys.modules}
    print(json.dumps([found, sorted(roots)]))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    found, roots = json.loads(result.stdout)
    assert {"core", "lightning", "MixUp", "demo"} <= set(found)
    trainers = {"pytorch_lightning", "lightning", "lightning_fabric", "fastai", "transformers"}
    trainers |= {"deepspeed", "accelerate"}
    assert not trainers & set(roots)
    heavy = {"torchvision", "sklearn", "matplotlib", "pandas", "scipy"}
    assert not heavy & set(roots)


# Recipes as a person names them.


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("none", []),
        ("MixUp", ["MixUp"]),
        ("demo", ["BlurPool", "MixUp", "LabelSmoothing", "ChannelsLast", "EMA"]),
        ("demo-BlurPool-EMA", ["MixUp", "LabelSmoothing", "ChannelsLast"]),
        ("none+SAM+MixUp", ["MixUp", "SAM"]),
        ("MixUp+demo-MixUp", ["BlurPool", "LabelSmoothing", "ChannelsLast", "EMA"]),
        ("demo+SAM-demo", ["SAM"]),
    ],
)
def test_recipes_as_a_person_writes_them(text, names):
    assert [a.name for a in plugins.recipe(text)] == names


def test_a_recipe_keeps_the_settings_of_what_it_adds():
    assert plugins.recipe("demo-MixUp+MixUp") == Recipe(plugins.recipes()["demo"])
    assert EMA("0.05dur") in plugins.recipe("MixUp+demo").algorithms


def test_a_recipe_in_a_file(tmp_path):
    path = tmp_path / "my-recipe.yaml"
    path.write_text("[MixUp: {alpha: 0.7}]")
    assert plugins.recipe(str(path)) == Recipe([MixUp(0.7)])
    with pytest.raises(FileNotFoundError):
        plugins.recipe(str(tmp_path / "other.yml"))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("MixUpp", LookupError, r"unknown recipe 'MixUpp'; did you mean 'MixUp'\?"),
        ("demo+demi", LookupError, r"unknown recipe 'demi'"),
        ("MixUp-EMA", LookupError, r"'MixUp-EMA' takes away EMA, which is not in it"),
        ("", ValueError, r"names with \+ and - between them, got ''"),
        ("MixUp+", ValueError, r"got 'MixUp\+'"),
        ("-MixUp", ValueError, r"got '-MixUp'"),
        ("MixUp EMA", ValueError, r"got 'MixUp EMA'"),
        ("Backdrop", TypeError, r"Backdrop has no default for some setting .*write a YAML file"),
        ("EMA+SWA", ConflictError, r"EMA can't be combined with SWA"),
    ],
)
def test_recipes_that_are_none(text, error, message):
    with pytest.raises(error, match=message):
        plugins.recipe(text)
