"""Loading a checkpoint needs neither Lightning nor Hydra, and samples as PNG need no Matplotlib."""

from pathlib import Path

import pytest

from betavae.errors import UserError
from betavae.models.vae import VAE
from betavae.runtime.checkpoint import FORMAT, format_caption, load, read_checkpoint, save_checkpoint
from tests.commands import REPO, fresh
from tests.conftest import DATA, MODULE

LOAD = "import betavae; betavae.load('model.ckpt')"
SAMPLE = f"""
import runpy, sys
sys.argv = ["sample.py", "ckpt=model.ckpt"]
runpy.run_path({str(REPO / "scripts" / "sample.py")!r}, run_name="__main__")
"""
HEAVY = "import sys; print(sorted({'lightning', 'hydra', 'omegaconf', 'matplotlib'} & set(sys.modules)))"


@pytest.mark.slow
@pytest.mark.parametrize("code", [LOAD, SAMPLE], ids=["load", "sample.py"])
def test_a_checkpoint_loads_without_lightning_and_hydra(tmp_path, code):
    weights = {f"vae.{name}": value for name, value in VAE(**MODULE["model"]).state_dict().items()}
    content = {"betavae_format": FORMAT, "hyper_parameters": MODULE, "state_dict": weights}
    content["datamodule_hyper_parameters"] = DATA | {"root": "data"}
    save_checkpoint(content, tmp_path / "model.ckpt")
    assert fresh("-c", f"{code}\n{HEAVY}", cwd=tmp_path).splitlines()[-1] == "[]"


def test_a_checkpoint_in_the_current_folder_has_its_run_folder(tmp_path, monkeypatch):
    weights = {f"vae.{name}": value for name, value in VAE(**MODULE["model"]).state_dict().items()}
    content = {"betavae_format": FORMAT, "hyper_parameters": MODULE, "state_dict": weights}
    content["datamodule_hyper_parameters"] = DATA | {"root": "data"}
    for name in ("checkpoints", "other"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        save_checkpoint(content, Path("best.ckpt"))
        folder = load("best.ckpt").folder
        assert folder.resolve() == (tmp_path if name == "checkpoints" else tmp_path / name)
        assert load("best.ckpt").path.relative_to(folder).name == "best.ckpt"


def test_a_caption_has_run_epoch_and_validation_neg_elbo():
    content = {"epoch": 9, "callbacks": {"LastValidationMetrics": {"metrics": {"neg_elbo": 105.904}}}}
    content |= {"hyper_parameters": MODULE, "datamodule_hyper_parameters": DATA}
    path = Path("runs/my_run/checkpoints/best.ckpt")
    gray = "my_run, epoch 10, validation neg. ELBO 105.90 nats (surrogate)"
    assert format_caption(path, content) == gray
    binary = content | {"datamodule_hyper_parameters": DATA | {"binarize": "dynamic"}}
    assert format_caption(path, binary) == gray.removesuffix(" (surrogate)")
    # Without validation, of an exported model, and of a file with anything else in these places.
    assert (
        format_caption(path, content | {"callbacks": {"LastValidationMetrics": {"metrics": {}}}}) == "my_run, epoch 10"
    )
    assert format_caption(Path("alone.ckpt"), {}) == "alone.ckpt"
    assert format_caption(Path("alone.ckpt"), {"epoch": "9", "callbacks": []}) == "alone.ckpt"


@pytest.mark.parametrize("classes", ["01", [], [0, 1], {"0": 1, "1": 1}])
def test_classes_that_are_no_list_of_names_are_rejected(tmp_path, classes):
    model = MODULE["model"] | {"hidden_dims": [2], "classes": classes}
    weights = {f"vae.{name}": value for name, value in VAE(**model).state_dict().items()}
    content = {"betavae_format": FORMAT, "hyper_parameters": MODULE | {"model": model}, "state_dict": weights}
    content["datamodule_hyper_parameters"] = DATA | {"root": "data"}
    save_checkpoint(content, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="its classes are not a list of names"):
        read_checkpoint(tmp_path / "model.ckpt")
