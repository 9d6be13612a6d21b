"""Every script with a conditional model and with learned priors, on images whose gray level is their label."""

import json
import re
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import betavae
from betavae.data.image_set import ImageSet
from betavae.data.scaling import Scaling
from betavae.models.vae import VAE
from betavae.runtime.callbacks import ImageLogger
from betavae.runtime.checkpoint import save_checkpoint
from tests.commands import REPO, run

SHADES = (30, 120, 210)
SMALL = [
    "trainer=smoke",
    *("data=arrays", "data.root=x.npz", "data.batch_size=50", "data.test_size=100", "data.validation_size=100"),
    *("model.hidden_dims=[16]", "model.latent_dim=2", "trainer.max_epochs=15", "trainer.limit_train_batches=1.0"),
    *("optimizer.lr=0.02", "trainer.check_val_every_n_epoch=15", "model.activation=tanh"),
]
MODELS = {
    "conditional": ["model.conditional=true"],
    "mixture": ["prior=mixture", "prior.components=5", "model.conditional=true"],
    "vamp": ["prior=vamp", "prior.components=5"],
    "flow": ["prior=flow", "prior.transforms=2", "prior.hidden_dims=[8]", "model.conditional=true"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shades")
    labels = np.arange(700) % 3
    # A gradient is left for z to encode; without it, the posterior would collapse.
    slopes = np.random.default_rng(0).uniform(-28, 28, (700, 1, 1)) * np.linspace(-1, 1, 8)[:, None].repeat(8, 1)
    images = (slopes + np.array(SHADES)[labels][:, None, None]).astype(np.uint8)
    np.savez(folder / "x.npz", images=images, labels=labels)
    np.savez(folder / "unlabeled.npz", images=images[:6])
    for name in ("0", "2", "seven"):
        (folder / ("names" if name == "seven" else "files") / name).mkdir(parents=True)
    Image.fromarray(images[0]).save(folder / "files" / "0" / "a.png")
    Image.fromarray(images[2]).save(folder / "files" / "2" / "b.png")
    Image.fromarray(images[0]).save(folder / "names" / "seven" / "c.png")
    for name, settings in MODELS.items():
        run(*SMALL, *settings, f"hydra.run.dir={name}", cwd=folder)
    return folder


@pytest.fixture
def script(trained):
    return lambda name, *words, ckpt="conditional", **how: run(
        f"ckpt={ckpt}", *words, cwd=trained, script=f"scripts/{name}.py", **how
    )


def save_shades(path, **labels):
    """Save images of three shades as `x_SPLIT` with the labels `y_SPLIT`; None leaves a split without labels."""
    arrays = {}
    for split, values in labels.items():
        n = 120 if values is None else len(values)
        arrays[f"x_{split}"] = np.full((n, 8, 8), 90, np.uint8)
        if values is not None:
            arrays[f"y_{split}"] = np.array(values)
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"train": [1, 3] * 60, "test": [1, 2, 3]}, "label 2 of the test images has no training image"),
        ({"train": [0, 2] * 60, "val": [0, 2], "test": [0, 1, 2]}, "label 1 of the test images has no training image"),
        ({"train": [0, 1] * 60, "val": [0, 3], "test": [0, 1]}, "label 3 of the validation images has no training"),
        ({"train": [0, 1] * 60, "test": None}, "the test images have no labels, which model.conditional=true needs"),
        ({"train": [1] * 120, "test": [1, 1]}, "has one class; expected a folder for each class"),
        ({"train": None, "test": [0, 1]}, "has no labels; expected a folder for each class"),
        ({"train": ["", "cat"] * 60, "test": ["cat"]}, "has images with an empty label"),
        ({"train": [f"{i / 7:.3f}" for i in range(120)], "test": ["-1"]}, "121 different labels for 108 training"),
    ],
)
def test_every_label_needs_training_images(tmp_path, labels, message):
    save_shades(tmp_path / "x.npz", **labels)
    settings = ["trainer=smoke", "data=arrays", "data.root=x.npz", "data.batch_size=50", "model.conditional=true"]
    output = run(*settings, cwd=tmp_path, code=1)
    assert message in output and output.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_a_split_of_the_first_class_alone_has_labels(tmp_path):
    save_shades(tmp_path / "x.npz", train=[0, 1] * 60, test=[0] * 10)
    tiny = ["trainer=smoke", "model.hidden_dims=[4]", "model.latent_dim=2", "trainer.max_epochs=1"]
    data = ["data=arrays", "data.root=x.npz", "data.batch_size=50"]
    run(*tiny, *data, "model.conditional=true", cwd=tmp_path)
    run("images=test", "out=z.npz", cwd=tmp_path, script="scripts/encode.py")
    assert np.load(tmp_path / "z.npz")["labels"].tolist() == [0] * 10


