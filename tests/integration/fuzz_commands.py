"""Fuzz complete commands: `python -m tests.integration.fuzz_commands seconds=3600 seed=0 out=DIR [case=17]`.

A case is a random session of one user in a temporary folder: data, trainings, interruptions, sweeps and scripts. After
each command the session checks the guarantees of every command. A new kind of fault is reduced to the commands and
words that it needs, and written to `out` as a shell script with its output.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import random
import re
import resource
import select
import shlex
import signal
import string
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from betavae.data.datasets.mnist import load_mnist
from tests.commands import REPO, Child, is_equal, load_script, started

MAX_SECONDS = 280  # of one command, by the clock
MAX_CPU_SECONDS = 60
MAX_MEMORY = 6 * 2**30  # bytes of one command
MAX_REDUCING = 60  # seconds spent on reducing one fault
FOREIGN = re.compile(
    r"\b[A-Z]\w*Warning\b|site-packages|warnings\.warn|^\[[WE]\d|^(INFO|WARNING|ERROR)[: ]|Exception ignored"
    r"|Error executing job|HYDRA_FULL_ERROR",
    re.MULTILINE,
)
# In an error for the user, these come from a bug or the internals of a library.
INTERNALS = re.compile(
    r"NoneType|has no attribute|<class|<function|0x[0-9a-f]{6}|unsupported operand|out of range|\bTensor\b|torch\.Size"
    r"|unexpected keyword|positional argument|must be str, not|not subscriptable|not iterable|size mismatch|MagicMock"
)
# Settings that start other processes, wait for other machines or download data.
NOT_HERE = ("trainer.num_nodes", "trainer.devices", "trainer.strategy", "data.name", "data", "resume", "hydra", "debug")
NOT_HERE += ("traceback", "plugins", "init_from")


@dataclass(frozen=True)
class Step:
    """A command (`script` and `words`), or Python code that makes or checks files."""

    script: str = ""
    words: tuple[str, ...] = ()
    code: str = ""
    stop: tuple[int, float] | None = None  # a signal and the seconds after which it is sent
    fresh: bool = False  # in a new process: distributed training starts itself again
    terminal: bool = False  # with the progress bar

    def shell(self) -> str:
        if not self.script:
            return f"python - <<'EOF'\n{self.code.strip()}\nEOF"
        line = shlex.join(["python", self.script, *self.words])
        if self.stop:
            line = f"timeout --signal={signal.Signals(self.stop[0]).name} {self.stop[1]:.2f} {line}"
        return line


class Fault(Exception):
    """A broken guarantee; `kind` names it without the details of its case."""

    def __init__(self, kind: str, steps: list[Step], output: str):
        super().__init__(kind)
        self.kind, self.steps, self.output = kind, steps, output

    def __str__(self) -> str:
        return "\n".join([self.kind, "", *(step.shell() for step in self.steps), "", self.output])


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_SECONDS, MAX_CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY, MAX_MEMORY))


def normalized(text: str) -> str:
    """Remove what differs from case to case: numbers, paths and quoted values."""
    text = re.sub(r"'[^']*'|\S*/\S*|\b[\w-]+\.(npy|npz|png|ckpt|bvae)\b", "_", text.strip())
    return re.sub(r"-?\d[\d.,e+-]*", "N", text)[:160]


def listing(root: Path) -> dict[str, str]:
    """Every file below `root` with a hash, every folder; without locks and caches."""
    found = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if (
            name.startswith(("home/.", "home/work/data", "home/work/cache", "home/work/my cache"))
            or path.name == ".lock"
        ):
            continue
        is_file = path.is_file() and not path.is_symlink()
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if is_file else ""
    return found


class Session:
    """The folder of a user, the steps taken in it and the user's own files."""

    def __init__(self, root: Path, data: Path, tell: bool = False):
        self.root, self.cwd, self.tell = root, root / "home" / "work", tell
        raw = self.cwd / "data" / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for file in (data / "MNIST" / "raw").iterdir():
            (raw / file.name).symlink_to(file)
        self.steps: list[Step] = []
        self.own: dict[str, str] = {}
        self.seconds = 0.0  # of the last command
        self.accepted = 0
        self.rejected: list[str] = []  # the errors

    def python(self, code: str) -> None:
        """Make or check files."""
        self.take(Step(code=code))

    def command(self, script: str, *words: str, **how: object) -> tuple[int, str]:
        return self.take(Step(script, tuple(words), **how))  # type: ignore[arg-type]

    def take(self, step: Step) -> tuple[int, str]:
        """Run a step. Returns its exit code and output. Raises Fault."""
        self.steps.append(step)
        before = listing(self.root)
        if not step.script:
            try:
                with contextlib.chdir(self.cwd):
                    exec(step.code, {})
            except Exception as error:
                kind = f"{type(error).__name__}: {normalized(str(error))}"
                raise Fault(kind, self.steps, traceback.format_exc()) from error
            changed = {name: value for name, value in listing(self.root).items() if before.get(name) != value}
            self.own |= {name: value for name, value in changed.items() if not self.in_run(name)}
            return 0, ""
        code, text = self.run(step)
        if self.tell:
            print(f"{step.shell()}\n  {code}  {self.seconds:.1f} s  {(text.strip().splitlines() or [''])[-1]}")
        self.accepted += code == 0
        self.rejected += [normalized(line) for line in re.findall(r"^error: .*$", text, re.MULTILINE)]
        kind = self.find_broken_guarantee(step, code, text, before)
        if kind:
            raise Fault(kind, self.steps, f"exit status {code}\n{text}")
        return code, text

    def in_run(self, name: str) -> bool:
        return any((folder / ".betavae").exists() for folder in (self.root / name).parents)

    def run(self, step: Step) -> tuple[int, str]:
        if step.fresh:
            process = started(str(REPO / step.script), *step.words, cwd=self.cwd, HOME=str(self.root / "home"))
            try:
                text, _ = process.communicate(timeout=MAX_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                return -signal.SIGKILL, process.communicate()[0]
            return process.returncode, text
        ours, theirs = os.openpty() if step.terminal else (None, None)
        child = Child(
            *step.words,
            cwd=self.cwd,
            script=step.script,
            prepare=limit,
            terminal=theirs,
            environment={"HOME": str(self.root / "home")},
        )
        number, seconds = step.stop or (signal.SIGKILL, MAX_SECONDS)
        code, shown = None, b""
        while code is None:
            time.sleep(0.01)
            code = child.poll()
            while ours is not None and select.select([ours], [], [], 0)[0]:
                shown += os.read(ours, 2**16)
            if code is None and time.perf_counter() - child.started > seconds:
                child.send(number)
                code = child.wait()
        self.seconds = time.perf_counter() - child.started
        if ours is None or theirs is None:
            return code, child.text
        os.close(ours)
        os.close(theirs)
        return code, shown.decode().replace("\r\n", "\n").replace("\r", "\n")

    def find_broken_guarantee(self, step: Step, code: int, text: str, before: dict[str, str]) -> str | None:
        """Return the first guarantee that a command has broken, or None."""
        script, sweep = Path(step.script).name, "-m" in step.words
        stopped = step.stop is not None and code in (-step.stop[0], 130, 143)
        errors = re.findall(r"^error: (.*)$", text, re.MULTILINE)
        after = listing(self.root)
        if "Traceback (most recent call last)" in text:
            frames = re.findall(r'File "[^"]*/betavae/([^"]*)", line \d+, in (\w+)', text)
            where = " ".join(frames[-1]) if frames else ""
            return f"{script}: traceback: {normalized(text.splitlines()[-1])} [{where}]"
        if found := FOREIGN.search(text):
            line = next(line for line in text.splitlines() if found[0].strip() in line)
            line = re.sub(r"^.*?(?=[A-Z]\w*Warning)", "", line)
            return f"{script}: foreign line: {normalized(line)}"
        if found := re.search(r"^warning: (?!.*was not made by betavae)(.*)$", text, re.MULTILINE):
            return f"{script}: a warning: {normalized(found[1])}"
        if code in (-signal.SIGKILL, -signal.SIGXCPU) and not step.stop:
            return f"{script}: does not end"
        if not stopped and code not in (0, 1):
            return f"{script}: exit status {code}"
        if code == 0 and errors:
            return f"{script}: exit status 0 with an error"
        if code == 1 and len(errors) != 1 and not (sweep and re.search(r"^failed: |missing", text, re.MULTILINE)):
            return f"{script}: exit status 1 with {len(errors)} errors: {normalized(text[-100:])}"
        if errors and (len(errors[0]) > 500 or INTERNALS.search(errors[0])):
            return f"{script}: internals in an error: {normalized(errors[0])}"
        for name, value in self.own.items():
            if after.get(name) != value:
                what = "removed" if name not in after else "changed"
                return f"{script}: {what} the user's file: {normalized(name)}"
        if not (stopped and code == -signal.SIGKILL):
            for name in set(after) - set(before):
                if re.search(r"\.part\b|betavae-part", name):
                    return f"{script}: left {normalized(Path(name).name)}"
        if errors and (not sweep or text.startswith("error: ")) and "not finite" not in errors[0]:
            changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
            changed = [name for name in changed if not re.search(r"/(sampler_\w+|anomalies-\w+)\.pt$", name)]  # caches
            if changed:
                return f"{script}: rejected after it had written {changed[0]}: {normalized(errors[0])}"
        if code == 0 and (found := re.search(r"(\S+)\W+(nan|inf)\b", text)):
            return f"{script}: prints {found[2]}: {normalized(found[1])}"
        for name in {name for name in after if after[name] != before.get(name)} - set(self.own):
            if name.endswith(".json") and after[name]:
                content = json.loads((self.root / name).read_text())
                if "NaN" in json.dumps(content) or "Infinity" in json.dumps(content):
                    return f"{script}: {Path(name).name} holds a number that is not finite"
                error = content.get("error", "")
                if error and not error.startswith(("UserError", "DivergenceError")):
                    return f"{script}: a job failed with {normalized(error)}"
        if script == "train.py" and code == 0 and not sweep:
            return self.find_contradiction(text)
        return None

    def find_contradiction(self, text: str) -> str | None:
        """Return a contradiction between the output and the files of a finished training, or None."""
        if "is finished; train longer by" in text or not re.search(r"^run   ", text, re.MULTILINE):
            return None if re.search(r"finished|Usage", text) else f"train.py: says nothing: {normalized(text[-100:])}"
        folder = self.cwd / re.search(r"^run   (.*)$", text, re.MULTILINE)[1]  # type: ignore[index]
        record = json.loads((folder / "metrics.json").read_text())
        if record["status"] != "finished":
            return f"train.py: exit status 0 with status {record['status']}"
        test = record["test"]
        numbers = {**test, **record.get("validation", {}), "seconds": record["seconds"]}
        if not all(math.isfinite(value) for value in numbers.values()):
            return "train.py: a number in metrics.json is not finite"
        if f"neg. ELBO {test['neg_elbo']:.2f} nats per image" not in text:
            return "train.py: the terminal and metrics.json differ"
        rounding = 2e-3 + 1e-3 * (abs(test["recon"]) + abs(test["kl"]))
        if abs(test["recon"] + test["kl"] - test["neg_elbo"]) > rounding:
            return "train.py: recon + kl is not neg_elbo"
        if not (folder / record["checkpoint"]).is_file():
            return "train.py: the checkpoint is missing"
        if not all((folder / "figures" / f"{name}.png").is_file() for name in ("samples", "reconstructions")):
            return "train.py: figures are missing"
        return None


def quoted(value: str) -> str:
    """Quote a value for Hydra."""
    return (
        value
        if re.fullmatch(r"[\w./-]+", value, re.ASCII)
        else "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    )


def assert_same_runs(a: str, b: str) -> None:
    """Compare two finished runs bit for bit."""
    first, second = (torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in (a, b))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "random_state", "epoch", "global_step"):
        assert is_equal(first[key], second[key]), f"{key} differs after a resume"
    records = [json.loads(Path(run, "metrics.json").read_text()) for run in (a, b)]
    for key in ("test", "validation", "epochs", "steps", "checkpoint"):
        assert records[0].get(key) == records[1].get(key), f"{key} in metrics.json differs after a resume"


# Values for any key; most are invalid for most keys.
VALUES = [
    *("0", "1", "-1", "2", "3", "7", "0.5", "-0.5", "1e-3", "1e400", "nan", "inf", "-inf", "true", "false", "null"),
    *("''", "[]", "[1]", "[0]", "[3,2]", "[[1]]", "{}", "{a: 1}", "abc", "'a b'", "mlp", "conv", "adam", "SGD"),
    *("linear", "cosine", "cyclical", "constant", "gaussian", "auto", "cpu", "gpu", "ddp", "16-mixed", "64-true"),
    *("warn", "00:00:00:01", "ü", "${beta}", "${nope}", "${seed}", "${oc.env:NOPE}", "../..", "a=b", "\\", "'"),
    *("[", "{", "$", "1,2", "~", "?", "???"),
]


def hostile_word(rng: random.Random, keys: list[str]) -> str:
    """A key with a value that is probably wrong, or with a typo."""
    key, value = rng.choice(keys), rng.choice(VALUES)
    if rng.random() < 0.15:
        at = rng.randrange(len(key))
        key = key[:at] + rng.choice(string.ascii_letters + "._-/@=") + key[at + rng.randrange(2) :]
    if rng.random() < 0.1:
        value = "".join(rng.choice(string.printable[:95]) for _ in range(rng.randrange(6)))
    return rng.choice(("", "", "", "", "+", "++", "~")) + key + rng.choice(("=",) * 9 + ("",)) + value


SHAPES = [(1, 1), (1, 28), (10, 8), (7, 5), (28, 28), (2000, 1), (1, 300), (8, 8), (3, 64), (33, 17), (4, 3)]
COUNTS = [2, 5, 12, 20, 40, 60, 130, 300]
SIZES = ["1", "2", "0.1", "0.3", "0.5"] * 4 + ["5", "0.99", "100"]
FILE_NAMES = ["a.npy", "my images.npy", "ünï.npy", "a,b.npy", "a=b.npy", "x+y.npy"]


def array_file(rng: random.Random, session: Session) -> tuple[list[str], str]:
    (height, width), n = rng.choice(SHAPES), rng.choice(COUNTS[3:] if rng.random() < 0.9 else COUNTS)
    shape = rng.choice([(n, height, width)] * 3 + [(n, height, width, 3), (n, 3, height, width), (n, height, width, 1)])
    drawn = rng.choice(["rng.integers(0, 256, SHAPE)", "rng.integers(0, 2, SHAPE) * 255", "np.full(SHAPE, 255)"])
    drawn = drawn if rng.random() < 0.3 else "rng.integers(0, 256, SHAPE)"
    name = rng.choice(FILE_NAMES) if rng.random() < 0.3 else "a.npy"
    code = f"import numpy as np\nrng = np.random.default_rng({rng.randrange(100)})\n"
    code += f"images = ({drawn.replace('SHAPE', str(shape))}).astype('uint8')\n"
    if rng.random() < 0.4:
        name = name.replace(".npy", ".npz")
        labels = rng.choice(["% 3", "% 2 == 0", "* 0 + 7", "* 1000", "// 3 - 1"])
        code += f"labels = np.arange({n}) {labels}\n"
        if rng.random() < 0.2:
            code += f"labels = np.stack([labels, np.arange({n}) % 4], 1)\n"
        keys = "images=images, labels=labels"
        if rng.random() < 0.3:
            keys = "x_train=images, y_train=labels, x_test=images[:5], y_test=labels[:5]"
        code += f"np.savez({name!r}, {keys})\n"
    else:
        code += f"np.save({name!r}, images)\n"
    session.python(code)
    words = ["data=arrays", f"data.root={quoted(name)}"]
    if rng.random() < (0.02 if "x_test" in code else 0.6):
        words.append(f"data.test_size={rng.choice(SIZES)}")
    return words, name


def picture_folder(rng: random.Random, session: Session) -> tuple[list[str], str]:
    name = rng.choice(["pics", "my pics", "ünï", "a,b"]) if rng.random() < 0.3 else "pics"
    ending = rng.choice(["png", "jpg", "gif"])
    folders = rng.choice([[""], ["cat", "dog"], ["train", "test"], ["train/a", "train/b", "val/a"], ["train", "b"]])
    session.python(
        "from pathlib import Path\nimport numpy as np\nfrom PIL import Image\n"
        f"rng = np.random.default_rng({rng.randrange(100)})\n"
        f"for i in range({rng.choice(COUNTS[3:])}):\n"
        f"    path = Path({name!r}, {folders}[i % {len(folders)}], f'{{i}}.{ending}')\n"
        "    path.parent.mkdir(parents=True, exist_ok=True)\n"
        f"    size = rng.integers(1, {rng.choice([2, 9, 40])}, 2)\n"
        "    Image.fromarray(rng.integers(0, 256, (*size, 3)).astype('uint8')).save(path)\n"
        + rng.choice(["", "", "Path(path.parent, 'broken.png').write_bytes(b'no picture')\n"])
    )
    words = ["data=folder", f"data.root={quoted(name)}"]
    words.append(f"data.image_size={rng.choice(['1', '8', '[10,8]', '[1,28]', '[7,5]', '16'])}")
    for key, values in {
        "channels": ["1", "3"],
        "fit": ["crop", "pad"],
        "background": ["black", "white"],
        **({} if "test" in folders else {"test_size": SIZES}),
        "cache": ["cache", "'my cache'"],
    }.items():
        if rng.random() < 0.3:
            words.append(f"data.{key}={rng.choice(values)}")
    return words, name


def packaged(rng: random.Random, session: Session) -> tuple[list[str], str]:
    limits = [f"trainer.limit_{split}_batches={rng.choice(['1', '3', '7'])}" for split in ("train", "val", "test")]
    limits.append("data.eval_batch_size=50")
    if rng.random() < 0.15:
        return ["data=sprites", "data.image_size=32", *limits], "sprites"
    return [*rng.choice([[], ["data=mnist_binarized"]]), *limits], "mnist"


# One of these lists is drawn, and one of its entries, which may be several words.
TRAINING: dict[str, list[str]] = {
    "network": [
        "model.hidden_dims=[1]",
        "model.hidden_dims=[8,4]",
        "model.hidden_dims=[2,2,2]",
        "model=conv model.hidden_dims=[2]",
        "model=conv model.hidden_dims=[3,2,2,2]",
        "model=resnet model.hidden_dims=[2,4]",
        "model=resnet model.hidden_dims=[3] +model.blocks=2",
    ],
    "latent": ["model.latent_dim=1", "model.latent_dim=2", "model.latent_dim=3", "model.latent_dim=12"],
    "activation": [f"model.activation={name}" for name in ("tanh", "gelu", "silu", "elu", "softplus")],
    "likelihood": [
        "model.likelihood=gaussian",
        "model.likelihood=continuous_bernoulli",
        "model.likelihood=logistic_mixture",
        "model.likelihood=logistic_mixture +model.components=1",
    ],
    "objective": [
        "objective.k=3",
        "objective.free_bits=0.5",
        "objective.kl_decomposition=true",
        "objective=iwae objective.k=1",
        "objective=iwae objective.k=3 objective.kl_decomposition=true",
        "objective=dreg objective.k=2",
        "objective=dreg objective.k=3 objective.resample=2",
        "objective=beta_tcvae",
        "objective=beta_tcvae objective.sampling=stratified",
        "objective=dip_vae",
        "objective=dip_vae objective.variant=i objective.k=2",
        "objective=capacity_vae",
        "objective=capacity_vae objective.gamma=0 beta=25 beta_schedule=linear",
    ],
    "beta": ["beta=0", "beta=0.1", "beta=4", "beta=1e3", "beta=1e30"],
    "beta_schedule": [
        "beta_schedule=linear",
        "beta_schedule=linear beta_schedule.warmup=0",
        "beta_schedule=linear beta_schedule.warmup=1",
        "beta_schedule=cyclical",
        "beta_schedule=cyclical beta_schedule.cycles=100 beta_schedule.ramp=1",
    ],
    "optimizer": [
        "optimizer=adamw",
        "optimizer=sgd",
        "optimizer=muon",
        "optimizer.name=RMSprop ~optimizer.betas ~optimizer.fused",
        "optimizer.name=Adagrad ~optimizer.betas ~optimizer.fused",
        "optimizer.name=NAdam ~optimizer.fused",
        "optimizer.name=Adafactor ~optimizer.betas ~optimizer.fused ~optimizer.eps",
        "optimizer.name=LBFGS ~optimizer.betas ~optimizer.eps ~optimizer.weight_decay ~optimizer.fused",
        "optimizer.name=Rprop ~optimizer.betas ~optimizer.eps ~optimizer.weight_decay ~optimizer.fused",
        "optimizer.name=ASGD ~optimizer.betas ~optimizer.eps ~optimizer.fused",
        "optimizer.name=SparseAdam ~optimizer.weight_decay ~optimizer.fused",
        "+optimizer.amsgrad=true",
        "optimizer.lr=1e30",
        "optimizer.lr=1e-30",
    ],
    "lr_schedule": ["lr_schedule=cosine", "lr_schedule=linear lr_schedule.warmup=0.5", "lr_schedule.warmup=1"],
    "init": ["init=data"],
    "seed": ["seed=0", "seed=4294967295"],
    "batches": [f"data.batch_size={n}" for n in (1, 2, 3, 5, 7, 64)],
    "eval_batches": [f"data.eval_batch_size={n}" for n in (1, 3, 10)],
    "validation": [f"data.validation_size={size}" for size in ["0"] * 8 + SIZES],
    "binarize": ["data.binarize=threshold", "data.binarize=dynamic"],
    "epochs": ["trainer.max_epochs=1", "trainer.max_epochs=3", "trainer.max_epochs=5"],
    "steps": ["trainer.max_steps=1", "trainer.max_steps=3", "trainer.max_steps=1000"],
    "time": ["trainer.max_time=00:00:00:00", "trainer.max_time=00:00:00:01"],
    "precision": [
        f"trainer.precision={name}" for name in ("bf16-mixed", "64-true", "bf16-true", "bf16-mixed", "16-true")
    ],
    "matmul": ["trainer.matmul_precision=highest", "trainer.matmul_precision=high"],
    "together": [
        "trainer.steps_per_batch=2",
        "trainer.steps_per_batch=3 trainer.accumulate_grad_batches=2",
        "trainer.steps_per_batch=100",
    ],
    "clip": [
        "trainer.gradient_clip_val=1",
        "trainer.gradient_clip_val=1e-9 trainer.gradient_clip_algorithm=value",
        "trainer.gradient_clip_algorithm=value",
    ],
    "accumulate": ["trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches=50"],
    "validate": [
        "trainer.check_val_every_n_epoch=2",
        "trainer.check_val_every_n_epoch=50",
        "trainer.val_check_interval=0.5",
        "trainer.val_check_interval=2",
        "trainer.val_check_interval=1000",
        "trainer.limit_val_batches=1",
        "trainer.limit_val_batches=0.01",
    ],
    "limit": [
        "trainer.limit_train_batches=1",
        "trainer.limit_train_batches=0.5",
        "trainer.limit_train_batches=0.001",
        "trainer.limit_test_batches=0.001",
        "trainer.limit_test_batches=1",
    ],
    "overfit": ["trainer.overfit_batches=1", "trainer.overfit_batches=0.5", "trainer.overfit_batches=100"],
    "log": ["trainer.log_every_n_steps=1", "trainer.log_every_n_steps=1000"],
    "debugging": ["trainer.deterministic=true", "trainer.deterministic=warn", "trainer.detect_anomaly=true"],
    "bar": ["trainer.enable_progress_bar=false"],
    "more": [
        "+trainer.benchmark=true",
        "+trainer.min_epochs=2",
        "+trainer.min_steps=7",
        "+trainer.limit_predict_batches=1",
        "+trainer.profiler=simple",
        "+trainer.sync_batchnorm=true",
        "+trainer.callbacks=[x]",
        "++trainer.max_epochs=2",
        "+trainer.accelerator=cpu",
    ],
    "figures": [
        "callbacks.figures_every_n_epochs=0",
        "callbacks.figures_every_n_epochs=1",
        "callbacks.figures_every_n_epochs=2",
    ],
    "monitor": ["callbacks.monitor=loss", "callbacks.monitor=kl", "callbacks.monitor=recon", "callbacks.monitor=nope"],
    "patience": ["callbacks.early_stopping_patience=0", "callbacks.early_stopping_patience=1"],
    "logger": ["logger=csv", "logger=[tensorboard,csv]", "~logger", "~logger.tensorboard", "logger=[]"],
    "name": ["name=''", "'name=a b'", "name=ünï", "name=1.5", "name=null", f"name={'x' * 300}", "name=a+b"],
    "runs": ["runs=other", "\"runs='my runs'\"", "runs=a/b/c", "runs=runs/../runs"],
    "preset": ["trainer=smoke", "trainer=[smoke,fast] trainer.compile=false", "experiment=tutorial"],
    "folder": ["hydra.run.dir=run", "\"hydra.run.dir='a run'\"", "hydra.run.dir=.", "hydra.run.dir=canary"],
}


def training_words(rng: random.Random) -> list[str]:
    groups = rng.sample(list(TRAINING), rng.choice((1, 2, 3, 4, 6, 9)))
    words = [word for group in groups for word in shlex.split(rng.choice(TRAINING[group]))]
    defaults = {"model.hidden_dims": "[8]", "data.batch_size": "4", "trainer.max_epochs": "2"}
    named = {word.lstrip("+~").partition("=")[0] for word in words}
    return [f"{key}={value}" for key, value in defaults.items() if key not in named] + words


SCRIPTS: dict[str, dict[str, list[str]]] = {
    "sample": {
        "n": ["1", "3", "65"],
        "sampler": ["prior", "gaussian", "mixture", "knn"],
        "label": ["0", "3", "999"],
        "temperature": ["0", "0.5", "1e6"],
        "columns": ["1", "100"],
        "save_images": ["true"],
        "save_tensor": ["true"],
    },
    "reconstruct": {"images": [], "n": ["1", "7", "1000"]},
    "interpolate": {
        "labels": ["[0,1]", "[0,0]", "[3,8]"],
        "images": ["[0,1]", "[0,0]", "[0,99]", "[1]"],
        "steps": ["2", "5"],
        "rows": ["1", "3"],
    },
    "traverse": {"image": ["null", "1", "99"], "dimensions": ["1", "2", "99"], "span": ["0.1", "1e6"], "steps": ["2"]},
    "manifold": {"size": ["1", "2", "7"]},
    "encode": {"images": []},
    "decode": {"latents": ["latents.npz", "latents.csv"]},
    "evaluate": {
        "k": ["1", "5", "10", "15"],
        "first": ["2", "3", "1000"],
        "memory_mb": ["1"],
        "probes": ["false"],
        "matmul_precision": ["medium"],
        "folder": ["new", "../../canary"],
    },
    "fidelity": {
        "sampler": ["prior", "gaussian", "mixture", "knn"],
        "n": ["2", "5", "50"],
        "repeats": ["2", "3"],
        "reference": ["2", "10"],
    },
    "detect": {
        "images": [],
        "alpha": ["0.5", "0.01", "1e-9"],
        "score": ["combined", "dose_svm", "dose", "neg_elbo"],
        "inliers": ["[0]", "[cat]", "[0,1]"],
        "out": ["anomalies", "../../canary", "RUN"],
    },
    "compress": {"images": [], "verify": ["false"], "report": ["false"], "lanes": ["1", "3"]},
    "decompress": {"out": ["decompressed", "back.npy", "../../canary", "RUN"], "file": ["images.bvae"]},
    "disentanglement": {"images": ["2", "5", "500"], "latents": ["mean", "sample"]},
    "export": {
        "format": ["onnx", "torchscript", "pt2", "safetensors", "folder"],
        "out": ["export", "../../canary", "RUN", "'my export'"],
    },
    "sweep_report": {
        "sweep": ["sweep"],
        "over": ["[beta]", "[seed]", "[beta,seed]"],
        "metric": ["kl", "seconds", "nope"],
        "out": ["report", "../../canary"],
    },
    "results": {},
}
ENDINGS = {"encode": ["npz", "csv", "parquet", "png"], "compress": ["bvae", "npz"]}
PICTURE_ENDINGS = ["png", "jpg", "pdf", "webp", "svg", "gif", "nope"]


@functools.cache
def script_keys(name: str) -> list[str]:
    return [*load_script(REPO / "scripts" / f"{name}.py").Settings.model_fields]


def script_words(rng: random.Random, name: str, data: str, run: str) -> list[str]:
    """Draw arguments of a script for the model in the folder `run` that was trained on `data`."""
    keys = script_keys(name)
    values = dict(SCRIPTS[name])
    if "images" in values and not values["images"]:
        other = ["../../canary/photo.png", "nothing", "mnist", "[../../canary/photo.png,nothing]", "../../canary"]
        values["images"] = ["test", "test", "train", "validation", quoted(data), quoted(data), rng.choice(other)]
    if "ckpt" in keys:
        values["ckpt"] = [run, run, *(f"{run}/checkpoints{end}" for end in ("/last.ckpt", "/best.ckpt", "")), "canary"]
    if "out" in keys and "out" not in values:
        ending = rng.choice(ENDINGS.get(name, PICTURE_ENDINGS))
        values["out"] = [f"o.{ending}", f"new/deep/o.{ending}", f"'my o.{ending}'", "../../canary/photo.png", "RUN"]
    if "seed" in keys:
        values["seed"] = ["0", "1", str(2**63 - 1)]
    if "data_root" in keys:
        values["data_root"] = ["data"] if data in ("mnist", "sprites") else [quoted(data), "nothing"]
    fast = {"evaluate": {"k": "5"}, "fidelity": {"n": "5", "repeats": "2"}, "disentanglement": {"images": "200"}}
    chosen = {**fast.get(name, {})} | ({"ckpt": run} if "ckpt" in keys and not run.startswith("runs/") else {})
    for key, options in values.items():
        if rng.random() < (0.7 if key in ("images", "sampler", "format", "score", "sweep") else 0.25):
            chosen[key] = rng.choice(options).replace("RUN", quoted(run))
    words = [f"{key}={quoted(value) if key == 'ckpt' else value}" for key, value in chosen.items()]
    if rng.random() < 0.08:
        words.append(hostile_word(rng, keys))
    return words


def canary(session: Session) -> None:
    """Write files of the user, which no command may change, some with names that commands write."""
    session.python(
        "from pathlib import Path\nimport numpy as np\nfrom PIL import Image\n"
        "for place in ('../../canary', '.'):\n"
        "    Path(place).mkdir(exist_ok=True)\n"
        "    Image.fromarray(np.full((9, 12, 3), 99, 'uint8')).save(Path(place, 'photo.png'))\n"
        "    for name in ('notes.txt', 'table.csv', 'evaluation.json', 'model.onnx', 'scores.csv'):\n"
        "        Path(place, name).write_text('{}')\n"
    )


def play(rng: random.Random, session: Session) -> None:
    """Play a random session."""
    from betavae.runtime.hydra_config import all_keys

    keys = [key for key in all_keys() if not key.startswith(NOT_HERE)]
    canary(session)
    given, data = rng.choice([array_file] * 3 + [picture_folder] * 2 + [packaged])(rng, session)
    kind = rng.choice(["train"] * 4 + ["resume", "resume", "longer", "longer", "sweep", "sweep"])
    for _ in range(4):  # until one is accepted
        words = given + training_words(rng)
        if rng.random() < 0.1:
            words.append(hostile_word(rng, keys))
        if kind == "sweep":
            code, text = sweep(rng, session, words)
        else:
            if not any(word.startswith("hydra.run.dir") for word in words):
                words.append("hydra.run.dir=runs/run")
            distributed = rng.random() < 0.02 and not any(word.startswith("trainer=") for word in words)
            words += ["trainer=ddp", "trainer.accelerator=cpu"] * distributed
            code, text = session.command("train.py", *words, fresh=distributed, terminal=rng.random() < 0.1)
        if code == 0:
            break
    if kind != "sweep":
        if code:
            return
        if kind == "resume" and not distributed:
            interrupt(rng, session, words)
        if kind == "longer":
            longer(rng, session, words)
        printed = re.search(r"^next  .*?python (scripts/.*?)$", text, re.MULTILINE | re.DOTALL)
        if printed and rng.random() < 0.3:
            must_work(session, *shlex.split(printed[1]))
    runs = [path.parent for path in sorted(session.cwd.rglob("metrics.json")) if '"finished"' in path.read_text()]
    if not runs:
        return
    run = str(rng.choice(runs).relative_to(session.cwd))
    harm = rng.choice([None] * 8 + [damage, change_data])
    if harm:
        harm(rng, session, data, run)
    pool = [*SCRIPTS, *["sweep_report"] * (8 * (kind == "sweep"))]
    for name in rng.sample(pool, rng.choice((1, 3, 5))):
        use(rng, session, name, data, run)
    if harm:
        session.command("train.py", f"resume={quoted(run)}", "trainer.max_epochs=6")


def use(rng: random.Random, session: Session, name: str, data: str, run: str) -> None:
    """A script, perhaps stopped, twice, and what reads what it wrote."""
    script, words = f"scripts/{name}.py", script_words(rng, name, data, run)
    if rng.random() < 0.1:
        number = rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        session.command(script, *words, stop=(number, rng.uniform(0.05, 1.5)))
    code, _ = session.command(script, *words)
    if code:
        return
    before = listing(session.root)
    if name in ("sample", "reconstruct", "interpolate", "encode") and rng.random() < 0.3:
        session.command(script, *words)
        if before != listing(session.root):
            raise Fault(f"{name}.py: the same seed gives another file", session.steps, "")
    reader = {"encode": ("decode", "latents"), "compress": ("decompress", "file")}.get(name)
    if reader:  # what it wrote
        script, key = reader
        written = [word.replace("out=", f"{key}=", 1) for word in words if word.startswith("out=")]
        reading = [word for word in script_words(rng, script, data, run) if not word.startswith(f"{key}=")]
        session.command(f"scripts/{script}.py", *reading, *written)


def damage(rng: random.Random, session: Session, data: str, run: str) -> None:
    """Harm one file of a run."""
    files = sorted(path for path in (session.cwd / run).rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choice(files).relative_to(session.cwd)
    session.python(
        f"from pathlib import Path\npath = Path({str(path)!r})\ncontent = path.read_bytes()\n"
        f"at = int({rng.random()} * len(content))\n"
        + rng.choice(
            [
                "path.write_bytes(content[:at])\n",
                "path.write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])\n",
                "path.write_bytes(b'')\n",
                "path.unlink()\n",
                "path.unlink()\npath.mkdir()\n",
                "path.write_text('{}')\n",
            ]
        )
    )


def change_data(rng: random.Random, session: Session, data: str, run: str) -> None:
    """Give the user's own data more, fewer or other images."""
    if data.endswith(".npy"):
        change = rng.choice(["np.concatenate([x, x[:1]])", "x[:-1]", "x ^ 1", "255 - x", "x[..., :-1]", "x[:0]"])
        session.python(f"import numpy as np\nx = np.load({data!r})\nnp.save({data!r}, {change})\n")
        unseen = rng.choice(("evaluate", "detect"))
        code, text = session.command(f"scripts/{unseen}.py", f"ckpt={quoted(run)}")
        if code == 0:
            raise Fault(f"{unseen}.py: reports on changed data", session.steps, text)
    elif (session.cwd / data).is_dir():
        change = rng.choice(
            ["path.unlink()", "path.write_bytes(b'no picture')", "path.rename(path.parent / 'new.png')"]
        )
        session.python(
            "from pathlib import Path\n"
            f"paths = sorted(path for path in Path({data!r}).rglob('*') if path.is_file())\n"
            f"for path in paths[:: {rng.choice((1, 2, 5))}]:\n    {change}\n"
        )


def must_work(session: Session, script: str, *words: str) -> str:
    """Run a command that the project has printed."""
    code, text = session.command(script, *words)
    if code:
        kind = f"a printed command fails: {script}: {normalized(text)}"
        raise Fault(kind, session.steps, f"exit status {code}\n{text}")
    return text


def interrupt(rng: random.Random, session: Session, words: list[str]) -> None:
    """The same run in another folder, stopped at random moments and resumed, must be the same run."""
    (whole,) = (word for word in words if word.startswith("hydra.run.dir="))
    timed = any("max_time" in word for word in words)
    words = [word for word in words if word != whole] + ["hydra.run.dir=cut"]
    seconds = session.seconds
    following = ["train.py", *words]
    for _ in range(rng.choice((1, 1, 2, 3))):
        number = rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGKILL))
        code, text = session.command(*following, stop=(number, rng.uniform(0.1, 1.1) * seconds))
        if code == 0:
            break
        if match := re.search(r"python (train\.py resume=.*)$", text, re.MULTILINE):
            following = shlex.split(match[1])
        elif (session.cwd / "cut" / "config.yaml").exists():
            following = ["train.py", "resume=cut"]
    else:
        must_work(session, *following)
    if not timed:
        name = whole.partition("=")[2].strip("'")
        session.python(
            f"from tests.integration.fuzz_commands import assert_same_runs\nassert_same_runs({name!r}, 'cut')\n"
        )


