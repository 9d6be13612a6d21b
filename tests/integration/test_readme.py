"""The README and its pages are correct: their commands and their code run as they are written."""

import itertools
import re
import shlex
import subprocess
import sys
from typing import Any

import pytest

from tests.commands import REPO, Child, run

PAGES = {path.name: path.read_text() for path in (REPO / "README.md", *sorted((REPO / "docs").glob("*.md")))}
README = PAGES["README.md"]
BLOCK = re.compile(r"(?:`([\w/.]+)`:\n\n)?```(\w+)\n(.*?)```", re.DOTALL)


def commands(text: str) -> list[str]:
    """Return every `python train.py ...` and `python scripts/...` in the text and in its shell blocks."""
    shell = "\n".join(code for _, kind, code in BLOCK.findall(text) if kind == "bash")
    inline = "\n".join(re.findall(r"`([^`\n]+)`", BLOCK.sub("", text)))
    found = re.findall(r"^python (?:train|scripts/[\w/]+)\.py[^#&\n]*", f"{inline}\n{shell}", re.MULTILINE)
    return [command.strip() for command in found]


# These need your own images, a launcher (test_sweeps.py), a browser (test_explorer_page.py) or several devices.
EXCLUDED = (
    "RUN_FOLDER",
    "NAME.py",
    "IMAGE_FOLDER",
    "hydra/launcher",
    "sweep=optuna",
    "trainer=ddp",
    "schema.py",
    "explore.py",
)
# Pages whose commands run in test_pages.py or in the tests of their application.
OTHER_PAGES = ("extending.md", "images.md", "anomalies.md", "compression.md", "generation.md", "export.md")
OTHER_PAGES += ("explorer.md", "disentanglement.md", "tables.md")
COMMANDS = [
    command
    for name, text in PAGES.items()
    if name not in OTHER_PAGES
    for command in commands(text)
    if not any(word in command for word in EXCLUDED)
]
COMMANDS = list(dict.fromkeys(COMMANDS))
SMALL = {
    "scripts/benchmarks/training.py": ["rounds=1", "epochs=1", "quality=false", "presets=[default]"],
    "scripts/benchmarks/data.py": ["n=6000", "steps=1"],
    "scripts/disentanglement.py": ["max_images=600"],
    "scripts/evaluate.py": ["max_images=40", "k=20", "probes=false"],
}


