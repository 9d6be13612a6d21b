"""What each setting may be, a model of each config group, and the one sentence for one that cannot be.

To widen a setting (a new network, data set, ...), name it in its own table, which is read when a setting is checked.
"""

# mypy: disable-error-code="valid-type"

import difflib
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import core_schema

from betavae.errors import UserError


class OneOf:
    """Names that are looked up when they are asked for."""

    def __init__(self, names: Callable[[], Iterable[Any]]):
        self.names = names

    def check(self, value: Any) -> Any:
        if not any(value == name and type(value) is type(name) for name in self.names()):  # the type too: True == 1
            raise ValueError
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": list(self.names())}


def one_of(names: Callable[[], Iterable[Any]]) -> Any:
    return Annotated[Any, OneOf(names)]


def kind(type_: Any, words: str, **limits: Any) -> Any:
    """A type, its limits, and the words for both."""
    return Annotated[type_, Field(description=words, **limits)]


Count = kind(int, "a whole number from 1 up", ge=1)
CountOrZero = kind(int, "a whole number from 0 up", ge=0)
Several = kind(int, "a whole number from 2 up", ge=2)
CountOrNull = kind(Annotated[int, Field(ge=1)] | None, "null or a whole number from 1 up")
SeveralOrNull = kind(Annotated[int, Field(ge=2)] | None, "null or a whole number from 2 up")
IntegerOrNull = kind(int | None, "null or a whole number")
NumberOrNull = kind(Annotated[int, Field(ge=0)] | None, "null or a whole number from 0 up")
Positive = kind(float, "a number above 0", gt=0, allow_inf_nan=False)
NotNegative = kind(float, "a number from 0 up", ge=0, allow_inf_nan=False)
Share = kind(float, "a number from 0 to 1", ge=0, le=1)
Flag = kind(bool, "true or false")
Text = kind(str, "a text", min_length=1)
TextOrNull = kind(Annotated[str, Field(min_length=1)] | None, "null or a text")
# Where the ~ is in quotes, or in Python; `key=~/file` is read by `cli`.
At = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
Place = kind(At, "a path")
PlaceOrNull = kind(At | None, "null or a path")
Seed = kind(int, "a whole number from 0 to 4294967295", ge=0, lt=2**32)
LongSeed = kind(int, "a whole number from 0 up", ge=0, lt=2**63)
Pair = kind(list[int], "two whole numbers", min_length=2, max_length=2)
Images = kind(
    Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)],
    "a folder, a file, a list of them, or the name of a data set",
)
ImagesOrNull = kind(
    Annotated[str, Field(min_length=1)]
    | Annotated[list[Annotated[str, Field(min_length=1)] | CountOrZero], Field(min_length=1)]
    | None,
    "null, a folder, a file, or a list",
)
Keys = kind(
    Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=2)] | None,
    "null, or one or two names of settings, such as [model.latent_dim,beta]",
)
Widths = kind(
    list[Annotated[int, Field(ge=1)]], "a list of whole numbers from 1 up, such as [400] or [512,256]", min_length=1
)
Batches = kind(
    Annotated[float, Field(gt=0, le=1)] | Annotated[int, Field(ge=1)],
    "a number above 0 to 1 (a share), or a whole number from 1 up (batches)",
)
# A setting that not every config has; its default is in a YAML.
Absent: Any = None


