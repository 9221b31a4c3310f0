"""Safetensors files, read piece by piece into the caller's memory: no file is mapped, only the piece is in memory.

``open_checkpoint`` reads the index and every header, and checks them against the files, before any tensor is read.
Source: safetensors.readme: "Format", eight bytes of header length, the header as JSON, then the tensors.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_HEADER_LIMIT = 100_000_000  # bytes, as safetensors has it


class CheckpointError(ValueError):
    """A checkpoint that is not complete or not what the model wants: the file or key, what is there, what is accepted."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: ``begin`` in bytes from the start of the file."""

    key: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` of the first dimension, on the CPU; the whole of a tensor without dimensions.

        Raises:
            CheckpointError: the file is gone, or shorter than it was.
        """
        if not self.shape:
            out = torch.empty((), dtype=self.dtype)
            offset = 0
        else:
            rows = range(self.shape[0])[start:stop]
            out = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
            offset = rows.start * math.prod(self.shape[1:]) * self.dtype.itemsize
        self._read_into(out, self.begin + offset)
        return out

    def read_into(self, out: Tensor, start: int = 0) -> None:
        """As many rows from ``start`` on as ``out`` has, which is contiguous, on the CPU and of the stored dtype."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        self._read_into(out, self.begin + start * row)

    def _read_into(self, out: Tensor, position: int) -> None:
        size = out.numel() * out.element_size()
        if not size:
            return
        left = memoryview((ctypes.c_char * size).from_address(out.data_ptr())).cast("B")
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(position)
                while left and (count := file.readinto(left)):
                    left = left[count:]
        except OSError as error:
            raise CheckpointError(
                f"{self.file}: {self.key} cannot be read ({error}); accepted: a complete file"
            ) from error
        if left:
            raise CheckpointError(f"{self.file}: ends within {self.key}; accepted: a complete file")


class Scratch:
    """Memory that pieces are read into one after the other: freed and allocated anew, they would leave holes in the heap."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def read(self, stored: StoredTensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a stored tensor, until the next call."""
        rows = range(stored.shape[0])[start:stop]
        shape = (len(rows), *stored.shape[1:])
        size = math.prod(shape) * stored.dtype.itemsize
        if self._bytes.numel() < size:
            self._bytes = torch.empty(size, dtype=torch.uint8)
        out = self._bytes[:size].view(stored.dtype).view(shape)
        stored.read_into(out, rows.start)
        return out


def open_checkpoint(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder with ``model.safetensors`` or ``model.safetensors.index.json``, or of one such file, by key.

    Where both are there the first is taken, as transformers does (``modeling_utils._get_resolved_checkpoint_files``).

    Raises:
        CheckpointError: the folder, a file that the index names or a key of it is missing; a header is damaged; a file is
            not as long as its header says; a key stands in two files.
    """
    if path.is_file():
        if path.suffix == ".json":  # the index, or the config
            raise CheckpointError(
                f"{path}: is no .safetensors file; accepted: such a file, or the folder {path.parent}"
            )
        return _read_header(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: there is no such folder; accepted: a local folder, or a .safetensors file (no hub id)"
        )
    index = path / INDEX
    # before the index: a checkpoint that is saved anew in one file leaves the old index there
    if (path / SINGLE).is_file():
        return _read_header(path / SINGLE)
    if not index.exists():
        raise CheckpointError(f"{path}: has neither {INDEX} nor {SINGLE}; accepted: a checkpoint in safetensors")
    homes = _weight_map(index)
    for name in sorted(set(homes.values())):
        if not (path / name).is_file():
            keys = [key for key, home in homes.items() if home == name]
            raise CheckpointError(
                f"{path / name}: is missing; {index.name} says that it has {keys[0]} ({len(keys)} keys)"
            )
    there: dict[str, StoredTensor] = {}
    for name in sorted(set(homes.values())):
        for key, stored in _read_header(path / name).items():
            if key in there:
                raise CheckpointError(f"{path / name}: has {key}, which {there[key].file.name} has, too")
            there[key] = stored
    for key, name in homes.items():
        if key not in there or there[key].file.name != name:
            raise CheckpointError(f"{path / name}: has no {key}, which {index.name} says that it has")
    return there


def _weight_map(index: Path) -> dict[str, str]:
    try:
        homes = json.loads(index.read_text("utf-8"))["weight_map"]
        if not all(isinstance(name, str) and Path(name).name == name for name in homes.values()):
            raise ValueError("a name in it is not that of a file beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: is no index of safetensors ({type(error).__name__}: {error})") from error
    return dict(homes)


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise ValueError(f"its header would have {length} bytes, and the file has {size}")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        tensors = {key: _stored(key, file, about, 8 + length) for key, about in header.items()}
        end = 0
        for key, (begin, ends) in sorted(
            ((key, about["data_offsets"]) for key, about in header.items()), key=lambda row: row[1]
        ):
            if begin != end:
                raise ValueError(f"{key} begins at byte {begin} of the data, and what stands before it ends at {end}")
            end = ends
        if 8 + length + end != size:
            raise ValueError(f"its tensors end at byte {8 + length + end}, and the file has {size}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{file}: is no complete safetensors file ({type(error).__name__}: {error})") from error
    return tensors


def _stored(key: str, file: Path, about: dict[str, Any], data: int) -> StoredTensor:
    begin, end = about["data_offsets"]
    shape = tuple(int(size) for size in about["shape"])
    if about["dtype"] not in DTYPES:
        raise ValueError(f"{key} has the dtype {about['dtype']}; accepted: {', '.join(DTYPES)}")
    dtype = DTYPES[about["dtype"]]
    if begin < 0 or min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{key} has {end - begin} bytes for {about['dtype']} {list(shape)}")
    return StoredTensor(key, file, dtype, shape, data + begin)