def small(command: str) -> tuple[str, list[str]]:
    """Return the script and the arguments of a command, with settings that make it fast."""
    script, *words = shlex.split(command.removeprefix("python "))
    if script == "train.py" and not {"--help", "--cfg"} & set(words):
        words += ["trainer.max_epochs=1", f"trainer.limit_train_batches={10 if 'step_counter' in command else 2}"]
        words += ["trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "trainer.log_every_n_steps=1"]
        words += ["trainer.compile=false", "callbacks.figures_every_n_epochs=0", "data.eval_batch_size=100"]
        words += ["trainer.steps_per_batch=1"] * ("burda" in command)  # a Lightning batch would be ten steps
        # Two values of each swept setting are enough.
        words = [re.sub(r"^([\w.]+=[^,\[]+,[^,]+),.*", r"\1", word) for word in words]
    return script, words + SMALL.get(script, [])


# One of those that differ only in settings that `small` overrides.
UNIQUE_COMMANDS = list({(small(command)[0], *sorted(set(small(command)[1]))): command for command in COMMANDS}.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data_root):
    """A working folder with one finished run."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "data").symlink_to(data_root)
    run(*small("python train.py")[1], cwd=folder)
    return folder


def test_readme_has_the_first_commands():
    blocks = "".join(code for _, kind, code in BLOCK.findall(README) if kind == "bash")
    assert "pip install -e . && python train.py" in blocks and 'pip install -e ".[dev]" && pytest' in blocks
    assert len(COMMANDS) > 20


def shorten_benchmark() -> None:
    """Run the parts of a benchmark as forked processes, on five batches."""
    from torch.utils.data import DataLoader

    iterate, popen = DataLoader.__iter__, subprocess.Popen
    DataLoader.__iter__ = lambda self: itertools.islice(iterate(self), 5)  # type: ignore[assignment, method-assign]

    def fork(arguments: list[str], **how: Any) -> Any:
        if arguments[0] != sys.executable:
            return popen(arguments, **how)
        _, script, *words = arguments
        words += ["trainer.limit_train_batches=5"] * script.endswith("train.py")
        return Child(*words, cwd=how["cwd"], script=script, terminal=how["stdout"].fileno())

    subprocess.Popen = fork  # type: ignore[assignment, misc]


@pytest.mark.slow
@pytest.mark.parametrize("command", UNIQUE_COMMANDS)
def test_command_runs(folder, command):
    for name in ("wandb", "mlflow"):
        if f"logger={name}" in command:
            pytest.importorskip(name)
    script, words = small(command)
    prepare = shorten_benchmark if script == "scripts/benchmarks/training.py" else None
    output = run(*words, cwd=folder, script=script, prepare=prepare)
    assert "Warning" not in output and "Traceback" not in output
    pictures = [path for name in re.findall(r"\S+\.png\b", output) if (path := folder / name).exists()]
    assert pictures or script in ("train.py", "scripts/results.py", "scripts/sweep_report.py")
    assert all(path.stat().st_size > 1000 for path in pictures)


@pytest.mark.parametrize("page", ["README.md", "settings.md"])
def test_python_code_runs(folder, page, monkeypatch):
    run_folder = max((folder / "runs").glob("*_mlp_*"))
    monkeypatch.chdir(folder)
    for _, kind, code in BLOCK.findall(PAGES[page]):
        if kind == "python":
            names: dict = {}
            exec(code.replace("runs/RUN_FOLDER", str(run_folder)), names)
            images = names["images"]
            assert images.shape == (64, 1, 28, 28) and 0 <= images.min() <= images.max() <= 1
            if "posterior" in names:
                mean, logvar = names["posterior"]
                assert mean.shape == logvar.shape == (8, names["run"].vae.latent_dim)


@pytest.mark.slow
def test_every_addition_of_extending_works(new_clone):
    clone = new_clone()
    blocks = BLOCK.findall(PAGES["extending.md"])
    for file, kind, text in blocks:
        if kind != "bash":
            with open(clone.folder / file, "a") as target:
                target.write(("\n\n" if kind == "python" else "") + text)
    found = [command for _, kind, text in blocks if kind == "bash" for command in commands(f"```bash\n{text}```")]
    assert len(found) == PAGES["extending.md"].count("```bash") > 5
    for command in found:
        script, words = small(command)
        output = clone.run(script, *words)
        assert "neg. ELBO" in output and "Warning" not in output, output
        if "sparse" in command:
            assert re.search(r"epoch +1/1 .* penalty \d", output) and re.search(r"test .* penalty \d", output)
        if "step_counter" in command:
            assert "step 10\n" in output
        folder = re.search(r"^run +(\S+)$", output, re.MULTILINE)[1]
        assert "epoch   2/2" in clone.run(script, f"resume={folder}", "trainer.max_epochs=2")


def test_readme_has_the_versions_of_the_package():
    project = (REPO / "pyproject.toml").read_text()
    first, end, torch, lightning = (
        re.search(pattern, project)[1]  # type: ignore[index]
        for pattern in (
            r'python = ">=3\.(\d+),',
            r'python = ">=[\d.]+,<3\.(\d+)"',
            r'"torch>=([\d.]+),',
            r'"lightning>=([\d.]+),',
        )
    )
    versions = f"Python 3.{first} to 3.{int(end) - 1}, PyTorch from {torch} and Lightning from {lightning}."
    assert versions in " ".join(README.split())


def test_settings_page_lists_every_option_of_every_group():
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\w, ]+)", PAGES["settings.md"], re.MULTILINE))
    for group in (path for path in (REPO / "configs").iterdir() if path.is_dir() and path.name != "hydra"):
        options = {path.stem for path in group.glob("*.yaml")} - ({"default"} if group.name == "trainer" else set())
        assert options <= set(rows[group.name].strip().split(", ")), group.name


def test_settings_page_describes_every_experiment():
    section = PAGES["settings.md"].split("## Experiments")[1].split("\n## ")[0]
    assert all(f"`{path.stem}`" in section for path in (REPO / "configs/experiment").glob("*.yaml"))


@pytest.mark.parametrize("page", PAGES)
def test_commands_quote_what_shells_change(page):
    """zsh rejects an unquoted bracket, and replaces a leading ~."""
    for command in commands(PAGES[page]):
        if "[ckpt=PATH" not in command:  # a synopsis
            unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "", command)
            assert not re.search(r"[\[\](){}*?]|\s~", unquoted), command


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    here = REPO if page == "README.md" else REPO / "docs"
    text = BLOCK.sub("", PAGES[page])
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        linked = here / path if path else here / page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], target
