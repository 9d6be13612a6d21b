"""Train a (β-)VAE: `python train.py model.latent_dim=20 beta=1.0`. All settings: `python train.py --help`."""

from omegaconf import DictConfig

from betavae import sweeps
from betavae.cli import command, importing


@command("train")
def main(cfg: DictConfig) -> float:
    with importing():  # here, so that --help does not wait for torch
        from betavae.training import train

    return sweeps.job(train, cfg)


if __name__ == "__main__":
    main()