def test_numbers_in_a_file_are_no_indices_of_named_classes(tmp_path):
    save_shades(tmp_path / "x.npz", train=["cat", "dog"] * 60, test=["cat", "dog"])
    tiny = ["trainer=smoke", "model.hidden_dims=[4]", "model.latent_dim=2", "trainer.max_epochs=1"]
    data = ["data=arrays", "data.root=x.npz", "data.batch_size=50"]
    run(*tiny, *data, "model.conditional=true", cwd=tmp_path)
    np.savez(tmp_path / "new.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.array([1, 0]))
    error = run("images=new.npz", cwd=tmp_path, script="scripts/encode.py", code=1)
    assert error == "error: images=new.npz: label=1 is invalid: expected one of cat, dog, the names of the classes\n"
    run("images=new.npz", "label=1", "out=z.npz", cwd=tmp_path, script="scripts/encode.py")
    assert np.load(tmp_path / "z.npz")["labels"].tolist() == ["dog", "dog"]
    np.savez(tmp_path / "z.npz", mean=np.zeros((2, 2)), names=np.array(["a", "b"]), labels=np.array([1, 0]))
    error = run("latents=z.npz", cwd=tmp_path, script="scripts/decode.py", code=1)
    assert error == "error: z.npz: label=1 is invalid: expected one of cat, dog, the names of the classes\n"


def test_labels_of_a_table_are_matched_by_value(tmp_path):
    """Rows whose first column is ten times the class, which are 1.0, 2.0 and 2.5, True and False."""
    rng = np.random.default_rng(0)
    tiny = ["trainer=smoke", "model.hidden_dims=[8]", "model.latent_dim=2", "trainer.limit_train_batches=1.0"]
    for names in (("1.0", "2.0", "2.5"), ("False", "True")):
        rows = [(10 * float(names[i % len(names)].replace("True", "1").replace("False", "0")), i) for i in range(400)]
        text = "a,b,kind\n" + "".join(
            f"{a + rng.normal():.3f},{rng.normal():.3f},{names[i % len(names)]}\n" for a, i in rows
        )
        (tmp_path / "t.csv").write_text(text)
        settings = ["experiment=table", *tiny, "data.root=t.csv", "data.label=kind", "data.batch_size=50"]
        run(*settings, "trainer.max_epochs=30", "model.conditional=true", f"hydra.run.dir=run_{names[0]}", cwd=tmp_path)
        for typed, name in (
            (("1", "1"), ("2.0", "2"), ("2.5", "2.5")) if "1.0" in names else (("true", "True"), ("False", "False"))
        ):
            words = (f"ckpt=run_{names[0]}", f"label={typed}", "n=3", "out=s.csv", "save_tensor=true")
            run(*words, cwd=tmp_path, script="scripts/sample.py")
            assert [line.split(",")[2] for line in (tmp_path / "s.csv").read_text().splitlines()[1:]] == [name] * 3
        assert torch.load(tmp_path / "s.pt", weights_only=True).shape == (3, 2, 1, 1)
    (tmp_path / "new.csv").write_text("a,b,kind\n20.0,0,2.0\n10.0,0,1.0\n")  # without 2.5, these are integers
    run("ckpt=run_1.0", "images=new.csv", "out=z.npz", cwd=tmp_path, script="scripts/encode.py")
    model = betavae.load(tmp_path / "run_1.0")
    values = torch.tensor([[20.0, 0.0], [10.0, 0.0]], dtype=torch.float64)[..., None, None]
    expected = model.encode(values, torch.tensor([1, 0])).mean
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "z.npz")["mean"]), expected)
    error = run("ckpt=run_1.0", "label=3", "out=s.csv", cwd=tmp_path, script="scripts/sample.py", code=1)
    assert error == "error: label=3 is invalid: expected one of 1, 2, 2.5\n"
    (tmp_path / "new.csv").write_text("a,b,kind\n20.0,0,2.0\n10.0,0,\n")
    error = run("ckpt=run_1.0", "images=new.csv", cwd=tmp_path, script="scripts/encode.py", code=1)
    assert error == "error: images=new.csv has no label for number 1, from 0; add it, or pass label=\n"
    (tmp_path / "new.csv").write_text("a,b\n20.0,0\n")
    error = run("ckpt=run_1.0", "images=new.csv", cwd=tmp_path, script="scripts/encode.py", code=1)
    expected = "images=new.csv has no column kind, the label; add it, or pass label=one of 1, 2, 2.5 for all rows"
    assert error == f"error: {expected}\n"
    error = run("ckpt=run_1.0", "save_images=true", "out=s.csv", cwd=tmp_path, script="scripts/sample.py", code=1)
    assert "is a model of a table, and save_images=true needs a model of images" in error


