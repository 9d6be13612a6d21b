import json

import pydantic
import pytest
import torch
from packaging.version import Version

from tests.commands import REPO, load_script

OLDER = Version(torch.__version__) < Version("2.15") or Version(pydantic.VERSION) < Version("2.14")


@pytest.mark.skipif(OLDER, reason="torch's optimisers and pydantic's wording are the newest's in configs/schema.json")
def test_the_schema_of_the_settings_is_up_to_date():
    module = load_script(REPO / "scripts" / "schema.py")
    kept = json.loads((REPO / "configs" / "schema.json").read_text())
    assert kept == json.loads(json.dumps(module.make_schema())), "run `python scripts/schema.py`"
    assert kept["$defs"]["Model"]["properties"]["activation"]["enum"][0] == "relu"
    assert "required" not in json.dumps(kept)
    for path in (REPO / "configs").glob("*/*.yaml"):
        if (line := path.read_text().partition("$schema=../schema.json")[2].split("\n")[0]).startswith("#/$defs/"):
            assert line.removeprefix("#/$defs/") in kept["$defs"], path
