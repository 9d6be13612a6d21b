"""Tests of exported models, read by the programs that they are for."""

import itertools
import json
import os
import re
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
from betavae.storage.files import atomic_dir
from tests.commands import Child, run
from tests.conftest import MODEL, REPO
from tests.unit.applications.conftest import save_vae

MODELS = {
    "bernoulli": MODEL | {"hidden_dims": [16], "latent_dim": 3, "activation": "tanh"},
    # Its log-probability includes the Bernoulli's cross-entropy.
    "conv": MODEL
    | {"network": "conv", "hidden_dims": [4, 6], "latent_dim": 2, "image_shape": [3, 10, 7]}
    | {"likelihood": "continuous_bernoulli"},
    "gaussian": MODEL | {"hidden_dims": [8], "latent_dim": 4, "likelihood": "gaussian"},
    "mixture": MODEL | {"hidden_dims": [8], "latent_dim": 4, "likelihood": "logistic_mixture"},
}


def make_vae(name):
    vae = VAE(**MODELS[name]).requires_grad_(False)
    for parameter in vae.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))  # No bias or scale keeps its initial value.
    if name == "conv":
        vae.decoder[-1].bias[0] -= 150  # Logits as low as a trained model's, where log(sigmoid(x)) is -inf.
    return vae.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model exported to ONNX."""
    vae, folder = make_vae("conv"), tmp_path_factory.mktemp("onnx") / "export"
    return vae, folder, export.export_graphs(vae, MODELS["conv"], "onnx", folder)


@pytest.mark.slow
def test_onnxruntime_computes_the_models_numbers(exported):
    import onnxruntime

    vae, folder, metadata = exported
    assert json.loads((folder / "model.json").read_text()) == metadata
    graphs = metadata["graphs"]
    sessions = {name: onnxruntime.InferenceSession(folder / graph["file"]) for name, graph in graphs.items()}
    for batch in (1, 5, 33):
        x, noise = torch.rand(batch, *vae.image_shape), torch.randn(batch, vae.latent_dim)
        mean, logvar = sessions["encoder"].run(None, {"image": x.numpy()})
        posterior = vae.encode(x)
        np.testing.assert_allclose(mean, posterior.mean, atol=2e-6)
        np.testing.assert_allclose(logvar, posterior.logvar, atol=2e-6)
        (image,) = sessions["decoder"].run(None, {"z": noise.numpy()})
        np.testing.assert_allclose(image, vae.decode(noise).clamp(0, 1), atol=1e-5)
        recon, kl = sessions["score"].run(None, {"image": x.numpy(), "noise": noise.numpy()})
        terms = elbo(vae, x, noise[None], 1.0)
        assert (recon + kl).mean() == pytest.approx(terms.loss.item(), rel=1e-5, abs=1e-4)
        assert recon.shape == kl.shape == (batch,)
    for name in ("recon", "kl"):
        assert graphs["score"]["outputs"][name]["shape"] == ["batch"]
    assert graphs["decoder"]["outputs"]["image"]["shape"] == ["batch", *vae.image_shape]


@pytest.mark.parametrize(
    ("form", "name"), [*itertools.product(("torchscript", "pt2"), ("bernoulli", "gaussian", "mixture"))]
)
@pytest.mark.filterwarnings("ignore:`torch.jit.load`")
def test_torch_formats_compute_the_models_numbers(tmp_path, form, name):
    vae = make_vae(name)
    metadata = export.export_graphs(vae, MODELS[name], form, tmp_path / "export")
    path = tmp_path / "export" / metadata["graphs"]["score"]["file"]
    score = torch.jit.load(path) if form == "torchscript" else torch.export.load(path).module()
    x, noise = torch.rand(9, 1, 28, 28), torch.randn(9, vae.latent_dim)
    recon, kl = score(x, noise)
    torch.testing.assert_close((recon + kl).mean(), elbo(vae, x, noise[None], 1.0).loss)
    check_no_paths(tmp_path / "export")


@pytest.mark.parametrize("prior", ["flow", "mixture"])
@pytest.mark.parametrize("form", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_labels_and_learned_priors_are_inputs_of_graphs(tmp_path, form, prior):
    settings = {"flow": {"transforms": 2, "hidden_dims": [4]}, "mixture": {"components": 3}}[prior]
    model = MODELS["conv"] | {"classes": ["cat", "dog", "fox"], "prior": {"name": prior} | settings}
    vae = VAE(**model).requires_grad_(False).eval()
    for parameter in vae.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    graphs = export.export_graphs(vae, model, form, tmp_path / "export")["graphs"]

    def compute(name, **inputs):
        path = tmp_path / "export" / graphs[name]["file"]
        assert list(graphs[name]["inputs"]) == list(inputs)
        if form == "pt2":
            return torch.export.load(path).module()(*inputs.values())
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        arrays = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        return [torch.from_numpy(array) for array in arrays]

    x, noise, uniform, label = torch.rand(5, 3, 10, 7), torch.randn(5, 2), torch.rand(5), torch.tensor([2, 0, 1, 1, 2])
    more = {"uniform": uniform} if prior == "mixture" else {}
    (z,) = compute("prior", noise=noise, **more, label=label)
    torch.testing.assert_close(z, vae.given(label).prior.transform(noise, uniform))
    torch.testing.assert_close(compute("decoder", z=z, label=label)[0], vae.given(label).decode(z).clamp(0, 1))
    torch.testing.assert_close(compute("encoder", image=x, label=label)[0], vae.given(label).encode(x).mean)
    recon, kl = compute("score", image=x, noise=noise, label=label)
    torch.testing.assert_close(recon + kl, vae.given(label).neg_elbo(x, noise[None]), rtol=1e-4, atol=1e-3)
    assert graphs["decoder"]["inputs"]["label"]["dtype"] == "int64"


def check_no_paths(folder):
    """Check that no file names a folder of this machine."""
    for path in folder.iterdir():
        for place in (REPO, sys.prefix, os.path.dirname(torch.__file__)):
            assert str(place).encode() not in path.read_bytes(), f"{path.name} names {place}"


@pytest.mark.slow
def test_onnx_files_name_no_local_paths(exported):
    check_no_paths(exported[1])


def test_safetensors_hold_weights_and_settings(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file

    vae = make_vae("conv")
    export.export_weights(vae, MODELS["conv"], tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        loaded = VAE(**json.loads(file.metadata()["model"]))
    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
    z = torch.randn(2, 2)
    assert torch.equal(loaded.decode(z), vae.decode(z))


def test_wrong_and_unsupported_graphs_are_rejected(tmp_path, monkeypatch):
    def write_wrong(graph, path):
        run = export.FORMATS["pt2"][1](graph, path)
        return lambda *inputs: [value + 1e-3 for value in run(*inputs)]

    def write_nan(graph, path):
        return lambda *inputs: [value * torch.nan for value in graph(*inputs)]

    for write, error in ((write_nan, "inf"), (write_wrong, "1.0e-03")):
        monkeypatch.setitem(export.FORMATS, "wrong", (".pt2", write))
        with pytest.raises(UserError, match=f"the exported encoder differs from torch by {error}"):
            export.export_graphs(make_vae("bernoulli"), MODELS["bernoulli"], "wrong", tmp_path)

    class DataDependent(Likelihood):
        def log_prob(self, x, params):
            return params.sum((-3, -2, -1)) if params.sum() > 0 else x.sum((-3, -2, -1))

        def mean(self, params):
            return params.sigmoid()

    monkeypatch.setitem(LIKELIHOODS, "data_dependent", DataDependent)
    model = MODELS["bernoulli"] | {"likelihood": "data_dependent"}
    with pytest.raises(UserError, match="format=pt2 does not support the score of this model"):
        export.export_graphs(VAE(**model).requires_grad_(False), model, "pt2", tmp_path)


@pytest.fixture
def ckpt(tmp_path):
    """A checkpoint outside a run folder, with a result of this file and one of an earlier file."""
    data = {"name": "folder", "root": "/home/me/secret", "cache": "/home/me/scratch", "image_size": 28}
    vae, path = make_vae("bernoulli"), tmp_path / "source" / "lone.ckpt"
    save_vae(path, vae, MODELS["bernoulli"], data | {"channels": 1, "fit": "pad"})
    stale = {"sha256": "of an earlier file", "best": "knn", "fid": {"mean": 98.765, "se": 1.0}}
    (path.parent / "fidelity.json").write_text(json.dumps(stale))
    (path.parent / "metrics.json").write_text(json.dumps({"test": {"neg_elbo": 123.456}, "note": "a surrogate"}))
    return path


def export_command(ckpt, form, out, cwd, **how):
    return run(f"ckpt={ckpt}", f"format={form}", f"out={out}", cwd=cwd, script="scripts/export.py", **how)


def test_exported_folder_loads_without_its_source(ckpt, tmp_path):
    out = tmp_path / "copy"
    export_command(ckpt, "folder", out, tmp_path)
    source = betavae.load(ckpt)
    ckpt.unlink()
    loaded = betavae.load(out)
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(loaded.vae.reconstruct(x), source.vae.reconstruct(x)) and loaded.settings == source.settings
    card = (out / "README.md").read_text()
    for words in (
        "find out before you share the model",
        "| data.fit | pad |",
        "# lone",
        "| model.latent_dim | 3 |",
        "| beta | 1.0 |",
        "test neg_elbo: 123.5",
        "a surrogate",
        "samples.png",
    ):
        assert words in card
    assert not re.search(r"secret|scratch|source|98\.765", card) and loaded.data["root"] == "data"
    assert b"/home/me" not in b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert (out / "samples.png").stat().st_size > 1000


@pytest.mark.parametrize("form", ["safetensors", "torchscript", "folder"])
def test_existing_folder_is_not_replaced(ckpt, tmp_path, form):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    text = export_command(ckpt, form, "full", tmp_path, code=1)
    assert re.search("out: full already exists; delete it or (choose|name) another", text)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "source"]


def test_second_writer_of_a_folder_is_rejected(tmp_path):
    with pytest.raises(UserError, match="out already exists"), atomic_dir(tmp_path / "out") as one:
        (one / "a").write_text("1")
        with atomic_dir(tmp_path / "out") as two:
            (two / "b").write_text("2")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["out", "out/b"]


def test_folder_filled_by_another_process_is_left_alone(tmp_path):
    with pytest.raises(UserError, match="already exists"), atomic_dir(tmp_path) as one:
        (one / "a").write_text("1")
        (tmp_path / "b").write_text("2")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("out", ["empty", ".", "link"])
def test_empty_folder_is_filled_in_place(ckpt, tmp_path, out):
    """The working folder, a mount point or the target of a link stays the same folder."""
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "link").symlink_to(empty)
    inode, cwd = empty.stat().st_ino, empty if out == "." else tmp_path
    assert "model.safetensors" in export_command(ckpt, "safetensors", out, cwd)
    assert empty.stat().st_ino == inode and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in empty.iterdir()) == ["model.json", "model.safetensors"]
    assert f"out: {out} already exists" in export_command(ckpt, "safetensors", out, cwd, code=1)


def test_killed_export_leaves_no_folder(ckpt, tmp_path):
    def die_at_the_decoder():
        write = export.FORMATS["torchscript"][1]

        def write_or_die(graph, path):
            if isinstance(graph, export.Decoder):
                os.kill(os.getpid(), signal.SIGKILL)
            return write(graph, path)

        export.FORMATS["torchscript"] = (".ts", write_or_die)

    out = tmp_path / "killed"
    words = (f"ckpt={ckpt}", "format=torchscript", f"out={out}")
    child = Child(*words, cwd=tmp_path, script="scripts/export.py", prepare=die_at_the_decoder)
    assert child.wait() == -signal.SIGKILL, child.text
    assert not out.exists()
    export_command(ckpt, "torchscript", out, tmp_path)
    assert (out / "model.json").exists()


@pytest.mark.slow
def test_code_of_the_docs_runs_without_torch(exported):
    _, folder, _ = exported
    code = re.search(r"```python\n(import json.*?)```", (REPO / "docs" / "export.md").read_text(), re.DOTALL)[1]
    blocked = "import sys\nsys.modules.update(torch=None, betavae=None, lightning=None)\n"
    checks = "\nassert images.shape == (16, 3, 10, 7) and images.min() >= 0 and images.max() <= 1\n"
    checks += "assert negative_elbo(images).shape == (16,) and sys.modules['torch'] is None\n"
    done = subprocess.run([sys.executable, "-c", blocked + code + checks], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"samples -?\d+\.\d+ shuffled -?\d+\.\d+", done.stdout.strip())


@pytest.mark.slow
def test_docs_code_for_labels_decodes_the_class(tmp_path):
    torch.manual_seed(0)
    settings = {"network": "mlp", "hidden_dims": [8], "latent_dim": 2, "activation": "relu", "image_shape": [1, 4, 4]}
    settings |= {"likelihood": "bernoulli", "classes": list("0123456789")}
    settings["prior"] = {"name": "flow", "transforms": 2, "hidden_dims": [8]}
    vae = VAE(**settings).requires_grad_(False).eval()
    export.export_graphs(vae, settings, "onnx", tmp_path / "out")
    first, second = re.findall(
        "```python\n(.*?)```", (REPO / "docs" / "export.md").read_text().split("without torch")[1], re.DOTALL
    )[:2]
    code = first.split("(images,)")[0] + second + "\nnp.savez('found.npz', z=z, sevens=sevens)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "out", check=True)
    found = {name: torch.from_numpy(values) for name, values in np.load(tmp_path / "out/found.npz").items()}
    torch.testing.assert_close(found["sevens"], vae.given(torch.tensor([7])).decode(found["z"]).clamp(0, 1))
    others = vae.given(torch.tensor([1])).decode(found["z"])
    assert not torch.allclose(found["sevens"], others)