def test_columns_of_many_classes_have_their_names(tmp_path):
    """With 25 classes, the figure of samples has a column for each of the first twenty."""
    classes = [f"class {number}" for number in range(25)]
    vae = VAE("mlp", [8], 2, "relu", "bernoulli", [1, 4, 4], classes=classes)
    images = ImageSet(torch.zeros(30, 1, 4, 4, dtype=torch.uint8), torch.arange(30) % 25, classes)
    datamodule = SimpleNamespace(splits={"test": images}, scaling=Scaling.unit())
    with torch.no_grad():
        figures, _ = ImageLogger(0, tmp_path).draw(SimpleNamespace(datamodule=datamodule), vae)
        labels, noise = torch.arange(20).repeat(8), torch.Generator().manual_seed(0)
        expected = vae.given(labels).sample(160, generator=noise)
    samples = figures["samples"]
    assert torch.equal(samples.images, expected) and samples.columns == 20
    assert list(samples.column_labels) == classes[:20]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_script_takes_the_model(trained, script, name):
    is_conditional = "model.conditional=true" in MODELS[name]
    label = ["label=2"] if is_conditional else []
    out, run_model = trained / f"out_{name}", lambda *words, **how: script(*words, ckpt=name, **how)
    assert {path.stem for path in (trained / name / "figures").iterdir()} >= {"samples", "traversal", "manifold"}
    run_model("evaluate", "k=20")
    aggregate = json.loads((trained / name / "evaluation.json").read_text())["aggregate"]
    assert aggregate.get("by_class", False) == is_conditional
    run_model("fidelity", "n=40", "repeats=2")
    scores = json.loads((trained / name / "fidelity.json").read_text())
    assert ("label_match" in scores["prior"]) == is_conditional
    for sampler in ("prior", "gaussian", "mixture", "knn"):
        run_model("sample", f"sampler={sampler}", f"out={out}/samples.png")
        run_model(
            "sample", f"sampler={sampler}", "label=2", f"out={out}/samples.png", code=sampler == "prior" and not label
        )
    run_model("traverse", f"out={out}/traverse.png")
    run_model("traverse", "image=null", *label, f"out={out}/traverse.png")
    run_model("manifold", *label, f"out={out}/manifold.png")
    run_model("interpolate", "labels=[0,2]", f"out={out}/interpolate.png")
    run_model("interpolate", "images=[0,1]", f"out={out}/interpolate.png")
    run_model("interpolate", "images=files", f"out={out}/interpolate.png")
    run_model("reconstruct", "images=files", f"out={out}/reconstruct.png")
    for suffix in (".npz", ".csv"):
        run_model("encode", "images=x.npz", f"out={out}/z{suffix}")
        run_model("decode", f"latents={out}/z{suffix}", f"out={out}/decoded{suffix}.d")
    run_model("detect", f"out={out}/detect", "alpha=0.05")
    run_model("detect", "images=unlabeled.npz", *label, f"out={out}/unlabeled", "alpha=0.05")
    message = run_model("compress", f"out={out}/x.bvae", code=1)
    assert "error: compression needs" in message and message.count("\n") == 1
    for form in ("torchscript", "safetensors", "folder"):
        run_model("export", f"format={form}", f"out={out}/{form}")
    graphs = json.loads((out / "torchscript" / "model.json").read_text())["graphs"]
    assert ("prior" in graphs) == (name != "conditional")
    assert ("label" in graphs["decoder"]["inputs"]) == is_conditional
    loaded = betavae.load(out / "folder").vae
    assert loaded.given(torch.tensor([1])).sample(3).shape == (3, 1, 8, 8)


