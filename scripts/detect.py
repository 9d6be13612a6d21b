"""Images that are not of the model's kind: `python scripts/detect.py images=PATH|DATASET [ckpt=PATH alarm=0.01]`.

Scores, p-values and flags of each in scores.csv, and pictures. What is needed for that is fitted to training images and
calibrated by validation images when it is first asked for, and kept beside the checkpoint. See docs/anomalies.md.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from betavae.runtime.cli import DataSettings, gc_paused, script_command
from betavae.runtime.settings import ImageSpec, NonEmptyStr


class Settings(DataSettings):
    images: ImageSpec = Field("test", title="pictures (folder, file, list); .npy, .npz; test, train, ...; a data set")
    alarm: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.01, title="flags at most this share of images of the training kind"
    )
    score: NonEmptyStr = Field("combined", title="combined, dose_svm, dose, neg_elbo")
    inliers: list[int | str] = Field([], title="labels that are of the training kind: a ROC curve")
    out: NonEmptyStr = Field("anomalies", title="a folder")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        from betavae import plotting
        from betavae.applications.anomalies import report
        from betavae.applications.anomalies.detector import false_alarm_rate
        from betavae.errors import UserError
        from betavae.runtime import checkpoint
        from betavae.runtime.inputs import is_dataset_name, resolve_images
        from betavae.runtime.run_folder import REPORT, check_claim, claim_folder
        from betavae.storage.files import has_stamp

    out = Path(settings.out).expanduser()
    check_claim(out, REPORT, "out")  # before what takes a while
    run = checkpoint.load(settings.ckpt, settings.runs)
    found = resolve_images(run, settings.images, settings.data_root)
    inside: list[bool] | None = None
    if settings.inliers:
        wanted = {str(label) for label in settings.inliers}
        inside = [str(label) in wanted for label in found.labels or []]
        if len(set(inside)) < 2:
            named = ", ".join(sorted({str(label) for label in found.labels or []})[:20]) or "none"
            raise UserError(
                f"inliers={settings.inliers} cannot be: some images must have these labels, and some others; labels "
                f"here: {named}"
            )
    # With another data set to look at, data_root is where that one is.
    other = is_dataset_name(settings.images) and settings.images != run.data.get("name")
    detector = report.detector(run, None if other else settings.data_root)
    report.check_score(detector, settings.score)
    calibration = len(detector.state["calibration"][settings.score])
    rate = false_alarm_rate(settings.alarm, calibration)
    claim_folder(out, REPORT, "out")
    result = report.score_images(detector, found.pixels, settings.score, settings.alarm)
    if inside is None and has_stamp(out / "roc.png"):
        (out / "roc.png").unlink()  # of other images
    report.write_table(result, found.names, found.labels, found.skipped, out / "scores.csv")
    for name, figure in report.figures(detector, found.pixels, result, inside).items():
        plotting.save_figure(figure, out / f"{name}.png")
    plotting.save_image(report.flagged_image_grid(detector, found.pixels, result), out / "where.png")
    for note in found.notes:
        print(note)
    print(f"flagged {int(result.flagged.sum()):,} of {len(found.names):,} images at alarm={settings.alarm}")
    print(
        f"of images like those of training {rate.mean:.2%} are flagged, by luck of {calibration:,} calibration images "
        f"{rate.low:.2%} to {rate.high:.2%}"
    )
    if found.notes and run.data.get("name") != "folder":  # whose own pictures are read in this way
        print("images that were changed to fit the model may be flagged more or less often: see docs/anomalies.md")
    if inside is not None:
        for name, value in report.detection_metrics(result, inside).items():
            print(f"{name:32}{value:.4f}")
    print(f"scores.csv and pictures in {out}/")


if __name__ == "__main__":
    main()
