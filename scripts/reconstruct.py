"""Test images above their reconstructions: `python scripts/reconstruct.py [ckpt=PATH n=32 out=reconstructions.png]`."""

from omegaconf import DictConfig

from betavae.cli import command, importing


@command("reconstruct")
def main(cfg: DictConfig) -> None:
    with importing():
        import torch

        from betavae import checkpoint, figures
        from betavae.data import test_set
        from betavae.rules import check

    check(cfg)
    loaded = checkpoint.load(cfg.ckpt, cfg.runs)
    x, _ = test_set(loaded.data, cfg.data_root)
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(cfg.seed))[: cfg.n]
    figures.save_picture(figures.grid(figures.reconstructions(loaded.vae, x[chosen]), 8), cfg.out)
    print(f"{len(chosen)} test images and, below each row, what {loaded.path} makes of them, in {cfg.out}")


if __name__ == "__main__":
    main()
