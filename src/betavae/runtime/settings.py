"""The settings of a training run: their types, their checks, and one sentence for an invalid one.

To add a network, data set, ..., add its name to its registry, which is read when a setting is checked.
"""

import difflib
import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)
from pydantic_core import CoreSchema, core_schema

from betavae.errors import UserError


class RegisteredName:
    """A string that must be a key of a registry.

    The registry is imported when a name is checked, since torch takes a second.
    """

    def __init__(self, module: str, registry: str):
        self.module, self.registry = module, registry

    def names(self) -> list[str]:
        found = getattr(importlib.import_module(self.module), self.registry)
        return list(found() if callable(found) else found)

    def check(self, name: str) -> str:
        if name not in self.names():
            raise ValueError
        return name

    def __get_pydantic_core_schema__(self, source: type, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {"enum": self.names()}


NonEmptyStr = Annotated[str, Field(min_length=1)]
PathStr = Annotated[str, Field(min_length=1, description="a path"), AfterValidator(os.path.expanduser)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Seed63 = Annotated[int, Field(ge=0, lt=2**63)]
IntAtLeast2 = Annotated[int, Field(ge=2)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Label = Annotated[bool | int | float | NonEmptyStr, Field(description="a label")]
ImageSpec = Annotated[
    NonEmptyStr | Annotated[list[NonEmptyStr], Field(min_length=1)],
    Field(description="a folder, a file, a list of them, or the name of a data set"),
]
Config = dict[str, Any]  # a config or one of its groups, as plain values
# Of a setting that only some options of its group have. Its default is in their YAML files.
UNSET: Any = None


class Settings(BaseModel):
    """Settings that reject other types (an integer may stand for a number) and unknown keys."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ExtensibleGroup(Settings):
    """A group whose further settings are arguments of the function or class that it names."""

    model_config = ConfigDict(extra="allow")


class Model(ExtensibleGroup):
    network: Annotated[str, RegisteredName("betavae.models.networks", "NETWORKS")]
    hidden_dims: Annotated[list[PositiveInt], Field(min_length=1, examples=[[512, 256]])]
    latent_dim: PositiveInt
    activation: Annotated[str, RegisteredName("betavae.models.networks", "ACTIVATIONS")]
    conditional: bool
    likelihood: Annotated[str, RegisteredName("betavae.models.likelihoods", "LIKELIHOODS")]
    scale: Literal["shared", "per_value"] = UNSET
    components: PositiveInt = UNSET
    blocks: NonNegativeInt = UNSET


class Prior(ExtensibleGroup):
    name: Annotated[str, RegisteredName("betavae.models.priors", "PRIORS")]
    components: PositiveInt = UNSET
    transforms: PositiveInt = UNSET
    hidden_dims: Annotated[list[PositiveInt], Field(min_length=1)] = UNSET


class Data(ExtensibleGroup):
    name: Annotated[str, RegisteredName("betavae.data", "DATASETS")]
    root: NonEmptyStr
    # A number of images, or a share of them.
    validation_size: Annotated[float, Field(ge=0, lt=1)] | NonNegativeInt | None
    test_size: Annotated[float, Field(gt=0, lt=1)] | PositiveInt | None = UNSET
    download: bool = UNSET
    image_size: PositiveInt | Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] = UNSET
    channels: PositiveInt = UNSET
    fit: Literal["crop", "pad"] = UNSET
    background: NonEmptyStr = UNSET
    cache: NonEmptyStr = UNSET
    label: str | int | None = UNSET
    columns: Annotated[list[str | int], Field(min_length=1, examples=[["age", "height"]])] | None = UNSET
    batch_size: PositiveInt
    eval_batch_size: PositiveInt
    binarize: Literal["none", "threshold", "dynamic"]
    scaling: Literal["unit", "minmax", "standardize", "none"] = UNSET
    seed: Seed


class Objective(ExtensibleGroup):
    name: Annotated[str, RegisteredName("betavae.objectives", "OBJECTIVES")]
    k: PositiveInt
    kl_decomposition: bool = UNSET
    free_bits: NonNegativeFloat = UNSET
    resample: PositiveInt | None = UNSET
    variant: Literal["i", "ii"] = UNSET
    off_diagonal: NonNegativeFloat = UNSET
    diagonal: NonNegativeFloat = UNSET
    gamma: NonNegativeFloat = UNSET
    sampling: Literal["stratified", "weighted"] = UNSET
    elbo_weight: Fraction = UNSET
    groups: PositiveInt = UNSET
    mmd_weight: NonNegativeFloat = UNSET


class BetaSchedule(ExtensibleGroup):
    name: Annotated[str, RegisteredName("betavae.objectives.schedules", "BETA_SCHEDULES")]
    warmup: Fraction = UNSET
    cycles: PositiveInt = UNSET
    ramp: PositiveFraction = UNSET


class Optimizer(ExtensibleGroup):
    name: Annotated[str, RegisteredName("betavae.optim", "optimizer_names")]
    lr: PositiveFloat = UNSET


class LRSchedule(Settings):
    name: Annotated[str, RegisteredName("betavae.optim", "LR_DECAYS")]
    warmup: Fraction


MinusOne = Annotated[int, Field(ge=-1, le=-1, description="-1")]  # Literal[-1] would also accept -1.0
PRECISION_ALIASES = {32: "32-true", "32": "32-true", 16: "16-mixed", "16": "16-mixed", "bf16": "bf16-mixed"}
PRECISION_ALIASES |= {64: "64-true", "64": "64-true"}
BatchLimit = PositiveFraction | PositiveInt  # a share of the batches, or a number of them


class Trainer(ExtensibleGroup):
    """Arguments of Lightning's Trainer; all others are accepted too.

    This project adds `matmul_precision`, `compile`, `cuda_graph` and `steps_per_batch`.
    """

    max_epochs: PositiveInt
    max_steps: PositiveInt | MinusOne
    max_time: Annotated[str, Field(pattern=r"^\d\d:\d\d:\d\d:\d\d$", description="a time as DD:HH:MM:SS")] | None
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"]
    devices: PositiveInt | Annotated[list[NonNegativeInt], Field(min_length=1)] | Literal["auto"] | MinusOne
    num_nodes: PositiveInt
    strategy: NonEmptyStr
    precision: Literal[
        "32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true", "16-true", "32", "16", "bf16", "64", 32, 16, 64
    ]
    matmul_precision: Literal["highest", "high", "medium"]
    compile: bool | Literal["default", "reduce-overhead", "max-autotune"]
    cuda_graph: bool
    steps_per_batch: PositiveInt
    gradient_clip_val: NonNegativeFloat | None
    gradient_clip_algorithm: Literal["norm", "value"]
    accumulate_grad_batches: PositiveInt
    check_val_every_n_epoch: PositiveInt
    val_check_interval: BatchLimit
    limit_train_batches: BatchLimit
    limit_val_batches: BatchLimit
    limit_test_batches: BatchLimit
    overfit_batches: Fraction | NonNegativeInt
    log_every_n_steps: PositiveInt
    deterministic: bool | Literal["warn"]
    detect_anomaly: bool
    enable_progress_bar: bool
    fast_dev_run: bool | NonNegativeInt = UNSET
    min_epochs: PositiveInt | None = UNSET
    min_steps: PositiveInt | None = UNSET
    profiler: Literal["simple", "advanced", "pytorch"] | None = UNSET
    benchmark: bool | None = UNSET
    sync_batchnorm: bool = UNSET


class Callbacks(Settings):
    figures_every_n_epochs: NonNegativeInt
    early_stopping_patience: NonNegativeInt | None
    monitor: NonEmptyStr
    custom: Annotated[
        dict[str, dict[str, Any] | None], Field(description="names in CALLBACKS, each with its arguments")
    ]


class NoSettings(Settings):
    """A logger without settings."""


class Wandb(Settings):
    project: NonEmptyStr
    entity: NonEmptyStr | None
    mode: Literal["offline", "online"]


class MLflow(Settings):
    experiment: NonEmptyStr
    tracking_uri: NonEmptyStr


class Loggers(ExtensibleGroup):
    """Any number of loggers. Further names are those of plugins in LOGGERS."""

    tensorboard: NoSettings = UNSET
    csv: NoSettings = UNSET
    wandb: Wandb = UNSET
    mlflow: MLflow = UNSET


class TrainConfig(Settings):
    beta: Annotated[float, Field(ge=0, le=1e30)]  # float32 ends at 3e38
    seed: Seed
    init: Literal["default", "data"]
    name: str | int | Annotated[float, Field(allow_inf_nan=True)]
    runs: NonEmptyStr
    resume: NonEmptyStr | None
    init_from: NonEmptyStr | None
    plugins: Annotated[list[NonEmptyStr], Field(examples=[["mypkg.nets"]])]
    tags: Annotated[list[NonEmptyStr], Field(examples=[["paper"]])]
    traceback: bool
    model: Model
    data: Data
    prior: Prior
    objective: Objective
    beta_schedule: BetaSchedule
    optimizer: Optimizer
    lr_schedule: LRSchedule
    trainer: Trainer
    callbacks: Callbacks
    logger: Loggers


# Arguments of Lightning's Trainer that are not settings, with what to type instead.
RESERVED_TRAINER_ARGS = {
    "logger": "pass logger=csv, tensorboard, ..., or none",
    "callbacks": "pass callbacks.custom.NAME",
    "plugins": "pass plugins=[MODULE] for code that registers names",
    "default_root_dir": "pass runs=FOLDER",
    "enable_checkpointing": "a run always saves the checkpoint that it tests, except with trainer.fast_dev_run=true",
    "enable_model_summary": "metrics.json has the number of parameters",
    "num_sanity_val_steps": "a run checks its settings without validation steps; trainer.fast_dev_run=true tries all",
    "use_distributed_sampler": "each process always gets its part of the images",
    "reload_dataloaders_every_n_epochs": "the images stay in memory",
    "barebones": "pass logger=none callbacks=none",
    "inference_mode": "validation and test always run without gradients",
    "model_registry": "it belongs to Lightning's cloud",
    "enable_autolog_hparams": "loggers always get the settings",
}
# What to type instead of settings that other templates have.
HABITS = {
    "train": "every run trains; evaluate a finished run by `python scripts/evaluate.py ckpt=RUN_FOLDER`",
    "test": "every run ends with a test, which trainer.limit_test_batches=1 shortens",
    "ckpt": "resume=RUN_FOLDER continues a run, init_from=CHECKPOINT starts a new one from its weights",
    "debug": "traceback=true shows the traceback of an error",
    "task_name": "the name of a run is name=TEXT",
    "extras": "these settings are not needed",
}

M = TypeVar("M", bound=BaseModel)


def suggest(name: str, names: Iterable[Any], otherwise: str = "") -> str:
    """Return a hint at the most similar of some names, or `otherwise`."""
    known = [str(n) for n in names]
    close = [n for n in known if n.startswith(name)] or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else otherwise


def suggest_key(key: str, keys: Iterable[str], otherwise: str = "") -> str:
    """Return a hint at what to type instead of an unknown setting, or `otherwise`."""
    return f"; {HABITS[key]}" if key in HABITS else suggest(key, keys, otherwise)


def nested_model(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """Return the model of a field that is a group of settings, or None."""
    annotation = model.model_fields[name].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all settings and groups of settings."""
    for name in model.model_fields:
        yield prefix + name
        if group := nested_model(model, name):
            yield from dotted_keys(group, f"{prefix}{name}.")


def flatten(values: Mapping[str, Any], prefix: str = "", depth: float = float("inf")) -> dict[str, Any]:
    """Return nested settings by their dotted keys, which join at most `depth` names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and depth > 1
        found |= flatten(value, f"{prefix}{key}.", depth - 1) if nested else {f"{prefix}{key}": value}
    return found


@functools.cache
def accepts_text(group: str, key: str) -> bool:
    """Return whether a setting of a group accepts a text or a list.

    An unknown setting counts as a number.
    """
    schema = TrainConfig.__annotations__[group].model_json_schema()["properties"].get(key, {"type": "number"})
    types = {option.get("type", "enum") for option in schema.get("anyOf", [schema])}
    return not types <= {"integer", "number", "boolean", "null"}


def format_value(value: Any) -> str:
    """Format a value as it is typed on a command line."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def describe(schema: Mapping[str, Any]) -> str:
    """Describe the values that a JSON schema accepts, as "an integer > 0 or null"."""
    if "description" in schema:
        return schema["description"]
    if "anyOf" in schema:
        *first, last = map(describe, schema["anyOf"])
        return f"{', '.join(first)} or {last}"
    if "enum" in schema:
        return f"one of {', '.join(map(format_value, schema['enum']))}"
    if "const" in schema:
        return format_value(schema["const"])
    if schema.get("type") == "array":
        few, most = schema.get("minItems", 0), schema.get("maxItems")
        kind = f"a list of {few} to {most} values" if most else f"a {'non-empty ' * (few > 0)}list"
        kind = f"a list of {few} values" if few == most else kind
        example = f", such as {schema['examples'][0]}" if "examples" in schema else ""
        return f"{kind} (each {describe(schema['items'])}{example})"
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = " and ".join(f"{sign} {schema[name]}" for name, sign in limits.items() if name in schema)
    kinds = {"integer": "an integer", "number": "a number", "string": "a text", "boolean": "true or false"}
    return f"{kinds.get(schema.get('type', ''), schema.get('type', 'a value'))} {bounds}".rstrip()


def validate(model: type[M], values: Any, prefix: str = "") -> M:
    """Validate settings.

    Args:
        model: The model of the settings.
        values: Plain values.
        prefix: The start of the keys in error messages.

    Raises:
        UserError: For the first setting that is unknown, missing or invalid.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    path = [str(name) for name in problem["loc"] if name != "[key]"]
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        key = ".".join(path)
        find_hint = suggest_key if model is TrainConfig else suggest  # scripts have no habits of other trainers
        raise UserError(f"{prefix}{key} is not a setting{find_hint(key, dotted_keys(model))}")
    # Behind the names of settings, a location has the items of lists and the branches of unions.
    group: type[BaseModel] = model
    names: list[str] = []
    value, schema = values, {"description": "a group of settings"}
    for name in path:
        names.append(name)
        value = value.get(name) if isinstance(value, dict) else None
        if (inner := nested_model(group, name)) is None:
            schema = group.model_json_schema()["properties"][name]
            break
        group = inner
    key = prefix + ".".join(names)
    if problem["type"] == "missing":
        raise UserError(f"{key} is missing")
    if problem["type"] == "string_unicode":
        raise UserError(f"{key}={value} is invalid: expected UTF-8; rename the file, or pass its folder")
    hint = suggest(str(value), schema.get("enum", ()))
    raise UserError(f"{key}={format_value(value)} is invalid: expected {describe(schema)}{hint}")


def check_group(group: str, values: Config) -> None:
    """Raise UserError for an invalid setting in one of the groups of a training run."""
    validate(TrainConfig.__annotations__[group], values, f"{group}.")


def check_signature(group: str, function: Callable[..., Any], settings: Mapping[str, Any], *given: Any) -> None:
    """Raise UserError if `function(*given, **settings)` would lack an argument or have an unknown one."""
    signature, name = inspect.signature(function), getattr(function, "__name__", str(function))
    parameters = signature.parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)][len(given) :]
    keys = [p.name for p in named]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not takes_any and (unknown := [key for key in settings if key not in keys]):
        key = f"{group}.{unknown[0]}"
        hint = suggest(unknown[0], keys, f"; leave it out, or remove it by ~{key}")
        raise UserError(f"{key} is not a setting of {name}{hint}")
    if missing := [p.name for p in named if p.default is p.empty and p.name not in settings]:
        raise UserError(f"{group}.{missing[0]} is missing, which {name} needs")
    try:
        signature.bind(*given, **settings)
    except TypeError as error:  # of a custom function with other arguments than betavae passes
        raise UserError(f"{group}: {name} does not take the arguments of its kind ({error})") from error


def check_settings(values: Config) -> None:
    """Raise UserError for an invalid setting of a training run, or two that exclude each other."""
    validate(TrainConfig, values)
    for name in values["logger"].keys() - Loggers.model_fields:
        if name not in (known := RegisteredName("betavae.runtime.loggers", "LOGGERS").names()):
            raise UserError(f"logger.{name} is not a logger: expected one of {', '.join(known)}{suggest(name, known)}")
        if not isinstance(values["logger"][name], dict):
            raise UserError(f"logger.{name}={format_value(values['logger'][name])} is invalid: expected its settings")
    trainer, objective = values["trainer"], values["objective"]
    clip, algorithm, steps = (
        trainer[key] for key in ("gradient_clip_val", "gradient_clip_algorithm", "steps_per_batch")
    )
    for key in trainer.keys() & RESERVED_TRAINER_ARGS:
        raise UserError(f"trainer.{key} is not a setting: betavae sets it ({RESERVED_TRAINER_ARGS[key]})")
    if values["init_from"] is not None and values["init"] != "default":
        raise UserError(f"init={values['init']} is invalid with init_from: expected default")
    if clip == 0:
        raise UserError("trainer.gradient_clip_val=0 is invalid: expected a number > 0 or null (no clipping)")
    if clip is None and algorithm != "norm":
        raise UserError(f"trainer.gradient_clip_algorithm={algorithm} needs trainer.gradient_clip_val > 0")
    if (objective.get("resample") or 0) >= objective["k"]:
        resample, k = objective["resample"], objective["k"]
        raise UserError(f"objective.resample={resample} is invalid: expected null or fewer than objective.k={k}")
    if objective["k"] % objective.get("groups", 1):
        groups, k = objective["groups"], objective["k"]
        raise UserError(f"objective.groups={groups} is invalid: expected a divisor of objective.k={k}")
    if "num_train_images" in objective:
        raise UserError("objective.num_train_images is not a setting: it is the number of training images")
    if set(trainer["max_time"] or "1") <= {"0", ":"}:
        raise UserError(f"trainer.max_time={trainer['max_time']} is invalid: expected null or a time above 0")
    from betavae.objectives import check_prior  # imported late: torch takes a second

    check_prior(objective, values["prior"]["name"])
    if values["model"]["conditional"] and values["prior"]["name"] == "vamp":
        raise UserError(
            "model.conditional=true is invalid with prior=vamp, whose pseudo-inputs have no labels; use prior=flow"
        )
    if steps > 1 and values["optimizer"]["name"] == "LBFGS":
        raise UserError(f"trainer.steps_per_batch={steps} is invalid: expected 1 with LBFGS (trainer=fast sets 10)")
