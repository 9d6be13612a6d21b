"""Guarantees of runs and sweeps in unusual situations, tested on complete commands."""

import signal
from pathlib import Path

import lightning as L
import pytest
import torch

from betavae.data.datamodule import ImageDataModule
from betavae.module import VAEModule
from tests.commands import REPO, TINY, Child, read_record, run, started
from tests.conftest import DATA, MODULE


@pytest.mark.slow
def test_a_sweep_rejects_changed_defaults(tmp_path, data_root, new_clone):
    clone = new_clone()
    other = tmp_path / "other"
    other.symlink_to(data_root)
    words = ["-m", *TINY, "trainer.max_epochs=1", f"data.root={data_root},{other}", "hydra.sweep.dir=sweep"]
    clone.run("train.py", *words)
    jobs = [path for path in (clone.folder / "sweep").iterdir() if path.is_dir()]
    assert len(jobs) == 2 and all(read_record(job)["status"] == "finished" for job in jobs)
    assert "is already finished" in clone.run("train.py", *words)
    optimizer = clone.folder / "configs" / "optimizer" / "adam.yaml"
    optimizer.write_text(optimizer.read_text().replace("lr: 1.0e-3", "lr: 2.0e-3"))
    before = {job: (job / "metrics.json").read_bytes() for job in jobs}
    text = clone.run("train.py", *words, code=1)
    assert "holds a job with optimizer.lr=0.001, and this job has optimizer.lr=0.002" in text
    assert before == {job: (job / "metrics.json").read_bytes() for job in jobs}


def test_sigterm_during_the_imports_is_handled(tmp_path):
    process = started(str(REPO / "train.py"), *TINY, cwd=tmp_path)
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch_python" not in maps.read_text():  # until it is importing torch
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "stopped" in text and "Traceback" not in text, text
    assert not list(tmp_path.glob("runs/*/metrics.json"))


def test_ctrl_c_during_the_test_is_recorded(tmp_path, data_root):
    def interrupt() -> None:
        import os

        real = VAEModule.test_step

        def test_step(self, batch, batch_idx):
            os.kill(os.getpid(), signal.SIGINT)
            return real(self, batch, batch_idx)

        VAEModule.test_step = test_step  # type: ignore[method-assign]

    child = Child(*TINY, f"data.root={data_root}", "hydra.run.dir=run", cwd=tmp_path, prepare=interrupt)
    assert child.wait() == 130, child.text
    assert read_record(tmp_path / "run")["status"] == "interrupted" and "resume=run" in child.text
    run("resume=run", cwd=tmp_path)
    assert read_record(tmp_path / "run")["status"] == "finished"


def trainer(**settings):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(accelerator="cpu", num_sanity_val_steps=0, **quiet, **settings)


@pytest.mark.forked
def test_evaluation_uses_the_full_beta_of_a_schedule(data_root):
    settings = {"beta": 8.0, "beta_schedule": {"name": "linear", "warmup": 1.0}}
    module, data = VAEModule(**MODULE | settings), ImageDataModule(**DATA | {"root": data_root})

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step >= 4

    ended = trainer(max_epochs=50, min_steps=1, limit_train_batches=10, limit_val_batches=1, callbacks=[Stop()])
    ended.fit(module, data)
    assert 0 < module.current_beta() < 1
    found = dict(ended.callback_metrics)
    ended.test(module, data, verbose=False)
    found |= ended.callback_metrics
    for split in ("val", "test"):
        loss, recon, kl = (found[f"{split}/{name}"].item() for name in ("loss", "recon", "kl"))
        assert loss == pytest.approx(recon + 8 * kl, rel=1e-5)


@pytest.mark.forked
def test_overfit_batches_repeats_the_same_batches(data_root):
    seen = []

    class Watched(VAEModule):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0].sum().item())
            return super().training_step(batch, batch_idx)

    data = ImageDataModule(**DATA | {"root": data_root})
    trainer(max_epochs=3, overfit_batches=2).fit(Watched(**MODULE), data)
    assert len(seen) == 6 and seen[:2] == seen[2:4] == seen[4:] and seen[0] != seen[1]
    seen.clear()
    trainer(max_epochs=2, limit_train_batches=2).fit(Watched(**MODULE), data)
    assert seen[:2] != seen[2:]


def test_half_precision_does_not_underflow():
    vae = VAEModule(**MODULE).vae.to(torch.float16)
    x = torch.rand(4, 1, 28, 28).half()
    _, _, params = vae(x)
    assert vae.likelihood.log_prob(x, params).isfinite().all()
