"""Write a JSON schema of all settings for editors: `python scripts/schema.py [out=PATH]`.

A YAML file whose first line is `# yaml-language-server: $schema=../schema.json#/$defs/Model` is completed and checked
while you type. For an experiment, the line ends in `schema.json`.
"""

import json
from typing import Any

from pydantic import Field

from betavae.runtime.cli import ScriptSettings, gc_paused, script_command
from betavae.runtime.settings import NonEmptyStr, TrainConfig


class Settings(ScriptSettings):
    out: NonEmptyStr = Field("configs/schema.json", title="file of the schema")


def make_schema() -> dict[str, Any]:
    """Return the schema of the settings of a training run."""
    from betavae.storage.files import STAMP

    whole = drop_requirements(TrainConfig.model_json_schema())
    for group in (whole, *whole["$defs"].values()):
        group["properties"] |= {"defaults": {"type": "array"}, "hydra": {"type": "object"}}  # of Hydra
    return {"made_by": STAMP, **whole}


def drop_requirements(node: Any) -> Any:
    """Drop required keys and defaults from a schema, since a YAML file may hold any part of the settings."""
    if isinstance(node, dict):
        return {
            key: drop_requirements(value) for key, value in node.items() if key not in ("required", "default", "title")
        }
    return [drop_requirements(item) for item in node] if isinstance(node, list) else node


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        from betavae.storage.files import atomic_path

    with atomic_path(settings.out) as path:
        path.write_text(json.dumps(make_schema(), indent=1) + "\n")
    print(f"wrote {settings.out}")


if __name__ == "__main__":
    main()
