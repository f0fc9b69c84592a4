"""Graphs as text, one line a node, and numbered files of them with what changed from one to the next."""

import difflib
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from bwla_compiler.errors import CheckpointError
from bwla_compiler.graph.capture import PREFIX, held

CONTEXT = 1
"""Unchanged lines around each change of a diff."""


def graph_text(graph: Graph | GraphModule) -> str:
    """Return a line a node: its name, dtype and shape, and what it is.

    A parameter shows its own name, the root of its mean square, and a checksum of its values, so that a fold shows in a
    diff. A bare Graph, which holds no parameters, shows their names.
    """
    gm = graph if isinstance(graph, GraphModule) else None
    nodes = graph.graph.nodes if isinstance(graph, GraphModule) else graph.nodes
    return "".join(f"{line}\n" for node in nodes if (line := _line(gm, node)))


def _line(gm: GraphModule | None, node: Node) -> str:
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    if node.op == "get_attr":
        value = held(gm, node) if gm is not None else None
        name = str(node.target).removeprefix(PREFIX)
        return f"{node}: {_kind(value)} = {name}{_values(value)}" if isinstance(value, Tensor) else f"{node} = {name}"
    shape = _kind(node.meta.get("val"))
    typed = f"{node}: {shape}" if shape else str(node)
    if node.op == "placeholder":
        return f"{typed} = input"
    arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(a)}" for k, a in node.kwargs.items()]
    return f"{typed} = {_called(node)}({', '.join(arguments)})"


def _called(node: Node) -> str:
    """Return what a node calls, "silu" or "bwla.transform": ATen's own names are plain."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = str(target).removesuffix(".default")
        return name.removeprefix("aten.")
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _argument(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_argument, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value).removeprefix("torch.")


def _kind(value: object) -> str:
    """Return dtype and shape, "float32[3, 11, 64]"; of several results each one's."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, map(_kind, value)))
    return ""


def _values(value: Tensor) -> str:
    if value.is_meta or not value.numel() or isinstance(value, torch._subclasses.FakeTensor):
        return ""
    plain = value.detach().cpu().contiguous()
    crc = zlib.crc32(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    rms = f"rms {plain.double().square().mean().sqrt():.4g}, " if plain.is_floating_point() else ""
    return f"  # {rms}crc {crc:08x}"


class GraphDump:
    """Writes stage after stage into a folder: `03-fold-rotations.txt`, and beside it a `.diff` from the one before.

    before: put before all names. Raises CheckpointError where the folder cannot be written.
    """

    def __init__(self, folder: Path, *, before: str = "") -> None:
        self.folder, self.before = folder, before
        self.files: list[Path] = []
        self._number, self._last, self._name = 0, "", ""

    def add(self, name: str, text: str, *, notes: Sequence[str] = ()) -> None:
        """Write a stage: its text, and what changed since the last one, with notes above it."""
        stem = f"{self.before}{self._number:02d}-{name}"
        self.write(f"{stem}.txt", text)
        if self._number:
            lines = (self._last.splitlines(), text.splitlines())
            changes = difflib.unified_diff(*lines, self._name, name, n=CONTEXT, lineterm="")
            comments = [f"# {note}" for note in notes]
            self.write(f"{stem}.diff", "".join(f"{line}\n" for line in (*comments, *changes)))
        self._number, self._last, self._name = self._number + 1, text, name

    def write(self, name: str, text: str) -> None:
        """Write one file. Raises CheckpointError where that does not go."""
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
        self.files.append(path)
