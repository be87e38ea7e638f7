"""Hook specifications, the plugin manager, and lazy lookup of what plugins bring.

A plugin is one line in a distribution's metadata, in the entry point group ``mosaic``, that names
a module with some of the hooks below. Our own algorithms and adapters come through the same door.
"""

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from mosaic_core.errors import nearest

if TYPE_CHECKING:
    from mosaic_core.adapter import Adapter
    from mosaic_core.algorithm import Algorithm
    from mosaic_core.recipe import Recipe
    from mosaic_core.workloads import Workload

__all__ = [
    "GROUP",
    "Hooks",
    "adapter",
    "adapters",
    "algorithms",
    "hookimpl",
    "hookspec",
    "installed",
    "load",
    "manager",
    "recipe",
    "recipes",
    "workload",
    "workloads",
]

GROUP = "mosaic"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


class Hooks:
    """The hooks a plugin may implement."""

    @hookspec
    def mosaic_algorithms(self) -> Sequence["type[Algorithm]"]:
        """Return classes of algorithms."""

    @hookspec
    def mosaic_adapter(self) -> "Adapter":
        """Return the adapter of one trainer, without importing the trainer."""

    @hookspec
    def mosaic_recipes(self) -> "Mapping[str, Sequence[Algorithm]]":
        """Return recipes by name."""

    @hookspec
    def mosaic_workloads(self) -> "Sequence[Workload]":
        """Return workloads: a model, real data and a budget to train with."""

    @hookspec
    def mosaic_losses(self) -> Sequence[Callable[..., Any]]:
        """Return losses ``loss(input, target, ...)`` that torch dispatches, to register."""


def installed() -> dict[str, EntryPoint]:
    """Return the entry points of all installed plugins by name; nothing is imported.

    Raises:
        LookupError: If two distributions claim one name.
    """
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            owners = ", ".join(sorted(e.dist.name for e in (other, entry) if e.dist))
            raise LookupError(f"mosaic: two plugins are called {entry.name!r} ({owners})")
    return found


@functools.cache
def manager() -> pluggy.PluginManager:
    """Return the plugin manager with all installed plugins loaded.

    Raises:
        ImportError: If a plugin can't be imported.
        LookupError: If a plugin implements no hook.
        pluggy.PluginValidationError: If a plugin misspells a hook or its arguments.
    """
    plugins = pluggy.PluginManager(GROUP)
    plugins.add_hookspecs(Hooks)
    for name, entry in sorted(installed().items()):
        owner = entry.dist.name if entry.dist else entry.value
        try:
            plugins.load_setuptools_entrypoints(GROUP, name=name)
        except pluggy.PluginValidationError:
            raise
        except Exception as error:
            raise ImportError(
                f"mosaic: plugin {name!r} of {owner} could not be loaded: {error!r}; update or"
                " uninstall it"
            ) from error
        _check(plugins, plugins.get_plugin(name), f"{name!r} of {owner}")
    _register_losses(plugins)
    return plugins


def load(module: str) -> None:
    """Load a module as a plugin that no distribution's metadata names, for this process.

    Args:
        module: Name of an importable module with hooks; if it is loaded already, nothing is done.

    Raises:
        ImportError: If it can't be imported.
        LookupError: If it implements no hook.
        pluggy.PluginValidationError: If it misspells a hook or its arguments.
    """
    plugins, plugin = manager(), importlib.import_module(module)
    if plugins.is_registered(plugin):
        return
    plugins.register(plugin)
    _check(plugins, plugin, repr(module))
    _register_losses(plugins)


def _check(plugins: pluggy.PluginManager, plugin: Any, what: str) -> None:
    if not plugins.get_hookcallers(plugin):
        raise LookupError(
            f"mosaic: plugin {what} implements no hook; decorate its functions"
            " with @mosaic_core.plugins.hookimpl"
        )
    plugins.check_pending()


def _register_losses(plugins: pluggy.PluginManager) -> None:
    from mosaic_core.target import register_loss

    for losses in plugins.hook.mosaic_losses():
        for loss in losses:
            register_loss(loss)


