"""Invalid input: each error is one line with the key or file, and nothing is written or lost."""

import copy
import functools
import hashlib
import io
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from betavae.data.datasets.dsprites import FILE as DSPRITES
from betavae.data.datasets.mnist import load_mnist
from betavae.errors import UserError
from betavae.runtime import checkpoint
from betavae.runtime.cli import parse_value
from betavae.runtime.hydra_config import to_plain
from betavae.runtime.settings import check_settings
from tests.commands import REPO, TINY, fresh, run
from tests.unit.runtime.test_configs import composed


@pytest.fixture(scope="module")
def workdir(workdir):
    """A working folder with a finished run in `run`."""
    run(*TINY, "trainer.max_epochs=2", "hydra.run.dir=run", cwd=workdir)
    return workdir


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def reject(workdir: Path, script: str, *args: str) -> str:
    """Run a command that must fail without writing anything; return its one line."""
    before = contents(workdir)
    text = run(*args, cwd=workdir, script=script, code=1)
    assert text.startswith("error: ") and text.count("\n") == 1 and "Traceback" not in text, text
    assert contents(workdir) == before
    return text


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    """The settings of a run, as Hydra composes them."""
    return to_plain(composed())


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("optimizer.lr=0", "optimizer.lr=0 .*number > 0"),
        ("model.latent_dim=0", "model.latent_dim=0 .*integer > 0"),
        ("model.latent_dim=-1", "model.latent_dim=-1 .*integer > 0"),
        ("model.latent_dim=2.5", "model.latent_dim=2.5 .*integer"),
        ("model.latent_dim=true", "model.latent_dim=true .*integer"),
        ("model.hidden_dims=[]", "model.hidden_dims=.*such as .512, 256"),
        ("model.hidden_dims=400", "model.hidden_dims=400 .*list"),
        ("model.likelihood=bernouli", "model.likelihood=bernouli .*did you mean bernoulli?"),
        ("model.activation=rellu", "model.activation=rellu .*did you mean relu?"),
        ("objective.name=elbow", "objective.name=elbow .*did you mean elbo?"),
        ("objective.k=0", "objective.k=0 .*integer > 0"),
        ("objective.free_bits=-1", "objective.free_bits=-1"),
        ("beta=-1", "beta=-1 .*number >= 0"),
        ("beta=nan", "beta=nan .*number"),
        ("beta=inf", "beta=inf .*number"),
        ("beta=null", "beta=null .*number"),
        ("seed=-1", "seed=-1"),
        ("data.batch_size=0", "data.batch_size=0 .*integer > 0"),
        ("data.binarize=yes", "data.binarize=.*threshold"),
        ("data.name=minst", "data.name=minst .*did you mean mnist?"),
        ("trainer.max_epochs=0", "trainer.max_epochs=0"),
        ("trainer.accelerator=tpuu", "trainer.accelerator=tpuu"),
        ("trainer.devices=0", "trainer.devices=0"),
        ("trainer.devices=-3", "trainer.devices=-3"),
        ("trainer.devices=-1.0", "trainer.devices=-1.0"),
        ("trainer.max_steps=-1.0", "trainer.max_steps=-1.0"),
        ("trainer.precision=12", "trainer.precision=12 .*32-true"),
        ("trainer.max_time=soon", "trainer.max_time=soon .*DD:HH:MM:SS"),
        ("trainer.val_check_interval=0", "trainer.val_check_interval=0"),
        ("trainer.gradient_clip_val=0", "trainer.gradient_clip_val=0 is invalid: expected"),
        ("trainer.gradient_clip_algorithm=value", "needs trainer.gradient_clip_val"),
    ],
)
def test_an_invalid_value_is_one_line(settings, mistake, said):
    key, value = mistake.split("=")
    *groups, name = key.split(".")
    changed = copy.deepcopy(settings)
    functools.reduce(dict.__getitem__, groups, changed)[name] = parse_value(value)
    with pytest.raises(UserError, match=said) as error:
        check_settings(changed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("model.latnt_dim=3", "model.latnt_dim is not a setting; did you mean model.latent_dim?"),
        ("latent_dim=3", "latent_dim is not a setting; did you mean model.latent_dim?"),
        ("+betta=3", "betta is not a setting; did you mean beta?"),
        ("+trainer.max_epoch=3", "trainer.max_epoch is not a setting of Trainer; did you mean max_epochs?"),
        ("+callbacks.figures=3", "callbacks.figures is not a setting; did you mean callbacks.figures_every_n_epochs?"),
        ("data=folder data.cache=null", "data.cache=null is invalid: expected"),
        ("data=folder data.background=0", "data.background=0 is invalid: expected"),
        ("data=folder data.image_size=null", "data.image_size=null is invalid: expected"),
        ("data=folder data.image_size=[64,null]", "data.image_size=.* is invalid: expected"),
        ("data=folder data.channels=2 data.root=.", "data.channels=2 is invalid: expected 1 or 3"),
        ("sweep=optuna hydra.sweeper.n_trials=3", "sweep=optuna needs -m: python train.py -m sweep=optuna"),
        ("optimizer=muon optimizer.vector_lr=-1", "at least 0"),
        ("optimizer=muon optimizer.momentum=1.5", "momentum=1.5 .* below 1"),
        ("optimizer=muon optimizer.betas=0.9", "optimizer.betas|optimizer: MuonAdam"),
        ("model.likelihood=logistic_mixture +model.components=0", "model.components=0 is invalid: expected"),
        ("model=resnet +model.blocks=-1", "model.blocks=-1 is invalid: expected"),
        ("beta=1e39", "beta=1e.39 is invalid: expected a number >= 0 and <= 1e.30"),
        ("prior.name=mixture", "prior: .*components"),
        ("+beta_schedule.warm=1", "beta_schedule.warm is not a setting of constant; leave it out"),
        ("experiment=mnist_nll beta_schedule=constant", "a setting of constant; .* by ~beta_schedule.warmup"),
        ("~beta_schedule.warmup beta_schedule=linear", "beta_schedule.warmup is missing, which linear needs"),
        ("+model.depth=1", "model.*depth"),
        ("objective.groups=4", "is a setting of objective=miwae and objective=piwae, and this run has"),
        ("data.fit=pad", "data.fit is a setting of data=folder, and this run has another data"),
        ("model.components=3", "model.components is a setting of some runs that .* by .model.components=..."),
        ("model=mpl", "model=mpl .*mlp"),
        ("modle=mlp", "modle.*model"),
        ("trainer=smok", "trainer=smok .*smoke"),
        ("experiment=tutorail", "experiment=tutorail .*tutorial"),
        ("beta=1,2", "beta=1,2 has a comma: pass -m for a sweep"),
        ("optimizer=adamm", "optimizer=adamm .*adam, "),
        ("optimizer.name=Adan", "optimizer.name=Adan .*did you mean Adam?"),
        ("+optimizer.nesterov=true", "optimizer.*nesterov"),
        ("optimizer.betas=[2,0.9]", "optimizer.*beta"),
        ("optimizer.lr=fast", "optimizer.lr=fast .*number"),
        ("model.hidden_dims=[400,0]", "model.hidden_dims=.*integer > 0"),
        ("objective=dreg objective.resample=0", "objective.resample=0 .*an integer > 0 or null"),
        ("data.batch_size=60001", "data.batch_size=60001 .*55000"),
        ("data.validation_size=60000", "data.validation_size=60000 .*60000"),
        ("data.root=/proc/nowhere", "data.root.*/proc/nowhere"),
        ("runs=/proc/nowhere", "runs.*/proc/nowhere"),
        pytest.param(
            "trainer.accelerator=gpu", "gpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
        ),
        ("trainer.strategy=dpp", "trainer.*dpp"),
        ("trainer.precision=16-mixed trainer.accelerator=cpu", "trainer.precision=16-mixed .*GPU"),
        ("trainer.precision=64-true trainer.accelerator=mps", "trainer.precision=64-true .*float64"),
        ("trainer.devices=4096 trainer.accelerator=cpu", "trainer.devices=4096 .*cores"),
        ("trainer=cuda_graph trainer.accelerator=cpu", "trainer.cuda_graph=true .*needs a CUDA device"),
        ("trainer=fast optimizer.name=LBFGS", "trainer.steps_per_batch=10 .*expected 1 with LBFGS"),
        ("trainer.limit_train_batches=0.00001", "limit_train_batches"),
        ("~optimizer", "optimizer is missing"),
        ("~beta", "beta"),
        ("~hydra={}", "~hydra=... deletes hydra only if that is its value"),
        ("data.batch_size=???", "data.batch_size=\\?\\?\\? is invalid"),
        ("trainer=null", "string"),
        ("name=${nothing}", "nothing"),
        ("beta=[1", "beta=\\[1"),
        ("beta", "beta"),
        ("resume=nowhere", "resume: nowhere"),
        ("resume=data", "resume: data .*config.yaml"),
        ("resume=run trainer.steps_per_batch=7", "resume: trainer.steps_per_batch=7 cannot change"),
        ("resume=run model.latent_dim=7", "resume: model.latent_dim=7 cannot change"),
        ("resume=run model=conv", "resume: model=conv cannot change"),
        ("resume=run trainer.max_epochs=1", "max_epochs=1"),
        ("+trainer.logger=csv", "trainer.logger is not a setting: betavae sets it"),
        ("callbacks.early_stopping_patience=2 data.validation_size=0", "validation_size=0 leaves no validation images"),
        ("callbacks.monitor=loss data.validation_size=0", "callbacks.monitor=loss is invalid: this run never"),
        ("hydra.run.dir=new/run data.validation_size=100000", "data.validation_size=100000"),
        ("hydra.run.dir='new/a run' beta=-1", "beta=-1 .*number >= 0"),
        ("objective=dreg objective.resample=5", "objective.resample=5 is invalid: expected null or fewer than"),
        ("+objective.num_train_images=10", "objective.num_train_images is not a setting"),
        ("data=sprites data.validation_size=100", "data.validation_size=100 is invalid: expected null or 0"),
        pytest.param("model.hidden_dims=[2000000000]", "does not fit into memory", marks=pytest.mark.slow),
    ],
)
def test_training_rejects_an_invalid_setting(workdir, mistake, said):
    sentence = reject(workdir, "train.py", *(TINY if "resume" not in mistake else []), *re.split(r" (?=\S+=)", mistake))
    assert re.search(said, sentence), sentence


