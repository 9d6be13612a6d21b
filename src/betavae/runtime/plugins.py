"""Plugins, modules of other packages that add names to the registries of betavae on import.

An installed package declares its modules as entry points of the group `betavae.plugins`; `plugins=[mypkg.nets]` names
others. A checkpoint records the plugins of its run, and never imports one. Imports neither Lightning nor Hydra.
"""

import importlib
import os
import re
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from betavae.errors import UserError, first_line

GROUP = "betavae.plugins"
REGISTRIES = (
    ("betavae.models.networks", "NETWORKS"),
    ("betavae.models.networks", "ACTIVATIONS"),
    ("betavae.models.likelihoods", "LIKELIHOODS"),
    ("betavae.models.priors", "PRIORS"),
    ("betavae.objectives", "OBJECTIVES"),
    ("betavae.objectives.schedules", "BETA_SCHEDULES"),
    ("betavae.optim", "LR_DECAYS"),
    ("betavae.data", "DATASETS"),
    ("betavae.runtime.callbacks", "CALLBACKS"),
    ("betavae.runtime.loggers", "LOGGERS"),
)
LOADED: dict[str, str] = {}  # the package of each plugin of this process, "" for those of `plugins=[...]`


def load_plugins(modules: Any = ()) -> None:
    """Import the installed plugins, then others, which may be in the current directory.

    Args:
        modules: The modules to import besides installed plugins.

    Raises:
        UserError: If an import fails, or a plugin registers a name that is taken.
    """
    if not isinstance(modules, list | tuple) or not all(isinstance(name, str) and name for name in modules):
        raise UserError(f"plugins={modules} is invalid: expected a list of modules, such as plugins=[mypkg.nets]")
    for point in entry_points(group=GROUP):
        if point.attr:
            raise UserError(
                f"plugin {point.name} of {package_name(point)} is invalid: its entry point is {point.value}, expected "
                "a module"
            )
        import_plugin(point.module, package_name(point))
    if modules and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # before the folder of the script, which may hold a module of the same name
    for name in modules:
        import_plugin(name, "")


def package_name(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.name


def import_plugin(name: str, package: str) -> None:
    """Import a plugin unless it is loaded. Raise UserError if that fails, or for a name that is taken."""
    if name in LOADED:
        return
    title = f"plugin {name} of {package}" if package else f"plugin {name}"
    before = [(registry, found, dict(found)) for registry, found in open_registries()]
    try:
        importlib.import_module(name)
    except Exception as error:
        raise UserError(f"{title}: its import failed with {type(error).__name__}: {first_line(error)}") from error
    for registry, found, earlier in before:
        if taken := [key for key, value in earlier.items() if found.get(key) is not value]:
            found.update(earlier)
            raise UserError(f"{title}: {taken[0]} in {registry} is taken; register another name")
    LOADED[name] = package


def open_registries() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the registries.

    Those that need Lightning are yielded only if they are imported already, as in a training run.
    """
    for module, registry in REGISTRIES:
        if module in sys.modules or not module.startswith("betavae.runtime."):
            yield registry, getattr(importlib.import_module(module), registry)


def describe_missing(recorded: object) -> str:
    """Describe the plugins that a run recorded and this process has not loaded, or return "".

    Args:
        recorded: The plugins as `LOADED` has them, from a file that may hold anything.
    """
    plugins = recorded if isinstance(recorded, dict) else {}
    texts = {name: package for name, package in plugins.items() if isinstance(name, str) and isinstance(package, str)}
    # The sentence is printed, and its command may be pasted into a shell.
    safe = {name: package for name, package in texts.items() if re.fullmatch(r"[\w.]+,[\w. +!-]*", f"{name},{package}")}
    missing = {name: package for name, package in safe.items() if name not in LOADED}
    modules = [name for name, package in missing.items() if not package]
    packages = [package for package in dict.fromkeys(missing.values()) if package]
    remedies = [f"install {', '.join(packages)}"] * bool(packages)
    remedies += [f"pass 'plugins=[{','.join(modules)}]'"] * bool(modules)
    return f"trained with the plugins {', '.join(missing)}; {' and '.join(remedies)}" if missing else ""
