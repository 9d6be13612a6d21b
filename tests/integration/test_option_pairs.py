"""Every pair of common settings trains, or is rejected in one line."""

import functools
import itertools

import numpy as np
import pytest
import torch

from tests.commands import Child

SMALL = ["trainer=smoke", "trainer.max_epochs=1", "trainer.limit_train_batches=4", "trainer.limit_val_batches=1"]
SMALL += [
    "trainer.limit_test_batches=1",
    "model.hidden_dims=[8]",
    "model.latent_dim=2",
    "callbacks.figures_every_n_epochs=0",
]
SMALL += ["data=arrays", "data.root=images.npy", "data.test_size=20", "data.validation_size=20", "data.batch_size=15"]
SETTINGS = [
    *("trainer.precision=bf16-mixed", "trainer.precision=64-true", "trainer.precision=bf16-true"),
    *("trainer.precision=16-mixed", "trainer.compile=true", "trainer.steps_per_batch=3", "trainer=[smoke,fast]"),
    *("trainer.gradient_clip_val=1", "trainer.accumulate_grad_batches=2", "trainer.overfit_batches=2"),
    *("callbacks.early_stopping_patience=1", "trainer.max_time=00:00:10:00", "trainer.max_steps=3"),
    *("trainer.val_check_interval=0.5", "data.validation_size=0", "trainer.deterministic=true"),
    *("optimizer=sgd", "optimizer=muon", "optimizer=adamw", "optimizer.name=LBFGS"),
]
FEW = {"optimizer.name=LBFGS": ["~optimizer.betas", "~optimizer.eps", "~optimizer.weight_decay", "~optimizer.fused"]}
PAIRS = [
    pair
    for pair in itertools.combinations(SETTINGS, 2)
    if pair[0].split("=")[0] != pair[1].split("=")[0] and not all(word.startswith("optimizer") for word in pair)
]
REJECTED = ["it needs a GPU", "this run never validates", "only when automatic", "LBFGS"]


def skip_code_generation() -> None:
    """Compile without code generation, which takes seconds and is tested in test_compile.py."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]


def test_there_are_enough_pairs():
    assert len(PAIRS) > 150


@pytest.mark.slow
@pytest.mark.parametrize("first", SETTINGS)
def test_a_setting_trains_with_every_other_setting(tmp_path, first):
    bad = []
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (100, 6, 5), dtype=np.uint8))
    for number, pair in enumerate(pair for pair in PAIRS if pair[0] == first):
        words = [word for setting in pair for word in (setting, *FEW.get(setting, []))]
        folder = f"hydra.run.dir=run{number}"
        child = Child(*SMALL, folder, *words, cwd=tmp_path, prepare=skip_code_generation)
        code, text = child.wait(), child.text
        lines = text.splitlines()
        trained = code == 0 and any(line.startswith("test  ") for line in lines)
        rejected = code == 1 and len(lines) == 1 and lines[0].startswith("error: ") and len(text) < 300
        if not (trained or rejected) or "warning" in text.lower() or "Traceback" in text:
            bad.append((pair, code, text))
        if rejected:
            assert any(word in text for word in REJECTED), (pair, text)
    assert not bad, bad[:3]
