import json
import math
import re
import shutil
import signal

import numpy as np
import pytest

from betavae.storage.files import hash_file
from tests.commands import TINY, Child, run, wait_for

EVALUATE = "scripts/evaluate.py"


@pytest.mark.slow
def test_runs_of_two_seeds_are_evaluated_and_averaged(tmp_path, data_root):
    def train(*args):
        # Ten steps of 1,024 images, and no compilation, which takes a minute.
        short = ["trainer=smoke", "trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.compile=false"]
        short += ["trainer.limit_test_batches=1", "model.latent_dim=10"]
        return run(*args, *short, f"data.root={data_root}", cwd=tmp_path)

    for experiment, seed in (("burda_vae", 0), ("burda_iwae5", 0), ("burda_iwae5", 1)):
        train(f"experiment={experiment}", f"seed={seed}", "runs=burda")
    runs = sorted((tmp_path / "burda").glob("*_burda_iwae5"))
    few = ["k=20", "max_images=70"]
    for folder, probes in zip(runs, ("probes=false", "probes=true"), strict=True):
        output = run(f"ckpt={folder.relative_to(tmp_path)}", *few, "memory_mb=1", probes, cwd=tmp_path, script=EVALUATE)
    result = json.loads((runs[1] / "evaluation.json").read_text())
    assert result["k"] == [1, 10, 20] and result["images"] == 70 and result["checkpoint"] == "checkpoints/last.ckpt"
    assert (runs[1] / "figures" / "evaluation.png").stat().st_size > 5000
    assert f"{result['nll_20']['mean']:.3f} ± {result['nll_20']['se']:.3f}" in output
    assert result["nll_1"]["mean"] > result["nll_10"]["mean"] > result["nll_20"]["mean"] > 50
    assert result["neg_elbo"]["mean"] == pytest.approx(result["nll_1"]["mean"], abs=1)
    assert result["neg_elbo"]["mean"] == pytest.approx(result["kl"]["mean"] + result["recon"]["mean"])
    assert sum(result["kl_per_dimension"]) == pytest.approx(result["kl"]["mean"])
    aggregate = result["aggregate"]
    # Estimated with one z of each of 70 images, it deviates by about half a nat.
    assert aggregate["mutual_information"] + aggregate["marginal_kl"] == pytest.approx(result["kl"]["mean"], abs=2)
    assert 0.5 < result["knn_accuracy"] <= 1 and 0.5 < result["linear_accuracy"] <= 1
    assert "log-likelihood of binarized images" in output and "Warning" not in output

    again = run(f"ckpt={runs[1]}", *few, "probes=false", "out=other", cwd=tmp_path, script=EVALUATE)
    other = json.loads((tmp_path / "other" / "evaluation.json").read_text())
    assert other["nll_20"]["mean"] == pytest.approx(result["nll_20"]["mean"], abs=1e-4) and "nearest" not in again

    table = run("runs=burda", cwd=tmp_path, script="scripts/results.py")
    values = [json.loads((folder / "evaluation.json").read_text())["nll_20"]["mean"] for folder in runs]
    mean, sd = sum(values) / 2, abs(values[0] - values[1]) / math.sqrt(2)
    row = next(line for line in table.splitlines() if "burda_iwae5" in line)
    assert f"{mean:.2f} ± {sd:.2f}" in row and "| 2 |" in row and len(re.findall("burda_iwae5 ", table)) == 1
    unevaluated = next((tmp_path / "burda").glob("*_burda_vae")).relative_to(tmp_path)
    assert f"not evaluated: {unevaluated}; evaluate a run by `python scripts/evaluate.py ckpt={unevaluated}`" in table
    # A run that was trained further since, and one that was interrupted, whose record has no times.
    with open(runs[1] / "checkpoints" / "last.ckpt", "ab") as file:
        file.write(b"\0")
    other = tmp_path / unevaluated
    (other / "metrics.json").write_text(json.dumps({"status": "interrupted", "machine": "m"}))
    result = json.loads((runs[0] / "evaluation.json").read_text())
    (other / "evaluation.json").write_text(json.dumps(result | {"sha256": hash_file(other / "checkpoints/last.ckpt")}))
    table = run("runs=burda", cwd=tmp_path, script="scripts/results.py")
    assert f"not evaluated: {runs[1].relative_to(tmp_path)};" in table
    assert re.search(r"burda_vae .* \(interrupted\) \| 1 \|", table) and re.search("burda_iwae5 .* [|] 1 [|]", table)
    # A folder that is no run, as of evaluate.py with out=runs/FOLDER, does not hide the others.
    shutil.copytree(tmp_path / "other", tmp_path / "burda" / "other")
    assert run("runs=burda", cwd=tmp_path, script="scripts/results.py") == table
    assert "no evaluated run under other" in run("runs=other", cwd=tmp_path, script="scripts/results.py", code=1)
    assert "no evaluated run" in run("runs=nothing", cwd=tmp_path, script="scripts/results.py", code=1)


@pytest.mark.slow
def test_a_killed_evaluation_resumes_with_the_same_results(tmp_path, data_root):
    run(*TINY, "trainer.max_epochs=1", f"data.root={data_root}", "hydra.run.dir=run", cwd=tmp_path)
    words = ["ckpt=run", "max_images=640", "probes=false", "k=300"]
    how = {"cwd": tmp_path, "script": EVALUATE}
    assert "resuming" not in run(*words, "out=whole", **how)
    killed = Child(*words, "out=killed", **how)
    wait_for(tmp_path, "killed/evaluation.part", killed)
    killed.send(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and not (tmp_path / "killed" / "evaluation.json").exists()
    assert "resuming after the 32 images" in run(*words, "out=killed", **how)
    assert not (tmp_path / "killed" / "evaluation.part").exists()
    whole, resumed = (json.loads((tmp_path / f / "evaluation.json").read_text()) for f in ("whole", "killed"))
    del whole["sampling_seconds"], resumed["sampling_seconds"]
    assert whole == resumed


def test_one_test_image_has_no_standard_error(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(10 * 4 * 4, dtype=np.uint8).reshape(10, 4, 4))
    data = ["data=arrays", "data.root=x.npy", "data.test_size=1", "data.batch_size=2", "hydra.run.dir=run"]
    run(*TINY, *data, "callbacks.figures_every_n_epochs=0", cwd=tmp_path)
    output = run("ckpt=run", "k=2", cwd=tmp_path, script=EVALUATE, code=1)
    assert output.startswith("error: run/checkpoints/best.ckpt: its data have 1 test image; expected at least 2")
    assert output.count("\n") == 1 and not (tmp_path / "run" / "evaluation.json").exists()


@pytest.mark.parametrize(("n", "classes", "is_skipped"), [(20, 1, True), (4, 2, True), (30, 25, False)])
def test_label_probes_need_enough_labeled_images(tmp_path, n, classes, is_skipped):
    x = np.random.default_rng(0).integers(0, 256, (n, 4, 4), np.uint8)
    labels = np.arange(n) % classes
    np.savez(tmp_path / "x.npz", x_train=x, y_train=labels, x_test=x, y_test=np.arange(n))
    data = ["data=arrays", "data.root=x.npz", "data.validation_size=0", "data.batch_size=2", "hydra.run.dir=run"]
    run(*TINY, *data, "callbacks.figures_every_n_epochs=0", cwd=tmp_path)
    output = run("ckpt=run", "k=2", cwd=tmp_path, script=EVALUATE)
    reason = "label probes skipped: they need at least 5 training images of two classes"
    assert (reason in output) == is_skipped
    assert ("5 nearest neighbors" in output) != is_skipped and "Warning" not in output
