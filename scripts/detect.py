"""Images that are not of the model's kind: `python scripts/detect.py images=PATH|DATASET [ckpt=PATH alarm=0.01]`.

Scores, p-values and flags of each in scores.csv, and pictures. What is needed for that is fitted to training images and
calibrated by validation images when it is first asked for, and kept beside the checkpoint. See docs/anomalies.md.
"""

# mypy: disable-error-code="valid-type"

from pathlib import Path

from pydantic import Field

from betavae.running.cli import DataSettings, importing, script
from betavae.running.settings import Images, Text, kind


class Settings(DataSettings):
    images: Images = Field("test", title="pictures (folder, file, list); .npy, .npz; test, train, ...; a data set")
    alarm: kind(float, "a number above 0 and below 1", gt=0, lt=1) = Field(
        0.01, title="flags at most this share of images of the training kind"
    )
    score: Text = Field("combined", title="combined, dose_svm, dose, neg_elbo")
    inliers: kind(list[int | str], "a list of labels") = Field(
        [], title="labels that are of the training kind: a ROC curve"
    )
    out: Text = Field("anomalies", title="a folder")


@script(Settings)
def main(settings: Settings) -> None:
    with importing():
        from betavae import pictures
        from betavae.errors import UserError
        from betavae.files import made_here
        from betavae.running import checkpoint
        from betavae.running.inputs import is_set, named_images
        from betavae.running.run_folder import REPORT, check_mark, put_mark
        from betavae.uses import anomaly_report
        from betavae.uses.anomalies import false_alarm_rate

    out = Path(settings.out).expanduser()
    check_mark(out, REPORT, "out")  # before what takes a while
    run = checkpoint.load(settings.ckpt, settings.runs)
    found = named_images(run, settings.images, settings.data_root)
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
    other = is_set(settings.images) and settings.images != run.data.get("name")
    detector = anomaly_report.detector(run, None if other else settings.data_root)
    anomaly_report.check_score(detector, settings.score)
    calibration = len(detector.state["calibration"][settings.score])
    rate = false_alarm_rate(settings.alarm, calibration)
    put_mark(out, REPORT, "out")
    result = anomaly_report.scored(detector, found.pixels, settings.score, settings.alarm)
    if inside is None and made_here(out / "roc.png"):
        (out / "roc.png").unlink()  # of other images
    anomaly_report.write_table(result, found.names, found.labels, found.unread, out / "scores.csv")
    for name, figure in anomaly_report.figures(detector, found.pixels, result, inside).items():
        pictures.save_figure(figure, out / f"{name}.png")
    pictures.save_picture(anomaly_report.where(detector, found.pixels, result), out / "where.png")
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
        for name, value in anomaly_report.against_labels(result, inside).items():
            print(f"{name:32}{value:.4f}")
    print(f"scores.csv and pictures in {out}/")


if __name__ == "__main__":
    main()
