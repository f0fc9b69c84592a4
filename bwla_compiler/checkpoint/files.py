"""Safetensors files, written whole or not at all, with a checksum of every tensor; and their checks.

A file is written beside its place, synced and renamed. Equal tensors give equal bytes: their order is fixed, nothing
tells of time or place. The header's metadata carry `bwla.crc32`: {name: CRC-32 of the tensor's bytes}, as JSON.
"""

import errno
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from bwla_compiler.errors import CheckpointError

CHECKSUMS = "bwla.crc32"
ALIGNMENT = 8
"""Bytes that a header's length is a multiple of, as safetensors has it."""

_NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors to a file and return its sha256. Memory: none beside the tensors that are on the CPU already.

    Raises CheckpointError, naming the file and the remedy, where it cannot be written; then nothing is left of it.
    """
    entries, start = {}, 0
    widest_first = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that all are aligned
    order = {name: tensors[name].detach().cpu().contiguous() for name in widest_first}
    for name, tensor in order.items():
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"{name} is {tensor.dtype}, which the format has no name for")
        end = start + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    sums = json.dumps({name: zlib.crc32(_bytes(tensor)) for name, tensor in order.items()}, separators=(",", ":"))
    metadata = {"format": "pt", CHECKSUMS: sums}
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNMENT)

    def write(file: BinaryIO) -> None:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in order.values():
            file.write(_bytes(tensor))

    return write_whole(path, write, room=8 + len(header) + start)


def write_json(path: Path, data: Any) -> str:
    """Write data as JSON, whole or not at all, and return the file's sha256. Raises CheckpointError."""
    text = (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()
    return write_whole(path, lambda file: file.write(text), room=len(text))


def write_whole(path: Path, write: Callable[[BinaryIO], Any], *, room: int) -> str:
    """Have `write` fill a file beside `path`, sync it, and give it its name; return its sha256.

    room: bytes that the file will take, for the error. Raises CheckpointError where there is no space or no right.
    """
    beside = path.with_name(f".{path.name}.tmp")
    with writing(path, room=room):
        try:
            with beside.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            found = file_sha256(beside)
            os.replace(beside, path)
            sync_folder(path.parent)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    return found


@contextmanager
def writing(path: Path, *, room: int = 0) -> Iterator[None]:
    """Turn the system's refusals to write a file or folder into CheckpointError, with the remedy."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        need = f" for its {room} bytes" if room else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"{path}: no space left on its disk{need}; free some and start the same command again: it goes on "
                "where it stopped"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise CheckpointError(f"{path}: no permission to write there; choose another folder") from error
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path) -> None:
    """Raise CheckpointError where a file is truncated, or a tensor differs from its checksum; the message names it.

    A file without checksums (of another writer) is only opened.
    """
    with opened(path) as file:
        sums = json.loads((file.metadata() or {}).get(CHECKSUMS, "{}"))
        for name in file.keys():  # noqa: SIM118 (not a dict)
            if name in sums and zlib.crc32(_bytes(file.get_tensor(name))) != sums[name]:
                raise CheckpointError(
                    f"{path}: {name} differs from its checksum: the file is damaged; copy or quantize it again"
                )


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a file."""
    with opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)


def header_bytes(path: Path) -> int:
    """Return the bytes of a file before its first tensor."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def data_bytes(path: Path) -> int:
    """Return the bytes of a file's tensors, its header left out."""
    return path.stat().st_size - header_bytes(path)


def tensor_sizes(path: Path) -> dict[str, int]:
    """Return the bytes of each tensor of a file, by its header. Raises CheckpointError for a damaged one."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return {n: e["data_offsets"][1] - e["data_offsets"][0] for n, e in header.items() if n != "__metadata__"}
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{path}: has no header that can be read ({error}); copy it again") from error


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file, mapped into memory. Raises CheckpointError where it is missing or damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: this shard is missing; copy or download the model again") from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors ({error}): it is truncated or damaged; copy or download it again"
        ) from error


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the metadata entry that carries the CRC-32 of each tensor."""
    sums = {name: zlib.crc32(_bytes(t.detach().cpu().contiguous())) for name, t in sorted(tensors.items())}
    return {CHECKSUMS: json.dumps(sums, separators=(",", ":"))}


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, row-major and little-endian, without a copy."""
    return _bytes(tensor)


def _bytes(tensor: Tensor) -> memoryview:
    if tensor.numel() == 0:
        return memoryview(b"")
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # an array has a buffer, whatever its stubs say
