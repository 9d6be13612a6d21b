"""Rank the rows of a table by anomaly score: `python scripts/benchmarks/tables.py ['seeds=[0,1]']`.

The table is scikit-learn's breast cancer table, 569 rows of 30 measurements. 70 % of the benign rows are for training;
the others and the malignant rows are ranked by scripts/detect.py, by an isolation forest and by the reconstruction
error of PCA. Saves the two tables and the AUROC of each method.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

from pydantic import Field

from betavae.errors import UserError, last_error_line
from betavae.runtime.cli import ScriptSettings, script_command
from betavae.runtime.settings import NonEmptyStr, PositiveInt, Seed
from betavae.storage.files import STAMP, atomic_path

ROOT = Path(__file__).parents[2]


class Settings(ScriptSettings):
    seeds: list[Seed] = Field([0, 1, 2], title="seeds of the split, and of each method", min_length=1)
    epochs: PositiveInt = Field(100, title="epochs of the VAE")
    folder: NonEmptyStr = Field("tables", title="folder for the tables, runs and results")


def write_tables(folder: Path, seed: int) -> None:
    """Write train_SEED.csv with benign rows, and mixed_SEED.csv with all other rows.

    The other rows are the remaining benign rows and all malignant rows.
    """
    import numpy as np
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    header = [*(name.replace(" ", "_") for name in data.feature_names), "diagnosis"]
    rows = [[*row, data.target_names[target]] for row, target in zip(data.data.tolist(), data.target, strict=True)]
    benign = np.random.default_rng(seed).permutation([i for i, row in enumerate(rows) if row[-1] == "benign"])
    train = set(benign[: round(0.7 * len(benign))].tolist())
    for name, chosen in (("train", True), ("mixed", False)):
        with open(folder / f"{name}_{seed}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(row for i, row in enumerate(rows) if (i in train) == chosen)


def run_command(script: str, *arguments: str) -> None:
    """Run a command of this project, without its output."""
    done = subprocess.run([sys.executable, str(ROOT / script), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError(last_error_line(done.stderr or done.stdout))


def measure(folder: Path, seed: int, epochs: int) -> dict[str, float]:
    """Train and rank with one seed; return the AUROC of each method."""
    from sklearn.decomposition import PCA
    from sklearn.ensemble import IsolationForest
    from sklearn.metrics import roc_auc_score
    from sklearn.preprocessing import StandardScaler

    from betavae.data.datasets.table import read_table

    write_tables(folder, seed)
    train, mixed = (folder / f"{name}_{seed}.csv" for name in ("train", "mixed"))
    settings = ["data.label=diagnosis", f"data.root={train}", f"trainer.max_epochs={epochs}"]
    run, scores = folder / f"run_{seed}", folder / f"scores_{seed}"
    run_command("train.py", "experiment=table", *settings, f"seed={seed}", f"hydra.run.dir={run}")
    run_command("scripts/detect.py", f"ckpt={run}", f"images={mixed}", "alpha=0.05", f"out={scores}")
    with open(scores / "scores.csv", newline="") as file:
        ranked = list(csv.DictReader(file))
    outlier = [row["label"] == "malignant" for row in ranked]
    names = ("combined", "dose_svm", "dose", "neg_elbo")
    found = {f"VAE, {name}": roc_auc_score(outlier, [float(row[name]) for row in ranked]) for name in names}
    first, second = (read_table(path, label="diagnosis") for path in (train, mixed))
    scaler = StandardScaler().fit(first.values.flatten(1))
    x, y = (scaler.transform(table.values.flatten(1)) for table in (first, second))
    outlier = [str(label) == "malignant" for label in second.labels.tolist()] if second.labels is not None else []
    pca = PCA(0.95).fit(x)
    errors = ((y - pca.inverse_transform(pca.transform(y))) ** 2).sum(1)
    forest = -IsolationForest(random_state=seed).fit(x).score_samples(y)
    found |= {
        "isolation forest": roc_auc_score(outlier, forest),
        "PCA, 95 % of variance": roc_auc_score(outlier, errors),
    }
    return {name: float(value) for name, value in found.items()}


@script_command(Settings)
def main(settings: Settings) -> None:
    from betavae.runtime.run_folder import REPORT, claim_folder

    folder = Path(settings.folder)
    claim_folder(folder, REPORT, "folder")
    results = [measure(folder, seed, settings.epochs) for seed in settings.seeds]
    table = {name: [round(result[name], 4) for result in results] for name in results[0]}
    with atomic_path(folder / "auroc.json") as path:
        path.write_text(json.dumps({"made_by": STAMP, "seeds": settings.seeds, **table}, indent=2) + "\n")
    print(f"AUROC of malignant against benign rows, mean of {len(results)} splits (each)")
    for name, values in table.items():
        print(f"{name:24}{sum(values) / len(values):.3f}  ({', '.join(f'{value:.3f}' for value in values)})")
    print(f"tables, runs and auroc.json saved to {folder}/")


if __name__ == "__main__":
    main()