def algorithms() -> dict[str, "type[Algorithm]"]:
    """Return all algorithms by name."""
    found = [cls for classes in manager().hook.mosaic_algorithms() for cls in classes]
    return _unique(((cls.__name__, cls) for cls in found), "algorithms")


def adapters() -> dict[str, "Adapter"]:
    """Return the adapters of all installed trainers by name; no trainer is imported."""
    found = manager().hook.mosaic_adapter()
    return _unique(((adapter.name, adapter) for adapter in found), "adapters")


def adapter(name: str) -> "Adapter":
    """Return one adapter.

    Raises:
        LookupError: If it is not installed.
    """
    known = adapters()
    if name not in known:
        raise LookupError(
            f"mosaic: no adapter for trainer {name!r} is installed{nearest(name, known)}"
        )
    return known[name]


def recipes() -> dict[str, "Sequence[Algorithm]"]:
    """Return all named recipes."""
    found = (item for named in manager().hook.mosaic_recipes() for item in named.items())
    return _unique(found, "recipes")


def recipe(text: str) -> "Recipe":
    """Return the recipe that a person names on a command line.

    Args:
        text: Path of a YAML file; or names of recipes and algorithms, added by ``+`` and taken
            away by ``-``, such as ``"demo+SAM-BlurPool"``. ``"none"`` is the empty recipe.

    Raises:
        LookupError: If a name is unknown, or what is to be taken away is not there.
        TypeError: If an algorithm needs a setting, which only YAML can give it.
        ValueError: If the text is not of that form, or the file no recipe.

    Example:
        >>> recipe("MixUp+LabelSmoothing+NoOp-MixUp")
        Recipe([LabelSmoothing(smoothing=0.1), NoOp()])
    """
    from mosaic_core.recipe import Recipe

    if Path(text).suffix in (".yaml", ".yml"):
        return Recipe.from_yaml(Path(text))
    if not re.fullmatch(r"\w+([+-]\w+)*", text):
        raise ValueError(
            "mosaic: a recipe must be the path of a YAML file, or names with + and - between them,"
            f" got {text!r}"
        )
    members: dict[str, Algorithm] = {}
    for sign, name in re.findall(r"([+-]?)(\w+)", text):
        named = {algorithm.name: algorithm for algorithm in _members(name)}
        if sign != "-":
            members |= named
        elif named.keys() <= members.keys():
            members = {n: a for n, a in members.items() if n not in named}
        else:
            raise LookupError(f"mosaic: {text!r} takes away {name}, which is not in it")
    return Recipe(members.values())


def _members(name: str) -> "Sequence[Algorithm]":
    """Return the algorithms of a recipe, or one by its name and with its defaults."""
    named, known = recipes(), algorithms()
    if name in named:
        return named[name]
    if name not in known:
        raise LookupError(f"mosaic: unknown recipe {name!r}{nearest(name, {**named, **known})}")
    try:
        return [known[name]()]
    except TypeError as error:
        raise TypeError(
            f"mosaic: {name} has no default for some setting ({error}); write a YAML file"
        ) from error


def workloads() -> dict[str, "Workload"]:
    """Return all workloads by name."""
    found = [w for many in manager().hook.mosaic_workloads() for w in many]
    return _unique(((w.name, w) for w in found), "workloads")


def workload(name: str) -> "Workload":
    """Return one workload.

    Args:
        name: That of a workload which a plugin brings, or ``module:object`` for any other.

    Raises:
        LookupError: If it is unknown.
        TypeError: If the object is no workload.
        ValueError: If the module can't be imported, or has no such object.
    """
    from mosaic_core.workloads import Workload

    if ":" in name:
        try:
            found = pkgutil.resolve_name(name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"mosaic: workload {name!r} could not be loaded: {error}") from error
        if not isinstance(found, Workload):
            raise TypeError(f"mosaic: {name} must be a Workload, got {type(found).__name__}")
        return found
    known = workloads()
    if name not in known:
        raise LookupError(f"mosaic: unknown workload {name!r}{nearest(name, known)}")
    return known[name]


def _unique(pairs: Any, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in sorted(pairs, key=lambda pair: str(pair[0])):
        if name in found:
            raise LookupError(f"mosaic: two {kind} are called {name!r}")
        found[name] = value
    return found
