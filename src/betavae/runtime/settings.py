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


class Choice:
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


def choice(names: Callable[[], Iterable[Any]]) -> Any:
    return Annotated[Any, Choice(names)]


def constrained(type_: Any, words: str, **limits: Any) -> Any:
    """A type, its limits, and the words for both."""
    return Annotated[type_, Field(description=words, **limits)]


PositiveInt = constrained(int, "a whole number from 1 up", ge=1)
NonNegativeInt = constrained(int, "a whole number from 0 up", ge=0)
IntAtLeast2 = constrained(int, "a whole number from 2 up", ge=2)
OptionalPositiveInt = constrained(Annotated[int, Field(ge=1)] | None, "null or a whole number from 1 up")
OptionalIntAtLeast2 = constrained(Annotated[int, Field(ge=2)] | None, "null or a whole number from 2 up")
IntegerOrNull = constrained(int | None, "null or a whole number")
OptionalNonNegativeInt = constrained(Annotated[int, Field(ge=0)] | None, "null or a whole number from 0 up")
PositiveFloat = constrained(float, "a number above 0", gt=0, allow_inf_nan=False)
NonNegativeFloat = constrained(float, "a number from 0 up", ge=0, allow_inf_nan=False)
Fraction = constrained(float, "a number from 0 to 1", ge=0, le=1)
NonEmptyStr = constrained(str, "a text", min_length=1)
OptionalStr = constrained(Annotated[str, Field(min_length=1)] | None, "null or a text")
# Where the ~ is in quotes, or in Python; `key=~/file` is read by `cli`.
ExpandedPath = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
PathStr = constrained(ExpandedPath, "a path")
OptionalPathStr = constrained(ExpandedPath | None, "null or a path")
Seed = constrained(int, "a whole number from 0 to 4294967295", ge=0, lt=2**32)
Seed63 = constrained(int, "a whole number from 0 up", ge=0, lt=2**63)
IntPair = constrained(list[int], "two whole numbers", min_length=2, max_length=2)
ImageSpec = constrained(
    Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)],
    "a folder, a file, a list of them, or the name of a data set",
)
ImagesOrNull = constrained(
    Annotated[str, Field(min_length=1)]
    | Annotated[list[Annotated[str, Field(min_length=1)] | NonNegativeInt], Field(min_length=1)]
    | None,
    "null, a folder, a file, or a list",
)
SweepKeys = constrained(
    Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=2)] | None,
    "null, or one or two names of settings, such as [model.latent_dim,beta]",
)
PositiveIntList = constrained(
    list[Annotated[int, Field(ge=1)]], "a list of whole numbers from 1 up, such as [400] or [512,256]", min_length=1
)
BatchLimit = constrained(
    Annotated[float, Field(gt=0, le=1)] | Annotated[int, Field(ge=1)],
    "a number above 0 to 1 (a share), or a whole number from 1 up (batches)",
)
# A setting that not every config has; its default is in a YAML.
UNSET: Any = None


