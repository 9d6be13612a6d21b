"""The layers of the package, read from its imports."""

import ast
from pathlib import Path

import pytest

from tests.commands import REPO

SOURCE = REPO / "src" / "betavae"
# Each layer may import itself and those after it.
LAYERS = [
    "__main__",
    "sweeps",
    "runtime",
    "applications",
    "module",
    "grids",
    "plotting",
    "metrics",
    "objectives",
    "models",
    "data",
    "optim",
]
LAYERS += ["storage", "errors"]
FILES = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in sorted(SOURCE.rglob("*.py"))}
FILES = {name.removesuffix(".__init__"): path for name, path in FILES.items() if name != "__init__"}
LIGHTNING = ("module", "data.datamodule", "runtime", "sweeps")  # what may import Lightning
TORCH_ONLY = ("models", "objectives", "optim")
# The code that a researcher reads first.
READ_FIRST = ["models.networks", "models.likelihoods", "models.vae", "objectives", "objectives.elbo", "module"]
READ_FIRST += ["data.image_set", "data.loader", "data.datamodule"]


def find_imports(path: Path) -> set[str]:
    """Find all modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {item.name for item in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{item.name}" for item in node.names)}
    return found


def own_imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports."""
    return {name.removeprefix("betavae.") for name in find_imports(path)} & FILES.keys()


def belongs(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down_the_layers(name):
    layer = LAYERS.index(name.split(".")[0])
    assert not {other for other in own_imports(FILES[name]) if LAYERS.index(other.split(".")[0]) < layer}


@pytest.mark.parametrize("name", FILES)
def test_only_their_layers_import_lightning_and_hydra(name):
    packages = {module.split(".")[0] for module in find_imports(FILES[name])}
    if not belongs(name, LIGHTNING):
        assert "lightning" not in packages
    if not belongs(name, ("runtime", "sweeps")):
        assert not packages & {"hydra", "omegaconf", "tensorboard"}
    if belongs(name, TORCH_ONLY):
        standard = {"collections", "functools", "inspect", "itertools", "math", "typing"}
        assert packages <= standard | {"torch", "betavae"}


def test_imports_have_no_cycles():
    graph = {name: own_imports(path) - {name} for name, path in FILES.items()}
    left = dict(graph)
    while leaves := [name for name, others in left.items() if not others & left.keys()]:
        for name in leaves:
            del left[name]
    assert not left, left


def test_the_research_code_is_one_sitting():
    lines = {name: len(FILES[name].read_text().splitlines()) for name in READ_FIRST}
    assert sum(lines.values()) <= 1400, lines


def test_no_assert_statements_outside_of_tests():
    """`python -O` would remove them."""
    for path in (*FILES.values(), *(REPO / "scripts").rglob("*.py"), REPO / "train.py"):
        assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)], path
