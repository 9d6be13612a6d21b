"""Train a (β-)VAE: `python train.py model.latent_dim=20 beta=1.0`.

`python train.py --help` lists all settings.
"""

import hydra
from omegaconf import DictConfig

from betavae.runtime.cli import gc_paused
from betavae.runtime.hydra_config import CONFIGS, hydra_command, hydra_job, is_multirun
from betavae.sweeps.jobs import run_job, sweep_summary


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(cfg: DictConfig) -> float:
    with hydra_job():
        if is_multirun():
            return run_job(cfg)
        with gc_paused():  # here, so that --help does not wait for torch
            from betavae.runtime.training import train

        return train(cfg)


if __name__ == "__main__":
    with hydra_command(), sweep_summary():
        main()
