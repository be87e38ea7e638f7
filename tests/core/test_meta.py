"""Rules that every module and every algorithm keeps, also those that are not written yet."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import mosaic_core
from mosaic_core import Algorithm, Card, Place, algorithms, functional

ROOT = Path(__file__).parents[2]
TRAINERS = {
    *("pytorch_lightning", "lightning", "lightning_fabric", "fastai", "fastcore", "fastprogress"),
    *("transformers", "accelerate", "deepspeed", "huggingface", "huggingface_hub"),
}

MODULES = {
    name: importlib.import_module(name)
    for name in [
        "mosaic_core",
        *(info.name for info in pkgutil.walk_packages(mosaic_core.__path__, "mosaic_core.")),
    ]
    if not name.endswith("__main__")
}
PUBLIC = {n: m for n, m in MODULES.items() if "._" not in n}
ALGORITHM_FILES = {n: m for n, m in MODULES.items() if n.startswith("mosaic_core.algorithms._")}
ALGORITHMS = {
    name: value
    for name, value in vars(algorithms).items()
    if isinstance(value, type) and issubclass(value, Algorithm)
}
SOURCES = sorted(Path(mosaic_core.__path__[0]).rglob("*.py"))
ADAPTER_SOURCES = sorted((ROOT / "adapters").glob("*/mosaic_*/**/*.py"))


def each(items: dict[str, object]) -> pytest.MarkDecorator:
    """Parametrise over the values of a dictionary."""
    return pytest.mark.parametrize("item", list(items.values()), ids=list(items))


def source(path: Path) -> str:
    """Return a path relative to the repository, for the names of tests."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def defined(module: ModuleType) -> set[str]:
    """Return the public names that a module's own source binds: not what it imports.

    Commands are no names for importers: the command line is how they are reached.
    """
    found: set[str] = set()
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not any(".command(" in ast.unparse(d) for d in node.decorator_list):
                found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return {name for name in found if not name.startswith("_")}


