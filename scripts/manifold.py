"""The whole of a 2-D latent space: `python scripts/manifold.py [ckpt=PATH size=20 out=manifold.png]`."""

from omegaconf import DictConfig

from betavae.cli import command, importing


@command("manifold")
def main(cfg: DictConfig) -> None:
    with importing():
        from betavae import checkpoint, figures
        from betavae.rules import check

    check(cfg)
    loaded = checkpoint.load(cfg.ckpt, cfg.runs)
    figures.save_picture(figures.grid(figures.manifold(loaded.vae, cfg.size), cfg.size), cfg.out)
    print(f"the manifold of {loaded.path} in {cfg.out}")


if __name__ == "__main__":
    main()