@pytest.mark.slow
def test_conditional_model_draws_the_requested_label(trained, script):
    def brightness():
        return 255 * torch.load(trained / "s.pt", weights_only=True).mean((1, 2, 3))

    for label, shade in enumerate(SHADES):
        script("sample", f"label={label}", "n=20", "out=s.png", "save_tensor=true")
        assert (brightness() - shade).abs().max() < 25
    script("sample", "n=9", "out=s.png", "save_tensor=true")
    assert (brightness().view(3, 3) - torch.tensor(SHADES)).abs().max() < 25  # a column per class


@pytest.fixture
def label_in_z(trained):
    """A model whose z is that of the label, and whose images are white or black where z and label do not match."""
    content = torch.load(trained / "conditional/checkpoints/best.ckpt", weights_only=True)
    weights = {key.removeprefix("vae."): value.zero_() for key, value in content["state_dict"].items()}
    weights["encoder.1.weight"].view(16, 4, 64)[0, 1:] = torch.tensor([[-1.0], [0.0], [1.0]])
    weights["encoder.3.weight"][0, 0] = 20.0
    weights["encoder.3.bias"][2:] = -10.0  # log-variances
    weights["decoder.0.weight"][:2, 0] = 0.1
    weights["decoder.0.weight"][1, 2:] = torch.tensor([2.0, 0.0, -2.0])
    weights["decoder.2.weight"][:, :2] = torch.tensor([2.0, 20.0])
    save_checkpoint(content, trained / "label_in_z.ckpt")
    return "label_in_z.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["gaussian", "knn"])
def test_fitted_samples_are_decoded_with_their_label(trained, script, label_in_z, sampler):
    wanted = torch.sigmoid(2 * torch.tensor([-2.0, 0.0, 2.0]).tanh())
    words = (f"sampler={sampler}", "out=s.png", "save_tensor=true")
    for label in range(3):
        script("sample", *words, f"label={label}", "n=4", ckpt=label_in_z)
        found = torch.load(trained / "s.pt", weights_only=True)
        torch.testing.assert_close(found.mean((1, 2, 3)), wanted[label].expand(4), atol=0.1, rtol=0)
    script("sample", *words, "n=9", ckpt=label_in_z)  # a column per class
    found = torch.load(trained / "s.pt", weights_only=True).mean((1, 2, 3)).view(3, 3)
    torch.testing.assert_close(found, wanted.expand(3, 3), atol=0.1, rtol=0)
    script("fidelity", f"sampler={sampler}", "n=40", "repeats=2", "out=fitted", ckpt=label_in_z)
    scores = json.loads((trained / "fitted" / "fidelity.json").read_text())
    nearest = [scores[name]["nearest"]["mean"] for name in (sampler, "reconstructions")]
    assert nearest[0] == pytest.approx(nearest[1], abs=0.1)


