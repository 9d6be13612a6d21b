"""Every pair of common settings trains, or is rejected in one line."""

import functools
import itertools

import numpy as np
import pytest
import torch

from tests.commands import run

SMALL = ["trainer=smoke", "trainer.max_epochs=1", "model.hidden_dims=[8]", "model.latent_dim=2"]
SMALL += [f"trainer.limit_{split}_batches={count}" for split, count in (("train", 4), ("val", 1), ("test", 1))]
SMALL += ["callbacks.figures_every_n_epochs=0", "data=arrays", "data.root=images.npy", "data.test_size=20"]
SMALL += ["data.validation_size=20", "data.batch_size=15"]
LBFGS = "optimizer.name=LBFGS ~optimizer.betas ~optimizer.eps ~optimizer.weight_decay ~optimizer.fused"
SETTINGS = [
    *("trainer.precision=bf16-mixed", "trainer.precision=64-true", "trainer.precision=bf16-true"),
    *("trainer.compile=true", "trainer.steps_per_batch=3", "trainer=[smoke,fast]"),
    *("trainer.gradient_clip_val=1", "trainer.accumulate_grad_batches=2", "trainer.overfit_batches=2"),
    *("callbacks.early_stopping_patience=1", "trainer.max_time=00:00:10:00", "trainer.max_steps=3"),
    *("trainer.val_check_interval=0.5", "data.validation_size=0", "trainer.deterministic=true"),
    *("optimizer=sgd", "optimizer=muon", "optimizer=adamw", LBFGS),
]
REJECTED = {
    ("trainer.steps_per_batch=3", LBFGS): "trainer.steps_per_batch=3 is invalid: expected 1 with LBFGS",
    ("trainer=[smoke,fast]", LBFGS): "trainer.steps_per_batch=10 is invalid: expected 1 with LBFGS",
    ("callbacks.early_stopping_patience=1", "trainer.max_steps=3"): "this run never validates",
    ("callbacks.early_stopping_patience=1", "data.validation_size=0"): "this run never validates",
}
MOST = 5  # settings of one command; more of them would hide each other


def have_one_key(*settings: str) -> bool:
    keys = {setting.split("=")[0] for setting in settings}
    return len(keys) < len(settings) or sum(key.startswith("optimizer") for key in keys) > 1


PAIRS = [pair for pair in itertools.combinations(SETTINGS, 2) if not have_one_key(*pair) and pair not in REJECTED]


def cover_pairs() -> list[tuple[str, ...]]:
    """Choose commands that together have all pairs of settings."""
    left, commands = dict.fromkeys(PAIRS), []
    while left:
        chosen = next(iter(left))
        while len(chosen) < MOST:
            gains = {}
            for setting in SETTINGS:
                pairs = [tuple(sorted((setting, other), key=SETTINGS.index)) for other in chosen]
                if all(pair in PAIRS for pair in pairs):
                    gains[setting] = sum(pair in left for pair in pairs)
            best = max(gains, key=lambda setting: gains[setting])
            if not gains[best]:
                break
            chosen = tuple(sorted((*chosen, best), key=SETTINGS.index))
        for pair in itertools.combinations(chosen, 2):
            left.pop(pair, None)
        commands.append(chosen)
    return commands


@pytest.fixture
def folder(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (100, 6, 5), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    return tmp_path


def skip_code_generation() -> None:
    """Compile without code generation, which takes seconds and is tested in test_compile.py."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]


@pytest.mark.slow
@pytest.mark.parametrize("settings", cover_pairs(), ids=" ".join)
def test_settings_train_together(folder, settings):
    words = [*SMALL, *" ".join(settings).split()]
    text = run(*words, cwd=folder, prepare=skip_code_generation)
    assert "\ntest  " in text and "warning" not in text.lower() and "Traceback" not in text, text


@pytest.mark.parametrize(("settings", "said"), [*REJECTED.items(), (("trainer.precision=16-mixed",), "it needs a GPU")])
def test_settings_are_rejected_together(folder, settings, said):
    text = run(*SMALL, "trainer.accelerator=cpu", *" ".join(settings).split(), cwd=folder, code=1)
    assert text.startswith("error: ") and said in text and text.count("\n") == 1 and len(text) < 300
