"""Flag images unlike the training images: `python scripts/detect.py images=PATH [alpha=0.01]`.

Saves scores, p-values and flags of all images in scores.csv, and figures. The first call fits a detector to training
and validation images and saves it in the run folder. See docs/anomalies.md.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from betavae.runtime.cli import DataSettings, LabelSettings, gc_paused, script_command
from betavae.runtime.settings import ImageSpec, Label, NonEmptyStr


class Settings(DataSettings, LabelSettings):
    images: ImageSpec = Field("test", title="images: a folder, file or list; .npy, .npz; test, train, ...; a data set")
    alpha: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.01, title="highest false-alarm rate, and the p-value up to which an image is flagged"
    )
    score: NonEmptyStr = Field("combined", title="combined, dose_svm, dose, neg_elbo")
    inliers: list[Label] = Field([], title="labels of ordinary images, for a ROC curve and detection metrics")
    out: NonEmptyStr = Field("anomalies", title="folder for the table and the figures")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        from betavae.applications.anomalies import report
        from betavae.applications.anomalies.detector import false_alarm_rate
        from betavae.runtime import checkpoint
        from betavae.runtime.inputs import includes_training_images, is_dataset_name, resolve_images, resolve_labels
        from betavae.runtime.run_folder import REPORT, check_claim, claim_folder

    out = Path(settings.out).expanduser()
    check_claim(out, REPORT, "out")
    run = checkpoint.load(settings.ckpt, settings.runs)
    images = resolve_images(run, settings.images, settings.data_root)
    labels = resolve_labels(run, settings.images, images, settings.label)
    is_inlier = report.match_inliers(images.labels, settings.inliers) if settings.inliers else None
    # If `images` names another data set, data_root is the folder of that one.
    is_other = is_dataset_name(settings.images) and settings.images != run.data.get("name")
    detector = report.load_or_fit_detector(run, None if is_other else settings.data_root)
    detector.check_calibrated(settings.score)
    calibration = len(detector.state["calibration"][settings.score])
    rate = false_alarm_rate(settings.alpha, calibration)
    claim_folder(out, REPORT, "out")
    pixels = report.scale_images(run, images.pixels)
    result = report.score_images(detector, pixels, settings.score, settings.alpha, labels)
    report.save_report(run, detector, result, images, is_inlier, out, labels)
    for note in images.notes:
        print(note)
    if includes_training_images(run, settings.images, settings.data_root):
        print("the detector was fitted to some of these images and flags fewer of them; images=test are unseen")
    print(f"flagged {int(result.flagged.sum()):,} of {len(images.names):,} {run.item}s at alpha={settings.alpha}")
    print(
        f"expected false-alarm rate {rate.mean:.2%}; 95 % interval {rate.low:.2%} to {rate.high:.2%}, due to the "
        f"sampling error of {calibration:,} calibration images"
    )
    if images.notes and run.data.get("name") != "folder":  # Training images of a folder are adapted in the same way.
        print("images with these notes may have another false-alarm rate: see docs/anomalies.md")
    if is_inlier is not None:
        for name, value in report.compute_detection_metrics(result, is_inlier).items():
            print(f"{name:36}{value:.4f}")
    print(f"scores.csv and figures saved to {out}/")


if __name__ == "__main__":
    main()
