"""The files around the code agree with it: workflows, hooks, nox sessions, versions, the changelog and the site."""

import ast
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import betavae
from tests.commands import REPO

WORKFLOWS = sorted((REPO / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
SITE = tomllib.loads((REPO / "zensical.toml").read_text())["project"]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md")


def find_sessions() -> set[str]:
    """Read the names of the sessions from noxfile.py."""
    functions = [
        node for node in ast.parse((REPO / "noxfile.py").read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    return {node.name for node in functions if any("session" in ast.unparse(item) for item in node.decorator_list)}


def find_fault(command: str) -> str:
    """Return what is missing for a command of a workflow, a hook or a page, or ""."""
    words = shlex.split(command, comments=True)
    if words[:1] == ["nox"]:
        end = words.index("--") if "--" in words else len(words)
        names = words[words.index("-s") + 1 : end] if "-s" in words else []
        unknown = set(names) - find_sessions()
        return f"no session {unknown}" if unknown or not names else ""
    if words[:1] == ["python"]:
        words = words[1:] if words[1] != "-m" else words[2:]
    if words[:2] == ["pip", "install"]:
        return ""
    if words and words[0].endswith(".py"):
        return "" if (REPO / words[0]).is_file() else f"no script {words[0]}"
    files = [word for word in words[1:] if word.startswith("tests/") and not (REPO / word).exists()]
    tool = words[0] if words else ""
    return f"no {files or tool}" if files or not (Path(sys.executable).parent / tool).is_file() else ""


def workflow_commands(path: Path) -> list[str]:
    """List the `run` lines of a workflow, once for each session of a matrix."""
    commands = []
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        sessions = job.get("strategy", {}).get("matrix", {}).get("session", [""])
        for step in job["steps"]:
            lines = step.get("run", "").splitlines()
            commands += [line.replace("${{ matrix.session }}", name) for line in lines for name in sessions]
    return commands


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_only_existing_sessions(path):
    commands = workflow_commands(path)
    assert any(command.startswith("nox -s ") for command in commands)
    assert all(command.startswith(("nox -s ", "pip install ")) for command in commands)
    assert not [(command, fault) for command in commands if (fault := find_fault(command))]


def test_workflows_cover_every_session_and_python():
    called = {name for path in WORKFLOWS for command in workflow_commands(path) for name in shlex.split(command)[2:3]}
    assert find_sessions() <= called and len(find_sessions()) == 5
    matrix = yaml.safe_load((REPO / ".github/workflows/tests.yml").read_text())["jobs"]["linux"]["strategy"]["matrix"]
    first, end = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    assert matrix["python"] == [f"3.{minor}" for minor in range(int(first), int(end))]
    classifiers = [name.removeprefix("Programming Language :: Python :: ") for name in PROJECT["classifiers"]]
    assert [name for name in classifiers if re.fullmatch(r"3\.\d+", name)] == matrix["python"]


def test_hooks_call_only_existing_commands():
    hooks = [
        hook
        for repo in yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    ]
    installed = [hook for hook in hooks if hook["language"] == "system"]
    assert len(hooks) == 6 and len(installed) == 5
    assert not [(hook["id"], fault) for hook in installed if (fault := find_fault(hook["entry"]))]
    (large,) = [hook for hook in hooks if hook not in installed]
    assert large["additional_dependencies"][0].startswith("pre-commit-hooks>=")


@pytest.mark.parametrize("command", ["nox", "nox -s test", "python scripts/no.py", "no-such-tool", "ruff tests/no.py"])
def test_missing_commands_are_found(command):
    assert find_fault(command)


def test_contributing_names_only_existing_commands():
    text = (REPO / "CONTRIBUTING.md").read_text()
    commands = re.findall(r"`((?:nox -s|python|pytest|ruff) [^`]+)`", text)
    assert len(commands) > 5
    for command in commands:
        for part in command.split("&&"):
            assert not find_fault(part), part


def test_versions_agree():
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert citation["version"] == betavae.__version__ and citation["license"] == PROJECT["license"]
    headings = re.findall(r"^## \[([^]]+)\]", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased" and headings[1] == betavae.__version__


def test_site_has_every_page():
    def find_pages(entry):
        """List the pages of an entry of `nav`: a name, a table or a list of entries."""
        if isinstance(entry, str):
            return [entry]
        return [page for item in (entry if isinstance(entry, list) else entry.values()) for page in find_pages(item)]

    pages = find_pages(SITE["nav"])
    assert len(pages) == len(set(pages))
    assert set(pages) == {path.name for path in (REPO / "docs").glob("*.md")} | {"tour.md", "index.md", "api/", *PAGES}


@pytest.mark.parametrize("page", PAGES)
def test_links_of_project_pages_lead_to_files(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", (REPO / page).read_text())
    assert all((REPO / target).exists() for target in targets)
