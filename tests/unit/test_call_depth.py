"""The way from train.py to the model and its loss is short."""

import json

import pytest

from tests.commands import REPO, TINY, fresh

# Records this project's frames at the first call of each function.
TRACER = """
import json, runpy, sys, traceback
from pathlib import Path
from betavae.models import likelihoods, networks

root, depths = Path(sys.argv.pop(1)), {}

def record(owner, name):
    original = getattr(owner, name)
    def wrapper(*args, **kwargs):
        if name not in depths:
            files = [Path(frame.filename).resolve() for frame in traceback.extract_stack()[:-1]]
            ours = [str(file.relative_to(root)) for file in files if file.is_relative_to(root)]
            depths[name] = [*ours, original.__code__.co_filename.removeprefix(f"{root}/")]
        return original(*args, **kwargs)
    setattr(owner, name, wrapper)

record(networks.MLPEncoder, "__init__")
record(likelihoods, "bce_with_logits")
sys.argv[0] = str(root / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
print(json.dumps(depths))
"""


@pytest.mark.slow
def test_few_frames_from_train_to_model_and_loss(tmp_path, data_root):
    args = [*TINY, f"data.root={data_root}", "trainer.max_epochs=1", "callbacks.figures_every_n_epochs=0"]
    text = fresh("-c", TRACER, str(REPO), *args, cwd=tmp_path)
    depths = json.loads(text.splitlines()[-1])
    model, loss = depths["__init__"], depths["bce_with_logits"]
    assert model[0] == loss[0] == "train.py"
    assert len(model) <= 8 and len(set(model)) <= 5, model
    assert len(loss) <= 10 and len(set(loss)) <= 7, loss
