"""Table and figures of anomaly scores, and the cache of fitted detectors beside checkpoints."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from betavae.applications.anomalies.detector import (
    FAST_SCORES,
    MAX_FIT_IMAGES,
    Detector,
    DetectorState,
    compute_p_values,
)
from betavae.applications.trained_run import TrainedRun
from betavae.data.image_io import LoadedImages
from betavae.data.labels import has_same_value
from betavae.data.loader import BYTES
from betavae.data.scaling import Scaling
from betavae.errors import UserError
from betavae.grids import Grid, save_grids
from betavae.plotting import create_figure, save_figure, stack_reconstructions
from betavae.storage.cache import load_or_compute
from betavae.storage.files import STAMP_COLUMN, atomic_path, has_stamp, hash_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_SHOWN_IMAGES = 64
MAX_UNUSUAL = 3  # columns named for each row of a table
HEAT_MAP_RANGE = 5  # standard deviations from the middle of the color map to its ends
# Constant, since a detector is fitted only to the data of its checkpoint, whose hash is in the file name.
CACHE_KEY = {"version": 4}


class ScoredImages(NamedTuple):
    """Scores of N images, with p-values and flags for the chosen score."""

    scores: dict[str, Tensor]  # (N,) each
    p_values: Tensor  # (N,)
    flagged: Tensor  # (N,) bool
    score: str


def load_or_fit_detector(run: TrainedRun, data_root: str | None = None) -> Detector:
    """Fit a detector to the images of a run, or load it from the run folder.

    Raises:
        UserError: If the run has no validation images, or its data have changed.
    """

    def fit() -> dict[str, Any]:
        validation = run.subset("validation", data_root)
        if not len(validation):
            raise UserError(
                f"{run.path} was trained with data.validation_size=0, and anomaly detection needs validation images; "
                "train a model with some"
            )
        train = run.subset("train", data_root, MAX_FIT_IMAGES)
        print("fitting the detector to training images, which happens once ...", flush=True)
        images = scale_images(run, train.pixels), scale_images(run, validation.pixels)
        return dict(Detector.fit(run.vae, *images, FAST_SCORES, train.labels, validation.labels).state)

    return Detector(run.vae, cast(DetectorState, load_or_compute(detector_path(run), CACHE_KEY, fit)))


def scale_images(run: TrainedRun, pixels: Tensor) -> Tensor:
    """Scale stored images for `Detector`, which scales bytes itself, a batch at a time."""
    return pixels if run.scaling.is_bytes else run.scaling.apply(pixels)


def detector_path(run: TrainedRun) -> Path:
    """Return the path of a run's cached detector."""
    return run.folder / f"anomalies-{hash_file(run.path)}.pt"


def load_cached_detector(run: TrainedRun) -> Detector | None:
    """Load the detector of a run if it is cached."""

    def fit() -> dict[str, Any]:
        raise LookupError

    try:
        return Detector(run.vae, cast(DetectorState, load_or_compute(detector_path(run), CACHE_KEY, fit)))
    except LookupError:
        return None


def score_images(
    detector: Detector, pixels: Tensor, score: str, alpha: float, labels: Tensor | None = None
) -> ScoredImages:
    """Score images, and flag those with a p-value of at most `alpha` under `score`.

    See `Detector.compute_scores`.
    """
    detector.check_calibrated(score)
    scores = detector.compute_scores(pixels, FAST_SCORES, labels)
    p_values = compute_p_values(scores[score], detector.state["calibration"][score])
    return ScoredImages(scores, p_values, p_values <= alpha, score)