@pytest.mark.parametrize(
    ("script", "mistake", "said"),
    [
        ("sample", "n=0", "n=0 .*integer > 0"),
        ("sample", "n=many", "n=many"),
        ("sample", "temperature=-1", "temperature=-1"),
        ("sample", "out=/proc/nowhere/x.png", "out: .*/proc/nowhere"),
        ("sample", "out=x.nope", "out=x.nope is invalid: expected a name that ends in .png, .jpg"),
        ("sample", "out=x.bmp", "out=x.bmp is invalid: expected a name that ends in .png, .jpg"),
        ("traverse", "out=x.gif", "out=x.gif is invalid: .* .tiff, .pdf, .svg"),
        ("sample", "ckpt=nowhere", "ckpt: nowhere does not exist"),
        ("sample", "ckpt=data", "ckpt: data is a folder"),
        ("sample", "nn=3", "nn is not a setting; did you mean n?"),
        ("results", "folder=x", "folder is not a setting"),
        ("sample", "ckpt=null runs=data", "no finished run in data"),
        ("interpolate", "labels=[3,12]", "labels=\\[3, 12\\]"),
        ("interpolate", "labels=[3]", "labels=\\[3\\]"),
        ("interpolate", "images=[1,2] rows=6", "rows=6 is invalid with images"),
        ("interpolate", "images=[1,2] rows=3", "rows=3 is invalid with images"),
        ("interpolate", "images=[1,10000]", "images=\\[1, 10000\\] .*9999"),
        ("traverse", "image=10000", "image=10000 .*9999"),
        ("manifold", "size=8", "latent_dim=2"),
        ("reconstruct", "n=0", "n=0"),
    ],
)
def test_scripts_reject_an_invalid_setting(workdir, script, mistake, said):
    ckpt = [] if script == "results" else ["ckpt=run"]
    sentence = reject(workdir, f"scripts/{script}.py", *ckpt, *mistake.split())
    assert re.search(said, sentence), sentence


