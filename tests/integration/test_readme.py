"""The README and its pages tell the truth: their commands run, in their order, and additions work as they say."""

import re
import shlex

import pytest

from tests.commands import REPO, run

PAGES = {path.name: path.read_text() for path in (REPO / "README.md", *sorted((REPO / "docs").glob("*.md")))}
README = PAGES["README.md"]
BLOCK = re.compile(r"(?:`([\w/.]+)`:\n\n)?```(\w+)\n(.*?)```", re.DOTALL)


def commands(text: str) -> list[str]:
    """Every `python train.py ...`, in the text or in a block of shell lines."""
    shell = "\n".join(code for _, kind, code in BLOCK.findall(text) if kind == "bash")
    inline = "\n".join(re.findall(r"`([^`\n]+)`", BLOCK.sub("", text)))
    found = re.findall(r"^python (?:train|scripts/\w+)\.py[^#&\n]*", f"{inline}\n{shell}", re.MULTILINE)
    return [command.strip() for command in found]


# Those that need a folder of one's own, a launcher (test_sweeps.py), or a hand (test_explorer.py) are not for here.
ELSEWHERE = ("RUN_FOLDER", "PICTURES", "hydra/launcher", "sweep=optuna", "trainer=ddp", "schema.py", "explore.py")
# Pages that are followed as a story in test_pages.py, and those of the tests of their name, test_fidelity.py for
# generation.md.
STORIES = ("extending.md", "pictures.md", "anomalies.md", "compression.md", "generation.md", "export.md", "explorer.md")
STORIES += ("disentanglement.md",)
COMMANDS = [
    command
    for name, text in PAGES.items()
    if name not in STORIES
    for command in commands(text)
    if not any(word in command for word in ELSEWHERE)
]
COMMANDS = list(dict.fromkeys(COMMANDS))


def small(command: str) -> tuple[str, list[str]]:
    """The script and the arguments of a command as it stands, with training cut to a few steps."""
    script, *words = shlex.split(command.removeprefix("python "))
    if script == "train.py" and not {"--help", "--cfg"} & set(words):
        words += ["trainer.max_epochs=1", f"trainer.limit_train_batches={10 if 'step_counter' in command else 2}"]
        words += ["trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "trainer.log_every_n_steps=1"]
        words += ["trainer.compile=false", "callbacks.figures_every_n_epochs=0"]  # test_optimizers.py compiles a step
        words += ["trainer.steps_per_batch=1"] * ("burda" in command)  # or it is ten times as many steps
        # Two values of each sweep show what more would.
        words = [re.sub(r"^([\w.]+=[^,\[]+,[^,]+),.*", r"\1", word) for word in words]
    if script == "scripts/benchmark.py":
        words += ["rounds=1", "epochs=1", "quality=false", "presets=[default]"]
    if script == "scripts/benchmark_data.py":
        words += ["n=6000", "steps=1"]
    if script == "scripts/disentanglement.py":
        words += ["max_images=600"]
    if script == "scripts/evaluate.py":
        words += ["max_images=40", "k=20", "probes=false"]
    return script, words


@pytest.fixture(scope="module")
def place(tmp_path_factory, data_root):
    """A working folder with one finished run."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "data").symlink_to(data_root)
    run(*small("python train.py")[1], cwd=folder)
    return folder


def test_the_first_commands_are_there():
    blocks = "".join(code for _, kind, code in BLOCK.findall(README) if kind == "bash")
    assert "pip install -e . && python train.py" in blocks and 'pip install -e ".[dev]" && pytest' in blocks
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("command", COMMANDS)
def test_command(place, command):
    for name in ("wandb", "mlflow"):
        if f"logger={name}" in command:
            pytest.importorskip(name)
    script, words = small(command)
    output = run(*words, cwd=place, script=script)
    assert "Warning" not in output and "Traceback" not in output
    picture = re.search(r"(?:in|and) (\S+\.png)", output)
    assert picture or script in ("train.py", "scripts/results.py", "scripts/sweep_report.py")
    assert not picture or (place / picture[1]).stat().st_size > 1000


@pytest.mark.parametrize("page", ["README.md", "settings.md"])
def test_the_python_lines(place, page, monkeypatch):
    folder = max((place / "runs").glob("*_mlp_*"))
    monkeypatch.chdir(place)
    for _, kind, code in BLOCK.findall(PAGES[page]):
        if kind == "python":
            names: dict = {}
            exec(code.replace("runs/RUN_FOLDER", str(folder)), names)
            images = names["images"]
            assert images.shape == (64, 1, 28, 28) and 0 <= images.min() <= images.max() <= 1
            if "posterior" in names:
                mean, logvar = names["posterior"]
                assert mean.shape == logvar.shape == (8, names["run"].vae.latent_dim)


def test_every_addition_works_as_written(new_clone):
    clone = new_clone()
    typed = []
    for file, kind, text in BLOCK.findall(PAGES["extending.md"]):
        if kind == "bash":
            typed += commands(f"```bash\n{text}```")
        else:
            with open(clone.folder / file, "a") as target:
                target.write(("\n\n" if kind == "python" else "") + text)
    assert len(typed) == PAGES["extending.md"].count("```bash") > 5
    for command in typed:
        script, words = small(command)
        output = clone.run(script, *words)
        assert "neg. ELBO" in output and "Warning" not in output, output
        if "sparse" in command:
            assert re.search(r"epoch +1/1 .* price \d", output) and re.search(r"test .* price \d", output)
        if "step_counter" in command:
            assert "step 10\n" in output
        folder = re.search(r"^run +(\S+)$", output, re.MULTILINE)[1]
        assert "epoch   2/2" in clone.run(script, f"resume={folder}", "trainer.max_epochs=2")


def test_the_versions_are_those_of_the_package():
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
    assert f"Python 3.{first} to 3.{int(end) - 1}, PyTorch from {torch} and Lightning from {lightning}:" in README