def match_inliers(labels: Sequence[object] | None, inliers: Sequence[object]) -> list[bool]:
    """Tell which images have one of the labels `inliers`.

    Raises:
        UserError: If all images are inliers, or none, or no image has one of the labels.
    """
    found = [str(label) for label in labels or ()]
    names, wanted = set(found), set()
    named = ", ".join(sorted(names)[:20]) or "none"
    for label in inliers:
        same = {str(label)} & names or {name for name in names if has_same_value(name, label)}
        if names and not same:
            raise UserError(f"inliers={inliers} is invalid: no image has the label {label} (labels found: {named})")
        wanted |= same
    is_inlier = [name in wanted for name in found]
    if len(set(is_inlier)) < 2:
        raise UserError(
            f"inliers={inliers} is invalid: expected labels of some of the images, not of all (labels found: {named})"
        )
    return is_inlier


def save_report(
    run: TrainedRun,
    detector: Detector,
    result: ScoredImages,
    images: LoadedImages,
    is_inlier: Sequence[bool] | None,
    out: Path,
    labels: Tensor | None = None,
) -> None:
    """Save the table and the figures to a folder; with `is_inlier` also the ROC curve."""
    unusual = find_unusual_columns(run, detector, images.pixels, labels) if run.columns else None
    write_table(result, images.names, images.labels, images.skipped, out / "scores.csv", unusual)
    save_figure(draw_histogram(detector, result), out / "histogram.png")
    if not run.columns:
        extremes = draw_extremes(images.pixels, result, run.scaling)
        save_grids(extremes, out / "extremes.png", f"by the {result.score} score")
        save_grids([draw_flagged_images(detector, images.pixels, result, labels, run.scaling)], out / "where.png")
    if is_inlier is not None:
        save_figure(draw_roc(result, is_inlier), out / "roc.png")
    elif has_stamp(out / "roc.png"):  # It shows other images.
        (out / "roc.png").unlink()


def find_unusual_columns(run: TrainedRun, detector: Detector, pixels: Tensor, labels: Tensor | None) -> list[str]:
    """Name the `MAX_UNUSUAL` most surprising columns of each row, with their value and surprise."""
    maps = detector.compute_heat_maps(scale_images(run, pixels), labels)
    surprise, order = maps.flatten(1).sort(descending=True)
    values, names = pixels.flatten(1), run.columns or []
    return [
        "; ".join(f"{names[c]}={values[row, c]:.6g} ({surprise[row, i]:+.1f} sd)" for i, c in enumerate(best))
        for row, best in enumerate(order[:, :MAX_UNUSUAL].tolist())
    ]


def write_table(
    result: ScoredImages,
    names: Sequence[str],
    labels: Sequence[object] | None,
    unread: Sequence[tuple[str, str]],
    out: Path,
    unusual: Sequence[str] | None = None,
) -> None:
    """Write a CSV row per image; that of an unreadable image has the reason instead of a flag.

    The rows of a table are ordered by their score, and name their most unusual columns.
    """
    ranking = result.scores[result.score].argsort(descending=True).tolist()
    # A file name may have bytes that are not UTF-8.
    with atomic_path(out) as path, open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        rows = csv.writer(file)
        extra = ["unusual_columns"] if unusual is not None else []
        rows.writerow(["name", "label", *result.scores, "p_value", "flagged", *extra, STAMP_COLUMN])
        for i in range(len(names)) if unusual is None else ranking:
            name, more = names[i], [unusual[i]] if unusual is not None else []
            scores = [f"{values[i].item():.6g}" for values in result.scores.values()]
            label = "" if labels is None else labels[i]
            p_value, flagged = f"{result.p_values[i].item():.6g}", bool(result.flagged[i])
            rows.writerow([name, label, *scores, p_value, flagged, *more, ""])
        for name, reason in unread:
            rows.writerow([name, *[""] * (2 + len(result.scores)), f"not read: {reason}", ""])


