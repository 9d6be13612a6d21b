"""What a sweep found, in tables and pictures: `python scripts/sweep_report.py [sweep=PATH over=[A,B] metric=kl]`."""

import re
import sys
from pathlib import Path

from omegaconf import DictConfig

from betavae.cli import command


@command("sweep_report")
def main(cfg: DictConfig) -> None:
    from betavae import sweep_report
    from betavae.rules import check

    check(cfg)
    sweep = Path(cfg.folder) if cfg.folder else sweep_report.newest(Path(cfg.runs) / "sweeps")
    out = Path(cfg.out)
    print(sweep_report.write(sweep, out, cfg.over, cfg.metric, cfg.seed))
    print(f"{', '.join(sorted(path.name for path in out.iterdir()))} in {out}/")


if __name__ == "__main__":
    # Hydra would look for `sweep=PATH` among the presets in configs/sweep/.
    sys.argv[1:] = [re.sub(r"^sweep=", "folder=", argument) for argument in sys.argv[1:]]
    main()
