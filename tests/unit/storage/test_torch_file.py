import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from betavae.storage.torch_file import DTYPES, load_torch_file
from tests.commands import REPO

START, END = b"\x80\x02", b"."
NUMBERS = pickle.dumps([(i, i) for i in range(1000)], 2)[2:-1]  # leaves its list in memo 0


def write_archive(path, pickled):
    """Write a file as torch.save does."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", pickled)
        file.writestr("x/byteorder", "little")
        file.writestr("x/data/0", bytes(16))
        file.writestr("x/version", "3\n")


def pickle_tensor(size, stride, count=4):
    """Return the pickle of a tensor over four float32."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuJ" + count.to_bytes(4, "little")
    sizes = b"".join(b"(" + b"".join(b"J" + n.to_bytes(4, "little") for n in t) + b"t" for t in (size, stride))
    new = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQK\0" + sizes + b"\x89" + new + b"tR"


HOSTILE = {
    "stride": (pickle_tensor([2**14], [0]), "more memory"),
    "bytearray": (b"cbuiltins\nbytearray\nJ" + (2**28).to_bytes(4, "little") + b"\x85R", "builtins.bytearray"),
    "encode": (b"c_codecs\nencode\nX\x01\0\0\0xX\x03\0\0\0hex\x86R", "_codecs.encode"),
    "tensor": (b"ctorch\nTensor\nK\x01\x85R", "torch.Tensor"),
    "memo": (b"Nr" + (2**25).to_bytes(4, "little"), "not a pickle that torch.save"),
    "copies": (b"](" + NUMBERS + b"ccollections\nOrderedDict\nh\0\x85Re", "argument"),
    "references": (b"]q\0" + b"".join(b"](" + b"h%c" % i * 9 + b"eq%c" % (i + 1) for i in range(9)), "more memory"),
    "dimensions": (pickle_tensor([1] * 65, [1] * 65), "65 dimensions"),
    "out_of_bounds": (pickle_tensor([5], [1]), "out of bounds"),
    "longer_storage": (pickle_tensor([2000], [1], 2000), "4 numbers instead of 2000"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_rejected(tmp_path, name):
    pickled, message = HOSTILE[name]
    write_archive(tmp_path / "x.pt", START + pickle_tensor([2, 2], [1, 2]) + END)
    assert torch.equal(load_torch_file(tmp_path / "x.pt"), torch.zeros(2, 2))
    write_archive(tmp_path / "x.pt", START + pickled + END)
    with pytest.raises(Exception, match=message):
        load_torch_file(tmp_path / "x.pt")


def test_damaged_and_compressed_files_are_rejected(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.arange(1000)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(1000).numpy().tobytes()) + 99] ^= 1
    path.write_bytes(content)
    with pytest.raises(zipfile.BadZipFile, match="CRC"):
        load_torch_file(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", pickle.dumps([], 2))
        file.writestr("x/data/0", bytes(10**6))
    with pytest.raises(ValueError, match="unpacks to more"):
        load_torch_file(path)


def test_values_are_loaded_as_torch_loads_them(tmp_path):
    shared = torch.arange(12)
    content = {
        "types": [torch.ones(3, dtype=dtype) for dtype in DTYPES.values()],
        "views": [shared.view(3, 4).t(), shared[3:5], torch.zeros(()), torch.zeros(0, 3), torch.ones(1).expand(2, 3)],
        "plain": OrderedDict(a=(1, -(2**40), None, True), b=[2.5, "ü"]),
    }
    torch.save(content, tmp_path / "x.pt")
    found, expected = load_torch_file(tmp_path / "x.pt"), torch.load(tmp_path / "x.pt", weights_only=True)
    for key in ("types", "views"):
        for one, other in zip(found[key], expected[key], strict=True):
            assert one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)
    assert found["plain"] == expected["plain"] and type(found["plain"]) is OrderedDict
    found["views"][1].zero_()  # as with torch.load, both share one storage
    assert found["views"][0][3, 0] == 0


def test_no_unsafe_reader_is_used_or_recommended():
    pages = [REPO / "README.md", *(REPO / "docs").glob("*.md"), *(REPO / "docs").glob("*.ipynb")]
    for path in (*(REPO / "src").rglob("*.py"), *(REPO / "scripts").rglob("*.py"), *pages):
        for unsafe in ("torch.load(", "load_from_checkpoint(", "import pickle\n", "joblib.load", "allow_pickle=True"):
            assert unsafe not in path.read_text() or path.name == "torch_file.py", (path, unsafe)