def longer(rng: random.Random, session: Session, words: list[str]) -> None:
    """Resume a finished run, as it is and with changed settings."""
    resume = next(word for word in words if word.startswith("hydra.run.dir=")).replace("hydra.run.dir", "resume")
    must_work(session, "train.py", resume)
    changes = rng.choice(
        [[], training_words(rng)[3:], ["callbacks.figures_every_n_epochs=1"], ["trainer.precision=bf16-mixed"]]
    )
    changes = [word for word in changes if word.startswith(("trainer.", "callbacks.", "data.eval", "+trainer."))]
    session.command("train.py", resume, f"trainer.max_epochs={rng.choice((1, 4, 6))}", *changes)


def sweep(rng: random.Random, session: Session, words: list[str]) -> tuple[int, str]:
    """A sweep, perhaps killed, and the same command again."""
    words = [word for word in words if not word.startswith(("hydra.run.dir", "beta=", "seed="))]
    axes = rng.choice([["beta=0.5,2"], ["seed=1,2"], ["beta=1,-1"], ["beta=1", "seed=3,4"], ["optimizer.lr=1e-3,1e30"]])
    axes = (
        axes
        if rng.random() < 0.7
        else rng.choice([["model=mlp,conv"], ["name='日本','中国'"], ["model.latent_dim=1,2"]])
    )
    if rng.random() < 0.2:
        axes = ["sweep=optuna", "hydra.sweeper.n_trials=2"]
        axes += rng.choice([[], ["hydra.sweeper.objectives=[recon,kl]"], ["hydra.sweeper.objectives=[nope]"]])
    words = ["-m", *words, *axes, f"hydra.sweep.dir={rng.choice(('sweep', 'sweep', 'a/sweep'))}"]
    stop = (rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)), rng.uniform(0.3, 2.0))
    code, text = session.command("train.py", *words, stop=stop if rng.random() < 0.5 else None)
    if code != 1 or rng.random() < 0.3:
        code, text = session.command("train.py", *words)
    return code, text


