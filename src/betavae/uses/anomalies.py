"""How strange an image is to a trained VAE, how sure one may be of that, and where in the image it is strange.

Every score is a number per image, higher: stranger, and depends on that image alone: the noise of the posterior's samples
is the same for all images. `Detector` fits what a score needs to training images and turns scores into p-values by
images that neither the VAE nor the score was fitted to.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from betavae.errors import UserError
from betavae.objectives import elbo, gaussian_kl, log_mean_exp, log_ratio
from betavae.vae import VAE, Posterior

DEFAULT = "combined"
QUICK = ("neg_elbo", "dose", "dose_svm", "combined")  # thousands of images per second on a CPU
SLOW = ("nll", "regret")
FIT_IMAGES = 20_000  # of the training images, at most: evenly spaced ones
KERNELS = 2_000  # of each kernel density, at most
SVM_IMAGES = 5_000
COMPONENTS = 50  # of the Gaussian mixture, with 200 images for each or more
BATCH = 500


def draws(vae: VAE, pairs: int) -> Tensor:
    """Fixed noise `(2 * pairs, 1, latent_dim)`, each with its negative, and of variance 1 in each dimension."""
    noise = torch.randn(pairs, 1, vae.latent_dim, generator=torch.Generator().manual_seed(0))
    noise = noise / noise.square().mean(0).sqrt()
    return torch.cat((noise, -noise)).to(next(vae.parameters()))


def neg_elbo(vae: VAE, x: Tensor) -> Tensor:
    """The negative ELBO of `x` `(N, C, H, W)` over eight draws, `(N,)` in nats (Kingma & Welling 2014)."""
    terms = elbo(vae, x, draws(vae, 4).expand(-1, len(x), -1), 1.0)
    return terms.recon + terms.kl.sum(1)


def nll(vae: VAE, x: Tensor, pairs: int = 32) -> Tensor:
    """The importance-weighted bound on -log p(x) of 2 * pairs draws, `(N,)` in nats (Burda et al. 2016)."""
    posterior, z, params = vae(x, draws(vae, pairs).expand(-1, len(x), -1))
    return -log_mean_exp(vae.likelihood.log_prob(x, params) + log_ratio(z, posterior))


def regret(vae: VAE, x: Tensor, steps: int = 50, lr: float = 0.1) -> Tensor:
    """Likelihood regret, `(N,)` in nats, at least 0 (Xiao, Yan & Amit 2020).

    By how much the ELBO of one image rises when mean and log-variance of its own posterior are optimised, by Adam from
    where the encoder puts them, with the decoder as it is. (The paper optimises the whole encoder for each image; here
    the two vectors that it gives, for all images at once.) The draws stay the same, and the best step counts.
    """
    noise = draws(vae, 4)
    with torch.enable_grad():
        mean, logvar = (part.detach().clone().requires_grad_() for part in vae.encode(x))
        optimizer = torch.optim.Adam([mean, logvar], lr)
        first = best = None
        for step in range(steps + 1):
            posterior = Posterior(mean, logvar)
            log_px = vae.likelihood.log_prob(x, vae.decode(posterior.rsample(noise))).mean(0)
            bound = log_px - gaussian_kl(posterior).sum(1)
            now = bound.detach()
            first, best = (now, now) if first is None or best is None else (first, torch.fmax(best, now))
            if step < steps:
                mean.grad, logvar.grad = torch.autograd.grad(-bound.sum(), [mean, logvar])
                optimizer.step()
    return best - first


def excess(vae: VAE, x: Tensor, reconstruction: Tensor) -> Tensor:
    """What the reconstruction `(N, C, H, W)` leaves unexplained, `(N,)` in nats, at least 0.

    The KL divergence of Bernoulli pixels of mean x from those of mean `reconstruction`, summed: cross-entropy less the
    pixels' own entropy, which is no fault of the model. For any likelihood; means are kept 0.001 away from 0 and 1.
    """
    near, mean = x.clamp(0.001, 0.999), reconstruction.clamp(0.001, 0.999)
    pixels = F.binary_cross_entropy(mean, near, reduction="none") - F.binary_cross_entropy(near, near, reduction="none")
    return pixels.sum((1, 2, 3))


def statistics(vae: VAE, x: Tensor) -> Tensor:
    """Eight statistics of encoder and decoder `(N, 8)`: neg. ELBO, distortion, KL, |mean|^2, the sums of the posterior's
    variances and log-variances, and squared error and `excess` of the reconstruction (as in Morningstar et al. 2021)."""
    mean, logvar = vae.encode(x)
    reconstruction = vae.likelihood.mean(vae.decode(mean))
    kl = gaussian_kl(Posterior(mean, logvar)).sum(1)
    bound = neg_elbo(vae, x)
    squares = (x - reconstruction).square().sum((1, 2, 3))
    rows = (bound, bound - kl, kl, mean.square().sum(1), logvar.exp().sum(1), logvar.sum(1), squares)
    return torch.stack((*rows, excess(vae, x, reconstruction)), 1).double()


def kernel_density(values: Tensor, at: Tensor) -> Tensor:
    """Log-densities `(N, S)` of `at` `(N, S)` under a normal kernel density of each column of `values` `(M, S)`, with
    Scott's bandwidth."""
    width = (values.std(0) * len(values) ** -0.2).clamp(min=1e-9)
    scaled, centres = at / width, values / width
    logs = [(-0.5 * (a[:, None] - c).square()).logsumexp(1) for a, c in zip(scaled.T, centres.T, strict=True)]
    return torch.stack(logs, 1) - torch.log(len(values) * math.sqrt(2 * math.pi) * width)


