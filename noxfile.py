"""Sessions of nox: ``nox`` runs lint and tests; ``nox --list`` tells the others.

An environment with torch takes minutes to make and gigabytes to keep, so there are few, they are
reused, and the sessions that only call the command line share the one of ``mosaic``.
"""

from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"  # the first with nox.project.dependency_groups
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "tests"]

ROOT = nox.project.load_toml("pyproject.toml")
ADAPTERS = sorted(path.parent for path in Path("adapters").glob("*/pyproject.toml"))


def install(session: nox.Session, *arguments: str, core: str = ".") -> None:
    """Install the core and all adapters in place, in one command so that they find each other."""
    adapters = (argument for path in ADAPTERS for argument in ("-e", str(path)))
    session.install("-e", core, *adapters, *arguments)


@nox.session
def tests(session: nox.Session) -> None:
    """Run pytest: ``nox -s tests -- -k mixup``."""
    install(session, *nox.project.dependency_groups(ROOT, "test"))
    # By file, as importing a trainer takes longer than most tests of it.
    session.run("pytest", "-n", "2", "--dist", "loadfile", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, imports, types and that the table in the README is current."""
    install(session, *nox.project.dependency_groups(ROOT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports")
    session.run("mypy")
    session.run("mosaic", "list", "--check-readme", "README.md")


@nox.session(default=False)
def mosaic(session: nox.Session) -> None:
    """Run the command line: ``nox -s mosaic -- list``."""
    install(session, core=".[demo]")
    session.run("mosaic", *session.posargs)


@nox.session(default=False, venv_backend="none")
def demo(session: nox.Session) -> None:
    """Train the demo with and without a recipe."""
    session.notify("mosaic", ["demo", *session.posargs])


@nox.session(default=False, venv_backend="none")
def readme(session: nox.Session) -> None:
    """Write the table of algorithms into the README."""
    session.notify("mosaic", ["list", "--write-readme", "README.md"])


@nox.session(default=False, venv_backend="none")
def bench(session: nox.Session) -> None:
    """Measure whether recipes train faster: ``nox -s bench -- --recipe demo``."""
    session.notify("mosaic", ["bench", *session.posargs])


@nox.session(default=False, python="3.11")
def lower_bounds(session: nox.Session) -> None:
    """Run pytest with the oldest allowed dependencies (``torch>=2.6`` as ``torch==2.6``)."""
    projects = [ROOT, *(nox.project.load_toml(path / "pyproject.toml") for path in ADAPTERS)]
    test = nox.project.dependency_groups(ROOT, "test")
    allowed = [*test, *(item for each in projects for item in each["project"]["dependencies"])]
    oldest = [
        item.replace(">=", "==")
        for item in sorted(set(allowed))
        if ">=" in item and not item.startswith("mosaic-")  # our own are the ones in this tree
    ]
    constraints = Path(session.create_tmp()) / "oldest.txt"
    constraints.write_text("\n".join(oldest))
    install(session, *test, "--constraint", str(constraints))
    # Old libraries warn of newer ones that they were not made for.
    session.run("pytest", "-W", "ignore", "-n", "2", "--dist", "loadfile", *session.posargs)
