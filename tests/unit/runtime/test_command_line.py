"""What a command prints to be typed next can be pasted into a shell, whatever the folders are called."""

import re
import shlex
import signal

import numpy as np
import pytest
from betavae.runtime.command_line import argument
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tests.commands import TINY, Child, run
from tests.integration.test_resume import ask_at

FOLDER = "my runs [1] = #x é,'q'"
CHARACTERS = st.text("\\'\"${}[]() =#,:~/ab1.eE+-\n\t*%é", min_size=1, max_size=12)
NUMBERS = st.from_regex(r"[-+]?[0-9_]*\.?[0-9_]*[eE]?[-+]?[0-9_:]+", fullmatch=True)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(CHARACTERS | NUMBERS | st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=40))
@example("runs/x")
@example("null")
@example("1e3")
@example("~")
@example("${oc.env:HOME}")
@example("\\${x}\\")
@example(FOLDER)
def test_an_argument_is_read_back_as_it_was(value):
    (word,) = shlex.split(argument("hydra.sweep.dir", value))
    read = OverridesParser.create().parse_override(word)
    resolved = OmegaConf.create({"value": read.value()}).value
    assert type(resolved) is str and resolved == ("./" * value.startswith("~") + value)


def test_ordinary_paths_are_not_quoted():
    assert argument("ckpt", "runs/2026-01-31_12-00-00_mlp_z2_beta1.0") == "ckpt=runs/2026-01-31_12-00-00_mlp_z2_beta1.0"


def typed(pattern: str, text: str) -> list[str]:
    """The words of a command line that was printed."""
    (line,) = re.findall(pattern, text, re.MULTILINE)
    return shlex.split(line)


@pytest.fixture(scope="module")
def place(tmp_path_factory, data_root):
    folder = tmp_path_factory.mktemp("place")
    (folder / "data").symlink_to(data_root)
    np.save(folder / "two.npy", np.zeros((2, 28, 28), np.uint8))
    return folder


def test_every_printed_command_runs(place):
    small = [*TINY, "model.likelihood=logistic_mixture", "callbacks.figures_every_n_epochs=0", "trainer.max_epochs=1"]
    child = Child(*small, *shlex.split(argument("runs", FOLDER)), cwd=place, prepare=ask_at(2, signal.SIGTERM))
    assert child.wait() == 143, child.text
    again = typed(r"^  python train\.py (.*)$", child.text)
    text = run(*again, cwd=place)
    assert "next  tensorboard --logdir" in text
    assert typed(r"^next  tensorboard --logdir (.*)$", text) == [FOLDER]
    (ckpt,) = typed(r"^ +python scripts/sample\.py (.*)$", text)
    run(ckpt, cwd=place, script="scripts/sample.py")
    text = run(*again, cwd=place)
    assert typed(r"longer: (.*) trainer\.max_epochs=N$", text) == again
    out = shlex.split(argument("out", f"{FOLDER}/x.bvae"))
    text = run(ckpt, *out, "images=two.npy", "report=false", cwd=place, script="scripts/compress.py")
    run(*typed(r"^next  python scripts/decompress\.py (.*)$", text), cwd=place, script="scripts/decompress.py")


def test_every_printed_command_of_a_sweep_runs(place):
    sweep = shlex.split(argument("hydra.sweep.dir", f"{FOLDER}/sweep"))
    words = ["-m", *TINY, "callbacks.figures_every_n_epochs=0", "trainer.max_epochs=1", "beta=1,-1"]
    text = run(*words, *sweep, cwd=place, code=1)
    assert typed(r"^the same command with (.*) keeps what is finished", text) == sweep
    report = typed(r"^next  python scripts/sweep_report\.py (.*)$", text)
    assert typed(r"^ +tensorboard --logdir (.*)$", text) == [f"{FOLDER}/sweep"]
    assert "| 1 | 1/1 |" in run(*report, cwd=place, script="scripts/sweep_report.py")
