"""Run the checks of the project, each in its own environment.

`nox` runs lint, tests and docs. `nox --list` lists all sessions.
"""

import tempfile
from pathlib import Path

import nox

nox.options.sessions = ["lint", "tests", "docs"]
nox.options.reuse_venv = "yes"


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and types."""
    session.install("-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the fast tests, or pytest with other arguments: `nox -s tests -- -m slow`."""
    session.install("-e", ".[dev]")
    session.run("pytest", *session.posargs)


@nox.session(python="3.11", venv_backend="uv")
def lowest(session: nox.Session) -> None:
    """Run the fast tests with the lowest supported versions of the dependencies."""
    session.install("--resolution", "lowest-direct", "-e", ".[dev]")
    session.run("pytest", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation site in site/; broken links are errors."""
    # The pages come from the source code, so betavae and torch are not installed.
    session.install(*nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["docs"])
    session.run("python", "docs/build.py", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build wheel and sdist in dist/, install each, and train.

    An optional argument is the tag, which must be the version.
    """
    version = Path("src/betavae/__init__.py").read_text().partition('__version__ = "')[2].partition('"')[0]
    if session.posargs and session.posargs != [f"v{version}"]:
        session.error(f"the tag {session.posargs[0]} is not v{version}, the version in src/betavae/__init__.py")
    session.install("build")
    for old in Path("dist").glob("betavae-*"):
        old.unlink()
    session.run("python", "-m", "build", "--outdir", "dist")
    for package in (next(Path("dist").glob("*.whl")), next(Path("dist").glob("*.tar.gz"))):
        check_package(session, package.resolve())


def check_package(session: nox.Session, package: Path) -> None:
    """Install a package into a new environment, then train and sample outside of the clone."""
    commands = (
        ("python", "-m", "venv", "venv"),
        ("venv/bin/pip", "install", "--quiet", str(package)),
        ("venv/bin/betavae", "train", "trainer=smoke"),
        ("venv/bin/betavae", "sample"),
    )
    with tempfile.TemporaryDirectory() as folder, session.chdir(folder):
        for command in commands:
            session.run(*command, external=True, env={"PYTHONPATH": None})
        if not Path("samples.png").is_file():
            session.error(f"{package.name} drew no samples")
