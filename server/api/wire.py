"""The door of every RPC: bytes in, one parse, and a clear INVALID_ARGUMENT for bytes that are no message.

gRPC's own deserializers answer INTERNAL ("Exception deserializing request!") to a request that does not parse. Here methods
are registered without one: the bytes reach `parse` inside the guarded call, so that the error is one of ours, names the
field and the offset, and is counted like any other.

Use: `server.add_generic_rpc_handlers([wire.handlers(DESCRIPTOR.services_by_name["InferenceService"], servicer, guard)])`.

A servicer is any object with one coroutine a unary method, `async def Embed(self, request, context)`, or one asynchronous
generator a streaming one; it returns (yields) messages, or bytes that are such a message already. A method marked `@raw` is
given the request's bytes instead of the message: for those whose payload is too large to be copied into one. A method that
the servicer lacks answers UNIMPLEMENTED.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import cache
from typing import Any, Protocol, TypeAlias, TypeVar, cast

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from server.errors import InvalidArgument, Unimplemented

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Unary = Callable[[bytes, Context], Awaitable[bytes]]
Stream = Callable[[Any, Context], AsyncIterator[bytes]]  # the first argument: bytes, or an iterator of them where the client streams
M = TypeVar("M", bound=Message)
F = TypeVar("F", bound=Callable[..., Any])

_VARINT, _FIXED64, _DELIMITED, _GROUP, _END_GROUP, _FIXED32 = range(6)
_PACKABLE = {
    **dict.fromkeys((FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FIXED64, FieldDescriptor.TYPE_SFIXED64), _FIXED64),
    **dict.fromkeys((FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_FIXED32, FieldDescriptor.TYPE_SFIXED32), _FIXED32),
}
_DEPTH = 100  # protobuf's own limit on nested messages


class Guard(Protocol):
    """What stands around every method: request id, deadline, metrics, and the one place that turns exceptions into a status.

    `method` is the full path, for example "/understudy.v1.InferenceService/Embed". What is returned must again be a coroutine function
    (`unary`) or an asynchronous generator function (`stream`): gRPC chooses by that how it calls them.
    """

    def unary(self, method: str, call: Unary) -> Unary:
        """Wraps a method with one response and one request."""
        ...

    def stream(self, method: str, call: Stream) -> Stream:
        """Wraps a method with many responses."""
        ...

    def took(self, request: Any) -> None:
        """Looks at each request before its servicer does: a message, or bytes where the method takes those. May raise."""
        ...


def raw(method: F) -> F:
    """Marks a servicer's method that takes the request's bytes as they came."""
    method.takes_bytes = True  # type: ignore[attr-defined]
    return method


def handlers(service: ServiceDescriptor, servicer: object, guard: Guard) -> grpc.GenericRpcHandler:
    """The handler of all methods of `service`. Raises TypeError for a method that takes a stream and gives one answer: none here does."""
    table = {method.name: _handler(method, servicer, guard) for method in service.methods}
    return grpc.method_handlers_generic_handler(service.full_name, table)


def _handler(method: MethodDescriptor, servicer: object, guard: Guard) -> grpc.RpcMethodHandler[Any, Any]:
    path = f"/{method.containing_service.full_name}/{method.name}"
    function = getattr(servicer, method.name, None) or _absent(method)
    takes_bytes = getattr(function, "takes_bytes", False)
    request_class = GetMessageClass(method.input_type)

    def read(data: bytes) -> Any:
        request = data if takes_bytes else parse(request_class, data)
        guard.took(request)
        return request

    async def unary(data: bytes, context: Context) -> bytes:
        return _write(await function(read(data), context))

    async def one_to_many(data: bytes, context: Context) -> AsyncIterator[bytes]:
        async for response in function(read(data), context):
            yield _write(response)

    async def many_to_many(data: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        async def requests() -> AsyncIterator[Any]:
            async for item in data:
                yield read(item)

        async for response in function(requests(), context):
            yield _write(response)

    if not method.server_streaming and not method.client_streaming:
        return grpc.unary_unary_rpc_method_handler(guard.unary(path, unary))
    if not method.server_streaming:
        raise TypeError(f"{path}: a stream of requests with one response is not supported")
    if method.client_streaming:
        return grpc.stream_stream_rpc_method_handler(guard.stream(path, many_to_many))
    return grpc.unary_stream_rpc_method_handler(guard.stream(path, one_to_many))


def _absent(method: MethodDescriptor) -> Callable[..., Any]:
    message = f"{method.full_name} is not offered by this server; GetStatus and reflection show what is."
    if not method.server_streaming:

        async def refuse(_request: object, _context: Context) -> bytes:
            raise Unimplemented(message, method=method.full_name)

        return refuse

    async def refuse_stream(_request: object, _context: Context) -> AsyncIterator[bytes]:
        raise Unimplemented(message, method=method.full_name)
        yield b""  # makes this an asynchronous generator

    return refuse_stream


def _write(response: Message | bytes) -> bytes:
    return response if isinstance(response, bytes) else response.SerializeToString()


def parse(message_class: type[M], data: bytes) -> M:
    """The message in `data`. Raises InvalidArgument that names the field, its byte offset and what is wrong with it."""
    try:
        return message_class.FromString(data)
    except DecodeError:
        raise malformed(cast(Descriptor, message_class.DESCRIPTOR), data) from None


def malformed(descriptor: Descriptor, data: bytes) -> InvalidArgument:
    """Says why `data` is no message of this type; for data that protobuf has refused."""
    fault = explain(descriptor, data)
    if fault is None:
        return InvalidArgument(f"the request is no {descriptor.full_name}: its bytes do not parse; make it from the published protos.")
    field, offset, problem = fault
    place = f"field '{field}', " if field else ""
    where = f"{place}byte {offset} of {len(data)}"
    message = f"the request is no {descriptor.full_name}: {problem} ({where}); make it from the published protos."
    return InvalidArgument(message, offset=offset, field=field) if field else InvalidArgument(message, offset=offset)


class _Fault(Exception):
    """The first thing wrong: path of the field (empty at the top), offset in bytes, the problem in words."""

    def __init__(self, field: str, offset: int, problem: str) -> None:
        super().__init__(problem)
        self.found = (field, offset, problem)


def explain(descriptor: Descriptor, data: bytes) -> tuple[str, int, str] | None:
    """The first fault in `data`: (field path such as "inputs[2].text", offset in bytes, problem), or None where this walk sees none."""
    try:
        _walk(descriptor, data, 0, len(data), "", 0)
    except _Fault as fault:
        return fault.found
    return None


def _walk(descriptor: Descriptor | None, data: bytes, at: int, end: int, path: str, depth: int) -> None:
    if depth > _DEPTH:
        raise _Fault(path, at, f"messages nest deeper than {_DEPTH}")
    seen: dict[int, int] = {}
    while at < end:
        start = at
        tag, at = _varint(data, at, end, path)
        number, kind = tag >> 3, tag & 7
        if number == 0 or tag > 0xFFFFFFFF:
            raise _Fault(path, start, "a field has the impossible number 0" if number == 0 else "a field number is too large")
        field = _fields(descriptor).get(number) if descriptor is not None else None
        name = _name(path, field, number, seen)
        at = _value(field, kind, number, data, at, end, name, depth)


@cache
def _fields(descriptor: Descriptor) -> dict[int, FieldDescriptor]:
    return dict(descriptor.fields_by_number)


def _name(path: str, field: FieldDescriptor | None, number: int, seen: dict[int, int]) -> str:
    own = f"#{number}" if field is None else field.name
    if field is not None and field.is_repeated:
        own += f"[{seen.setdefault(number, 0)}]"
        seen[number] += 1
    return f"{path}.{own}" if path else own


def _value(field: FieldDescriptor | None, kind: int, number: int, data: bytes, at: int, end: int, name: str, depth: int) -> int:
    """Checks one field's value; returns the offset after it."""
    if kind == _VARINT:
        return _varint(data, at, end, name)[1]
    if kind in (_FIXED64, _FIXED32):
        size = 8 if kind == _FIXED64 else 4
        if at + size > end:
            raise _Fault(name, at, f"{size} bytes are announced and {end - at} are there")
        return at + size
    if kind == _GROUP:
        return _group(number, data, at, end, name, depth)
    if kind != _DELIMITED:
        raise _Fault(name, at, "a group ends that did not begin" if kind == _END_GROUP else f"wire type {kind} does not exist")
    length, at = _varint(data, at, end, name)
    if at + length > end:
        raise _Fault(name, at, f"{length} bytes are announced and {end - at} are there")
    if field is not None:
        _content(field, data, at, at + length, name, depth)
    return at + length


