"""Loading a checkpoint needs neither Lightning nor Hydra."""

import pytest

from betavae.models.vae import VAE
from betavae.runtime.checkpoint import FORMAT, save_checkpoint
from tests.commands import REPO, fresh
from tests.conftest import DATA, MODULE

LOAD = "import betavae; betavae.load('model.ckpt')"
SAMPLE = f"""
import runpy, sys
sys.argv = ["sample.py", "ckpt=model.ckpt"]
runpy.run_path({str(REPO / "scripts" / "sample.py")!r}, run_name="__main__")
"""
HEAVY = "import sys; print(sorted({'lightning', 'hydra', 'omegaconf'} & set(sys.modules)))"


@pytest.mark.slow
@pytest.mark.parametrize("code", [LOAD, SAMPLE], ids=["load", "sample.py"])
def test_a_checkpoint_loads_without_lightning_and_hydra(tmp_path, code):
    weights = {f"vae.{name}": value for name, value in VAE(**MODULE["model"]).state_dict().items()}
    content = {"betavae_format": FORMAT, "hyper_parameters": MODULE, "state_dict": weights}
    content["datamodule_hyper_parameters"] = DATA | {"root": "data"}
    save_checkpoint(content, tmp_path / "model.ckpt")
    assert fresh("-c", f"{code}\n{HEAVY}", cwd=tmp_path).splitlines()[-1] == "[]"
