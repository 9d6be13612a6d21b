"""The wheel: it has the configs and the scripts, and its command `betavae` trains and samples without a clone."""

import re
import shlex
import subprocess
import sys
import zipfile

import pytest

from tests.commands import ENVIRONMENT, REPO, TINY, fresh
from tests.integration.test_readme import BLOCK, PAGES

COMMANDS = ["train", *sorted(path.stem for path in REPO.glob("scripts/*.py"))]
LIST = "import runpy, sys; sys.argv[1:] = {}; runpy.run_module('betavae', run_name='__main__'); "
LIST += "assert not {{'torch', 'lightning', 'hydra'}} & set(sys.modules)"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    words = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(REPO))
    fresh("-m", "pip", *words, cwd=folder)
    return next(folder.glob("betavae-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the installed wheel. The test's environment has its dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    fresh("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(wheel), cwd=folder)
    return folder


@pytest.fixture(scope="module")
def user(tmp_path_factory, data_root):
    """A working folder with the configs of installation.md."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "data").symlink_to(data_root)
    for file, kind, text in BLOCK.findall(PAGES["installation.md"]):
        if kind == "yaml":
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
    return folder


def betavae(installed, cwd, *words, code=0):
    """Run the console command and return its output."""
    environment = ENVIRONMENT | {"PYTHONPATH": str(installed)}
    command = [sys.executable, str(installed / "bin" / "betavae"), *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_wheel_has_configs_and_scripts(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    files = [
        REPO / "train.py",
        *REPO.glob("scripts/*.py"),
        *REPO.glob("configs/**/*.yaml"),
        REPO / "configs/schema.json",
    ]
    assert len(files) > 50
    for path in files:
        assert packed[f"betavae/{path.relative_to(REPO)}"] == path.read_bytes()
    assert "betavae/py.typed" in packed
    assert {name.split("/")[0].split("-")[0] for name in packed} == {"betavae", "hydra_plugins"}
    assert not [name for name in packed if "benchmarks" in name or "__pycache__" in name]


@pytest.mark.slow
def test_page_commands_run_without_a_clone(installed, user):
    shell = "".join(text for _, kind, text in BLOCK.findall(PAGES["installation.md"]) if kind == "bash")
    train, sample = (shlex.split(line)[1:] for line in shell.splitlines() if line.startswith("betavae"))
    output = betavae(installed, user, *train, *TINY, "data.root=data")
    run = re.search(r"^run +(\S+_mine)$", output, re.MULTILINE)[1]
    config = (user / run / "config.yaml").read_text()
    # From the user's experiment, the user's optimizer, the package's optimizer and the package's data.
    assert all(line in config for line in ("beta: 4", "lr: 0.002", "fused: true", "validation_size: 5000"))
    next_command = re.search(r"betavae sample ckpt=\S+", output)[0]
    assert "Warning" not in output and "python " not in output
    for words in (sample, shlex.split(next_command)[1:]):
        assert "64 samples" in betavae(installed, user, *words)
        assert (user / "samples.png").stat().st_size > 1000
        (user / "samples.png").unlink()
    resumed = betavae(installed, user, "train", f"resume={run}", "trainer.max_epochs=5")
    assert "epoch   5/5" in resumed


@pytest.mark.slow
def test_messages_name_the_console_command(installed, user, tmp_path):
    assert "Usage: betavae train [group" in (text := betavae(installed, user, "train", "--help"))
    assert "python" not in text and "mine" in text
    assert (
        "one of best10, " in (text := betavae(installed, user, "train", "experiment=no", code=1)) and " mine," in text
    )
    assert "train one by `betavae train`" in betavae(installed, tmp_path, "sample", code=1)


@pytest.mark.slow
def test_user_config_replaces_the_packaged_one(installed, tmp_path):
    assert "lr: 0.001" in betavae(installed, tmp_path, "train", "--cfg", "job", "--package", "optimizer")
    (tmp_path / "configs" / "optimizer").mkdir(parents=True)
    (tmp_path / "configs" / "optimizer" / "adam.yaml").write_text("name: Adam\nlr: 0.5\n")
    assert "lr: 0.5" in betavae(installed, tmp_path, "train", "--cfg", "job", "--package", "optimizer")


@pytest.mark.parametrize("words", [[], ["sample", "--help"]])
def test_listing_and_help_import_no_torch(words, tmp_path):
    text = fresh("-c", LIST.format(words), cwd=tmp_path)
    if words:
        assert text.startswith("Sample images from a trained VAE: `betavae sample [") and "temperature=1" in text
    else:
        listed = re.findall(r"^  (\w+) +(\w.{10,60}\w)$", text, re.MULTILINE)
        assert [name for name, _ in listed] == COMMANDS


def test_unknown_command_is_one_line(tmp_path):
    text = fresh("-m", "betavae", "sampel", "n=4", cwd=tmp_path, code=1)
    assert text == "error: sampel is not a command of betavae; did you mean sample?\n"
