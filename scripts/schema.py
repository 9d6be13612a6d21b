"""What each setting may be, for editors that know JSON schema: `python scripts/schema.py [out=configs/schema.json]`.

With the line `# yaml-language-server: $schema=../schema.json#/$defs/Model` at its top, a YAML file is completed and
checked as it is typed; an experiment's line ends in `schema.json`.
"""

import json
from typing import Any

from pydantic import Field

from betavae.runtime.cli import ScriptSettings, gc_paused, script_command
from betavae.runtime.settings import NonEmptyStr, TrainConfig


class Settings(ScriptSettings):
    out: NonEmptyStr = Field("configs/schema.json", title="the schema")


def schema() -> dict[str, Any]:
    from betavae.storage.files import STAMP

    whole = partial(TrainConfig.model_json_schema())
    for group in (whole, *whole["$defs"].values()):
        group["properties"] |= {"defaults": {"type": "array"}, "hydra": {"type": "object"}}  # Hydra's own
    return {"made_by": STAMP, **whole}


def partial(node: Any) -> Any:
    """Without what is required, and without defaults: a YAML file says only what differs, and holds the defaults."""
    if isinstance(node, dict):
        return {key: partial(value) for key, value in node.items() if key not in ("required", "default", "title")}
    return [partial(item) for item in node] if isinstance(node, list) else node


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        from betavae.storage.files import atomic_path

    with atomic_path(settings.out) as path:
        path.write_text(json.dumps(schema(), indent=1) + "\n")
    print(f"the schema of all settings in {settings.out}")


if __name__ == "__main__":
    main()
