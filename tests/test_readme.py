"""The README tells the truth: its commands run, in their order, and its additions work as it says."""

import re
import shlex

import pytest

from tests.conftest import REPO

README = (REPO / "README.md").read_text()
BLOCKS = re.findall(r"(?:`([\w/.]+)`[^`]*)?```(\w+)\n(.*?)```", README, re.DOTALL)
SHELL = "\n".join(text for _, kind, text in BLOCKS if kind == "bash")
INLINE = "\n".join(re.findall(r"`([^`\n]+)`", README))
ADDITIONS = README.split("## Make it yours")[1].split("\n## ")[0]
COMMANDS = [
    line for line in dict.fromkeys(re.findall(r"^python [^#&\n]+", INLINE, re.MULTILINE)) if "RUN_FOLDER" not in line
]


def smoke(command: str) -> list[str]:
    """The command as it stands, with training cut to seconds."""
    words = shlex.split(command.removeprefix("python "))
    if words[0] == "train.py" and not {"--help", "--cfg"} & set(words):
        words += ["trainer=smoke", "trainer.max_epochs=1"]
        words = [word for word in words if word != "trainer=fast"]  # test_optimizers.py compiles a step
    if words[0] == "scripts/benchmark.py":
        words += ["rounds=1", "epochs=1", "quality=false", "presets=[default]"]
    return words


@pytest.fixture(scope="module")
def readme_clone(new_clone):
    clone = new_clone()
    clone.run(*smoke("python train.py"))
    return clone


def test_the_two_commands_are_there():
    assert "pip install -e . && python train.py" in SHELL and 'pip install -e ".[dev]" && pytest' in SHELL
    assert len(COMMANDS) > 12


@pytest.mark.parametrize("command", COMMANDS)
def test_command(readme_clone, command):
    output = readme_clone.run(*smoke(command))
    assert "Warning" not in output and "Traceback" not in output
    if command.startswith("python scripts/"):
        picture = re.search(r"in (\w+\.png)", output)
        assert picture and (readme_clone.folder / picture[1]).stat().st_size > 1000


def test_the_python_lines(readme_clone):
    run = max((readme_clone.folder / "runs").glob("*_mlp_*"))
    code = next(text for _, kind, text in BLOCKS if kind == "python" and "load_from_checkpoint" in text)
    code = code.replace("runs/RUN_FOLDER", str(run)) + "assert images.shape == (64, 1, 28, 28)"
    readme_clone.run("-c", code)


def test_every_addition_works_as_written(new_clone):
    clone = new_clone()
    commands = []
    for file, kind, text in re.findall(r"(?:`([\w/.]+)`:\n\n)?```(\w+)\n(.*?)```", ADDITIONS, re.DOTALL):
        if kind == "bash":
            commands.append(text.strip())
        else:
            with open(clone.folder / file, "a") as target:
                target.write(("\n\n" if kind == "python" else "") + text)
    assert len(commands) == 5
    for command in commands:
        assert "neg. ELBO" in clone.run(*smoke(command))
