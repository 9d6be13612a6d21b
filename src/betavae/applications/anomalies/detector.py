"""Images that are not of a trained VAE's kind: how sure one may be of that, and where in an image it is strange.

`Detector` fits what the scores of `anomaly_scores.py` need to training images, and turns scores into p-values by images
that neither the VAE nor the scores were fitted to. Needs scikit-learn to fit, torch alone to use what was fitted.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from betavae.applications.anomalies import scores as scoring
from betavae.errors import UserError
from betavae.models.vae import VAE

SKLEARN_MISSING = 'telling images apart needs scikit-learn: pip install -e ".[evaluation]"'
DEFAULT_SCORE = "combined"
FAST_SCORES = ("neg_elbo", "dose", "dose_svm", "combined")  # thousands of images per second on a CPU
SLOW_SCORES = ("nll", "regret")
FIT_IMAGES = 20_000  # of the training images, at most: evenly spaced ones
KDE_POINTS = 2_000  # of each kernel density, at most
SVM_IMAGES = 5_000
COMPONENTS = 50  # of the Gaussian mixture, where each has 200 images or more
LATENT_WEIGHT = 1.5  # of the latent surprise in the combined score
LEAST_IMAGES = 20  # to fit anything to
BATCH = 500  # images at once, of which eight draws are decoded; fewer of larger images
BATCH_PIXELS = 2**20


class Detector(NamedTuple):
    """A VAE and what was fitted for it. `state` holds tensors and numbers alone, for `torch.save`, and
    `Detector(vae, load_torch_file(path))` is the same detector again."""

    vae: VAE
    state: dict[str, Any]

    @classmethod
    @torch.no_grad()
    def fit(cls, vae: VAE, train: Tensor, validation: Tensor, names: Sequence[str] = FAST_SCORES) -> "Detector":
        """Fit densities to `train`, and calibrate the scores `names` by `validation`.

        Images are `(N, C, H, W)`, uint8 or floats in [0, 1]. `validation` must be of the same kind as `train`, and the
        VAE must not have seen them: else it flags more than it says. Needs scikit-learn. Raises UserError if it is not
        installed, or if there are fewer than 20 training images, or all are alike.
        """
        try:
            from sklearn.mixture import GaussianMixture  # here, since it takes a second
            from sklearn.svm import OneClassSVM
        except ModuleNotFoundError:
            raise UserError(SKLEARN_MISSING) from None
        if len(train) < LEAST_IMAGES:
            raise UserError(
                f"{len(train)} training images are too few to learn from what is ordinary: {LEAST_IMAGES} at least"
            )
        index = torch.arange(0, len(train), max(1, -(-len(train) // FIT_IMAGES)))
        train = train.index_select(0, index)
        counts = torch.zeros(256, dtype=torch.long)
        for x in batches(vae, train):
            counts += (255 * x).round().byte().cpu().flatten().bincount(minlength=256)
        background = float(counts.argmax()) / 255
        parts = []
        surprise, squares = torch.zeros(2, *train.shape[2:], dtype=torch.double)
        for x in batches(vae, train):
            parts.append((scoring.statistics(vae, x), *scoring.latent_and_unexplained(vae, x, background)))
            surprises = scoring.pixel_surprise(vae, x).double().cpu()
            surprise += surprises.sum(0)
            squares += surprises.square().sum(0)
        values, means, unexplained = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        surprise /= len(train)
        centre, scale = values.mean(0), values.std(0).clamp(min=1e-9)
        rows = (values - centre) / scale
        svm = OneClassSVM(nu=0.1, gamma="scale").fit(rows[:: -(-len(rows) // SVM_IMAGES)].numpy())
        components = max(1, min(COMPONENTS, len(means) // 200))
        found = GaussianMixture(components, init_params="k-means++", max_iter=20, tol=0, reg_covar=0.1, random_state=0)
        spread = means.std(0).clamp(min=1e-9)
        alike = UserError(
            "the training images are too much alike, or the encoder takes them all to one place: nothing can be told "
            "from them"
        )
        if float(spread.max()) < 1e-6:  # rounding
            raise alike
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the fit did not converge: twenty steps are meant
            try:
                found.fit((means / spread).float().numpy())
            except ValueError as error:
                raise alike from error
        mixture = {"weights": found.weights_, "means": found.means_, "roots": found.precisions_cholesky_}
        state: dict[str, Any] = {
            "kernels": values[:: -(-len(values) // KDE_POINTS)].clone(),
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
            "pixel_mean": surprise,
            "pixel_sd": (squares - len(train) * surprise.square()).clamp(min=0).div(len(train) - 1).sqrt(),
        }
        latent = -scoring.mixture_log_density(state["mixture"], means / spread)
        state["parts"] = torch.tensor(
            [[part.mean(), part.std().clamp(min=1e-9)] for part in (latent, unexplained)]
        ).double()
        scores = cls(vae, state).scores(validation, names)
        return cls(vae, state | {"calibration": {name: score.sort().values for name, score in scores.items()}})

    def scores(self, x: Tensor, names: Sequence[str] = FAST_SCORES) -> dict[str, Tensor]:
        """Each score of `names` (of QUICK and SLOW) for the images `x` `(N, C, H, W)`: `(N,)` in double precision.

        neg_elbo, nll, regret: see the functions of these names.
        dose: minus the sum of the log-densities of `statistics` (DoSE-KDE, Morningstar et al. 2021): a statistic far
            below those of training images is as strange as one far above.
        dose_svm: the distance outside a one-class SVM of the same statistics, standardised (DoSE-SVM, there).
        combined: see `combined`.
        """
        if unknown := set(names) - {*FAST_SCORES, *SLOW_SCORES}:
            raise UserError(
                f"score={sorted(unknown)[0]} cannot be: it must be one of {', '.join((*FAST_SCORES, *SLOW_SCORES))}"
            )
        functions: dict[str, Callable[[Tensor], Tensor]] = {
            "neg_elbo": lambda x: scoring.neg_elbo(self.vae, x),
            "nll": lambda x: scoring.nll(self.vae, x),
            "regret": lambda x: scoring.likelihood_regret(self.vae, x),
            "dose": self.dose,
            "dose_svm": self.dose_svm,
            "combined": self.combined,
        }
        with torch.no_grad():
            parts = [[functions[name](part).double().cpu() for name in names] for part in batches(self.vae, x)]
        return {name: torch.cat(score) for name, score in zip(names, zip(*parts, strict=True), strict=True)}

    def dose(self, x: Tensor) -> Tensor:
        return -scoring.kernel_density(self.state["kernels"], scoring.statistics(self.vae, x).cpu()).sum(1)

    def dose_svm(self, x: Tensor) -> Tensor:
        rows = (scoring.statistics(self.vae, x).cpu() - self.state["centre"]) / self.state["scale"]
        return -scoring.svm_decision(self.state["svm"], rows)

    def combined(self, x: Tensor) -> Tensor:
        """Two surprises: the posterior mean's, under a Gaussian mixture of those of training images (as DAGMM has it,
        Zong et al. 2018), and the `excess` per ink. Each is standardised by training images, and the logs of their
        upper normal tails added: Fisher's combination, with weights (Good 1955)."""
        means, unexplained = (
            part.cpu() for part in scoring.latent_and_unexplained(self.vae, x, self.state["background"])
        )
        latent = -scoring.mixture_log_density(self.state["mixture"], means / self.state["spread"])
        centre, scale = self.state["parts"].T
        tails = -torch.special.log_ndtr(-(torch.stack((latent, unexplained), 1) - centre) / scale)
        return LATENT_WEIGHT * tails[:, 0] + tails[:, 1]

    def p_values(self, x: Tensor, name: str = DEFAULT_SCORE) -> Tensor:
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
            maps = torch.cat([scoring.pixel_surprise(self.vae, part).double().cpu() for part in batches(self.vae, x)])
        return (maps - mean) / sd.clamp(min=floor)


