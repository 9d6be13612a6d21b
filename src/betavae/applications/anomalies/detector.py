"""Detect images unlike the training images of a VAE, with a known false-alarm rate.

`Detector.fit` fits the densities that the scores of `scores.py` need to training images, and calibrates p-values on
validation images that neither the VAE nor the scores were fitted to. Fitting needs scikit-learn; a fitted detector
needs only torch.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from betavae.applications.anomalies import scores as scoring
from betavae.data.loader import BYTES
from betavae.errors import UserError
from betavae.models.vae import VAE

DEFAULT_SCORE = "combined"
FAST_SCORES = ("neg_elbo", "dose", "dose_svm", "combined")  # thousands of images per second on a CPU
SLOW_SCORES = ("nll", "regret")
MIN_FIT_IMAGES = 20
MAX_FIT_IMAGES = 20_000
MAX_KDE_POINTS = 2_000
MAX_SVM_IMAGES = 5_000
MAX_COMPONENTS = 50
MIN_IMAGES_PER_COMPONENT = 200
LATENT_WEIGHT = 1.5  # weight of the latent surprise in the combined score
BATCH_SIZE = 500  # images decoded at once with eight samples each; fewer if they are large
BATCH_PIXELS = 2**20


class DetectorState(TypedDict):
    """Everything a detector has fitted, as tensors and numbers for `torch.save`."""

    kernels: Tensor  # (M, 8), or 7 without a background: statistics of training images
    center: Tensor  # their mean
    scale: Tensor  # their standard deviation
    svm: scoring.OneClassSVM  # of the standardized statistics
    background: float | None  # most frequent gray level
    spread: Tensor  # (latent_dim,), standard deviation of the posterior means
    mixture: scoring.GaussianMixture  # of the posterior means over `spread`
    surprises: Tensor  # (2, 2), mean and standard deviation of the latent surprise and of the unexplained nats
    pixel_mean: Tensor  # (H, W), or (C, 1) of a table, of `pixel_surprise`
    pixel_sd: Tensor
    calibration: dict[str, Tensor]  # sorted scores of the validation images


class Detector(NamedTuple):
    """A VAE with the state fitted for it."""

    vae: VAE
    state: DetectorState

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        vae: VAE,
        train: Tensor,
        validation: Tensor,
        names: Sequence[str] = FAST_SCORES,
        train_labels: Tensor | None = None,
        validation_labels: Tensor | None = None,
    ) -> "Detector":
        """Fit the densities to training images and calibrate the scores on validation images.

        Args:
            vae: The trained VAE.
            train: `(N, C, H, W)`, uint8, or floats as the VAE sees them.
            validation: Images of the same distribution that the VAE was not trained on. If it was trained on them, the
                false-alarm rate is higher than stated.
            names: The scores to calibrate.
            train_labels: The labels (N,) of the training images, for a conditional model.
            validation_labels: Those of the validation images.

        Raises:
            UserError: If scikit-learn is missing, or the training images are too few or too similar.
        """
        check_scikit_learn()
        if len(train) < MIN_FIT_IMAGES:
            raise UserError(
                f"{len(train)} training images are too few for anomaly detection; expected at least {MIN_FIT_IMAGES}"
            )
        step = max(1, math.ceil(len(train) / MAX_FIT_IMAGES))
        rows = torch.arange(0, len(train), step)
        train, labels = train.index_select(0, rows), None if train_labels is None else train_labels[rows]
        background = find_background(vae, train)
        is_unit = background is not None
        values = torch.cat([scoring.statistics(view, x, is_unit).cpu() for view, x in iter_batches(vae, train, labels)])
        batches = iter_batches(vae, train, labels)
        latents = [scoring.latent_and_unexplained(view, x, background) for view, x in batches]
        means, unexplained = (torch.cat(part).cpu() for part in zip(*latents, strict=True))
        center, scale = values.mean(0), values.std(0).clamp(min=1e-9)
        spread = means.std(0).clamp(min=1e-9)
        mixture = fit_mixture(means, spread)
        latent = -scoring.mixture_log_density(mixture, means / spread)
        moments = [[part.mean(), part.std().clamp(min=1e-9)] for part in (latent, unexplained)]
        pixel_mean, pixel_sd = fit_pixel_surprise(vae, train, labels)
        state: DetectorState = {
            "kernels": values[:: math.ceil(len(values) / MAX_KDE_POINTS)].clone(),
            "center": center,
            "scale": scale,
            "svm": fit_svm((values - center) / scale),
            "background": background,
            "spread": spread,
            "mixture": mixture,
            "surprises": torch.tensor(moments).double(),
            "pixel_mean": pixel_mean,
            "pixel_sd": pixel_sd,
            "calibration": {},
        }
        detector = cls(vae, state)
        state["calibration"] = {
            name: score.sort().values
            for name, score in detector.compute_scores(validation, names, validation_labels).items()
        }
        return detector

    def compute_scores(
        self, x: Tensor, names: Sequence[str] = FAST_SCORES, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute scores of images.

        - neg_elbo, nll, regret: `scores.neg_elbo`, `scores.nll`, `scores.likelihood_regret`.
        - dose: minus the sum of the log-densities of the `statistics` (DoSE-KDE, Morningstar et al. 2021). A statistic
          far below those of training images is as anomalous as one far above.
        - dose_svm: the distance to a one-class SVM of the same statistics, standardized (DoSE-SVM, same paper).
        - combined: see `score_combined`.

        Args:
            x: `(N, C, H, W)`, uint8, or floats as the VAE sees them.
            names: Names in `FAST_SCORES` and `SLOW_SCORES`.
            labels: The labels (N,) that a conditional model needs.

        Returns:
            Each score by its name, `(N,)` in double precision.
        """
        functions: dict[str, Callable[[Detector, Tensor], Tensor]] = {
            "neg_elbo": lambda detector, x: scoring.neg_elbo(detector.vae, x),
            "nll": lambda detector, x: scoring.nll(detector.vae, x),
            "regret": lambda detector, x: scoring.likelihood_regret(detector.vae, x),
            "dose": Detector.score_dose,
            "dose_svm": Detector.score_dose_svm,
            "combined": Detector.score_combined,
        }
        if unknown := [name for name in names if name not in functions]:
            known = ", ".join((*FAST_SCORES, *SLOW_SCORES))
            raise UserError(f"score={unknown[0]} is invalid: expected one of {known}")
        parts = []
        with torch.no_grad():
            for view, part in iter_batches(self.vae, x, labels):
                detector = self._replace(vae=view)
                parts.append([functions[name](detector, part).double().cpu() for name in names])
        return {name: torch.cat(score) for name, score in zip(names, zip(*parts, strict=True), strict=True)}

    def statistics(self, x: Tensor) -> Tensor:
        """Compute the statistics of the scores `dose` and `dose_svm`."""
        return scoring.statistics(self.vae, x, self.state["background"] is not None).cpu()

    def score_dose(self, x: Tensor) -> Tensor:
        """Score by density of states with kernel density estimates."""
        return -scoring.kernel_density(self.state["kernels"], self.statistics(x)).sum(1)

    def score_dose_svm(self, x: Tensor) -> Tensor:
        """Score by density of states with a one-class SVM."""
        rows = (self.statistics(x) - self.state["center"]) / self.state["scale"]
        return -scoring.svm_decision(self.state["svm"], rows)

    def score_combined(self, x: Tensor) -> Tensor:
        """Combine two surprises by the weighted sum of the logs of their upper normal tails.

        The first is that of the posterior mean under a Gaussian mixture of the training images' means (as in DAGMM,
        Zong et al. 2018), the second is `unexplained_nats` per unit of ink. Both are standardized by training images.
        The sum is Fisher's combination with weights (Good 1955).
        """
        means, unexplained = scoring.latent_and_unexplained(self.vae, x, self.state["background"])
        latent = -scoring.mixture_log_density(self.state["mixture"], means.cpu() / self.state["spread"])
        center, scale = self.state["surprises"].T
        tails = -torch.special.log_ndtr(-(torch.stack((latent, unexplained.cpu()), 1) - center) / scale)
        return LATENT_WEIGHT * tails[:, 0] + tails[:, 1]

    def compute_p_values(self, x: Tensor, name: str = DEFAULT_SCORE, labels: Tensor | None = None) -> Tensor:
        """Compute conformal p-values of images, `(N,)`, for a conditional model with their `labels` `(N,)`.

        The p-value of an image from the training distribution is at most a with probability at most a (Vovk et al.
        2005), on average over calibration sets; `false_alarm_rate` has the variation between calibration sets.
        """
        self.check_calibrated(name)
        return compute_p_values(self.compute_scores(x, (name,), labels)[name], self.state["calibration"][name])

    def check_calibrated(self, name: str) -> None:
        """Raise UserError if a score was not calibrated."""
        if name not in self.state["calibration"]:
            raise UserError(f"score={name} is invalid: expected one of {', '.join(self.state['calibration'])}")

    def compute_heat_maps(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Compute the standardized surprise of each pixel, `(N, H, W)`.

        For a table, it is the surprise of each column, `(N, C, 1)`. A conditional model needs `labels` `(N,)`.

        It is `pixel_surprise` in standard deviations from the training images' mean at that pixel. A standard deviation
        counts as at least a tenth of the root mean square over pixels. Without that floor, any ink near the border,
        where all training images are equal, would have an infinite value.
        """
        mean, sd = self.state["pixel_mean"], self.state["pixel_sd"]
        floor = 0.1 * sd.square().mean().sqrt()
        with torch.no_grad():
            maps = [
                scoring.pixel_surprise(view, part).double().cpu() for view, part in iter_batches(self.vae, x, labels)
            ]
        return (torch.cat(maps) - mean) / sd.clamp(min=floor)


def check_scikit_learn() -> None:
    """Raise UserError if scikit-learn, which brings SciPy, is not installed."""
    if find_spec("sklearn") is None:
        raise UserError('anomaly detection needs scikit-learn: pip install -e ".[evaluation]"')


def find_background(vae: VAE, images: Tensor) -> float | None:
    """Find the most frequent gray level; return None for tables and values that are not in [0, 1]."""
    if images.is_floating_point() and (images.shape[2:] == (1, 1) or images.min() < 0 or images.max() > 1):
        return None
    counts = torch.zeros(256, dtype=torch.long)
    for _, x in iter_batches(vae, images):
        counts += (255 * x).round().byte().cpu().flatten().bincount(minlength=256)
    return float(counts.argmax()) / 255


def fit_svm(rows: Tensor) -> scoring.OneClassSVM:
    """Fit a one-class SVM to up to `MAX_SVM_IMAGES` of the rows."""
    from sklearn.svm import OneClassSVM  # Imported here because it takes a second.

    svm = OneClassSVM(nu=0.1, gamma="scale").fit(rows[:: math.ceil(len(rows) / MAX_SVM_IMAGES)].numpy())
    return {
        "vectors": torch.from_numpy(svm.support_vectors_),
        "weights": torch.from_numpy(svm.dual_coef_[0]),
        "offset": float(svm.intercept_[0]),
        "gamma": float(svm._gamma),  # scikit-learn has no public name for the value of gamma="scale".
    }


def fit_mixture(means: Tensor, spread: Tensor) -> scoring.GaussianMixture:
    """Fit a Gaussian mixture to posterior means `(N, latent_dim)` over their standard deviations."""
    from sklearn.mixture import GaussianMixture  # Imported here because it takes a second.

    too_similar = UserError(
        "the training images are too similar for anomaly detection, or the encoder maps all of them to one point"
    )
    if float(spread.max()) < 1e-6:  # Such differences are rounding errors.
        raise too_similar
    components = max(1, min(MAX_COMPONENTS, len(means) // MIN_IMAGES_PER_COMPONENT))
    mixture = GaussianMixture(components, init_params="k-means++", max_iter=20, tol=0, reg_covar=0.1, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It warns that twenty steps did not converge, which is intended.
        try:
            mixture.fit((means / spread).float().numpy())
        except ValueError as error:
            raise too_similar from error
    return {
        "weights": torch.from_numpy(mixture.weights_).double(),
        "means": torch.from_numpy(mixture.means_).double(),
        "roots": torch.from_numpy(mixture.precisions_cholesky_).double(),
    }


def fit_pixel_surprise(vae: VAE, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the mean and standard deviation of `pixel_surprise` over images."""
    total, squares = torch.zeros(2, 1, 1, dtype=torch.double)
    for view, x in iter_batches(vae, images, labels):
        surprises = scoring.pixel_surprise(view, x).double().cpu()
        total = total + surprises.sum(0)
        squares = squares + surprises.square().sum(0)
    mean = total / len(images)
    return mean, (squares - len(images) * mean.square()).clamp(min=0).div(len(images) - 1).sqrt()


def compute_p_values(scores: Tensor, calibration: Tensor) -> Tensor:
    """Compute conformal p-values.

    A p-value is (1 + number of calibration scores at least as high) / (1 + number of calibration scores).

    Args:
        scores: `(N,)`; a NaN counts as the highest score.
        calibration: Sorted scores `(n,)`.

    Returns:
        p-values `(N,)`.
    """
    below = torch.searchsorted(calibration, scores.contiguous())
    return (1 + len(calibration) - below).double() / (1 + len(calibration))


class FalseAlarmRate(NamedTuple):
    """The share of unseen images of the training distribution that are flagged."""

    mean: float  # over calibration sets
    low: float  # 2.5 % quantile, from the sampling error of the calibration set (and of the new images, if given)
    high: float  # 97.5 % quantile


def false_alarm_rate(alpha: float, calibration: int, new_images: int | None = None) -> FalseAlarmRate:
    """Predict the false-alarm rate of images with a p-value of at most `alpha`.

    Given n calibration images it has the distribution Beta(l, n + 1 - l) with l = floor(alpha (n + 1)) (Vovk 2012), and
    the number of false alarms among `new_images` is beta-binomial.

    Raises:
        UserError: If `alpha` is not between 0 and 1, or too small for so few calibration images.
    """
    check_scikit_learn()
    from scipy import stats

    if not 0 < alpha < 1:
        raise UserError(f"alpha={alpha} is invalid: expected a number above 0 and below 1")
    rank = math.floor(alpha * (calibration + 1) * (1 + 1e-12))  # 0.01 * 100 is rounded to less than 1.
    if rank < 1:
        needed = math.ceil(1 / alpha) - 1
        raise UserError(f"alpha={alpha} needs at least {needed} validation images, and there are {calibration}")
    if new_images is None:
        low, high = stats.beta(rank, calibration + 1 - rank).interval(0.95)
    else:
        counts = stats.betabinom(new_images, rank, calibration + 1 - rank).interval(0.95)
        low, high = (count / new_images for count in counts)
    return FalseAlarmRate(rank / (calibration + 1), float(low), float(high))


def iter_batches(vae: VAE, images: Tensor, labels: Tensor | None = None) -> Iterator[tuple[VAE, Tensor]]:
    """Iterate over images `(N, C, H, W)` in batches of floats on the VAE's device.

    The images are uint8 or scaled floats. Each batch comes with the VAE for its `labels`.
    """
    if not len(images):
        raise UserError("there are no images to score")
    weight = next(vae.parameters())
    batch_size = max(1, min(BATCH_SIZE, BATCH_PIXELS // images[0].numel()))
    for index in torch.arange(len(images)).split(batch_size):
        batch = images.index_select(0, index)
        view = vae.given(None if labels is None else labels[index])
        yield view, (BYTES.apply(batch) if batch.dtype == torch.uint8 else batch).to(weight)