class Settings(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class ExtensibleGroup(Settings):
    """A group whose further settings are the arguments of what its names name."""

    model_config = ConfigDict(extra="allow")


def registries() -> Any:
    """The modules that hold the tables; imported late, since torch takes a second."""
    from betavae import data, objectives, optim
    from betavae.models import likelihoods, networks
    from betavae.objectives import schedules
    from betavae.runtime import callbacks

    class Tables:
        NETWORKS, ACTIVATIONS = networks.NETWORKS, networks.ACTIVATIONS
        LIKELIHOODS, OBJECTIVES, DATASETS = likelihoods.LIKELIHOODS, objectives.OBJECTIVES, data.DATASETS
        BETA_SCHEDULES, LR_DECAYS = schedules.BETA_SCHEDULES, optim.LR_DECAYS
        OPTIMIZERS, CALLBACKS = optim.optimizer_names(), callbacks.CALLBACKS

    return Tables


class Model(ExtensibleGroup):
    network: choice(lambda: registries().NETWORKS)
    hidden_dims: PositiveIntList
    latent_dim: PositiveInt
    activation: choice(lambda: registries().ACTIVATIONS)
    likelihood: choice(lambda: registries().LIKELIHOODS)


class Data(ExtensibleGroup):
    name: choice(lambda: registries().DATASETS)
    root: NonEmptyStr
    validation_size: constrained(
        Annotated[float, Field(ge=0, lt=1)] | NonNegativeInt | None,
        "null, a whole number from 0 up (images), or a number below 1 (a share)",
    )
    test_size: constrained(
        Annotated[float, Field(gt=0, lt=1)] | PositiveInt | None,
        "null, a whole number from 1 up (images), or a number below 1 (a share)",
    ) = UNSET
    download: bool = UNSET
    batch_size: PositiveInt
    eval_batch_size: PositiveInt
    binarize: choice(lambda: ["none", "threshold", "dynamic"])
    seed: Seed


class Objective(ExtensibleGroup):
    name: choice(lambda: registries().OBJECTIVES)
    k: PositiveInt
    kl_decomposition: bool = UNSET
    free_bits: NonNegativeFloat = UNSET
    resample: OptionalPositiveInt = UNSET
    variant: choice(lambda: ["i", "ii"]) = UNSET
    off_diagonal: NonNegativeFloat = UNSET
    diagonal: NonNegativeFloat = UNSET
    gamma: NonNegativeFloat = UNSET
    sampling: choice(lambda: ["stratified", "weighted"]) = UNSET


class BetaSchedule(ExtensibleGroup):
    name: choice(lambda: registries().BETA_SCHEDULES)
    warmup: Fraction = UNSET
    cycles: PositiveInt = UNSET
    ramp: constrained(float, "a number above 0 to 1", gt=0, le=1) = UNSET


class Optimizer(ExtensibleGroup):
    name: choice(lambda: registries().OPTIMIZERS)
    lr: PositiveFloat = UNSET


class LRSchedule(Settings):
    name: choice(lambda: registries().LR_DECAYS)
    warmup: Fraction


class Trainer(ExtensibleGroup):
    """Lightning's, whose further arguments are settings too.

    This project adds `matmul_precision`, `compile`, `cuda_graph` and `steps_per_batch`.
    """

    max_epochs: PositiveInt
    max_steps: constrained(
        Annotated[int, Field(ge=1)] | Annotated[int, Field(ge=-1, le=-1)], "a whole number from 1 up, or -1"
    )
    max_time: constrained(Annotated[str, Field(pattern=r"^\d\d:\d\d:\d\d:\d\d$")] | None, "null or DD:HH:MM:SS")
    accelerator: choice(lambda: ["auto", "cpu", "gpu", "cuda", "mps"])
    devices: constrained(
        Annotated[int, Field(ge=1)]
        | Annotated[list[NonNegativeInt], Field(min_length=1)]
        | Annotated[str, Field(pattern="^auto$")]
        | Annotated[int, Field(ge=-1, le=-1)],
        "a whole number from 1 up, a list of device numbers, auto, or -1 (all)",
    )
    num_nodes: PositiveInt
    strategy: NonEmptyStr
    precision: choice(lambda: ["32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true", "16-true"])
    matmul_precision: choice(lambda: ["highest", "high", "medium"])
    compile: choice(lambda: [False, True, "default", "reduce-overhead", "max-autotune"])
    cuda_graph: bool
    steps_per_batch: PositiveInt
    gradient_clip_val: constrained(
        Annotated[float, Field(ge=0, allow_inf_nan=False)] | None, "null or a number from 0 up"
    )
    gradient_clip_algorithm: choice(lambda: ["norm", "value"])
    accumulate_grad_batches: PositiveInt
    check_val_every_n_epoch: PositiveInt
    val_check_interval: BatchLimit
    limit_train_batches: BatchLimit
    limit_val_batches: BatchLimit
    limit_test_batches: BatchLimit
    overfit_batches: constrained(
        Annotated[float, Field(ge=0, le=1)] | NonNegativeInt, "a number from 0 to 1, or of batches"
    )
    log_every_n_steps: PositiveInt
    deterministic: choice(lambda: [False, True, "warn"])
    detect_anomaly: bool
    enable_progress_bar: bool


class Callbacks(Settings):
    figures_every: NonNegativeInt
    early_stopping_patience: constrained(NonNegativeInt | None, "null or a whole number from 0 up")
    monitor: NonEmptyStr
    custom: constrained(dict[str, dict[str, Any] | None], "names from CALLBACKS, each with its settings")


class NoSettings(Settings):
    """A logger that has no settings."""


class Wandb(Settings):
    project: NonEmptyStr
    entity: OptionalStr
    mode: choice(lambda: ["offline", "online"])


class MLflow(Settings):
    experiment: NonEmptyStr
    tracking_uri: NonEmptyStr


class Loggers(Settings):
    """Any number of them."""

    tensorboard: NoSettings = UNSET
    csv: NoSettings = UNSET
    wandb: Wandb = UNSET
    mlflow: MLflow = UNSET


class TrainConfig(Settings):
    beta: NonNegativeFloat
    seed: Seed
    init: choice(lambda: ["default", "data"])
    name: constrained(str | int | float, "a text")
    runs: NonEmptyStr
    resume: OptionalStr
    debug: bool
    model: Model
    data: Data
    objective: Objective
    beta_schedule: BetaSchedule
    optimizer: Optimizer
    lr_schedule: LRSchedule
    trainer: Trainer
    callbacks: Callbacks
    logger: Loggers


def suggest(name: str, names: Iterable[Any], otherwise: str = "") -> str:
    close = difflib.get_close_matches(name, [str(n) for n in names], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else otherwise


def nested_model(field: Any) -> type[BaseModel] | None:
    """The model of a field that is a group of settings."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def dotted_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if group := nested_model(field):
            keys += dotted_keys(group, f"{prefix}{name}.")
    return keys


@functools.cache
def has_words(group: str, key: str) -> bool:
    """Return whether a setting of a group may be a text or a list, as far as it is known."""
    schema = TrainConfig.model_fields[group].annotation.model_json_schema()["properties"].get(key, {"type": "number"})  # type: ignore
    types = {option.get("type", "enum") for option in schema.get("anyOf", [schema])}
    return not types <= {"integer", "number", "boolean", "null"}


def validate(model: type[BaseModel], values: Any, prefix: str = "") -> Any:
    """`values` as a `model`. Raises UserError, in one sentence, for the first setting that is unknown, missing, or
    cannot be; `prefix` is put before its key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    path = problem["loc"]
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        key = ".".join(str(name) for name in path if name != "[key]")
        raise UserError(f"{prefix}{key} is not a setting{suggest(key, dotted_keys(model))}") from None
    # Behind the names of settings come items of lists and branches of unions.
    key, group = prefix, model
    value: Any = values
    for name in path:
        field = group.model_fields[str(name)]
        key, value, inner = f"{key}{name}", value.get(name) if isinstance(value, dict) else None, nested_model(field)
        if inner is None:
            break
        key, group = f"{key}.", inner
    if problem["type"] == "string_unicode":
        raise UserError(f"{key.rstrip('.')}={value} is invalid: expected UTF-8; rename the file, or name its folder")
    if problem["type"] == "missing":
        raise UserError(f"{key.rstrip('.')} is missing")
    if inner is not None:
        raise UserError(f"{key.rstrip('.')} must be a group of settings, and is {value}")
    table = next((item for item in field.metadata if isinstance(item, Choice)), None)
    words = "one of " + ", ".join(map(str, table.names())) if table else field.description
    hint = suggest(str(value), table.names()) if table else ""
    raise UserError(f"{key}={value} cannot be: it must be {words}{hint}")


def to_plain(cfg: Any) -> Any:
    """A config's values as plain Python. Raises UserError for one that is `???`."""
    if OmegaConf.is_config(cfg):
        if missing := sorted(OmegaConf.missing_keys(cfg)):
            raise UserError(f"{missing[0]}=??? is no value")
        return OmegaConf.to_container(cfg, resolve=True)
    return cfg


def check_group(group: str, values: Mapping[str, Any]) -> None:
    """Raises UserError for a setting of one of the groups of a training run that cannot be."""
    validate(TrainConfig.model_fields[group].annotation, dict(values), f"{group}.")  # type: ignore[arg-type]


def check_signature(group: str, function: Callable[..., Any], settings: Mapping[str, Any], *given: Any) -> None:
    """Raises UserError when `function(*given, **settings)` would lack a setting or have one too many."""
    try:
        inspect.signature(function).bind(*given, **settings)
    except TypeError as error:
        raise UserError(f"{group}: the settings {', '.join(settings)} do not fit ({error})") from error


def check_settings(cfg: DictConfig) -> None:
    """Raises UserError for a setting of a training run that is unknown, missing, or cannot be."""
    values = to_plain(cfg)
    validate(TrainConfig, values)
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
    if "num_train_images" in objective:
        raise UserError("objective.num_train_images is not a setting: it is the number of training images")
    if set(trainer["max_time"] or "1") <= {"0", ":"}:
        raise UserError(f"trainer.max_time={trainer['max_time']} is invalid: expected null or a time above 0")
    if trainer["steps_per_batch"] > 1 and values["optimizer"]["name"] == "LBFGS":
        steps = trainer["steps_per_batch"]
        raise UserError(f"trainer.steps_per_batch={steps} cannot be with LBFGS: make it 1 (trainer=fast makes it 10)")
