"""Put train.py, scripts/ and configs/ into the package of a wheel, for the console command `betavae`."""

import glob
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":  # an editable installation uses the files of the clone
            names = ("train.py", "configs", *glob.glob("scripts/*.py", root_dir=self.root))
            build_data["force_include"] |= {name: f"betavae/{name}" for name in names}
