"""What each latent dimension does, ordered by its KL: `python scripts/traverse.py [ckpt=PATH dimensions=10]`."""

from omegaconf import DictConfig

from betavae.cli import command, importing


@command("traverse")
def main(cfg: DictConfig) -> None:
    with importing():
        import torch

        from betavae import checkpoint, figures
        from betavae.data import test_set
        from betavae.errors import UserError
        from betavae.objectives import gaussian_kl
        from betavae.rules import check

    check(cfg)
    loaded = checkpoint.load(cfg.ckpt, cfg.runs)
    x, _ = test_set(loaded.data, cfg.data_root)
    if cfg.image is not None and cfg.image >= len(x):
        raise UserError(f"image={cfg.image} cannot be: the test images are numbered 0 to {len(x) - 1}")
    kl = gaussian_kl(loaded.vae.encode(x)).mean(0)
    order = kl.argsort(descending=True)[: cfg.dimensions].tolist()
    start = torch.zeros(loaded.vae.latent_dim) if cfg.image is None else loaded.vae.encode(x[[cfg.image]]).mean[0]
    values = torch.linspace(-cfg.span, cfg.span, cfg.steps)
    rows = figures.traversal(loaded.vae, start, order, values)

    labels = [f"{value:.1f}" for value in values.tolist()]
    figure = figures.new_figure(0.45 * cfg.steps + 1.2, 0.45 * len(order) + 0.6)
    axes = figure.add_subplot()
    figures.show(axes, figures.grid(rows, cfg.steps))
    height, width = (size + 2 for size in loaded.vae.image_shape[1:])
    axes.set_yticks([(row + 0.5) * height for row in range(len(order))], [f"z{d}  {kl[d]:.2f} nats" for d in order])
    axes.set_xticks([(column + 0.5) * width for column in range(cfg.steps)], labels)
    axes.tick_params(length=0, labelsize=7)
    figures.save_figure(figure, cfg.out)
    print(f"{len(order)} latent dimensions of {loaded.path}, by KL, in {cfg.out}")


if __name__ == "__main__":
    main()
