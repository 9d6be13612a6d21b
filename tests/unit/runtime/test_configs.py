"""Every YAML file composes, is valid and builds; every script's settings are valid and documented."""

import inspect
import re

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from betavae.data.datamodule import ImageDataModule
from betavae.errors import UserError
from betavae.runtime.hydra_config import to_plain
from betavae.runtime.run_folder import RunFolder
from betavae.runtime.settings import check_settings, validate
from betavae.runtime.training import TrainingRun, flatten_hparams
from tests.commands import REPO, load_script

CONFIGS = REPO / "configs"
GROUPS = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob("*/*.yaml"))
SCRIPTS = sorted(str(p.relative_to(REPO / "scripts").with_suffix("")) for p in (REPO / "scripts").rglob("*.py"))


def composed(*overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", list(overrides))


def test_experiment_tutorial_has_the_settings_of_the_tutorial():
    cfg = composed("experiment=tutorial")
    assert cfg.model.hidden_dims == [400] and cfg.model.latent_dim == 20 and cfg.model.activation == "relu"
    assert (cfg.optimizer.name, cfg.optimizer.lr, cfg.data.batch_size) == ("Adam", 1e-3, 128)
    assert (cfg.trainer.max_epochs, cfg.data.validation_size, cfg.beta) == (10, 0, 1.0)


@pytest.mark.parametrize("option", [o for o in GROUPS if o.split("/")[0] not in ("sweep", "hydra")])
def test_every_option_builds(option, data_root, tmp_path):
    group, name = option.split("/")
    chosen = [f"{group}={name}"] if option != "trainer/default" else []  # it is always included, below the experiment
    cfg = composed(*chosen, f"data.root={data_root}")
    check_settings(to_plain(cfg))
    if cfg.data.name != "mnist":  # its images are not on this machine
        ImageDataModule(**to_plain(cfg.data))
        cfg.data = composed(f"data.root={data_root}").data
    if cfg.trainer.cuda_graph and not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs a CUDA device"):
            TrainingRun(to_plain(cfg), RunFolder(tmp_path))
        return
    built = TrainingRun(to_plain(cfg), RunFolder(tmp_path))
    assert not any(tmp_path.iterdir())
    assert built.trainer.max_epochs == (1 if option == "debug/fdr" else cfg.trainer.max_epochs)
    x, labels = next(iter(built.datamodule.test_dataloader()))
    built.module(x[:2], labels[:2])
    # The hyper-parameters in a checkpoint are plain values, which a round trip through YAML does not change.
    hparams = dict(built.module.hparams)
    assert OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(hparams)))) == hparams


def test_each_column_of_hparams_has_one_type():
    """TensorBoard cannot filter by a column that mixes null and 1.0, false and a mode, or 1 and auto."""
    groups = [f"objective={name}" for name in ("elbo", "iwae", "dreg", "beta_tcvae", "dip_vae", "capacity_vae")]
    other = ["trainer.gradient_clip_val=1.0", "trainer.compile=default", "trainer.deterministic=warn"]
    other += ["trainer.devices=auto", "trainer.max_time=00:00:00:09", "trainer.limit_train_batches=20"]
    tables = [
        flatten_hparams(composed(*words))
        for words in ([], other, ["trainer.devices=[0]"], *([group] for group in groups))
    ]
    tables += [flatten_hparams(composed("objective=dreg", "objective.resample=2", "trainer.compile=true"))]
    columns: dict[str, set[str]] = {}
    for table in tables:
        for key, value in table.items():
            columns.setdefault(key, set()).add("number" if isinstance(value, float | int) else type(value).__name__)
    assert all(len(types) == 1 for types in columns.values()), columns
    assert columns["trainer.gradient_clip_val"] == columns["objective.resample"] == columns["beta"] == {"number"}


def test_trainer_presets_override_experiments_and_combine():
    paper = composed("experiment=burda_vae").trainer
    assert (paper.precision, paper.compile, paper.steps_per_batch, paper.max_epochs) == ("bf16-mixed", True, 10, 1500)
    smoke = composed("experiment=burda_vae", "trainer=smoke").trainer
    assert smoke.precision == "bf16-mixed" and not smoke.compile  # compiling takes longer than the run
    assert (smoke.max_epochs, smoke.limit_train_batches, smoke.steps_per_batch) == (2, 20, 1)
    both = composed("trainer=[smoke,fast]").trainer  # the later preset wins
    assert (both.max_epochs, both.precision, both.compile) == (2, "bf16-mixed", True)
    assert (
        composed("trainer=[smoke,fast]", "trainer.max_epochs=7").trainer.max_epochs == 7
    )  # a typed value wins over presets


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_settings_are_used_documented_and_valid(name):
    module = load_script(REPO / "scripts" / f"{name}.py")
    settings = module.Settings
    defaults = {key: field.get_default() for key, field in settings.model_fields.items()}
    assert validate(settings, defaults) == settings()
    assert all(field.title for field in settings.model_fields.values())
    text = (REPO / "scripts" / f"{name}.py").read_text()
    # Shared settings too; the command line reads the others.
    assert not [key for key in defaults if f"settings.{key}" not in text and key not in ("traceback", "plugins")]
    # The docstring names settings that exist.
    for key in re.findall(r"[\[ ](\w+)=", inspect.getdoc(module).splitlines()[0]):
        assert key in defaults, key
    with pytest.raises(UserError, match="nonsense is not a setting"):
        validate(settings, {"nonsense": 1})
