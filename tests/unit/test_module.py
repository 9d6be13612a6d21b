import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy

from betavae.data.datamodule import ImageDataModule
from betavae.module import TEST_DRAWS, VAEModule
from betavae.objectives import elbo
from betavae.runtime import checkpoint
from betavae.runtime.resume import DivergenceGuard, ExactResume
from tests.commands import fresh
from tests.conftest import DATA, MODULE

pytestmark = pytest.mark.forked  # for autograd
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def fit(data_root, seed=0, module=MODULE, callbacks=(), strategy="auto", **changes):
    L.seed_everything(seed, verbose=False)
    data = ImageDataModule(**DATA | {"root": data_root} | changes)
    made = VAEModule(**module)
    trainer = L.Trainer(
        max_epochs=1,
        limit_train_batches=10,
        log_every_n_steps=5,
        accelerator="cpu",
        strategy=strategy,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **QUIET,
    )
    trainer.fit(made, data)
    return made, data, trainer


def test_same_seed_gives_same_weights_also_for_seed_zero(data_root):
    weights = [torch.cat([p.flatten() for p in fit(data_root, seed)[0].parameters()]) for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_checkpoint_alone_rebuilds_the_model(data_root, tmp_path):
    model = {"model": MODULE["model"] | {"hidden_dims": [32, 16]}}
    module, data, trainer = fit(data_root, module=MODULE | model, callbacks=[ExactResume()])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    x = data.splits["test"].pixels[:8] / 255
    torch.save((x, module.eval()(x)), tmp_path / "expected.pt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"] == module.hparams
    assert checkpoint.read_checkpoint(tmp_path / "a.ckpt")["betavae_format"] == checkpoint.FORMAT
    code = """
import torch, betavae
x, expected = torch.load("expected.pt")
assert torch.equal(betavae.load("a.ckpt").vae.reconstruct(x), expected)
"""
    fresh("-c", code, cwd=tmp_path)


def test_test_means_are_over_all_images_at_any_batch_size(data_root):
    module, data, trainer = fit(data_root)
    results = []
    for size in (1000, 333, 10000):
        data.eval_batch_size = size
        trainer.test(module, data, verbose=False)
        results.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("test/")})
    assert results[0] == pytest.approx(results[1], rel=1e-6) and results[0] == pytest.approx(results[2], rel=1e-6)
    # The same by the plain formula with other noise: within five standard errors of the mean over images.
    x = data.splits["test"].pixels.float() / 255
    with torch.no_grad():
        terms = elbo(module.vae, x, torch.randn(1, len(x), 20), 1.0)
    per_image = terms.recon + terms.kl.sum(1)
    assert results[0]["test/neg_elbo"] == pytest.approx(per_image.mean().item(), abs=0.3)
    assert results[0]["test/kl"] == pytest.approx(terms.kl.sum(1).mean().item(), rel=1e-5)
    assert results[0]["test/loss"] == pytest.approx(results[0]["test/neg_elbo"], rel=1e-6)
    active = (terms.posterior.mean.var(0, correction=0) > 0.01).sum().item()
    assert results[0]["test/active_units"] == active


def test_the_test_averages_several_samples_of_z(data_root, monkeypatch):
    """The result is the mean over the draws, and an image's noise does not depend on the others."""
    module, data, trainer = fit(data_root)
    data.eval_batch_size = 1000
    seen = []
    monkeypatch.setattr(module, "objective", lambda vae, x, noise, b: seen.append(noise) or elbo(vae, x, noise, b))
    trainer.test(module, data, verbose=False)
    assert len(seen) == TEST_DRAWS * 10 and not any(torch.equal(seen[0], other) for other in seen[1:])
    x = data.splits["test"].pixels.float() / 255
    with torch.no_grad():
        draws = [torch.cat(seen[draw::TEST_DRAWS], 1) for draw in range(TEST_DRAWS)]
        expected = sum(elbo(module.vae, x, noise, 1.0).loss for noise in draws) / TEST_DRAWS
    assert trainer.callback_metrics["test/neg_elbo"].item() == pytest.approx(expected.item(), rel=1e-6)


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
    # Validation between them moves nothing.
    trainer = L.Trainer(max_epochs=2, limit_train_batches=4, limit_val_batches=1, accelerator="cpu", **QUIET)
    trainer.fit(module, ImageDataModule(**DATA | {"root": data_root}))
    assert [beta for beta, _ in seen] == pytest.approx([0, 0.5, 1, 1.5, 2, 2, 2, 2])
    assert [lr for _, lr in seen] == pytest.approx([1e-3 * (1 - step / 8) for step in range(8)])


class Epochs(Callback):
    """The means of each epoch, as they were when it ended."""

    def __init__(self):
        self.means = []

    def on_train_epoch_end(self, trainer, module):
        self.means.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("epoch/")})


