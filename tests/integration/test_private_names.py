"""All that this project uses of other packages' insides, and of what they do without promising it.

One test for each: when a new release changes it, the test that fails says by its name what, and its docstring where we
use it. Upper bounds in pyproject.toml are the next releases that these have not been run against.
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
    """A model of one number, for what follows."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return {"loss": self.weight * batch.sum(), "sums": [batch_idx]}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(("module", outputs["sums"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(*callbacks, **settings):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(accelerator="cpu", callbacks=list(callbacks), **{"max_epochs": 1, **quiet, **settings})


def loader():
    return torch.utils.data.DataLoader(torch.ones(4), batch_size=1)


def test_lightning_the_flag_of_a_received_sigterm_ends_the_loop_between_two_steps():
    """running/lightning.py: stop_after_this_step."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer._signal_connector.received_sigterm = True

    run, model = trainer(Stop()), Two()
    with pytest.raises(SIGTERMException):
        run.fit(model, loader())
    assert run.global_step == 2 and len(model.seen) == 2


def test_lightning_iteration_based_training_is_asked_of_the_fit_loop():
    """running/lightning.py: mend."""
    run = trainer(max_steps=3)
    assert run.fit_loop._iteration_based_training() is True


def test_lightning_notes_the_running_hook_in_current_fx_name():
    """running/lightning.py: Steps.__setattr__."""
    names = []

    class Watch(Two):
        def __setattr__(self, name, value):
            if name == "_current_fx_name":
                names.append(value)
            super().__setattr__(name, value)

    trainer().fit(Watch(), loader())
    assert names.count("training_step") == 4


def test_lightning_calls_callbacks_before_the_module_and_hands_on_what_a_step_returned():
    """curves.py: Curves."""

    class See(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            module.seen.append(("callback", outputs["sums"]))

    model = Two()
    trainer(See()).fit(model, loader())
    assert model.seen[:2] == [("callback", [0]), ("module", [0])]


def test_lightning_callback_metrics_is_one_dictionary_that_can_be_added_to():
    """curves.py: Curves."""
    run = trainer()
    run.fit(Two(), loader())
    run.callback_metrics["x"] = torch.ones(())
    assert run.callback_metrics["x"] == 1


def test_lightning_model_checkpoint_remembers_the_best_under_these_names():
    """running/resuming.py: RunCheckpoint."""
    wanted = {"best_model_path", "kth_best_model_path", "last_model_path", "best_k_models", "dirpath"}
    assert wanted <= set(ModelCheckpoint().state_dict())


def test_lightning_asks_a_module_for_callbacks():
    """module.py: configure_callbacks."""

    class Mine(Two):
        def configure_callbacks(self):
            return [asked]

    class Asked(Callback):
        started = False

        def on_train_start(self, trainer, module):
            self.started = True

    asked = Asked()
    trainer().fit(Mine(), loader())
    assert asked.started


def test_lightning_knows_slurm_by_these_variables(monkeypatch):
    """running/processes.py: started_by_srun, and running/lightning.py: plugins."""
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.delenv("SLURM_JOB_NAME", raising=False)
    assert SLURMEnvironment.detect()
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    assert not SLURMEnvironment.detect()


def test_torchrun_sets_these_variables_and_serves_a_store(tmp_path):
    """running/processes.py."""
    script = tmp_path / "s.py"
    script.write_text(
        "import os; print(*(os.environ[n] for n in ('TORCHELASTIC_RUN_ID', 'TORCHELASTIC_RESTART_COUNT',"
        "'TORCHELASTIC_USE_AGENT_STORE', 'RANK', 'MASTER_PORT')))"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.stdout.split()[1:4] == ["0", "True", "0"], done.stderr


def test_torch_draws_normals_in_blocks_of_sixteen():
    """module.py: evaluate, and measures/likelihood.py: rows of whole sixteens do not depend on how many are drawn."""
    one, many = (torch.Generator().manual_seed(0) for _ in range(2))
    rows = torch.cat([torch.randn(size, 32, generator=one) for size in (1, 2, 4)])
    assert torch.equal(rows, torch.randn(7, 32, generator=many))


def test_tensorboard_writer_gives_out_its_file_writer(tmp_path):
    """running/loggers.py: log_outcome."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        assert hasattr(writer._get_file_writer(), "add_summary")


def test_tensorboard_names_an_embeddings_folder_after_its_step(tmp_path):
    """running/loggers.py: log_embedding."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_embedding(torch.zeros(3, 3), global_step="projector", tag="a")
    assert (tmp_path / "projector" / "a" / "tensors.tsv").exists()


def test_torch_load_reads_a_file_with_a_comment(tmp_path):
    """files.py: made_here, and pictures.py: save_tensor."""
    from betavae.plotting import save_tensor
    from betavae.storage.files import has_stamp

    path = save_tensor(torch.arange(3), tmp_path / "x.pt")
    assert torch.equal(torch.load(path, weights_only=True), torch.arange(3)) and has_stamp(path)


@pytest.mark.parametrize(
    ("override", "words"), [("nope=1", "Could not override 'nope'"), ("model=nope", "Could not find 'model/nope'")]
)
def test_hydra_says_what_it_cannot_compose_in_these_words(override, words):
    """running/cli.py: explain."""
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
    """sweeping/jobs.py: SweepCallback."""
    from hydra._internal.callbacks import Callbacks

    assert "except Exception" in inspect.getsource(Callbacks._notify)


def test_optuna_gives_a_trial_its_number_in_the_storage():
    """sweeping/pruning.py: Pruning."""
    study = optuna.create_study()
    study.add_trial(optuna.trial.create_trial(value=1.0))
    assert isinstance(study.trials[0]._trial_id, int)


def test_scikit_learn_keeps_what_gamma_came_to():
    """uses/anomalies.py: Detector.fit."""
    from sklearn.svm import OneClassSVM

    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).numpy()
    assert OneClassSVM(gamma="scale").fit(rows)._gamma == pytest.approx(1 / (3 * rows.var()))


@pytest.mark.parametrize(("graphs", "limit", "compiled"), [(4, 3, 3), (4, 5, 4)])
def test_torch_runs_functions_uncompiled_beyond_its_recompile_limit(graphs, limit, compiled):
    """running/lightning.py: compile_loss."""
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


def test_nothing_else_of_others_is_used():
    """Attributes with an underscore of anything but this project's own objects, in all of its code."""
    used = set()
    for path in [*(REPO / "src").rglob("*.py"), *(REPO / "scripts").rglob("*.py"), REPO / "train.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                used |= set() if own else {node.attr}
            if isinstance(node, ast.ImportFrom) and "._" in str(node.module):
                used.add(node.module)
    used -= {"_asdict", "_replace"}  # a named tuple's, which are documented
    assert used == {
        *("_signal_connector", "_iteration_based_training", "_get_file_writer", "_trial_id", "_gamma", "_dynamo"),
    }