class Attack:
    """An object whose pickle runs code."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def broken_checkpoints(good: Path, folder: Path, victim: Path) -> dict[str, str]:
    """Write checkpoints to `folder`; return the error of each by its name."""
    whole, content = good.read_bytes(), torch.load(good, weights_only=True)

    def saved(name: str, **changes) -> None:
        torch.save(content | changes, folder / name)

    (folder / "empty").touch()
    (folder / "text").write_text("these are not weights")
    (folder / "truncated").write_bytes(whole[: len(whole) // 2])
    # In the middle of the weights, where torch.load does not detect it.
    middle = whole.index(content["state_dict"]["vae.encoder.1.weight"].numpy().tobytes()) + 1000
    (folder / "flipped").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    torch.save({"state_dict": {"w": torch.zeros(3)}, "epoch": 3}, folder / "others")
    torch.save(torch.zeros(3), folder / "tensor")
    saved("list", hyper_parameters=[1])
    saved("number", datamodule_hyper_parameters=5)
    saved("newer", betavae_format=checkpoint.FORMAT + 1)
    saved("older", betavae_format=checkpoint.FORMAT - 1)
    settings = content["hyper_parameters"]
    for name, change in {
        "shapes": {"latent_dim": 7},
        "huge": {"latent_dim": 10**9},
        "network": {"network": "os.system"},
        "target": {"_target_": "os.system", "command": f"touch {victim}"},
        "deep": {"network": "resnet", "blocks": 10**9},
    }.items():
        saved(name, hyper_parameters=settings | {"model": settings["model"] | change})
    wide = settings["model"] | {"hidden_dims": [10_000]}
    weights = {f"vae.{key}": torch.zeros(1).expand(shape) for key, shape in checkpoint.model_shapes(wide, 100).items()}
    saved("strides", hyper_parameters=settings | {"model": wide}, state_dict=weights)
    data = content["datamodule_hyper_parameters"] | {"name": "folder", "root": str(folder), "image_size": 10**6}
    saved("pictures", datamodule_hyper_parameters=data)
    torch.save(content | {"attack": Attack(victim)}, folder / "pickle")
    (folder / "bare_pickle").write_bytes(pickle.dumps(Attack(victim)))
    torch.save(Attack(victim), folder / "old_format", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(folder / "bomb", "w", zipfile.ZIP_DEFLATED) as bomb, zipfile.ZipFile(good) as archive:
        for part in archive.namelist():
            bomb.writestr(
                part, archive.read(part) if "/data/" not in part else bytes(300_000_000 if part.endswith("/0") else 8)
            )
    return {
        **dict.fromkeys(("empty", "text", "truncated", "bare_pickle", "old_format", "pickle"), "damaged or not a"),
        "flipped": "Bad CRC",
        **dict.fromkeys(("others", "tensor", "list", "number"), "not a checkpoint of betavae"),
        "newer": f"this betavae reads format {checkpoint.FORMAT}; update betavae",
        "older": "; train the model again",
        **dict.fromkeys(("shapes", "huge"), "do not match"),
        "network": "model.network=os.system",
        "target": "_target_",
        "bomb": "unpacks to more",
        "deep": "fewer weights than its settings describe",
        "strides": "more memory than its size allows",
        "pictures": "data.image_size=1000000 is not the size",
    }


@pytest.mark.slow
def test_a_damaged_or_hostile_checkpoint_is_rejected(workdir, tmp_path):
    victim = tmp_path / "victim"
    for name, said in broken_checkpoints(workdir / "run" / "checkpoints" / "best.ckpt", tmp_path, victim).items():
        sentence = reject(workdir, "scripts/sample.py", f"ckpt={tmp_path / name}")
        assert said in sentence and str(tmp_path / name) in sentence, (name, sentence)
        assert not victim.exists(), name
        # The same file as the last checkpoint of a run that is resumed.
        copied = copy_interrupted(workdir, tmp_path / f"copy_{name}")
        shutil.copy(tmp_path / name, copied / "checkpoints" / "last.ckpt")
        before = contents(copied)
        sentence = reject(workdir, "train.py", f"resume={copied}")
        assert said in sentence and "last.ckpt" in sentence and contents(copied) == before, (name, sentence)
        assert not victim.exists(), name


@pytest.mark.slow
def test_every_flipped_bit_is_harmless_or_detected(workdir, tmp_path):
    """Bits at 300 positions of the file are flipped, one at a time."""
    good = workdir / "run" / "checkpoints" / "best.ckpt"
    whole = good.read_bytes()
    expected = checkpoint.load(str(good), "").vae.state_dict()
    seen = 0
    for number in range(300):
        at = number * len(whole) // 300
        (tmp_path / "x").write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        try:
            state = checkpoint.load(str(tmp_path / "x"), "").vae.state_dict()
        except UserError:
            seen += 1
            continue
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert seen > 200


def copy_interrupted(workdir: Path, folder: Path) -> Path:
    """Copy the finished run, as if it had been killed."""
    copied = shutil.copytree(workdir / "run", folder / "run")
    interrupt(copied)
    return copied


@pytest.mark.parametrize(
    "text",
    [
        *("", "model: [", "- 1", "model: {}\ntrainer: {}\nresume: null\n", "a: 1\n"),
        "model: !!python/object/apply:os.system ['touch VICTIM']",
        "trainer: {max_epochs: '${run_dir:null,VICTIM}'}",
        "model: {_target_: os.system, command: 'touch VICTIM'}",
    ],
)
def test_a_damaged_or_hostile_config_is_rejected(workdir, tmp_path, text):
    copied, victim = copy_interrupted(workdir, tmp_path), tmp_path / "victim"
    (copied / "config.yaml").write_text(text.replace("VICTIM", str(victim)))
    assert "config.yaml" in reject(workdir, "train.py", f"resume={copied}")
    assert not victim.exists()


@pytest.mark.slow
def test_a_damaged_config_is_rejected_without_asserts(workdir, tmp_path):
    """`python -O` removes assert statements."""
    copied = copy_interrupted(workdir, tmp_path)
    (copied / "config.yaml").write_text("- 1\n")
    before = contents(copied)
    text = fresh("-O", str(REPO / "train.py"), f"resume={copied}", cwd=workdir, code=1)
    assert text == reject(workdir, "train.py", f"resume={copied}") and "it holds a list, not a dict" in text
    assert contents(copied) == before


def test_an_interpolation_in_a_config_is_never_resolved(workdir, tmp_path):
    copied = copy_interrupted(workdir, tmp_path)
    text = (copied / "config.yaml").read_text()
    line = f"name: ${{run_dir:null,{tmp_path}/victim}}"
    (copied / "config.yaml").write_text(re.sub("(?m)^name:.*", line, text))
    run(f"resume={copied}", "trainer.max_epochs=3", cwd=workdir)
    assert line in (copied / "config.yaml").read_text()
    interrupt(copied)
    (copied / "config.yaml").write_text(re.sub("(?m)^  precision:.*", "  precision: ${oc.env:HOME}", text))
    assert "precision=${oc.env:HOME} " in reject(workdir, "train.py", f"resume={copied}")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def interrupt(run_folder: Path) -> None:
    """Make a finished run look as if it had been killed."""
    metrics = run_folder / "metrics.json"
    metrics.write_text(metrics.read_text().replace('"finished"', '"running"'))


def test_a_checkpoint_does_not_choose_where_data_go(workdir, tmp_path):
    content = torch.load(workdir / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    content["datamodule_hyper_parameters"]["root"] = str(tmp_path / "climbed")
    torch.save(content, tmp_path / "x.ckpt")
    arguments = (f"ckpt={tmp_path / 'x.ckpt'}", f"out={tmp_path / 'x.png'}")
    run(*arguments, cwd=workdir, script="scripts/reconstruct.py")
    assert (tmp_path / "x.png").exists() and not (tmp_path / "climbed").exists()


def test_damaged_data_files_are_rejected(data_root, tmp_path):
    name = "train-images-idx3-ubyte"
    whole = (Path(data_root) / "MNIST" / "raw" / name).read_bytes()
    shutil.copytree(Path(data_root) / "MNIST", tmp_path / "MNIST")
    file = tmp_path / "MNIST" / "raw" / name
    flipped = whole[:7] + b"\x07" + whole[8:]
    for harmed in (b"", whole[:100_000], whole[:-1], flipped, pickle.dumps(Attack(tmp_path / "v"))):
        file.write_bytes(harmed)
        with pytest.raises(UserError, match=str(tmp_path)):
            load_mnist(tmp_path, "train")
    assert not (tmp_path / "v").exists()
    # Missing files are restored.
    file.unlink()
    (file.parent / "train-labels-idx1-ubyte").unlink()
    assert load_mnist(tmp_path, "train").pixels.shape == (60_000, 1, 28, 28)


@pytest.mark.parametrize("kind", ["lzma", "claim", "parquet"])
def test_decompression_bombs_are_rejected(workdir, tmp_path, kind):
    """Small files that unpack to huge arrays, or claim a huge shape."""
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        columns = {name: pyarrow.array(np.zeros(10**6, np.float32)) for name in ("name", "mean_0", "mean_1", "mean_2")}
        parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet", compression="zstd")
    else:
        method, count = (zipfile.ZIP_LZMA, 10**6) if kind == "lzma" else (zipfile.ZIP_DEFLATED, 10**14)
        with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as file:
            for name, shape in (
                ("images", (count, 4, 2)),
                ("mean", (count, 3)),
                ("names", (count,)),
                ("imgs", (count, 8, 8)),
            ):
                header = io.BytesIO()
                dtype = {"mean": "<f4", "names": "<U1"}.get(name, "|u1")
                np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
                file.writestr(f"{name}.npy", header.getvalue() + bytes(10**6 * 16 if kind == "lzma" else 1000))
    path = next(tmp_path.iterdir())
    assert path.stat().st_size < 50_000
    assert str(path) in reject(workdir, "scripts/decode.py", "ckpt=run", f"latents={path}")
    if kind != "parquet":
        assert str(path) in reject(workdir, "scripts/encode.py", "ckpt=run", f"images={path}")
        assert str(path) in reject(workdir, "train.py", "data=arrays", f"data.root={path}")
        shutil.copy(path, tmp_path / DSPRITES)
        assert DSPRITES in reject(workdir, "train.py", "data=dsprites", f"data.root={tmp_path}")


def test_an_error_is_one_line_unless_traceback_is_true(workdir):
    before = contents(workdir)
    mistake = fresh(str(REPO / "train.py"), "model.latent_dim=0", "runs=new", cwd=workdir, code=1)
    assert mistake.startswith("error: ") and mistake.count("\n") == 1
    debug = run("model.latent_dim=0", "traceback=true", "runs=new", cwd=workdir, code=1)
    assert "Traceback" in debug and "model.latent_dim=0" in debug
    assert contents(workdir) == before


def test_a_bug_shows_its_traceback(workdir):
    def prepare():
        from betavae.module import VAEModule

        VAEModule.training_step = lambda *args: {}["bug"]

    text = run(*TINY, "hydra.run.dir=bug", cwd=workdir, prepare=prepare, code=1)
    assert "Traceback" in text and "KeyError: 'bug'" in text
    assert '"status": "failed"' in (workdir / "bug" / "metrics.json").read_text()
    shutil.rmtree(workdir / "bug")


def test_missing_images_and_labels_are_rejected(workdir):
    text = reject(workdir, "scripts/encode.py", "ckpt=run", "images=folder")
    assert "folder" in text and "No such file" in text
    text = reject(workdir, "scripts/detect.py", "ckpt=run", "inliers=[cat]")
    assert "inliers=['cat'] is invalid" in text and "labels found: 0, 1, 2" in text