def p_values(scores: Tensor, calibration: Tensor) -> Tensor:
    """Conformal p-values of `scores` `(N,)` by the sorted `calibration` `(n,)`. A NaN is as strange as can be."""
    below = torch.searchsorted(calibration, scores.contiguous())
    return (1 + len(calibration) - below).double() / (1 + len(calibration))


class FalseAlarms(NamedTuple):
    """The share of unseen images of the training kind whose p-value is at most the alarm."""

    mean: float  # over calibration sets
    low: float  # 2.5 and 97.5 % of them, by the luck of one calibration set, and of `fresh` images if there are any
    high: float


def false_alarm_rate(alpha: float, calibration: int, fresh: int | None = None) -> FalseAlarms:
    """The false-alarm rate given one set of `calibration` images is Beta(l, n + 1 - l)-distributed, with
    l = floor(alarm (n + 1)) (Vovk 2012), and the count among `fresh` images beta-binomially.

    Raises UserError if so small an alarm needs more calibration images, or SciPy is not there.
    """
    try:
        from scipy import stats
    except ModuleNotFoundError:
        raise UserError(SKLEARN_MISSING) from None
    rank = math.floor(alpha * (calibration + 1) * (1 + 1e-12))  # 0.01 * 100 is less than 1 by its rounding
    if not 0 < alpha < 1:
        raise UserError(f"alarm={alpha} cannot be: it must be above 0 and below 1")
    if rank < 1:
        needed = math.ceil(1 / alpha) - 1
        raise UserError(f"alarm={alpha} needs at least {needed} validation images, and there are {calibration}")
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
    for index in torch.arange(len(images)).split(max(1, min(BATCH, BATCH_PIXELS // images[0].numel()))):
        part = images.index_select(0, index)
        yield part.to(weight) / 255 if part.dtype == torch.uint8 else part.to(weight)
