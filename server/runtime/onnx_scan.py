"""Looks through an ONNX file without trusting it and without loading it: operators, tensors, external data, shapes.

ONNX Runtime follows external-data paths, allocates what a tensor's dimensions say and runs any operator that it knows, so a file from
outside is read here first. The file is mapped, not read, and tensor bytes are stepped over: a scan costs milliseconds and no memory.
Field numbers are those of onnx.proto (IR version 13), the wire format is https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

from server.errors import ModelRejected

# Domains whose operators live in ONNX Runtime itself or in our kernel library; any other would need a library of someone else's.
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "understudy"})
# Operators of those domains that reach outside of the file: compiled caches by path, Python and ATen callbacks.
FORBIDDEN = frozenset({"EPContext", "PyOp", "PythonOp", "PythonOpGrad", "ATen", "ATenGrad", "ExternalGradient"})
# TensorProto.DataType -> bits an element; strings (8) have no fixed size.
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16}
_BITS |= {17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2}
_MAX_DEPTH = 48  # graphs in attributes of nodes in graphs; ONNX Runtime's own parser stops at 100 messages
_MAX_FIELDS = 5_000_000
_MAX_ELEMENTS = 1 << 40
_MAX_STATIC_INPUT = 1 << 31


class _Field(NamedTuple):
    number: int
    wire: int
    value: int  # varint and fixed: the value; bytes: where they begin
    stop: int  # bytes: where they end


@dataclass(slots=True)
class OnnxSummary:
    """What a file holds. `external` are file names beside it; `inputs`/`outputs` are the graph's value names in order."""

    nodes: int = 0
    tensors: int = 0
    operators: set[tuple[str, str]] = field(default_factory=set)
    external: set[str] = field(default_factory=set)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    functions: set[tuple[str, str]] = field(default_factory=set)


def scan_onnx(path: Path) -> OnnxSummary:
    """Summary of an ONNX file that is safe to hand to ONNX Runtime.

    Raises:
        ModelRejected: not ONNX, truncated, foreign operators, external data outside of the folder, dimensions that its bytes do not back.
    """
    size = path.stat().st_size
    if size == 0:
        raise ModelRejected(f"{path.name} is empty; an ONNX model was expected. Copy or pull it again.", file=path.name)
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        scanner = _Scanner(data, path)
        scanner.model(0, size)
        scanner.check_operators()
    return scanner.summary


