"""Exported models, read by the programs that they are for."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import betavae
from betavae.applications import export
from betavae.errors import UserError
from betavae.models.likelihoods import LIKELIHOODS, Likelihood
from betavae.models.vae import VAE
from betavae.objectives import elbo
from betavae.runtime import checkpoint
from betavae.storage.files import atomic_dir
from tests.commands import Child, run
from tests.conftest import DATA, MODEL, MODULE, REPO

MODELS = {
    "mlp": MODEL | {"hidden_dims": [16], "latent_dim": 3, "activation": "tanh"},
    # The continuous one has the Bernoulli's cross-entropy in it.
    "conv": MODEL
    | {"network": "conv", "hidden_dims": [4, 6], "latent_dim": 2, "image_shape": [3, 10, 7]}
    | {"likelihood": "continuous_bernoulli"},
    "gaussian": MODEL | {"hidden_dims": [8], "latent_dim": 4, "likelihood": "gaussian"},
}


def made(name):
    vae = VAE(**MODELS[name]).requires_grad_(False)
    for parameter in vae.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))  # no bias, and no scale, at its first value
    if name == "conv":
        vae.decoder[-1].bias[0] -= 150  # logits as far out as a trained model's, where log(sigmoid(x)) is -inf
    return vae.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model as ONNX, once, since it takes seconds."""
    vae, folder = made("conv"), tmp_path_factory.mktemp("onnx") / "export"
    return vae, folder, export.export_graphs(vae, MODELS["conv"], "onnx", folder)


def test_onnxruntime_gives_the_models_numbers_at_any_batch(exported):
    import onnxruntime

    vae, folder, about = exported
    assert json.loads((folder / "model.json").read_text()) == about
    sessions = {key: onnxruntime.InferenceSession(folder / graph["file"]) for key, graph in about["graphs"].items()}
    for batch in (1, 5, 33):
        x, noise = torch.rand(batch, *vae.image_shape), torch.randn(batch, vae.latent_dim)
        mean, logvar = sessions["encoder"].run(None, {"image": x.numpy()})
        posterior = vae.encode(x)
        np.testing.assert_allclose(mean, posterior.mean, atol=2e-6)
        np.testing.assert_allclose(logvar, posterior.logvar, atol=2e-6)
        (image,) = sessions["decoder"].run(None, {"z": noise.numpy()})
        np.testing.assert_allclose(image, vae.decode(noise).clamp(0, 1), atol=1e-5)  # 1/2 + 1/2 coth(l/2) - 1/l
        distortion, rate = sessions["score"].run(None, {"image": x.numpy(), "noise": noise.numpy()})
        terms = elbo(vae, x, noise[None], 1.0)
        assert distortion.shape == rate.shape == (batch,)
        assert (distortion + rate).mean() == pytest.approx(terms.loss.item(), rel=1e-5, abs=1e-4)
        for key, values in (("distortion", distortion), ("rate", rate)):
            assert values.shape == tuple(batch if n == "batch" else n for n in shape_of(about, "score", key))
    assert shape_of(about, "decoder", "image") == ["batch", *vae.image_shape]


def shape_of(about, graph, output):
    return about["graphs"][graph]["outputs"][output]["shape"]


@pytest.mark.parametrize(("form", "name"), [("torchscript", "mlp"), ("pt2", "gaussian")])
@pytest.mark.filterwarnings("ignore:`torch.jit.load`")
def test_torchs_own_formats(tmp_path, form, name):
    vae = made(name)
    about = export.export_graphs(vae, MODELS[name], form, tmp_path / "export")
    path = tmp_path / "export" / about["graphs"]["score"]["file"]
    score = torch.jit.load(path) if form == "torchscript" else torch.export.load(path).module()
    x, noise = torch.rand(9, 1, 28, 28), torch.randn(9, vae.latent_dim)
    wanted = elbo(vae, x, noise[None], 1.0)
    distortion, rate = score(x, noise)
    torch.testing.assert_close((distortion + rate).mean(), wanted.loss)
    tells_no_paths(tmp_path / "export")


