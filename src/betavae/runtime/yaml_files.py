"""YAML files of run and sweep folders: plain values, without interpolation or code."""

import re
from pathlib import Path
from typing import Any

import yaml

from betavae.errors import UserError, first_line
from betavae.storage.files import atomic_write_bytes

MAX_BYTES = 2**20


class Loader(yaml.SafeLoader):
    """YAML with numbers as Hydra reads them and without aliases.

    A few lines of aliases can expand to any size.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it contains an alias")
        return super().compose_node(parent, index)


class Dumper(yaml.SafeDumper):
    """Quote every string that `Loader` would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML writes the line breaks of Unicode as they are, and reads them as spaces, unless in double quotes.
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


Dumper.add_representer(str, Dumper.represent_str)
for side in (Loader, Dumper):  # 1e-3 is a number in YAML 1.2 and for Hydra, but not in YAML 1.1
    side.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*\.?[\d_]*[eE][-+]?\d+$"), None)


def write_yaml(path: Path, values: Any) -> None:
    """Write plain values to a YAML file that `read_yaml` reads back unchanged."""
    atomic_write_bytes(path, yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True).encode())


def read_yaml(path: Path, kind: type = dict) -> Any:
    """Read a YAML file that holds a dict or a list of plain values. An interpolation stays a text.

    Raises:
        UserError: If the file cannot be read, is larger than MAX_BYTES, is not YAML, or holds another type.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
        values = yaml.load(content.decode(), Loader)
        if not isinstance(values, kind):
            raise ValueError(f"it holds a {type(values).__name__}, not a {kind.__name__}")
        return values
    except Exception as error:  # PyYAML raises AttributeError and others too
        reason = first_line(error)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            reason = f"{error.problem} in line {error.problem_mark.line + 1}"
        raise UserError(f"{path} is not a valid YAML file: {reason}") from error