class Settings(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class Open(Settings):
    """A group whose further settings are the arguments of what its names name."""

    model_config = ConfigDict(extra="allow")


def tables() -> Any:
    """The modules that hold the tables; imported late, since torch takes a second."""
    from betavae import callbacks, data, likelihoods, networks, objectives, optimizers, schedules

    class Tables:
        NETWORKS, ACTIVATIONS = networks.NETWORKS, networks.ACTIVATIONS
        LIKELIHOODS, OBJECTIVES, SOURCES = likelihoods.LIKELIHOODS, objectives.OBJECTIVES, data.SOURCES
        BETA_SCHEDULES, LR_DECAYS = schedules.BETA_SCHEDULES, schedules.LR_DECAYS
        OPTIMIZERS, CALLBACKS = optimizers.names(), callbacks.CALLBACKS

    return Tables


class Model(Open):
    network: one_of(lambda: tables().NETWORKS)
    hidden_dims: Widths
    latent_dim: Count
    activation: one_of(lambda: tables().ACTIVATIONS)
    likelihood: one_of(lambda: tables().LIKELIHOODS)


class Data(Open):
    name: one_of(lambda: tables().SOURCES)
    root: Text
    validation_size: kind(
        Annotated[float, Field(ge=0, lt=1)] | CountOrZero | None,
        "null, a whole number from 0 up (images), or a number below 1 (a share)",
    )
    test_size: kind(
        Annotated[float, Field(gt=0, lt=1)] | Count | None,
        "null, a whole number from 1 up (images), or a number below 1 (a share)",
    ) = Absent
    download: Flag = Absent
    batch_size: Count
    eval_batch_size: Count
    binarize: one_of(lambda: ["none", "threshold", "dynamic"])
    seed: Seed


class Objective(Open):
    name: one_of(lambda: tables().OBJECTIVES)
    k: Count
    kl_parts: Flag = Absent
    free_bits: NotNegative = Absent
    resample: CountOrNull = Absent
    variant: one_of(lambda: ["i", "ii"]) = Absent
    off_diagonal: NotNegative = Absent
    diagonal: NotNegative = Absent
    gamma: NotNegative = Absent
    sampling: one_of(lambda: ["stratified", "weighted"]) = Absent


class BetaSchedule(Open):
    name: one_of(lambda: tables().BETA_SCHEDULES)
    warmup: Share = Absent
    cycles: Count = Absent
    ramp: kind(float, "a number above 0 to 1", gt=0, le=1) = Absent


class Optimizer(Open):
    name: one_of(lambda: tables().OPTIMIZERS)
    lr: Positive = Absent


class LRSchedule(Settings):
    name: one_of(lambda: tables().LR_DECAYS)
    warmup: Share


class Trainer(Open):
    """Lightning's, whose further arguments are settings too.

    This project adds `matmul_precision`, `compile`, `cuda_graph` and `steps_per_batch`.
    """

    max_epochs: Count
    max_steps: kind(
        Annotated[int, Field(ge=1)] | Annotated[int, Field(ge=-1, le=-1)], "a whole number from 1 up, or -1"
    )
    max_time: kind(Annotated[str, Field(pattern=r"^\d\d:\d\d:\d\d:\d\d$")] | None, "null or DD:HH:MM:SS")
    accelerator: one_of(lambda: ["auto", "cpu", "gpu", "cuda", "mps"])
    devices: kind(
        Annotated[int, Field(ge=1)]
        | Annotated[list[CountOrZero], Field(min_length=1)]
        | Annotated[str, Field(pattern="^auto$")]
        | Annotated[int, Field(ge=-1, le=-1)],
        "a whole number from 1 up, a list of device numbers, auto, or -1 (all)",
    )
    num_nodes: Count
    strategy: Text
    precision: one_of(lambda: ["32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true", "16-true"])
    matmul_precision: one_of(lambda: ["highest", "high", "medium"])
    compile: one_of(lambda: [False, True, "default", "reduce-overhead", "max-autotune"])
    cuda_graph: Flag
    steps_per_batch: Count
    gradient_clip_val: kind(Annotated[float, Field(ge=0, allow_inf_nan=False)] | None, "null or a number from 0 up")
    gradient_clip_algorithm: one_of(lambda: ["norm", "value"])
    accumulate_grad_batches: Count
    check_val_every_n_epoch: Count
    val_check_interval: Batches
    limit_train_batches: Batches
    limit_val_batches: Batches
    limit_test_batches: Batches
    overfit_batches: kind(Annotated[float, Field(ge=0, le=1)] | CountOrZero, "a number from 0 to 1, or of batches")
    log_every_n_steps: Count
    deterministic: one_of(lambda: [False, True, "warn"])
    detect_anomaly: Flag
    enable_progress_bar: Flag


class Callbacks(Settings):
    figures_every: CountOrZero
    early_stopping_patience: kind(CountOrZero | None, "null or a whole number from 0 up")
    monitor: Text
    own: kind(dict[str, dict[str, Any] | None], "names from CALLBACKS, each with its settings")


class Nothing(Settings):
    """A logger that has no settings."""


class Wandb(Settings):
    project: Text
    entity: TextOrNull
    mode: one_of(lambda: ["offline", "online"])


class MLflow(Settings):
    experiment: Text
    tracking_uri: Text


class Loggers(Settings):
    """Any number of them."""

    tensorboard: Nothing = Absent
    csv: Nothing = Absent
    wandb: Wandb = Absent
    mlflow: MLflow = Absent


class Train(Settings):
    beta: NotNegative
    seed: Seed
    init: one_of(lambda: ["default", "data"])
    name: kind(str | int | float, "a text")
    runs: Text
    resume: TextOrNull
    debug: Flag
    model: Model
    data: Data
    objective: Objective
    beta_schedule: BetaSchedule
    optimizer: Optimizer
    lr_schedule: LRSchedule
    trainer: Trainer
    callbacks: Callbacks
    logger: Loggers


def nearest(name: str, names: Iterable[Any], otherwise: str = "") -> str:
    close = difflib.get_close_matches(name, [str(n) for n in names], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else otherwise


def group_of(field: Any) -> type[BaseModel] | None:
    """The model of a field that is a group of settings."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def keys_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if group := group_of(field):
            keys += keys_of(group, f"{prefix}{name}.")
    return keys


@functools.cache
def has_words(group: str, key: str) -> bool:
    """Return whether a setting of a group may be a text or a list, as far as it is known."""
    schema = Train.model_fields[group].annotation.model_json_schema()["properties"].get(key, {"type": "number"})  # type: ignore
    types = {option.get("type", "enum") for option in schema.get("anyOf", [schema])}
    return not types <= {"integer", "number", "boolean", "null"}


def validated(model: type[BaseModel], values: Any, prefix: str = "") -> Any:
    """`values` as a `model`. Raises UserError, in one sentence, for the first setting that is unknown, missing, or
    cannot be; `prefix` is put before its key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    path = problem["loc"]
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        key = ".".join(str(name) for name in path if name != "[key]")
        raise UserError(f"{prefix}{key} is not a setting{nearest(key, keys_of(model))}") from None
    # Behind the names of settings come items of lists and branches of unions.
    key, group = prefix, model
    value: Any = values
    for name in path:
        field = group.model_fields[str(name)]
        key, value, inner = f"{key}{name}", value.get(name) if isinstance(value, dict) else None, group_of(field)
        if inner is None:
            break
        key, group = f"{key}.", inner
    if problem["type"] == "string_unicode":
        raise UserError(f"{key.rstrip('.')}={value} is invalid: expected UTF-8; rename the file, or name its folder")
    if problem["type"] == "missing":
        raise UserError(f"{key.rstrip('.')} is missing")
    if inner is not None:
        raise UserError(f"{key.rstrip('.')} must be a group of settings, and is {value}")
    table = next((item for item in field.metadata if isinstance(item, OneOf)), None)
    words = "one of " + ", ".join(map(str, table.names())) if table else field.description
    hint = nearest(str(value), table.names()) if table else ""
    raise UserError(f"{key}={value} cannot be: it must be {words}{hint}")


def plain(cfg: Any) -> Any:
    """A config's values as plain Python. Raises UserError for one that is `???`."""
    if OmegaConf.is_config(cfg):
        if missing := sorted(OmegaConf.missing_keys(cfg)):
            raise UserError(f"{missing[0]}=??? is no value")
        return OmegaConf.to_container(cfg, resolve=True)
    return cfg


def check_group(group: str, values: Mapping[str, Any]) -> None:
    """Raises UserError for a setting of one of the groups of a training run that cannot be."""
    validated(Train.model_fields[group].annotation, dict(values), f"{group}.")  # type: ignore[arg-type]


def check_arguments(group: str, function: Callable[..., Any], settings: Mapping[str, Any], *given: Any) -> None:
    """Raises UserError when `function(*given, **settings)` would lack a setting or have one too many."""
    try:
        inspect.signature(function).bind(*given, **settings)
    except TypeError as error:
        raise UserError(f"{group}: the settings {', '.join(settings)} do not fit ({error})") from error


def check_settings(cfg: DictConfig) -> None:
    """Raises UserError for a setting of a training run that is unknown, missing, or cannot be."""
    values = plain(cfg)
    validated(Train, values)
    trainer = values["trainer"]
    if trainer["gradient_clip_val"] == 0:
        raise UserError("trainer.gradient_clip_val=0 clips nothing: make it null, or a number above 0")
    if trainer["gradient_clip_val"] is None and trainer["gradient_clip_algorithm"] != "norm":
        algorithm = trainer["gradient_clip_algorithm"]
        raise UserError(
            f"trainer.gradient_clip_algorithm={algorithm} needs trainer.gradient_clip_val, a number above 0"
        )
    objective = values["objective"]
    if (objective.get("resample") or 0) >= objective["k"]:
        resample, k = objective["resample"], objective["k"]
        raise UserError(f"objective.resample={resample} is invalid: expected null or fewer than objective.k={k}")
    if "images" in objective:
        raise UserError("objective.images is not a setting: it is the number of training images")
    if set(trainer["max_time"] or "1") <= {"0", ":"}:
        raise UserError(f"trainer.max_time={trainer['max_time']} is invalid: expected null or a time above 0")
    if trainer["steps_per_batch"] > 1 and values["optimizer"]["name"] == "LBFGS":
        steps = trainer["steps_per_batch"]
        raise UserError(f"trainer.steps_per_batch={steps} cannot be with LBFGS: make it 1 (trainer=fast makes it 10)")