class _Scanner:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.summary = OnnxSummary()
        self.fields_left = _MAX_FIELDS

    def reject(self, what: str, mend: str = "It is broken or no exporter made it: export or pull the model again.") -> NoReturn:
        raise ModelRejected(f"{self.path.name}: {what}. {mend}", file=self.path.name)

    # The wire format.

    def varint(self, at: int, end: int) -> tuple[int, int]:
        data, value, shift = self.data, 0, 0
        while at < end:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, at
            shift += 7
            if shift > 63:
                self.reject("a number is longer than 10 bytes; it is no valid protobuf")
        return self.reject("it ends in the middle of a number; it is truncated or no protobuf")

    def fields(self, at: int, end: int) -> Iterator[_Field]:
        while at < end:
            self.fields_left -= 1
            if self.fields_left < 0:
                self.reject(f"it has more than {_MAX_FIELDS} fields, which no real graph needs")
            key, at = self.varint(at, end)
            number, wire = key >> 3, key & 7
            if number == 0:
                self.reject("it has a field with number 0; it is no valid protobuf")
            if wire == 0:
                value, at = self.varint(at, end)
                yield _Field(number, wire, value, at)
                continue
            if wire == 2:
                length, at = self.varint(at, end)
            elif wire in (1, 5):
                length = 8 if wire == 1 else 4
            else:
                self.reject(f"it has a field of wire type {wire}; it is no valid protobuf")
            if length > end - at:
                self.reject(f"a field of {length} bytes begins {end - at} bytes before the end of its message; the file is truncated")
            yield _Field(number, wire, at, at + length)
            at += length

    def text(self, item: _Field, limit: int = 4096) -> str:
        if item.wire != 2:
            self.reject("a name is not stored as text")
        if item.stop - item.value > limit:
            self.reject(f"a name has {item.stop - item.value} bytes, more than {limit}")
        try:
            return self.data[item.value : item.stop].decode("utf-8")
        except UnicodeDecodeError:
            self.reject("a name is not UTF-8")

    def message(self, item: _Field) -> tuple[int, int]:
        if item.wire != 2:
            self.reject(f"field {item.number} should hold a message and holds a number")
        return item.value, item.stop

    def integers(self, item: _Field) -> Iterator[int]:
        """Signed values of a repeated int64, packed or not."""
        if item.wire == 0:
            yield item.value - (1 << 64) if item.value >> 63 else item.value
            return
        at, end = self.message(item)
        while at < end:
            value, at = self.varint(at, end)
            yield value - (1 << 64) if value >> 63 else value

    # onnx.proto.

    def model(self, at: int, end: int) -> None:
        graphs = 0
        for item in self.fields(at, end):
            if item.number == 7:
                graphs += 1
                self.graph(*self.message(item), depth=0)
            elif item.number == 25:
                self.function(*self.message(item))
        if graphs != 1:
            self.reject(f"it holds {graphs} graphs; an ONNX model has exactly one")

    def graph(self, at: int, end: int, depth: int) -> None:
        if depth > _MAX_DEPTH:
            self.reject(f"graphs are nested more than {_MAX_DEPTH} deep")
        for item in self.fields(at, end):
            if item.number == 1:
                self.node(*self.message(item), depth=depth)
            elif item.number == 5:
                self.tensor(*self.message(item))
            elif item.number == 15:
                self.sparse(*self.message(item))
            elif item.number in (11, 12):
                name = self.value_info(*self.message(item))
                if depth == 0:
                    (self.summary.inputs if item.number == 11 else self.summary.outputs).append(name)

    def node(self, at: int, end: int, depth: int) -> None:
        operator = domain = ""
        for item in self.fields(at, end):
            if item.number == 4:
                operator = self.text(item)
            elif item.number == 7:
                domain = self.text(item)
            elif item.number == 5:
                self.attribute(*self.message(item), depth=depth)
        self.summary.nodes += 1
        self.summary.operators.add((domain, operator))

    def attribute(self, at: int, end: int, depth: int) -> None:
        for item in self.fields(at, end):
            if item.number in (5, 10):
                self.tensor(*self.message(item))
            elif item.number in (6, 11):
                self.graph(*self.message(item), depth=depth + 1)
            elif item.number in (22, 23):
                self.sparse(*self.message(item))

    def function(self, at: int, end: int) -> None:
        name = domain = ""
        for item in self.fields(at, end):
            if item.number == 1:
                name = self.text(item)
            elif item.number == 10:
                domain = self.text(item)
            elif item.number == 7:
                self.node(*self.message(item), depth=1)
            elif item.number == 11:
                self.attribute(*self.message(item), depth=1)
        self.summary.functions.add((domain, name))

    def sparse(self, at: int, end: int) -> None:
        for item in self.fields(at, end):
            if item.number in (1, 2):
                self.tensor(*self.message(item))

    def tensor(self, at: int, end: int) -> None:
        self.summary.tensors += 1
        elements, kind, raw, external, name = 1, 0, -1, {}, ""
        located_outside = False
        for item in self.fields(at, end):
            if item.number == 1:
                for dim in self.integers(item):
                    elements = self.grown(elements, dim, name)
            elif item.number == 2:
                kind = item.value
            elif item.number == 8:
                name = self.text(item)
            elif item.number == 9:
                start, stop = self.message(item)
                raw = stop - start
            elif item.number == 13:
                key, value = self.entry(*self.message(item))
                external[key] = value
            elif item.number == 14:
                located_outside = item.value == 1
        bits = _BITS.get(kind, 0)
        if not bits and kind != 8:
            self.reject(f"tensor {name!r} has the unknown element type {kind}")
        wanted = (elements * bits + 7) // 8
        if external or located_outside:
            self.check_external(name, external, wanted)
        elif raw >= 0:
            if bits and raw != wanted:
                self.reject(f"tensor {name!r} has {raw} bytes where its dimensions need {wanted}")
        elif elements > 4 * (end - at):
            self.reject(f"tensor {name!r} claims {elements} elements in a message of {end - at} bytes")

    def grown(self, elements: int, dim: int, name: str) -> int:
        if dim < 0:
            self.reject(f"tensor {name!r} has a dimension of {dim}; dimensions are not negative")
        if elements * dim > _MAX_ELEMENTS:
            self.reject(f"tensor {name!r} claims more than {_MAX_ELEMENTS} elements")
        return elements * dim

    def entry(self, at: int, end: int) -> tuple[str, str]:
        key = value = ""
        for item in self.fields(at, end):
            if item.number == 1:
                key = self.text(item)
            elif item.number == 2:
                value = self.text(item)
        return key, value

    def check_external(self, name: str, entries: dict[str, str], wanted: int) -> None:
        mend = "Save the model again with its data in files beside it (onnx.save_model(..., location='model.onnx.data'))."
        location = entries.get("location", "")
        if not location or location in (".", "..") or any(c in location for c in "/\\\0:"):
            self.reject(f"tensor {name!r} takes its data from {location!r}, which is no plain file name beside the model", mend)
        try:
            offset = int(entries.get("offset", "0"))
            length = int(entries.get("length", str(wanted)))
        except ValueError:
            self.reject(f"tensor {name!r} has an external offset or length that is no number", mend)
        target = self.path.parent / location
        if target.is_symlink() or not target.is_file():
            self.reject(f"tensor {name!r} takes its data from {location!r}, which is not a file in the model's folder", mend)
        if offset < 0 or length != wanted or offset + length > target.stat().st_size:
            self.reject(f"tensor {name!r} needs {wanted} bytes at {offset} of {location!r}, which has {target.stat().st_size}", mend)
        self.summary.external.add(location)

    def value_info(self, at: int, end: int) -> str:
        name = ""
        for item in self.fields(at, end):
            if item.number == 1:
                name = self.text(item)
            elif item.number == 2:
                self.type(*self.message(item))
        return name

    def type(self, at: int, end: int) -> None:
        for kind in self.fields(at, end):
            if kind.number != 1:  # sequences, maps and optionals have no dimensions of their own
                continue
            for part in self.fields(*self.message(kind)):
                if part.number == 2:
                    self.shape(*self.message(part))

    def shape(self, at: int, end: int) -> None:
        elements = 1
        for dim in self.fields(at, end):
            if dim.number != 1:
                continue
            for item in self.fields(*self.message(dim)):
                if item.number == 1 and item.wire == 0:
                    value = item.value - (1 << 64) if item.value >> 63 else item.value
                    elements *= max(value, 1)  # some exporters write -1 for "any"
        if elements > _MAX_STATIC_INPUT:
            self.reject(f"an input or output claims {elements} elements, more than {_MAX_STATIC_INPUT}")

    def check_operators(self) -> None:
        if not self.summary.nodes and not self.summary.outputs:
            self.reject("its graph has no nodes and no outputs")
        for domain, operator in sorted(self.summary.operators):
            if (domain, operator) in self.summary.functions:
                continue
            if domain not in DOMAINS:
                self.reject(
                    f"it uses operator {operator!r} of domain {domain!r}, which needs a custom library; only ONNX, ONNX Runtime and "
                    "Understudy operators are run",
                    "Export the model without custom operators.",
                )
            if operator in FORBIDDEN:
                self.reject(f"it uses operator {operator!r}, which reaches outside of the model's folder", "Export the model without it.")