def draw_histogram(detector: Detector, result: ScoredImages) -> "Figure":
    """Draw the scores of the images beside those of the validation images."""
    calibration = detector.state["calibration"][result.score]
    # The axis ends half the calibration's range beyond it, since one score may be a thousand times as high.
    margin = 0.5 * max(float(calibration.max() - calibration.min()), 1e-9)
    low, high = float(calibration.min()) - margin, float(calibration.max()) + margin
    figure = create_figure(6, 3)
    axes = figure.add_subplot()
    for name, scores in {"validation images": calibration, "these images": result.scores[result.score]}.items():
        clamped = scores.nan_to_num(high).clamp(low, high)
        axes.hist(clamped.tolist(), bins=60, range=(low, high), density=True, histtype="step", label=name)
    axes.set_xlabel(f"{result.score} score, clamped to this range; higher is more anomalous")
    axes.legend(fontsize=8)
    return figure


def draw_extremes(pixels: Tensor, result: ScoredImages, scaling: Scaling = BYTES) -> list[Grid]:
    """Draw the 32 images with the highest and the 32 with the lowest scores."""
    order = result.scores[result.score].argsort(descending=True)
    halves = {"most anomalous": order[:32], "least anomalous": order.flip(0)[:32]}
    drawn = {title: scaling.apply(pixels.index_select(0, index)) for title, index in halves.items()}
    return [Grid(scaling.to_picture(x), min(8, len(x)), title=title) for title, x in drawn.items()]


def draw_roc(result: ScoredImages, is_inlier: Sequence[bool]) -> "Figure":
    """Draw the ROC curve of the chosen score."""
    from sklearn.metrics import roc_curve

    false_positives, true_positives, _ = roc_curve([not i for i in is_inlier], result.scores[result.score].numpy())
    figure = create_figure(3.5, 3.5)
    axes = figure.add_subplot()
    axes.plot(false_positives, true_positives)
    axes.set_xlabel("false-alarm rate")
    axes.set_ylabel("detection rate")
    return figure


def draw_flagged_images(
    detector: Detector,
    pixels: Tensor,
    result: ScoredImages,
    labels: Tensor | None = None,
    scaling: Scaling = BYTES,
) -> Grid:
    """Draw the flagged images above their reconstructions and heat maps.

    These are up to `MAX_SHOWN_IMAGES` with the highest scores, or the eight highest if none is flagged. Heat maps go
    from blue to red, from -5 to 5 standard deviations.
    """
    from matplotlib import colormaps

    order = result.scores[result.score].argsort(descending=True)
    flagged = order[result.flagged[order]]
    shown = flagged[:MAX_SHOWN_IMAGES] if len(flagged) else order[:8]
    x, labels = scaling.apply(pixels.index_select(0, shown)), None if labels is None else labels[shown]
    position = (detector.compute_heat_maps(x, labels).numpy() + HEAT_MAP_RANGE) / (2 * HEAT_MAP_RANGE)
    maps = torch.from_numpy(colormaps["coolwarm"](position)[..., :3]).movedim(-1, 1)
    columns = min(8, len(x))
    pairs = scaling.to_picture(stack_reconstructions(detector.vae.given(labels), x))
    rows = pairs.unflatten(0, (-1, 2, columns)).expand(-1, -1, -1, 3, -1, -1)
    maps = torch.cat((maps, maps.new_ones(-len(x) % columns, *maps.shape[1:]))).unflatten(0, (-1, 1, columns))
    names = ["image", "reconstruction", "heat map"] * len(rows)
    return Grid(torch.cat((rows, maps.to(rows)), 1).flatten(0, 2), columns, names)


def compute_detection_metrics(result: ScoredImages, is_inlier: Sequence[bool]) -> dict[str, float]:
    """Compute metrics of the chosen score as a classifier of outliers."""
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    is_outlier, scores = [not i for i in is_inlier], result.scores[result.score].numpy()
    false_positives, true_positives, _ = roc_curve(is_outlier, scores)
    return {
        "AUROC": float(roc_auc_score(is_outlier, scores)),
        "average precision": float(average_precision_score(is_outlier, scores)),
        "false-alarm rate at 95 % detection": float(false_positives[(true_positives >= 0.95).argmax()]),
    }
