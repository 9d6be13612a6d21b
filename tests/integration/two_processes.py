"""Take one SGD step on a fixed batch of 64 images, then test, in `sys.argv[1]` processes (for test_sweeps.py)."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from betavae.data.datamodule import ImageDataModule
from betavae.module import VAEModule
from betavae.runtime.resume import ExactResume


class Fixed(VAEModule):
    """A module whose noise depends only on the image."""

    def loss(self, x: Tensor, labels: Tensor | None, noise: Tensor, beta: Tensor) -> Any:
        self.drawn = float(noise[0, 0, 0])
        noise = x.flatten(1)[:, 300 : 300 + self.vae.latent_dim].unsqueeze(0) * 2 - 1
        return super().loss(x, labels, noise, beta)

    def on_train_batch_end(self, *args: Any) -> None:
        self.drawn_in_training = self.all_gather(torch.tensor(self.drawn)).view(-1).tolist()


def main() -> None:
    processes, root = int(sys.argv[1]), sys.argv[2]
    L.seed_everything(1, verbose=False)
    data = ImageDataModule("mnist", root, 0, 64 // processes, 300, "none", seed=0)
    data.setup()
    test = data.splits["test"]
    data.splits["test"] = replace(
        test, pixels=test.pixels[:1001], labels=test.labels[:1001]
    )  # not divisible by the number of processes
    model = {"network": "mlp", "hidden_dims": [32], "latent_dim": 5, "activation": "relu", "likelihood": "bernoulli"}
    module = Fixed(
        model | {"image_shape": [1, 28, 28]},
        {"name": "elbo", "k": 1},
        2.0,
        {"name": "constant"},
        {"name": "SGD", "lr": 1.0},
        {"name": "constant", "warmup": 0.0},
    )
    before = {name: value.clone() for name, value in module.vae.state_dict().items()}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_steps=1,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[ExactResume()],
    )
    trainer.fit(module, data)
    sums = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
    gradient = {name: before[name] - value for name, value in module.vae.state_dict().items()}
    module.vae.load_state_dict(before)
    test = trainer.test(module, data, verbose=False)[0]
    if trainer.is_global_zero:
        content = {"gradient": gradient, "test": test, "noise": module.drawn_in_training, "train": sums}
        torch.save(content, Path(f"{processes}.pt"))


if __name__ == "__main__":
    main()