class SoFar(Callback):
    """The mean loss of the epoch so far after each batch, and the loss and number of images of each batch."""

    def __init__(self):
        self.seen, self.batches = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches.append((outputs["loss"].item(), len(batch[0])))
        if "epoch/loss" in trainer.callback_metrics:
            self.seen.append((batch_idx, trainer.callback_metrics["epoch/loss"].item()))


def test_epoch_means_are_published_every_log_every_n_steps(data_root):
    probe = SoFar()
    data, module = ImageDataModule(**DATA | {"root": data_root}), VAEModule(**MODULE)
    trainer = L.Trainer(
        max_epochs=1, limit_train_batches=10, log_every_n_steps=4, accelerator="cpu", callbacks=[probe], **QUIET
    )
    trainer.fit(module, data)
    until = {4: 4, 5: 4, 6: 4, 7: 4, 8: 8, 9: 8}  # batches included; callbacks run before the module's hook
    for index, mean in probe.seen:
        batches = probe.batches[: until[index]]
        expected = sum(loss * images for loss, images in batches) / sum(images for _, images in batches)
        assert mean == pytest.approx(expected, rel=1e-5)
    assert [index for index, _ in probe.seen] == list(until)


def test_training_sums_are_reduced_once_per_log_interval(data_root):
    class Counting(SingleDeviceStrategy):
        reductions = 0

        def reduce(self, tensor, *args, **kwargs):
            self.reductions += tensor.ndim == 2  # other reductions are of flags
            return super().reduce(tensor, *args, **kwargs)

    _, _, trainer = fit(data_root, callbacks=[DivergenceGuard()], strategy=Counting("cpu"))
    assert trainer.strategy.reductions == 2  # of 10 steps with `log_every_n_steps=5`


class Outputs(Callback):
    """Shapes of the batches, and losses, as a callback sees them."""

    def __init__(self):
        self.shapes, self.losses = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.shapes.append((batch[0].shape, batch[1].shape))
        self.losses.append(outputs["loss"].item())


def test_several_steps_per_batch_equal_single_steps(data_root):
    settings = {"beta_schedule": {"name": "linear", "warmup": 0.5}, "lr_schedule": {"name": "linear", "warmup": 0.0}}
    ended = []
    for steps in (1, 3):
        L.seed_everything(0, verbose=False)
        data = ImageDataModule(**DATA | {"root": data_root, "validation_size": 59_000})
        module, epochs, outputs = VAEModule(**MODULE | settings), Epochs(), Outputs()
        if steps > 1:
            module.set_steps_per_batch(steps, data.batch_size, 1, None, "norm")
            data.batch_size *= steps
        callbacks = [epochs, outputs]
        trainer = L.Trainer(
            max_epochs=4, max_steps=20, limit_val_batches=0, accelerator="cpu", callbacks=callbacks, **QUIET
        )
        trainer.fit(module, data)  # 8 steps an epoch, the last on a smaller batch; ends in the middle of a batch of 3
        assert trainer.global_step == module.total_steps == 20 and trainer.num_training_batches == -(-8 // steps)
        ended.append((module, trainer.optimizers[0].state_dict(), epochs.means, outputs))
    (one, one_state, one_means, one_outputs), (several, several_state, several_means, outputs) = ended
    assert one_means == several_means and len(one_means) == 3
    assert set(one_means[0]) == {"epoch/loss", "epoch/recon", "epoch/kl", "epoch/neg_elbo"}
    for first, second in zip(one.parameters(), several.parameters(), strict=True):
        assert torch.equal(first, second)
    assert one_state["param_groups"] == several_state["param_groups"]
    # Callbacks get the images of the three steps as one batch, and their mean loss.
    assert outputs.shapes[:2] == [((384, 1, 28, 28), (384,))] * 2
    assert outputs.losses[0] == pytest.approx(sum(one_outputs.losses[:3]) / 3, rel=1e-6)


@pytest.mark.parametrize(("clip", "algorithm"), [(0.5, "norm"), (0.01, "value")])
def test_several_steps_accumulate_and_clip_like_lightning(data_root, clip, algorithm):
    ended = []
    for steps in (1, 3):
        L.seed_everything(0, verbose=False)
        data = ImageDataModule(**DATA | {"root": data_root, "validation_size": 59_000})
        module = VAEModule(**MODULE)
        wanted = {"gradient_clip_val": clip, "gradient_clip_algorithm": algorithm, "accumulate_grad_batches": 2}
        if steps > 1:
            module.set_steps_per_batch(steps, data.batch_size, 2, clip, algorithm)
            data.batch_size *= steps * 2
            wanted = {}
        trainer = L.Trainer(max_epochs=2, limit_val_batches=0, accelerator="cpu", **wanted, **QUIET)
        trainer.fit(module, data)
        assert trainer.global_step == 8
        ended.append(module)
    for first, second in zip(*(module.parameters() for module in ended), strict=True):
        assert torch.equal(first, second)
