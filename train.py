"""Train a (β-)VAE: `python train.py model.latent_dim=20 beta=1.0`. All settings: `python train.py --help`."""

from omegaconf import DictConfig

from betavae.runtime.cli import gc_paused, train_command
from betavae.sweeps.jobs import run_job


@train_command
def main(cfg: DictConfig) -> float:
    return run_job(train, cfg)


def train(cfg: DictConfig) -> float:
    with gc_paused():  # here, so that --help and jobs that are finished do not wait for torch
        from betavae.runtime import training

    return training.train(cfg)


if __name__ == "__main__":
    main()