def tells_no_paths(folder):
    """Of the machine on which it was made."""
    for path in folder.iterdir():
        for place in (REPO, sys.prefix, os.path.dirname(torch.__file__)):
            assert str(place).encode() not in path.read_bytes(), f"{path.name} names {place}"


def test_onnx_tells_no_paths(exported):
    tells_no_paths(exported[1])


def test_safetensors_hold_the_weights_and_the_recipe(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file

    vae = made("conv")
    export.export_weights(vae, MODELS["conv"], tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        again = VAE(**json.loads(file.metadata()["model"]))
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    z = torch.randn(2, 2)
    assert torch.equal(again.decode(z), vae.decode(z))


def test_a_graph_that_is_off_is_refused(tmp_path, monkeypatch):
    def wrong(graph, path):
        run = export.FORMATS["pt2"][1](graph, path)
        return lambda *inputs: [value + 1e-3 for value in run(*inputs)]

    def nothing(graph, path):
        return lambda *inputs: [value * torch.nan for value in graph(*inputs)]

    monkeypatch.setitem(export.FORMATS, "wrong", (".pt2", nothing))
    with pytest.raises(UserError, match="exported encoder is off by inf"):
        export.export_graphs(made("mlp"), MODELS["mlp"], "wrong", tmp_path)
    monkeypatch.setitem(export.FORMATS, "wrong", (".pt2", wrong))
    with pytest.raises(UserError, match=r"exported encoder is off by 1.0e-03"):
        export.export_graphs(made("mlp"), MODELS["mlp"], "wrong", tmp_path)

    class Choosy(Likelihood):
        def log_prob(self, x, params):
            return params.sum((-3, -2, -1)) if params.sum() > 0 else x.sum((-3, -2, -1))

        def mean(self, params):
            return params.sigmoid()

    monkeypatch.setitem(LIKELIHOODS, "choosy", Choosy)
    model = MODELS["mlp"] | {"likelihood": "choosy"}
    with pytest.raises(UserError, match="format=pt2 cannot hold the score"):
        export.export_graphs(VAE(**model).requires_grad_(False), model, "pt2", tmp_path)


@pytest.fixture
def lone(tmp_path):
    path = tmp_path / "theirs" / "lone.ckpt"
    content = {"betavae_format": checkpoint.FORMAT, "hyper_parameters": MODULE | {"model": MODELS["mlp"]}}
    content["state_dict"] = {f"vae.{key}": value for key, value in made("mlp").state_dict().items()}
    data = DATA | {"name": "folder", "root": "/home/me/secret", "cache": "/home/me/scratch", "image_size": 28}
    checkpoint.save_checkpoint(content | {"datamodule_hyper_parameters": data | {"channels": 1, "fit": "pad"}}, path)
    stale = {"sha256": "of the file before", "best": "knn", "fid": {"mean": 98.765, "se": 1.0}}
    (path.parent / "fidelity.json").write_text(json.dumps(stale))
    (path.parent / "metrics.json").write_text(json.dumps({"test": {"neg_elbo": 123.456}, "note": "a surrogate"}))
    return path


def command(lone, **settings):
    script = runpy.run_path(str(REPO / "scripts" / "export.py"))
    script["main"].task({"ckpt": str(lone), **{key: str(value) for key, value in settings.items()}})


def test_the_folder_is_a_model_of_its_own(lone, tmp_path):
    out = tmp_path / "mine"
    command(lone, format="folder", out=out)
    theirs = betavae.load(lone)
    lone.unlink()
    run = betavae.load(out)
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(run.vae.reconstruct(x), theirs.vae.reconstruct(x)) and run.settings == theirs.settings
    card = (out / "README.md").read_text()
    for words in (
        "find out before you pass it on",
        "| data.fit | pad |",
        "# lone",
        "| model.latent_dim | 3 |",
        "test neg_elbo: 123.5",
        "a surrogate",
        "samples.png",
    ):
        assert words in card
    assert not re.search(r"secret|scratch|theirs|98\.765", card) and run.data["root"] == "data"
    assert b"/home/me" not in b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert (out / "samples.png").stat().st_size > 1000


def test_nothing_of_others_is_written_over(lone, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for form in ("safetensors", "torchscript", "folder"):
        with pytest.raises(UserError, match="full already exists; delete it or choose another folder"):
            command(lone, format=form, out=tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    # Nor an export, which somebody may have made better, or put something beside.
    (tmp_path / "mine").mkdir()  # an empty folder will do
    command(lone, format="safetensors", out=tmp_path / "mine")
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"quantised")
    for form in ("safetensors", "folder"):
        with pytest.raises(UserError, match="mine already exists"):
            command(lone, format=form, out=tmp_path / "mine")
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == b"quantised"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "mine", "theirs"]


def test_of_two_at_once_the_first_has_the_folder(tmp_path):
    with pytest.raises(UserError, match="out already exists"), atomic_dir(tmp_path / "out") as one:
        (one / "a").write_text("1")
        with atomic_dir(tmp_path / "out") as two:
            (two / "b").write_text("2")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["out", "out/b"]


@pytest.mark.parametrize("out", ["empty", ".", "link"])
def test_an_empty_folder_is_filled_in_place(lone, tmp_path, out):
    """The working folder, a mount point or the target of a link must remain the folder that it is."""
    cwd = tmp_path / "empty"
    cwd.mkdir()
    (tmp_path / "link").symlink_to(cwd)
    inode, place = cwd.stat().st_ino, cwd if out == "." else tmp_path
    text = run(f"ckpt={lone}", "format=safetensors", f"out={out}", cwd=place, script="scripts/export.py")
    assert cwd.stat().st_ino == inode and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in cwd.iterdir()) == ["model.json", "model.safetensors"]
    assert "model.safetensors" in text
    again = run(f"ckpt={lone}", "format=safetensors", f"out={out}", cwd=place, script="scripts/export.py", code=1)
    assert f"out: {out} already exists" in again


def test_of_two_at_once_in_an_empty_folder_one_has_it(tmp_path):
    with pytest.raises(UserError, match="already exists"), atomic_dir(tmp_path) as one:
        (one / "a").write_text("1")
        (tmp_path / "b").write_text("2")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_export_that_is_killed_in_the_middle_leaves_nothing_that_looks_like_one(lone, tmp_path):
    def die_at_the_second():
        write = export.FORMATS["torchscript"][1]

        def dying(graph, path):
            if isinstance(graph, export.Decoder):
                os.kill(os.getpid(), signal.SIGKILL)
            return write(graph, path)

        export.FORMATS["torchscript"] = (".ts", dying)

    out = tmp_path / "killed"
    words = (f"ckpt={lone}", "format=torchscript", f"out={out}")
    child = Child(*words, cwd=tmp_path, script="scripts/export.py", prepare=die_at_the_second)
    assert child.wait() == -signal.SIGKILL, child.text
    assert not out.exists()
    command(lone, format="torchscript", out=out)
    assert (out / "model.json").exists()


def test_the_page_samples_and_scores_where_there_is_no_torch(exported):
    """The Python of docs/export.md as it stands."""
    _, folder, _ = exported
    code = re.search(r"```python\n(import json.*?)```", (REPO / "docs" / "export.md").read_text(), re.DOTALL)[1]
    blocked = "import sys\nsys.modules.update(torch=None, betavae=None, lightning=None)\n"
    checks = "\nassert images.shape == (16, 3, 10, 7) and images.min() >= 0 and images.max() <= 1\n"
    checks += "assert negative_elbo(images).shape == (16,) and sys.modules['torch'] is None\n"
    done = subprocess.run([sys.executable, "-c", blocked + code + checks], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"samples -?\d+\.\d+ shuffled -?\d+\.\d+", done.stdout.strip())
