"""New images from a trained VAE: `python scripts/sample.py [ckpt=PATH n=64 seed=0 temperature=1.0 out=samples.png]`."""

from pathlib import Path

from omegaconf import DictConfig

from betavae.cli import command, importing


@command("sample")
def main(cfg: DictConfig) -> None:
    with importing():
        import torch

        from betavae import checkpoint, figures
        from betavae.rules import check

    check(cfg)
    loaded = checkpoint.load(cfg.ckpt, cfg.runs)
    images = loaded.vae.sample(cfg.n, cfg.temperature, torch.Generator().manual_seed(cfg.seed))
    out = Path(cfg.out)
    figures.save_picture(figures.grid(images, cfg.columns), out)
    print(f"{cfg.n} samples of {loaded.path} in {out}")
    if cfg.save_images:
        folder = out.with_suffix("")
        for number, image in enumerate(images):
            figures.save_picture(image, folder / f"{number:0{len(str(cfg.n - 1))}d}.png", scale=1)
        print(f"each as a picture in {folder}/")
    if cfg.save_tensor:
        with figures.writing(out.with_suffix(".pt")) as path:
            torch.save(images, path)
        print(f"as a tensor {tuple(images.shape)} in {path}")


if __name__ == "__main__":
    main()
