"""Every YAML composes, passes the rules and builds."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from betavae.rules import check
from betavae.settings import RULES
from betavae.training import build
from tests.conftest import REPO

CONFIGS = REPO / "configs"
GROUPS = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob("*/*.yaml"))
SCRIPTS = sorted(path.stem for path in (REPO / "scripts").glob("*.py"))


def composed(*overrides, name="train"):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(name, list(overrides))


def test_the_defaults_are_the_tutorials():
    cfg = composed("experiment=tutorial")
    assert cfg.model.hidden_dims == [400] and cfg.model.latent_dim == 20 and cfg.model.activation == "relu"
    assert (cfg.optimizer.name, cfg.optimizer.lr, cfg.data.batch_size) == ("Adam", 1e-3, 128)
    assert (cfg.trainer.max_epochs, cfg.data.validation_size, cfg.beta) == (10, 0, 1.0)


@pytest.mark.parametrize("option", [o for o in GROUPS if o.split("/")[0] not in ("sweep", "hydra")])
def test_option_builds(option, data_root, tmp_path, monkeypatch):
    group, name = option.split("/")
    cfg = composed(f"{group}={name}", f"data.root={data_root}")
    check(cfg, RULES)
    if name in ("fashion_mnist", "kmnist"):  # not on this machine; their loader is tested in test_data.py
        cfg.data.name = "mnist"
    datamodule, module, trainer = build(cfg, tmp_path)
    assert not any(tmp_path.iterdir())
    assert trainer.max_epochs == cfg.trainer.max_epochs
    x, _ = next(iter(datamodule.test_dataloader()))
    module(x[:2])
    # What goes into the checkpoint is plain: it survives a round trip through YAML unchanged.
    plain = dict(module.hparams)
    assert OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(plain)))) == plain


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_its_config(name):
    cfg = composed(name=name)
    check(cfg)
    text = Path(REPO / "scripts" / f"{name}.py").read_text()
    unused = [key for key in cfg if key not in ("debug", "ckpt", "runs", "seed") and f"cfg.{key}" not in text]
    assert not unused
