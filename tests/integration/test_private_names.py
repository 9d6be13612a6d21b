"""The private names and undocumented behavior of other packages that this project relies on.

There is one test for each; its docstring names the code that relies on it. The upper bounds in pyproject.toml are the
next releases, with which these tests have not run.
"""

import ast
import inspect
import os
import subprocess
import sys

import hydra
import lightning as L
import optuna
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from tests.commands import REPO


class Two(L.LightningModule):
    """A model with one parameter."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return self.weight * batch.sum()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append("module")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(*callbacks, **settings):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(accelerator="cpu", callbacks=list(callbacks), **{"max_epochs": 1, **quiet, **settings})


def loader():
    return torch.utils.data.DataLoader(torch.ones(4), batch_size=1)


@pytest.mark.forked
def test_lightning_ends_between_steps_by_its_sigterm_flag():
    """runtime/lightning_workarounds.py: stop_after_this_step."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer._signal_connector.received_sigterm = True

    run, model = trainer(Stop()), Two()
    with pytest.raises(SIGTERMException):
        run.fit(model, loader())
    assert run.global_step == 2 and len(model.seen) == 2


def test_lightning_asks_the_fit_loop_if_steps_are_limited():
    """runtime/lightning_workarounds.py: patch_trainer."""
    run = trainer(max_steps=3)
    assert run.fit_loop._iteration_based_training() is True


@pytest.mark.forked
def test_lightning_sets_current_fx_name_for_each_hook():
    """module.py: VAEModule.__setattr__."""
    names = []

    class Watch(Two):
        def __setattr__(self, name, value):
            if name == "_current_fx_name":
                names.append(value)
            super().__setattr__(name, value)

    trainer().fit(Watch(), loader())
    assert names.count("training_step") == 4


@pytest.mark.forked
def test_lightning_calls_callbacks_before_the_module():
    """module.py: VAEModule.on_train_epoch_end."""

    class See(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            module.seen.append("callback")

    model = Two()
    trainer(See()).fit(model, loader())
    assert model.seen[:2] == ["callback", "module"]


@pytest.mark.forked
def test_lightning_callback_metrics_accepts_new_keys():
    """module.py: VAEModule.publish_epoch."""
    run = trainer()
    run.fit(Two(), loader())
    run.callback_metrics["x"] = torch.ones(())
    assert run.callback_metrics["x"] == 1


def test_lightning_model_checkpoint_has_these_state_keys():
    """runtime/resume.py: RunCheckpoint."""
    wanted = {"best_model_path", "kth_best_model_path", "last_model_path", "best_k_models", "dirpath"}
    assert wanted <= set(ModelCheckpoint().state_dict())


def test_lightning_detects_slurm_by_these_variables(monkeypatch):
    """runtime/distributed.py: started_by_srun, and runtime/lightning_workarounds.py: cluster_plugins."""
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.delenv("SLURM_JOB_NAME", raising=False)
    assert SLURMEnvironment.detect()
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    assert not SLURMEnvironment.detect()


def test_torchrun_sets_these_variables(tmp_path):
    """runtime/distributed.py."""
    script = tmp_path / "s.py"
    script.write_text(
        "import os; print(*(os.environ[n] for n in ('TORCHELASTIC_RUN_ID', 'TORCHELASTIC_RESTART_COUNT',"
        "'TORCHELASTIC_USE_AGENT_STORE', 'RANK', 'MASTER_PORT')))"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.stdout.split()[1:4] == ["0", "True", "0"], done.stderr


def test_torch_draws_normals_in_blocks_of_sixteen():
    """module.py: evaluate, and metrics/likelihood.py: rows of multiples of 16 do not depend on the number of rows."""
    one, many = (torch.Generator().manual_seed(0) for _ in range(2))
    rows = torch.cat([torch.randn(size, 32, generator=one) for size in (1, 2, 4)])
    assert torch.equal(rows, torch.randn(7, 32, generator=many))


def test_tensorboard_summary_writer_has_a_file_writer(tmp_path):
    """runtime/loggers.py: log_final_metrics."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        assert hasattr(writer._get_file_writer(), "add_summary")


def test_tensorboard_names_an_embedding_by_its_step(tmp_path):
    """runtime/loggers.py: log_embedding."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_embedding(torch.zeros(3, 3), global_step="projector", tag="a")
    assert (tmp_path / "projector" / "a" / "tensors.tsv").exists()


def test_torch_load_reads_a_file_with_a_comment(tmp_path):
    """storage/files.py: has_stamp, and plotting.py: save_tensor."""
    from betavae.plotting import save_tensor
    from betavae.storage.files import has_stamp

    path = save_tensor(torch.arange(3), tmp_path / "x.pt")
    assert torch.equal(torch.load(path, weights_only=True), torch.arange(3)) and has_stamp(path)


@pytest.mark.parametrize(
    ("override", "words"), [("nope=1", "Could not override 'nope'"), ("model=nope", "Could not find 'model/nope'")]
)
def test_hydra_describes_composition_errors_like_this(override, words):
    """runtime/hydra_config.py: describe_config_error."""
    with (
        hydra.initialize_config_dir(str(REPO / "configs"), version_base="1.3"),
        pytest.raises(Exception) as caught,
    ):
        hydra.compose("train", [override])
    texts, error = [], caught.value
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    assert words in "\n".join(texts)


def test_hydra_turns_exceptions_of_a_callback_into_warnings_but_not_a_system_exit():
    """sweeps/jobs.py: SweepCallback."""
    from hydra._internal.callbacks import Callbacks

    assert "except Exception" in inspect.getsource(Callbacks._notify)


def test_optuna_trial_has_an_id_in_its_storage():
    """sweeps/pruning.py: PruningCallback."""
    study = optuna.create_study()
    study.add_trial(optuna.trial.create_trial(value=1.0))
    assert isinstance(study.trials[0]._trial_id, int)


def test_scikit_learn_stores_the_scaled_gamma():
    """applications/anomalies/detector.py."""
    from sklearn.svm import OneClassSVM

    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).numpy()
    assert OneClassSVM(gamma="scale").fit(rows)._gamma == pytest.approx(1 / (3 * rows.var()))


@pytest.mark.parametrize(("graphs", "limit", "compiled"), [(4, 3, 3), (4, 5, 4)])
def test_torch_stops_compiling_at_its_recompile_limit(graphs, limit, compiled):
    """runtime/compile.py: compile_loss."""
    torch.compiler.reset()
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph

    double = torch.compile(lambda x: 2 * x, backend=backend, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=limit):
        for size in range(2, 2 + graphs):
            double(torch.ones(size))
    assert len(seen) == compiled and torch._dynamo.config.accumulated_recompile_limit >= 256


def test_no_other_private_names_are_used():
    """Attributes with an underscore, except on self and cls, in all code of this project."""
    used = set()
    for path in [*(REPO / "src").rglob("*.py"), *(REPO / "scripts").rglob("*.py"), REPO / "train.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                used |= set() if own else {node.attr}
            if isinstance(node, ast.ImportFrom) and "._" in str(node.module):
                used.add(node.module)
    used -= {"_asdict", "_replace"}  # documented methods of named tuples
    assert used == {
        *("_signal_connector", "_iteration_based_training", "_get_file_writer", "_trial_id", "_gamma", "_dynamo"),
    }