def _content(field: FieldDescriptor, data: bytes, at: int, end: int, name: str, depth: int) -> None:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        _walk(field.message_type, data, at, end, name, depth + 1)
    elif field.type == FieldDescriptor.TYPE_STRING:
        try:
            data[at:end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Fault(name, at + error.start, "text is not valid UTF-8") from None
    elif field.is_repeated and field.type != FieldDescriptor.TYPE_BYTES:
        kind = _PACKABLE.get(field.type, _VARINT)
        width = {_FIXED64: 8, _FIXED32: 4}.get(kind)
        if width is not None:
            if (end - at) % width:
                raise _Fault(name.removesuffix("[0]"), at, f"{end - at} bytes are no whole number of {width}-byte values")
            return
        while at < end:
            at = _varint(data, at, end, name)[1]


def _group(number: int, data: bytes, at: int, end: int, name: str, depth: int) -> int:
    if depth > _DEPTH:
        raise _Fault(name, at, f"messages nest deeper than {_DEPTH}")
    while at < end:
        tag, at = _varint(data, at, end, name)
        if tag & 7 == _END_GROUP:
            if tag >> 3 != number:
                raise _Fault(name, at, "a group ends that did not begin")
            return at
        at = _value(None, tag & 7, tag >> 3, data, at, end, name, depth + 1)
    raise _Fault(name, at, "a group begins and does not end")


def _varint(data: bytes, at: int, end: int, name: str) -> tuple[int, int]:
    value = shift = 0
    start = at
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift >= 70:
            raise _Fault(name, start, "a number is longer than 10 bytes")
    raise _Fault(name, start, "the message ends inside a number")
