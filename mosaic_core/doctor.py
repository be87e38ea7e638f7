"""What is installed, and what of it is broken; nothing here fails because a plugin does."""

import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import pluggy

from mosaic_core import plugins
from mosaic_core.adapter import Adapter
from mosaic_core.recipe import Recipe

__all__ = ["Finding", "examine", "version_of"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        section: What kind of thing it is.
        name: Its name.
        status: ``"ok"``, ``"absent"`` (which is no fault) or ``"broken"``.
        text: Version and details, or what is wrong with it.
    """

    section: str
    name: str
    status: Literal["ok", "absent", "broken"]
    text: str


def examine() -> Iterator[Finding]:
    """Look at Python, torch, the accelerator, and everything that plugins bring."""
    yield Finding("System", "python", "ok", f"{platform.python_version()}, {platform.platform()}")
    yield _torch()
    loaded = []
    for entry in sorted(metadata.entry_points(group=plugins.GROUP), key=lambda e: e.name):
        owner = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
        try:
            hooks = _load(entry)
            yield Finding("Plugins", entry.name, "ok", f"{owner}: {_contents(hooks)}")
            loaded.append(hooks)
        except Exception as error:  # a plugin may fail in any way
            yield Finding("Plugins", entry.name, "broken", f"{owner}: {_said(error)}")
    yield from _together()
    for hooks in loaded:
        for adapter in hooks.mosaic_adapter():
            yield _trainer(adapter)
    for hooks in loaded:
        for recipes in hooks.mosaic_recipes():
            for name, algorithms in recipes.items():
                yield _recipe(name, algorithms)
    yield from _optional()


def version_of(adapter: Adapter) -> str | None:
    """Return name and version of the trainer an adapter is for, None if it is not installed.

    Metadata alone is read: whether a module can be found says little, and importing takes seconds.
    """
    for name in adapter.trainers:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return None


def _torch() -> Finding:
    try:
        import torch

        accelerator = f"{torch.get_num_threads()} CPU threads, no accelerator"
        if torch.cuda.is_available():
            accelerator = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        elif torch.backends.mps.is_available():
            accelerator = "Apple MPS"
        return Finding("System", "torch", "ok", f"{torch.__version__}, {accelerator}")
    except Exception as error:  # a damaged installation or driver fails in many ways
        return Finding("System", "torch", "broken", _said(error))


def _load(entry: metadata.EntryPoint) -> Any:
    """Load one plugin, alone, and call its hooks once."""
    manager = pluggy.PluginManager(plugins.GROUP)
    manager.add_hookspecs(plugins.Hooks)
    manager.register(entry.load(), entry.name)
    manager.check_pending()
    _contents(manager.hook)
    return manager.hook


def _contents(hooks: Any) -> str:
    counts = {
        "algorithm": sum(map(len, hooks.mosaic_algorithms())),
        "adapter": len(hooks.mosaic_adapter()),
        "recipe": sum(map(len, hooks.mosaic_recipes())),
        "workload": sum(map(len, hooks.mosaic_workloads())),
        "loss": sum(map(len, hooks.mosaic_losses())),
    }
    plural = {"loss": "losses"}
    texts = (
        f"{count} {name if count == 1 else plural.get(name, f'{name}s')}"
        for name, count in counts.items()
        if count
    )
    return ", ".join(texts) or "nothing"


def _together() -> Iterator[Finding]:
    """Find what is wrong only with all plugins together: names that are taken twice."""
    for find in (
        plugins.installed,
        plugins.algorithms,
        plugins.adapters,
        plugins.recipes,
        plugins.workloads,
    ):
        try:
            find()
        except LookupError as error:
            yield Finding("Plugins", "names", "broken", _said(error))
            return
        except Exception:  # a broken plugin, which was found above
            return


def _trainer(adapter: Adapter) -> Finding:
    version = version_of(adapter)
    if version is None:
        way = f"not installed; pip install {adapter.trainers[0]}"
        return Finding("Trainers", adapter.title, "absent", way)
    return Finding("Trainers", adapter.title, "ok", version)


def _recipe(name: str, algorithms: Any) -> Finding:
    try:
        members = ", ".join(algorithm.name for algorithm in Recipe(algorithms))
        return Finding("Recipes", name, "ok", members or "empty")
    except Exception as error:  # a plugin may bring anything
        return Finding("Recipes", name, "broken", _said(error))


def _optional() -> Iterator[Finding]:
    """Look at the packages of our own extras, as our metadata names them."""
    for requirement in metadata.requires("mosaic-core") or []:
        match = re.match(r"([\w.-]+).*\bextra\s*==\s*['\"]([\w-]+)", requirement)
        if match is None or match[1].startswith("mosaic-"):
            continue
        name, extra = match.groups()
        try:
            yield Finding("Optional", name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            way = f'not installed; pip install "mosaic-core[{extra}]"'
            yield Finding("Optional", name, "absent", way)


def _said(error: Exception) -> str:
    """Return type and first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
