"""From one test image to another through the latent space: `python scripts/interpolate.py digits=[3,8]`."""

from omegaconf import DictConfig

from betavae.cli import command, importing


@command("interpolate")
def main(cfg: DictConfig) -> None:
    with importing():
        import torch

        from betavae import checkpoint, figures
        from betavae.data import test_set
        from betavae.errors import UserError
        from betavae.rules import check

    check(cfg)
    loaded = checkpoint.load(cfg.ckpt, cfg.runs)
    x, labels = test_set(loaded.data, cfg.data_root)
    if cfg.images is not None:
        if max(cfg.images) >= len(x):
            raise UserError(f"images={cfg.images} cannot be: the test images are numbered 0 to {len(x) - 1}")
        pairs = [tuple(cfg.images)]
    else:
        generator = torch.Generator().manual_seed(cfg.seed)
        ends = []
        for digit in cfg.digits:
            of_digit = (labels == digit).nonzero()[:, 0]
            if not len(of_digit):
                raise UserError(f"digits={cfg.digits} cannot be: the labels are 0 to {int(labels.max())}")
            ends.append(of_digit[torch.randint(len(of_digit), (cfg.rows,), generator=generator)].tolist())
        pairs = list(zip(*ends, strict=True))
    rows = [figures.interpolation(loaded.vae, x[[start]], x[[end]], cfg.steps) for start, end in pairs]
    # Each row between its two originals.
    framed = [torch.cat((x[[start]], row, x[[end]])) for (start, end), row in zip(pairs, rows, strict=True)]
    figures.save_picture(figures.grid(torch.cat(framed), cfg.steps + 2), cfg.out)
    print(f"{len(rows)} interpolations by {loaded.path}, the originals at both ends, in {cfg.out}")


if __name__ == "__main__":
    main()
