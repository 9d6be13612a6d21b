import io
import zipfile
from pathlib import Path

import torch

from betavae.storage.cache import load_or_compute
from betavae.storage.files import STAMP


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_kept_file_is_data_and_never_run(tmp_path):
    buffer = io.BytesIO()
    torch.save({"asked": {}, "made": Hostile(tmp_path / "run")}, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = STAMP.encode()
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    assert load_or_compute(tmp_path / "a.pt", {}, lambda: {"x": 1}) == {"x": 1}
    assert not (tmp_path / "run").exists()
    assert load_or_compute(tmp_path / "a.pt", {}, lambda: {"x": 2}) == {"x": 1}, "it was made anew, and then kept"
    assert load_or_compute(tmp_path / "a.pt", {"seed": 1}, lambda: {"x": 3}) == {"x": 3}