@pytest.mark.slow
def test_latents_are_decoded_with_their_labels(trained, script):
    for suffix in (".npz", ".csv"):
        script("encode", "images=files", f"out=z{suffix}")
        script("decode", f"latents=z{suffix}", "out=own")
        script("decode", f"latents=z{suffix}", "out=other", "label=1")
        for folder, shades in (("own", (30, 210)), ("other", (120, 120))):
            pictures = sorted((trained / folder).rglob("*.png"))
            assert [np.asarray(Image.open(path)).mean() for path in pictures] == pytest.approx(shades, abs=25)
    # The label of all images replaces their own, also in the file.
    script("encode", "images=names", "label=0", "out=named.npz")
    assert np.load(trained / "named.npz")["labels"].tolist() == [0]
    own, other = (np.load(trained / name) for name in ("z.npz", "named.npz"))
    np.testing.assert_allclose(own["mean"][0], other["mean"][0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["encode", "images=unlabeled.npz"], "images=unlabeled.npz has no labels, which a conditional model needs"),
        (["encode", "images=names"], "images=names: label=seven is invalid: expected one of 0, 1, 2"),
        (["reconstruct", "images=files/0"], "has no labels"),
        (["detect", "images=unlabeled.npz"], "has no labels"),
        (["sample", "label=7"], "label=7 is invalid: expected one of 0, 1, 2"),
        (["manifold"], "the manifold has no labels"),
        (["traverse", "image=null"], "image=null has no labels"),
        (["decode", "latents=z.npy"], "z.npy has no labels"),
    ],
)
def test_missing_or_unknown_label_is_one_sentence(trained, script, words, message):
    np.save(trained / "z.npy", np.zeros((2, 2)))
    output = script(*words, code=1)
    assert message in output and output.startswith("error: ") and output.count("\n") == 1


@pytest.mark.slow
def test_commands_and_code_of_the_docs_run(trained, script, monkeypatch):
    section = (REPO / "docs" / "models.md").read_text().partition("## Labels")[2]
    commands = re.findall(r"^python scripts/(\w+)\.py ckpt=runs/RUN_FOLDER ?([^#\n]*)", section, re.MULTILINE)
    assert len(commands) == 5
    for name, words in commands:
        words = words.replace("label=7", "label=2").replace("label=3", "label=1").replace("FOLDER", "names")
        script(name, *words.split(), *(["n=40", "repeats=2"] if name == "fidelity" else []))
    monkeypatch.chdir(trained)
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    names: dict = {}
    exec(code.replace("runs/RUN_FOLDER", "conditional").replace("[7]", "[2]"), names)
    assert (255 * names["sevens"] - SHADES[2]).abs().mean() < 25


@pytest.mark.slow
def test_data_without_usable_labels_are_rejected(trained):
    np.savez(trained / "far.npz", images=np.zeros((400, 8, 8), np.uint8), labels=np.arange(400) * 10**7)
    for root, message in (
        ("unlabeled.npz", "has no labels"),
        ("far.npz", "needs several images of each class, and .* 400 different"),
    ):
        words = [*SMALL, f"data.root={root}", "model.conditional=true", "hydra.run.dir=bad"]
        words += ["data.test_size=1", "data.validation_size=1", "data.batch_size=2"]
        output = run(*words, cwd=trained, code=1)
        assert re.search(f"error: model.conditional=true .*{message}", output)
    assert all(one < other for one, other in pairwise(SHADES))