def repeated(steps: Iterable[Step], data: Path) -> Fault | None:
    """The fault that these steps end in, in a new folder."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        session = Session(Path(folder), data)
        try:
            for step in steps:
                session.take(step)
        except Fault as fault:
            return fault
    return None


def reduced(fault: Fault, data: Path) -> Fault:
    """The same kind of fault with fewer steps and words, as far as `MAX_REDUCING` allows."""
    end = time.perf_counter() + MAX_REDUCING
    if fault.kind.startswith("a printed command"):  # the session has to print it
        return fault

    def attempt(steps: list[Step]) -> bool:
        nonlocal fault
        if time.perf_counter() > end:
            return False
        found = repeated(steps, data)
        if found and found.kind == fault.kind:
            fault = found
            return True
        return False

    number = len(fault.steps) - 2
    while number >= 0:
        attempt([*fault.steps[:number], *fault.steps[number + 1 :]])
        number -= 1
    for position in reversed(range(len(fault.steps))):
        size = max(1, len(fault.steps[position].words) // 2)
        while size:
            start = 0
            while start < len(fault.steps[position].words):
                step = fault.steps[position]
                fewer = replace(step, words=step.words[:start] + step.words[start + size :])
                if not attempt([*fault.steps[:position], fewer, *fault.steps[position + 1 :]]):
                    start += size
            size //= 2
    return fault


def main(seconds: float = 60, seed: int = 0, out: str = "fuzz", case: int | None = None) -> None:
    """Run cases until `seconds` have passed, or the one `case`, and write the faults and a summary to `out`."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    faults: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    accepted = 0
    end = time.perf_counter() + seconds
    with tempfile.TemporaryDirectory(prefix="fuzz-data-") as data:
        for split in ("train", "test"):
            load_mnist(Path(data), split)
        for number in range(10**9) if case is None else [case]:
            if time.perf_counter() > end:
                break
            with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
                session = Session(Path(place), Path(data), tell=case is not None)
                fault = None
                try:
                    play(random.Random(f"{seed}-{number}"), session)
                except Fault as found:
                    fault = found
            accepted += session.accepted
            rejected.update(session.rejected)
            if fault:
                faults[fault.kind] += 1
                if faults[fault.kind] == 1:
                    print(f"case {number}: {fault.kind}", flush=True)
                    write(reduced(fault, Path(data)), folder, f"seed={seed} case={number}")
            counts = f"{accepted} commands accepted, {rejected.total()} rejected, {faults.total()} faults"
            lines = [f"{number + 1} cases, {counts}", ""]
            lines += [f"{count:5}  {name_of(kind)}  {kind}" for kind, count in faults.most_common()]
            lines += ["", *(f"{count:5}  {sentence}" for sentence, count in rejected.most_common())]
            (folder / "summary.txt").write_text("\n".join(lines) + "\n")
    print(lines[0])


def name_of(kind: str) -> str:
    return hashlib.sha256(kind.encode()).hexdigest()[:8]


def write(fault: Fault, folder: Path, source: str) -> None:
    """Write a fault as a shell script, its output in comments."""
    comment = [source, fault.kind, *fault.output.splitlines()]
    lines = [*(step.shell() for step in fault.steps), "", *(f"# {line}" for line in comment)]
    (folder / f"{name_of(fault.kind)}.sh").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    typed = dict(word.split("=", 1) for word in sys.argv[1:])
    kinds = {"seconds": float, "seed": int, "out": str, "case": int}
    main(**{key: kinds[key](value) for key, value in typed.items()})  # type: ignore[arg-type]
