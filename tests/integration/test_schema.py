import json

import pydantic
import pytest
import torch
from packaging.version import Version

from tests.commands import REPO, load_script

OLDER = Version(torch.__version__) < Version("2.15") or Version(pydantic.VERSION) < Version("2.14")


@pytest.mark.skipif(OLDER, reason="configs/schema.json depends on the versions of torch and pydantic")
def test_the_schema_of_the_settings_is_up_to_date():
    module = load_script(REPO / "scripts" / "schema.py")
    saved = json.loads((REPO / "configs" / "schema.json").read_text())
    assert saved == json.loads(json.dumps(module.make_schema())), "run `python scripts/schema.py`"
    assert saved["$defs"]["Model"]["properties"]["activation"]["enum"][0] == "relu"
    assert "required" not in json.dumps(saved)
    for path in (REPO / "configs").glob("*/*.yaml"):
        if (line := path.read_text().partition("$schema=../schema.json")[2].split("\n")[0]).startswith("#/$defs/"):
            assert line.removeprefix("#/$defs/") in saved["$defs"], path
