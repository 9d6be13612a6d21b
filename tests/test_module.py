import subprocess
import sys

import lightning as L
import pytest
import torch

from betavae.data import MNISTDataModule
from betavae.module import VAEModule
from betavae.objectives import elbo
from tests.conftest import DATA, MODULE


def fit(data_root, seed=0, module=MODULE, **changes):
    L.seed_everything(seed, verbose=False)
    data = MNISTDataModule(**DATA | {"root": data_root} | changes)
    made = VAEModule(**module)
    trainer = L.Trainer(
        max_epochs=1,
        limit_train_batches=10,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(made, data)
    return made, data, trainer


def test_the_same_seed_gives_the_same_weights_and_zero_is_a_seed(data_root):
    weights = [torch.cat([p.flatten() for p in fit(data_root, seed)[0].parameters()]) for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_checkpoint_is_the_whole_recipe_in_a_fresh_process(data_root, tmp_path):
    module, data, trainer = fit(data_root, module=MODULE | {"model": MODULE["model"] | {"hidden_dims": [32, 16]}})
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    x = data.sets["test"][0][:8] / 255
    torch.save((x, module.eval()(x)), tmp_path / "expected.pt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"] == module.hparams
    code = """
import torch; from betavae.module import VAEModule; from betavae.checkpoint import load
x, expected = torch.load("expected.pt")
assert torch.equal(VAEModule.load_from_checkpoint("a.ckpt", weights_only=True, map_location="cpu").eval()(x), expected)
assert torch.equal(load("a.ckpt", "runs").vae.reconstruct(x), expected)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_the_test_is_over_all_images_in_nats_and_for_any_batch_size(data_root):
    module, data, trainer = fit(data_root)
    results = []
    for size in (1000, 333, 10000):
        data.eval_batch_size = size
        trainer.test(module, data, verbose=False)
        results.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("test/")})
    assert results[0] == pytest.approx(results[1], rel=1e-6) and results[0] == pytest.approx(results[2], rel=1e-6)
    # The same by the plain formula with other noise: within five standard errors of the mean over images.
    x = data.sets["test"][0].float() / 255
    with torch.no_grad():
        terms = elbo(module.vae, x, torch.randn(1, len(x), 20), 1.0)
    per_image = terms.recon + terms.kl.sum(1)
    assert results[0]["test/neg_elbo"] == pytest.approx(per_image.mean().item(), abs=0.3)
    assert results[0]["test/kl"] == pytest.approx(terms.kl.sum(1).mean().item(), rel=1e-5)
    assert results[0]["test/loss"] == pytest.approx(results[0]["test/neg_elbo"], rel=1e-6)
    active = (terms.posterior_mean.var(0, correction=0) > 0.01).sum().item()
    assert results[0]["test/active_units"] == active


def test_beta_weighs_the_loss_and_not_the_neg_elbo(data_root):
    module, data, trainer = fit(data_root, module=MODULE | {"beta": 4.0})
    trainer.test(module, data, verbose=False)
    test = {k.removeprefix("test/"): v.item() for k, v in trainer.callback_metrics.items()}
    assert test["loss"] == pytest.approx(test["recon"] + 4 * test["kl"], rel=1e-5)
    assert test["neg_elbo"] == pytest.approx(test["recon"] + test["kl"], rel=1e-5)


def test_schedules_follow_the_global_step(data_root):
    seen = []

    class Watched(VAEModule):
        def training_step(self, batch, batch_idx):
            seen.append((self.current_beta(), self.trainer.optimizers[0].param_groups[0]["lr"]))
            return super().training_step(batch, batch_idx)

    settings = {"beta": 2.0, "beta_schedule": {"name": "linear", "warmup": 0.5}}
    settings["lr_schedule"] = {"name": "linear", "warmup": 0.0}
    module = Watched(**MODULE | settings)
    trainer = L.Trainer(
        max_epochs=2,
        limit_train_batches=4,
        limit_val_batches=1,  # validation between them moves nothing
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, MNISTDataModule(**DATA | {"root": data_root}))
    assert [beta for beta, _ in seen] == pytest.approx([0, 0.5, 1, 1.5, 2, 2, 2, 2])
    assert [lr for _, lr in seen] == pytest.approx([1e-3 * (1 - step / 8) for step in range(8)])


def test_several_steps_in_one_batch_of_lightning_change_nothing(data_root):
    settings = {"beta_schedule": {"name": "linear", "warmup": 0.5}, "lr_schedule": {"name": "linear", "warmup": 0.0}}
    ended = []
    for together in (1, 3):
        L.seed_everything(0, verbose=False)
        data = MNISTDataModule(**DATA | {"root": data_root, "validation_size": 59_000, "binarize": "dynamic"})
        module = VAEModule(**MODULE | settings)
        module.automatic_optimization, data.steps_per_batch = together == 1, together
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = L.Trainer(max_epochs=4, max_steps=20, limit_val_batches=0, accelerator="cpu", **quiet)
        trainer.fit(module, data)  # 8 steps an epoch, the last of a smaller batch; ends in the middle of a group of 3
        assert trainer.global_step == module.total_steps == 20 and trainer.num_training_batches == -(-8 // together)
        ended.append((module, trainer.optimizers[0].state_dict()))
    (one, one_state), (other, other_state) = ended
    assert one.train_means == other.train_means
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert one_state["param_groups"] == other_state["param_groups"]
