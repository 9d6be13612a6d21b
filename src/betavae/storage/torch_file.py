"""Read untrusted files of `torch.save` without running code, in memory proportional to their size.

`torch.load(weights_only=True)` guarantees neither. Before torch 2.10 a file can corrupt memory (CVE-2026-24747). In any
version a file of one kilobyte can allocate without limit, as `bytearray(n)` or as a tensor with a stride of 0.
"""

import io
import math
import pickle
import pickletools
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16},
    **{"LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8},
    **{"BFloat16Storage": torch.bfloat16, "ByteStorage": torch.uint8, "BoolStorage": torch.bool},
}
MAX_DIMS = 64
MAX_REUSE = 10  # uses of each byte of a file; keys and tensors may be shared by several places


def load_torch_file(path: Path) -> Any:
    """Load tensors (to the CPU) and plain values.

    Raises:
        Exception: Of any type, if the file is damaged, holds anything else, or holds values of more than `MAX_REUSE`
            times its size, such as a tensor with a stride of 0.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        if sum(part.file_size for part in archive.infolist()) > size:
            raise ValueError("it unpacks to more than its size")
        # The key is the name within the archive's only folder; `read` verifies the checksum.
        parts = {name.partition("/")[2]: bytearray(archive.read(name)) for name in archive.namelist()}
    if parts.get("byteorder", b"little").decode() != sys.byteorder:
        raise ValueError("it was written on a machine with another byte order")
    content = Unpickler(parts).load()
    check_size(content, MAX_REUSE * size)
    return content


class Unpickler(pickle.Unpickler):
    """Unpickle plain values, and tensors whose bytes are in `parts`, the files of the archive by name."""

    def __init__(self, parts: dict[str, bytearray]):
        self.parts = parts
        # CPython allocates a memo as long as its largest index.
        for opcode, index, _ in pickletools.genops(parts["data.pkl"]):
            if "PUT" in opcode.name and index is not None and index > len(parts["data.pkl"]):
                raise ValueError("it is not a pickle that torch.save wrote")
        super().__init__(io.BytesIO(parts["data.pkl"]))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return lambda: OrderedDict()  # without arguments, since a few bytes of pickle could copy a long list
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return rebuild_tensor
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is neither a tensor nor a plain value")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, count = pid
        data = self.parts[f"data/{key}"]
        storage = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        if len(storage) != count:
            raise ValueError(f"data/{key} holds {len(storage)} numbers instead of {count}")
        return storage


def rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """Build a tensor as `torch._utils` does, with a limited number of dimensions."""
    if len(size) > MAX_DIMS:
        raise ValueError(f"a tensor has {len(size)} dimensions")
    return storage.as_strided(size, stride, offset)


def check_size(value: Any, left: int) -> int:
    """Subtract the size of `value` from `left` bytes and return the rest.

    Raises:
        ValueError: If nothing is left.
    """
    if isinstance(value, Tensor):
        left -= math.prod(value.shape) * value.element_size()
    elif isinstance(value, str | bytes | bytearray):
        left -= len(value)
    else:
        left -= 1 + (value.bit_length() // 8 if isinstance(value, int) else 0)
    if left < 0:
        raise ValueError("its values take more memory than its size allows")
    if isinstance(value, dict):
        value = (*value.keys(), *value.values())
    if isinstance(value, list | tuple | set | frozenset):
        for part in value:
            left = check_size(part, left)
    return left