def isort_key(name: str) -> tuple[int, list[tuple[int, int, str]]]:
    """Order as ruff's RUF022 does: constants, classes, the rest; numbers by value."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    parts = re.findall(r"\d+|\D+", name)
    return kind, [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts]


def test_there_is_something_to_check() -> None:
    assert {"mosaic_core", "mosaic_core.run", "mosaic_core.algorithms"} <= PUBLIC.keys()
    assert "mosaic_core.algorithms._mixup" in ALGORITHM_FILES
    assert {"MixUp", "EMA", "NoOp"} <= ALGORITHMS.keys()
    assert ADAPTER_SOURCES


# What modules offer.


@each(PUBLIC)
def test_all_is_complete(item: ModuleType) -> None:
    listed = getattr(item, "__all__", None)
    if listed is None:  # nothing of its own: a package, or one that passes names on
        assert not defined(item)
        return
    assert len(set(listed)) == len(listed)
    assert all(hasattr(item, name) for name in listed)
    assert defined(item) - set(listed) == set()  # complete
    if not (hasattr(item, "__path__") or item is functional):  # which pass names on
        assert set(listed) - defined(item) == set()


@each({n: m for n, m in MODULES.items() if hasattr(m, "__all__")})
def test_all_is_sorted(item: ModuleType) -> None:
    assert list(item.__all__) == sorted(item.__all__, key=isort_key)


@each(MODULES)
def test_every_module_says_what_it_is(item: ModuleType) -> None:
    assert (item.__doc__ or "").strip()


def test_the_package_offers_exactly_what_it_imports() -> None:
    tree = ast.parse(inspect.getsource(mosaic_core))
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == set(mosaic_core.__all__)


@each(ALGORITHM_FILES)
def test_a_file_of_an_algorithm_offers_one_algorithm_and_its_functions(item: ModuleType) -> None:
    offered = [getattr(item, name) for name in item.__all__]
    assert sum(isinstance(o, type) and issubclass(o, Algorithm) for o in offered) == 1
    assert all(o.__module__ == item.__name__ for o in offered)
    functions = {
        name
        for name, value in vars(item).items()
        if inspect.isfunction(value)
        and value.__module__ == item.__name__
        and not name.startswith("_")
    }
    assert functions == {o.__name__ for o in offered if inspect.isfunction(o)}


def test_the_algorithms_package_offers_what_its_files_do() -> None:
    offered = {name for module in ALGORITHM_FILES.values() for name in module.__all__}
    public = {
        name
        for name, value in vars(algorithms).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == offered
    assert sum(len(module.__all__) for module in ALGORITHM_FILES.values()) == len(offered)


def test_functional_offers_every_pure_function() -> None:
    functions = {name for name, value in vars(algorithms).items() if inspect.isfunction(value)}
    assert set(functional.__all__) == functions
    assert {"mixup_batch", "smooth_labels", "apply_blurpool", "compute_ema"} <= functions
    assert all(getattr(functional, name) is getattr(algorithms, name) for name in functions)


# What an algorithm comes with.


@each(ALGORITHMS)
def test_an_algorithm_is_a_frozen_dataclass_with_a_place(item: type[Algorithm]) -> None:
    assert dataclasses.is_dataclass(item)
    assert item.__dataclass_params__.frozen
    assert isinstance(item.place, Place)
    assert inspect.getdoc(item)
    assert all(isinstance(name, str) for name in item.excludes)


@each(ALGORITHMS)
def test_an_algorithm_has_a_card(item: type[Algorithm]) -> None:
    assert isinstance(vars(item).get("card"), Card)  # its own, not that of a base
    for field in dataclasses.fields(Card):
        text = getattr(item.card, field.name)
        if field.name == "url" and item.place is Place.MEASURING:
            continue  # what only measures comes from no paper
        assert text == text.strip()
        assert text
        assert "  " not in text
    for name in ("summary", "effect", "use_when", "interactions"):
        assert getattr(item.card, name).endswith("."), name


@each({n: a for n, a in ALGORITHMS.items() if a.place is not Place.MEASURING})
def test_an_algorithm_has_a_reference(item: type[Algorithm]) -> None:
    assert re.fullmatch(r"\S.* (19|20)\d\d", item.card.reference)  # authors and year
    assert re.fullmatch(r"https://[^\s]+", item.card.url)
    assert "References:" in inspect.getsource(inspect.getmodule(item))


@each(ALGORITHMS)
def test_every_setting_is_documented(item: type[Algorithm]) -> None:
    doc = inspect.getdoc(item)
    for field in dataclasses.fields(item):
        assert re.search(rf"^    {field.name}: ", doc, re.MULTILINE), field.name


@each(ALGORITHM_FILES)
def test_an_algorithm_has_a_test_file(item: ModuleType) -> None:
    name = item.__name__.rpartition("._")[2]
    assert (ROOT / "tests" / "core" / f"test_{name}.py").is_file()


@each(ALGORITHM_FILES)
def test_an_algorithm_reads_in_two_minutes(item: ModuleType) -> None:
    assert len(inspect.getsource(item).splitlines()) < 300


# What sources must not hold.


@pytest.mark.parametrize("path", [*SOURCES, *ADAPTER_SOURCES], ids=source)
def test_no_assert_validates(path: Path) -> None:
    if "testing" in path.parts:
        return  # contract suites for pytest
    tree = ast.parse(path.read_text())
    assert [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Assert)] == []


@pytest.mark.parametrize("path", SOURCES, ids=source)
def test_the_core_imports_no_trainer(path: Path) -> None:
    roots: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").partition(".")[0])
    assert not TRAINERS & roots
    assert not {root for root in roots if root.startswith("mosaic_")} - {"mosaic_core"}


@pytest.mark.parametrize("path", SOURCES, ids=source)
def test_the_core_names_no_trainer(path: Path) -> None:
    text = path.read_text()
    doc = ast.get_docstring(ast.parse(text), clean=False) or ""
    text = text.replace(doc, "", 1)  # the docstring of a module may say where it is used
    named = rf"\b({'|'.join(sorted(TRAINERS))}|pytorch lightning|hugging face)\b"
    found = [line.strip() for line in text.splitlines() if re.search(named, line, re.IGNORECASE)]
    assert found == []


def test_no_package_markers_under_tests() -> None:
    # tests/fastai/__init__.py would make `import fastai` load the test folder.
    assert [str(p) for p in (ROOT / "tests").rglob("__init__.py")] == []
    assert [str(p) for p in (ROOT / "adapters").glob("*/__init__.py")] == []


# Examples.


@each(MODULES)
def test_examples_in_docstrings_run(item: ModuleType) -> None:
    result = doctest.testmod(item)
    assert result.failed == 0


def test_most_functions_have_an_example() -> None:
    finder = doctest.DocTestFinder()
    examples = sum(len(t.examples) for m in MODULES.values() for t in finder.find(m))
    assert examples > 20
