"""What `anomalies.Detector` says of a set of images, as a table and pictures; and detectors kept beside checkpoints."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from betavae.applications.anomalies.detector import FAST_SCORES, FIT_IMAGES, Detector, p_values
from betavae.errors import UserError
from betavae.plotting import create_figure, draw_image, make_grid, stack_reconstructions
from betavae.storage.cache import hash_file, load_or_compute
from betavae.storage.files import STAMP, atomic_path

MOST_SHOWN = 64  # of the flagged images
# A checkpoint fits one detector, since it is fitted only to the data that the checkpoint was trained on.
ASKED = {"version": 3}


class ScoredImages(NamedTuple):
    scores: dict[str, Tensor]  # (N,) each
    p_values: Tensor  # (N,) of the chosen score
    flagged: Tensor  # (N,) bool
    score: str


def detector(run: Any, data_root: str | None = None) -> Detector:
    """That of a `Run`: from `anomalies-HASH.pt` in its folder, else fitted to its training images, calibrated by its
    validation images, and kept there. Raises UserError if no validation images were set aside, or they have changed."""

    def fit() -> dict[str, Any]:
        validation = run.subset("validation", data_root)
        if not len(validation):
            raise UserError(
                "images are told apart by what validation images look like, and this model was trained with "
                "data.validation_size=0: train one that has some"
            )
        train = run.subset("train", data_root, FIT_IMAGES)  # as the model saw them, binarised too
        print("fitting to training images, once ...", flush=True)
        return Detector.fit(run.vae, train.pixels, validation.pixels).state

    return Detector(run.vae, load_or_compute(detector_path(run), ASKED, fit))


def detector_path(run: Any) -> Path:
    """Where the detector of a `Run` is kept."""
    return run.folder / f"anomalies-{hash_file(run.path)}.pt"


def cached_detector(run: Any) -> Detector | None:
    """That of a `Run` if `detector` was asked for it before, which takes a while the first time."""

    def fit() -> dict[str, Any]:
        raise LookupError

    try:
        return Detector(run.vae, load_or_compute(detector_path(run), ASKED, fit))
    except LookupError:
        return None


def check_score(detector: Detector, score: str) -> None:
    if score not in detector.state["calibration"]:
        raise UserError(f"score={score} cannot be: it must be one of {', '.join(detector.state['calibration'])}")


def score_images(detector: Detector, pixels: Tensor, score: str, alarm: float) -> ScoredImages:
    check_score(detector, score)
    scores = detector.scores(pixels, FAST_SCORES)
    found = p_values(scores[score], detector.state["calibration"][score])
    return ScoredImages(scores, found, found <= alarm, score)


def write_table(
    result: ScoredImages,
    names: Sequence[str],
    labels: Sequence[Any] | None,
    unread: Sequence[tuple[str, str]],
    out: Path,
) -> None:
    """A row for each image; that of one that could not be read says why in the place of its flag."""
    # A name may hold bytes that are no UTF-8.
    with atomic_path(out) as path, open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        rows = csv.writer(file)
        rows.writerow(["name", "label", *result.scores, "p_value", "flagged", f"made by {STAMP}"])
        for i, name in enumerate(names):
            numbers = [f"{values[i].item():.6g}" for values in result.scores.values()]
            label = "" if labels is None else labels[i]
            rows.writerow([name, label, *numbers, f"{result.p_values[i].item():.6g}", bool(result.flagged[i]), ""])
        for name, reason in unread:
            rows.writerow([name, *[""] * (2 + len(result.scores)), f"not read: {reason}", ""])


def figures(
    detector: Detector, pixels: Tensor, result: ScoredImages, is_inlier: Sequence[bool] | None
) -> dict[str, Any]:
    """A histogram against the training kind, the most and least ordinary images, and (where it is known which are of
    the training kind) the ROC curve."""
    values = result.scores[result.score]
    order = values.argsort(descending=True)
    figure = create_figure(6, 3)
    axes = figure.add_subplot()
    ordinary = detector.state["calibration"][result.score]
    # What is further out than half the range of the training kind is shown there: one image may be a thousand times as
    # strange.
    room = 0.5 * max(float(ordinary.max() - ordinary.min()), 1e-9)
    low, high = float(ordinary.min()) - room, float(ordinary.max()) + room
    for name, part in {"training kind": ordinary, "these images": values}.items():
        part = part.nan_to_num(high).clamp(low, high)
        axes.hist(part.tolist(), bins=60, range=(low, high), density=True, histtype="step", label=name)
    axes.set_xlabel(f"{result.score} score, higher is stranger (at the right end: or more)")
    axes.legend(fontsize=8)
    drawn = {"histogram": figure}
    figure = create_figure(6, 3)
    for place, (title, chosen) in enumerate({"strangest": order[:32], "most ordinary": order.flip(0)[:32]}.items(), 1):
        axes = figure.add_subplot(1, 2, place)
        draw_image(axes, make_grid(pixels[chosen].float() / 255, 8))
        axes.set_title(title, fontsize=9)
    drawn["extremes"] = figure
    if is_inlier is not None:
        from sklearn.metrics import roc_curve

        false, true, _ = roc_curve([not i for i in is_inlier], values.numpy())
        figure = create_figure(3.5, 3.5)
        axes = figure.add_subplot()
        axes.plot(false, true)
        axes.set_xlabel("false alarms")
        axes.set_ylabel("detected")
        drawn["roc"] = figure
    return drawn


def flagged_image_grid(detector: Detector, pixels: Tensor, result: ScoredImages) -> Tensor:
    """The flagged images, the strangest 64 of them (of none the strangest eight), as a picture `(3, H, W)`: rows of
    images, of their reconstructions and of their heat maps, blue to red from -5 to 5 standard deviations."""
    from matplotlib import colormaps

    order = result.scores[result.score].argsort(descending=True)
    flagged = order[result.flagged[order]]
    x = pixels[flagged[:MOST_SHOWN] if len(flagged) else order[:8]].float() / 255
    maps = torch.from_numpy(colormaps["coolwarm"]((detector.heat_map(x).numpy() + 5) / 10)[..., :3]).movedim(-1, 1)
    rows = stack_reconstructions(detector.vae, x).unflatten(0, (-1, 2, columns := min(8, len(x))))
    maps = torch.cat((maps, maps.new_zeros(-len(x) % columns, *maps.shape[1:]))).unflatten(0, (-1, 1, columns))
    return make_grid(torch.cat((rows.expand(-1, -1, -1, 3, -1, -1), maps.to(rows)), 1).flatten(0, 2), columns)


def detection_metrics(result: ScoredImages, inside: Sequence[bool]) -> dict[str, float]:
    """Raises UserError unless there are images of both kinds."""
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    truth, values = [not i for i in inside], result.scores[result.score].numpy()
    if len(set(truth)) < 2:
        raise UserError("inliers: there must be images of labels in the list, and of others")
    false, true, _ = roc_curve(truth, values)
    return {
        "AUROC": float(roc_auc_score(truth, values)),
        "average precision": float(average_precision_score(truth, values)),
        "false alarms at 95 % detection": float(false[(true >= 0.95).argmax()]),
    }
