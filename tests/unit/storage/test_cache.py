import io
import zipfile
from pathlib import Path

import torch

from betavae.storage.cache import load_or_compute
from betavae.storage.files import STAMP


class Hostile:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_hostile_cache_file_is_replaced_and_not_executed(tmp_path):
    buffer = io.BytesIO()
    torch.save({"key": {}, "value": Hostile(tmp_path / "run")}, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = STAMP.encode()
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    assert load_or_compute(tmp_path / "a.pt", {}, lambda: {"x": 1}) == {"x": 1}
    assert not (tmp_path / "run").exists()
    assert load_or_compute(tmp_path / "a.pt", {}, lambda: {"x": 2}) == {"x": 1}
    assert load_or_compute(tmp_path / "a.pt", {"seed": 1}, lambda: {"x": 3}) == {"x": 3}


def test_a_foreign_file_is_left_alone_and_reported(tmp_path, capsys):
    (tmp_path / "a.pt").write_text("mine")
    assert load_or_compute(tmp_path / "a.pt", {}, lambda: {"x": 1}) == {"x": 1}
    assert (tmp_path / "a.pt").read_text() == "mine"
    assert "a.pt already exists and was not made by betavae" in capsys.readouterr().out
