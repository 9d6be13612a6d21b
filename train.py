"""Train a (β-)VAE: `python train.py model.latent_dim=20 beta=1.0`. All settings: `python train.py --help`."""

from omegaconf import DictConfig

from betavae.running.cli import importing, train_command
from betavae.sweeping.jobs import run_job


@train_command
def main(cfg: DictConfig) -> float:
    with importing():  # here, so that --help does not wait for torch
        from betavae.running.training import train

    return run_job(train, cfg)


if __name__ == "__main__":
    main()