def svm_decision(svm: dict[str, Any], at: Tensor) -> Tensor:
    """Scikit-learn's `OneClassSVM.decision_function` of rows `at`, `(N,)`: positive inside."""
    distances = torch.cdist(at, svm["vectors"], compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.exp(-svm["gamma"] * distances) @ svm["weights"] + svm["offset"]


def mixture_log_density(mixture: dict[str, Tensor], at: Tensor) -> Tensor:
    """Log-density `(N,)` of rows `at` under a mixture of normal distributions with full covariances."""
    roots = mixture["roots"]  # (K, D, D), each times its transpose the precision
    distances = (at @ roots - (mixture["means"][:, None] @ roots)).square().sum(2)  # (K, N)
    logs = mixture["weights"].log() + roots.diagonal(dim1=1, dim2=2).log().sum(1)
    return (logs[:, None] - 0.5 * distances).logsumexp(0) - 0.5 * at.shape[1] * math.log(2 * math.pi)


def latent_and_unexplained(vae: VAE, x: Tensor, background: float) -> tuple[Tensor, Tensor]:
    """The posterior means `(N, latent_dim)`, and `excess` per unit of ink `(N,)`: ink is what differs
    from `background`, the most frequent grey level of training images."""
    mean = vae.encode(x).mean
    ink = (x - background).abs().sum((1, 2, 3)).clamp(min=1)
    return mean.double(), (excess(vae, x, vae.likelihood.mean(vae.decode(mean))) / ink).double()


def pixel_surprise(vae: VAE, x: Tensor) -> Tensor:
    """-log p(x|z) at the posterior mean for each pixel, `(N, H, W)` in nats, channels summed.

    The likelihood takes each pixel for an image of its own, as it may: given z, pixels are independent.
    """

    def alone(images: Tensor) -> Tensor:
        return images.movedim(1, 3).flatten(0, 2)[..., None, None]

    params = vae.decode(vae.encode(x).mean)
    return -vae.likelihood.log_prob(alone(x), alone(params)).view(len(x), *x.shape[2:])


class Detector(NamedTuple):
    """A VAE and what was fitted for it. `state` holds tensors and numbers alone, for `torch.save`, and
    `Detector(vae, torch.load(path, weights_only=True))` is the same detector again."""

    vae: VAE
    state: dict[str, Any]

    @classmethod
    @torch.no_grad()
    def fit(cls, vae: VAE, train: Tensor, validation: Tensor, names: Sequence[str] = QUICK) -> "Detector":
        """Fit densities to `train`, and calibrate the scores `names` by `validation`.

        Images are `(N, C, H, W)`, uint8 or floats in [0, 1]. `validation` must be of the same kind as `train`, and the
        VAE must not have seen them: else it flags more than it says. Needs scikit-learn.
        """
        from sklearn.mixture import GaussianMixture  # here, since it takes a second
        from sklearn.svm import OneClassSVM

        index = torch.arange(0, len(train), max(1, -(-len(train) // FIT_IMAGES)))
        train = train.index_select(0, index)
        levels = train if train.dtype == torch.uint8 else (255 * train).round().byte()
        background = float(levels.flatten().bincount().argmax()) / 255
        parts = [
            (statistics(vae, x), *latent_and_unexplained(vae, x, background), pixel_surprise(vae, x).double())
            for x in batches(vae, train)
        ]
        values, means, unexplained, surprise = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        centre, scale = values.mean(0), values.std(0).clamp(min=1e-9)
        rows = (values - centre) / scale
        svm = OneClassSVM(nu=0.1, gamma="scale").fit(rows[:: -(-len(rows) // SVM_IMAGES)].numpy())
        components = max(1, min(COMPONENTS, len(means) // 200))
        found = GaussianMixture(components, init_params="k-means++", max_iter=20, tol=0, reg_covar=1e-3, random_state=0)
        spread = means.std(0).clamp(min=1e-9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the fit did not converge: twenty steps are meant
            found.fit((means / spread).float().numpy())
        mixture = {"weights": found.weights_, "means": found.means_, "roots": found.precisions_cholesky_}
        state: dict[str, Any] = {
            "kernels": values[:: -(-len(values) // KERNELS)].clone(),
            "centre": centre,
            "scale": scale,
            "svm": {
                "vectors": torch.from_numpy(svm.support_vectors_),
                "weights": torch.from_numpy(svm.dual_coef_[0]),
                "offset": float(svm.intercept_[0]),
                "gamma": float(svm._gamma),  # scikit-learn has no public name for what gamma="scale" came to
            },
            "background": background,
            "spread": spread,
            "mixture": {name: torch.from_numpy(part).double() for name, part in mixture.items()},
            "pixel_mean": surprise.mean(0),
            "pixel_sd": surprise.std(0),
        }
        latent = -mixture_log_density(state["mixture"], means / spread)
        state["parts"] = torch.tensor(
            [[part.mean(), part.std().clamp(min=1e-9)] for part in (latent, unexplained)]
        ).double()
        scores = cls(vae, state).scores(validation, names)
        return cls(vae, state | {"calibration": {name: score.sort().values for name, score in scores.items()}})

    def scores(self, x: Tensor, names: Sequence[str] = QUICK) -> dict[str, Tensor]:
        """Each score of `names` (of QUICK and SLOW) for the images `x` `(N, C, H, W)`: `(N,)` in double precision.

        neg_elbo, nll, regret: see the functions of these names.
        dose: minus the sum of the log-densities of `statistics` (DoSE-KDE, Morningstar et al. 2021): a statistic far
            below those of training images is as strange as one far above.
        dose_svm: the distance outside a one-class SVM of the same statistics, standardised (DoSE-SVM, there).
        combined: see `combined`.
        """
        if unknown := set(names) - {*QUICK, *SLOW}:
            raise UserError(f"score={sorted(unknown)[0]} cannot be: it must be one of {', '.join((*QUICK, *SLOW))}")
        functions: dict[str, Callable[[Tensor], Tensor]] = {
            "neg_elbo": lambda x: neg_elbo(self.vae, x),
            "nll": lambda x: nll(self.vae, x),
            "regret": lambda x: regret(self.vae, x),
            "dose": self.dose,
            "dose_svm": self.dose_svm,
            "combined": self.combined,
        }
        with torch.no_grad():
            parts = [[functions[name](part).double().cpu() for name in names] for part in batches(self.vae, x)]
        return {name: torch.cat(score) for name, score in zip(names, zip(*parts, strict=True), strict=True)}

    def dose(self, x: Tensor) -> Tensor:
        return -kernel_density(self.state["kernels"], statistics(self.vae, x).cpu()).sum(1)

    def dose_svm(self, x: Tensor) -> Tensor:
        rows = (statistics(self.vae, x).cpu() - self.state["centre"]) / self.state["scale"]
        return -svm_decision(self.state["svm"], rows)

    def combined(self, x: Tensor) -> Tensor:
        """Two surprises: the posterior mean's, under a Gaussian mixture of those of training images (as DAGMM has it,
        Zong et al. 2018), and the `excess` per ink. Each is standardised by training images, and their upper normal
        tails multiplied (Fisher): -sum log(1 - Phi(.))."""
        means, unexplained = (part.cpu() for part in latent_and_unexplained(self.vae, x, self.state["background"]))
        latent = -mixture_log_density(self.state["mixture"], means / self.state["spread"])
        centre, scale = self.state["parts"].T
        return -torch.special.log_ndtr(-(torch.stack((latent, unexplained), 1) - centre) / scale).sum(1)

    def p_values(self, x: Tensor, name: str = DEFAULT) -> Tensor:
        """`(N,)`: (1 + the number of calibration images at least as strange) / (1 + their number).

        Conformal: an image of the training kind has a p-value of at most a with a probability of at most a (Vovk et al.
        2005). How far one calibration set may be from that, `false_alarm_rate` says.
        """
        calibration = self.state["calibration"].get(name)
        if calibration is None:
            raise UserError(
                f"score={name} was not calibrated: it must be one of {', '.join(self.state['calibration'])}"
            )
        return p_values(self.scores(x, (name,))[name], calibration)

    def heat_map(self, x: Tensor) -> Tensor:
        """`(N, H, W)`: `pixel_surprise` in standard deviations from the training images' mean of that pixel.

        A pixel's standard deviation counts as at least a tenth of the root mean square over pixels: at the border,
        where all training images are alike, any ink would else be infinitely strange.
        """
        mean, sd = self.state["pixel_mean"], self.state["pixel_sd"]
        floor = 0.1 * sd.square().mean().sqrt()
        with torch.no_grad():
            maps = torch.cat([pixel_surprise(self.vae, part).double().cpu() for part in batches(self.vae, x)])
        return (maps - mean) / sd.clamp(min=floor)


def p_values(scores: Tensor, calibration: Tensor) -> Tensor:
    """Conformal p-values of `scores` `(N,)` by the sorted scores `calibration` `(n,)`. A NaN is as strange as can be."""
    below = torch.searchsorted(calibration, scores.contiguous())
    return (1 + len(calibration) - below) / (1 + len(calibration))


class FalseAlarms(NamedTuple):
    """The share of unseen images of the training kind whose p-value is at most the alarm."""

    mean: float  # over calibration sets
    low: float  # 2.5 and 97.5 % of them, by the luck of one calibration set, and of `fresh` images if there are any
    high: float


def false_alarm_rate(alarm: float, calibration: int, fresh: int | None = None) -> FalseAlarms:
    """The false-alarm rate given one set of `calibration` images is Beta(l, n + 1 - l)-distributed, with
    l = floor(alarm (n + 1)) (Vovk 2012), and the count among `fresh` images beta-binomially.

    Raises UserError if so small an alarm needs more calibration images. Needs SciPy.
    """
    from scipy import stats

    rank = math.floor(alarm * (calibration + 1) * (1 + 1e-12))  # 0.01 * 100 is less than 1 by its rounding
    if not 0 < alarm < 1:
        raise UserError(f"alarm={alarm} cannot be: it must be above 0 and below 1")
    if rank < 1:
        needed = math.ceil(1 / alarm) - 1
        raise UserError(f"alarm={alarm} needs at least {needed} validation images, and there are {calibration}")
    rate = stats.beta(rank, calibration + 1 - rank)
    if fresh is None:
        low, high = rate.interval(0.95)
    else:
        low, high = (count / fresh for count in stats.betabinom(fresh, rank, calibration + 1 - rank).interval(0.95))
    return FalseAlarms(rank / (calibration + 1), float(low), float(high))


def batches(vae: VAE, images: Tensor) -> Iterator[Tensor]:
    """Images `(N, C, H, W)`, uint8 or floats in [0, 1], as batches of floats on the VAE's device."""
    if not len(images):
        raise UserError("there are no images to look at")
    weight = next(vae.parameters())
    for index in torch.arange(len(images)).split(BATCH):
        part = images.index_select(0, index)
        yield part.to(weight) / 255 if part.dtype == torch.uint8 else part.to(weight)
