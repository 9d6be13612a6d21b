"""Arguments are formatted and parsed alike, so that printed commands can be pasted into a shell."""

import re
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from betavae.runtime.cli import adapt_commands, argument, describe_error, parse_arguments, parse_value
from tests.commands import TINY, Child, run
from tests.integration.test_resume import signal_at

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
def test_hydra_and_scripts_parse_a_formatted_argument_back(value):
    (word,) = shlex.split(argument("hydra.sweep.dir", value))
    read = OverridesParser.create().parse_override(word)
    resolved = OmegaConf.create({"value": read.value()}).value
    expected = "./" * value.startswith("~") + value
    assert type(resolved) is str and resolved == expected
    script_value = parse_value(word.partition("=")[2])
    assert type(script_value) is str and script_value == expected


@pytest.mark.parametrize(
    ("fail", "sentence"),
    [
        (lambda: torch.empty(10**13), "not enough memory for 40,000.0 GB at once; pass smaller numbers"),
        (lambda: torch.zeros(1).fill_(10**400), "a number is too large"),
        (lambda: torch.linspace(-1e39, 1e39, 3), "a number is too large"),
    ],
)
def test_huge_numbers_are_one_sentence(fail, sentence):
    with pytest.raises((RuntimeError, OverflowError)) as caught:
        fail()
    assert sentence in describe_error(caught.value)


def test_keys_may_have_dashes_and_ckpt_path_is_ckpt():
    assert parse_arguments(["--k=100", "ckpt_path=--a=1"]) == {"k": 100, "ckpt": "--a=1"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("-1e-3", -0.001),
        ("1_000", 1000),
        ("-inf", float("-inf")),
        ("007", "007"),
        ("infinity", "infinity"),
        (" 7 ", 7),
        ("True", True),
        ("null", None),
        ("", ""),
        ("a b=c, d", "a b=c, d"),
        ("'7'", "7"),
        ('"it\'s"', "it's"),
        ("[3,8]", [3, 8]),
        ("[runs/a, 'b, c', \"7\", null]", ["runs/a", "b, c", "7", None]),
        ("[]", []),
        ("[ ]", []),
        ("[3", "[3"),
    ],
)
def test_scripts_parse_values_like_hydra(text, value):
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


def test_ordinary_paths_need_no_quotes():
    assert argument("ckpt", "runs/2026-01-31_12-00-00_mlp_z2_beta1.0") == "ckpt=runs/2026-01-31_12-00-00_mlp_z2_beta1.0"


def typed(pattern: str, text: str) -> list[str]:
    """Return the words of a printed command line."""
    (line,) = re.findall(pattern, text, re.MULTILINE)
    return shlex.split(line)


def test_every_printed_command_of_a_run_works(workdir):
    np.save(workdir / "two.npy", np.zeros((2, 28, 28), np.uint8))
    small = [*TINY, "model.likelihood=logistic_mixture", "callbacks.figures_every_n_epochs=0", "trainer.max_epochs=1"]
    child = Child(*small, *shlex.split(argument("runs", FOLDER)), cwd=workdir, prepare=signal_at(2, signal.SIGTERM))
    assert child.wait() == 143, child.text
    again = typed(r"^  python train\.py (.*)$", child.text)
    text = run(*again, cwd=workdir)
    assert "next  tensorboard --logdir" in text
    assert typed(r"^next  tensorboard --logdir (.*)$", text) == [FOLDER]
    (ckpt,) = typed(r"^ +python scripts/sample\.py (.*)$", text)
    run(ckpt, cwd=workdir, script="scripts/sample.py")
    text = run(*again, cwd=workdir)
    assert typed(r"longer by (.*) trainer\.max_epochs=N$", text) == again
    out = shlex.split(argument("out", f"{FOLDER}/x.bvae"))
    text = run(ckpt, *out, "images=two.npy", "report=false", cwd=workdir, script="scripts/compress.py")
    run(*typed(r"^next  python scripts/decompress\.py (.*)$", text), cwd=workdir, script="scripts/decompress.py")


def test_every_printed_command_of_a_sweep_works(workdir):
    sweep = shlex.split(argument("hydra.sweep.dir", f"{FOLDER}/sweep"))
    words = ["-m", *TINY, "callbacks.figures_every_n_epochs=0", "trainer.max_epochs=1", "beta=1,-1"]
    text = run(*words, *sweep, cwd=workdir, code=1)
    assert typed(r"^the same command with (.*) keeps finished jobs", text) == sweep
    report = typed(r"^next  python scripts/sweep_report\.py (.*)$", text)
    assert typed(r"^ +tensorboard --logdir (.*)$", text) == [f"{FOLDER}/sweep"]
    assert "| 1 | 1/1 |" in run(*report, cwd=workdir, script="scripts/sweep_report.py")


def test_messages_name_the_command_that_started(monkeypatch):
    text = 'python train.py -m; python scripts/sweep_report.py sweep=a; pip install -e ".[explore]"; scripts/detect.py'
    monkeypatch.delenv("BETAVAE_CONSOLE", raising=False)
    assert adapt_commands(text) == text
    monkeypatch.setenv("BETAVAE_CONSOLE", "1")
    expected = 'betavae train -m; betavae sweep_report sweep=a; pip install "betavae[explore]"; scripts/detect.py'
    assert adapt_commands(text) == expected


def test_open_files_in_reference_cycles_are_written_at_exit(tmp_path):
    code = """
from betavae.runtime.cli import gc_paused
with gc_paused():
    import torch
class Callback:
    pass
callback = Callback()
callback.trainer, callback.file, callback.both = [callback], open("kept.txt", "w"), open("kept.bin", "w+b")
callback.file.write("epoch 0")
callback.both.write(b"epoch 0")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "kept.txt").read_text() == (tmp_path / "kept.bin").read_text() == "epoch 0"
