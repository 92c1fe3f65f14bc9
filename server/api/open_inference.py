"""inference.GRPCInferenceService: the Open Inference Protocol with Triton's additions, over the models that the runtime has loaded.

A request gives either the inputs of the model's graph, as raw tensors, or those of its text form (server/api/open_inference_text.py).
Shared memory, tracing and log settings are left out of this servicer, so that `wire` answers UNIMPLEMENTED for them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

from server.api import calls, wire
from server.api import open_inference_codec as codec
from server.api import open_inference_generate as generation
from server.api import open_inference_models as models
from server.api.open_inference_codec import Array
from server.api.open_inference_text import TextForm, TextOptions, form_of, infer_text, rewrite_text
from server.core import Call, Priority, Results, Timings
from server.errors import DeadlineExceeded, InvalidArgument, InvalidTensor, ModelNotLoaded, NotFound, UnderstudyError
from server.runtime.manifest import Manifest
from server.runtime.runtime import ModelState, Runtime
from understudy.oip import open_inference_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "model_repository", "schedule_policy", "statistics")
STREAM_WINDOW = 64  # requests of one stream that run at once; further ones wait in the transport
_LIGHT_BYTES = 256 * 1024  # larger typed contents are read in a thread: each element becomes an object on the way
_PRIORITIES = {0: Priority.INTERACTIVE, 1: Priority.CRITICAL, 2: Priority.INTERACTIVE, 3: Priority.BULK}
_PARAMETERS = ("priority", "timeout", "truncate")
_FINAL = "triton_enable_empty_final_response"  # the real client sends it on streams
# Appended to a serialised response it is merged into it: so parsers treat a message that stands there twice.
_FINAL_RESPONSE = pb.ModelStreamInferResponse(
    infer_response=pb.ModelInferResponse(parameters={"triton_final_response": pb.InferParameter(bool_param=True)})
).SerializeToString()
_INDEX_STATES = {ModelState.READY: "READY", ModelState.LOADING: "LOADING", ModelState.UNLOADING: "UNLOADING"}


class OpenInferenceServicer:
    """Edges only: bytes to arrays here, the work in the runtime's engines.

    `version` is the server's release. `ready` says whether calls are taken at all, e.g. False while the server drains.
    `max_items` bounds the texts of one request.
    """

    def __init__(self, runtime: Runtime, *, version: str, max_items: int = 2048, ready: Callable[[], bool] = lambda: True) -> None:
        self._runtime = runtime
        self._version = version
        self._max_items = max_items
        self._ready = ready
        self._counted: dict[tuple[str, str], models.Counted] = {}

    # Health and names.

    async def ServerLive(self, _request: pb.ServerLiveRequest, _context: wire.Context) -> pb.ServerLiveResponse:
        """Always live."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, _request: pb.ServerReadyRequest, _context: wire.Context) -> pb.ServerReadyResponse:
        """Ready with a model that is."""
        ready = self._ready() and any(status.state is ModelState.READY for status in self._runtime.loaded())
        return pb.ServerReadyResponse(ready=ready)

    async def ModelReady(self, request: pb.ModelReadyRequest, _context: wire.Context) -> pb.ModelReadyResponse:
        """Ready when it answers; a model that does not exist is not."""
        try:
            self._runtime.manifest(request.name, request.version or None)
        except (NotFound, ModelNotLoaded):
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._ready())

    async def ServerMetadata(self, _request: pb.ServerMetadataRequest, _context: wire.Context) -> pb.ServerMetadataResponse:
        """Name, release, extensions."""
        return pb.ServerMetadataResponse(name="understudy", version=self._version, extensions=EXTENSIONS)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, _context: wire.Context) -> pb.ModelMetadataResponse:
        """Inputs and outputs."""
        manifest = self._runtime.manifest(request.name, request.version or None)
        versions = [s.version for s in self._runtime.loaded() if s.name == manifest.name and s.state is ModelState.READY]
        return models.metadata(manifest, self._raw(manifest), versions)

    async def ModelConfig(self, request: pb.ModelConfigRequest, _context: wire.Context) -> pb.ModelConfigResponse:
        """Set-up."""
        manifest = self._runtime.manifest(request.name, request.version or None)
        return models.config(manifest, self._raw(manifest), self._max_items)

    def _raw(self, manifest: Manifest) -> models.RawModel | None:
        generates = manifest.form in ("decoder", "seq2seq")
        return None if generates else self._runtime.tensors(manifest.name, manifest.version)

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, _context: wire.Context) -> pb.ModelStatisticsResponse:
        """Counts of one model or of all that are loaded."""
        if request.name:
            self._runtime.manifest(request.name, request.version or None)
        response = pb.ModelStatisticsResponse()
        for status in self._runtime.loaded():
            if status.state is not ModelState.READY or request.name not in ("", status.name) or request.version not in ("", status.version):
                continue
            counted = self._counted.get((status.name, status.version), models.Counted())
            response.model_stats.append(counted.show(status.name, status.version, status.memory_bytes))
        return response

    # The repository.

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, _context: wire.Context) -> pb.RepositoryIndexResponse:
        """Every version of the repository, and whether it answers."""
        _check_repository(request.repository_name)
        entries = await asyncio.to_thread(self._runtime.repository.entries)
        statuses = {(status.name, status.version): status for status in self._runtime.loaded()}
        response = pb.RepositoryIndexResponse()
        for entry in entries:
            status = statuses.get((entry.name, entry.version))
            state = _INDEX_STATES.get(status.state, "UNAVAILABLE") if status is not None else "UNAVAILABLE"
            if request.ready and state != "READY":
                continue
            reason = entry.error or (status.error if status is not None else "")
            if state == "UNAVAILABLE":
                reason = reason or "unloaded"
            response.models.add(name=entry.name, version=entry.version, state=state, reason=reason)
        return response

    async def RepositoryModelLoad(self, request: pb.RepositoryModelLoadRequest, _context: wire.Context) -> pb.RepositoryModelLoadResponse:
        """Loads the newest version in place of those before it, or the named one beside them."""
        _check_repository(request.repository_name)
        version = _repository_version(request.parameters, ("version",))
        await self._runtime.load(request.model_name, version, replace=version is None)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, _context: wire.Context
    ) -> pb.RepositoryModelUnloadResponse:
        """Unloads all versions, or the named one."""
        _check_repository(request.repository_name)
        version = _repository_version(request.parameters, ("version", "unload_dependents"))
        await self._runtime.unload(request.model_name, version)
        return pb.RepositoryModelUnloadResponse()

    # Inference.

    @wire.raw
    async def ModelInfer(self, data: bytes, _context: wire.Context) -> bytes:
        """One run."""
        request = codec.read_request(data)
        call = calls.current_call()
        _apply(request.message, call)
        return await self._infer_in_time(request, call)

    @wire.raw
    async def ModelStreamInfer(self, requests: AsyncIterator[bytes], _context: wire.Context) -> AsyncIterator[bytes]:
        """Runs side by side, answers in order. Bytes that are no request end the stream: what follows them cannot be trusted."""
        base = calls.current_call()
        waiting: asyncio.Queue[asyncio.Task[bytes] | bytes | Exception | None] = asyncio.Queue(STREAM_WINDOW)
        running: dict[asyncio.Task[Any], Call] = {}
        places = asyncio.Semaphore(STREAM_WINDOW)  # of answers that are being generated

        async def generate(request: codec.Request, call: Call) -> None:
            try:
                await self._generate_stream(request, call, waiting.put)
            except Exception as error:  # a mistake of ours ends the stream, as it does for the other models
                await waiting.put(error)

        async def read() -> None:
            end: Exception | None = None
            generating: set[asyncio.Task[None]] = set()

            def ended(task: asyncio.Task[None]) -> None:
                generating.discard(task)
                running.pop(task, None)
                places.release()

            try:
                async for data in requests:
                    call = Call(base.request_id, base.deadline, tenant=base.tenant, user=base.user)
                    request = codec.read_request(data)
                    if self._generates(request):
                        await places.acquire()
                        answer = asyncio.create_task(generate(request, call))
                        running[answer] = call
                        generating.add(answer)
                        answer.add_done_callback(ended)
                        continue
                    task = asyncio.create_task(self._infer_one(request, call))
                    running[task] = call
                    await waiting.put(task)
                if generating:
                    await asyncio.gather(*generating, return_exceptions=True)
            except Exception as error:
                end = error
            await waiting.put(end)

        reader = asyncio.create_task(read())
        try:
            while (item := await waiting.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, bytes):
                    yield item
                    continue
                yield await item
                del running[item]
        finally:
            reader.cancel()
            for task, call in list(running.items()):
                call.cancelled = True
                task.cancel()

    def _generates(self, request: codec.Request) -> bool:
        """Whether the answers come in any number, as they are written."""
        try:
            return self._runtime.manifest(request.message.model_name, request.message.model_version or None).form == "decoder"
        except UnderstudyError:
            return False  # said where the request is answered

    async def _generate_stream(self, request: codec.Request, call: Call, put: Callable[[bytes], Awaitable[None]]) -> None:
        """One request of a stream to a model that generates: its responses, or its own error."""
        message = request.message
        try:
            _apply(message, call)
            codec.check_request(message)
            ask = generation.read(codec.read_inputs(request))
            if not ask.stream:
                response = codec.stream_response(await self._infer_in_time(request, call))
                await put(response + _FINAL_RESPONSE if _flag(message, _FINAL) else response)
                return
            async with asyncio.timeout(call.remaining() if "timeout" in message.parameters else None):
                await self._generate_pieces(message, ask, call, put)
        except TimeoutError:
            call.cancelled = True
            await put(
                self._failed(message, DeadlineExceeded("the request's timeout passed; expected more time.", stage=call.stage or "run"))
            )
        except UnderstudyError as error:
            await put(self._failed(message, error))

    async def _generate_pieces(
        self, message: pb.ModelInferRequest, ask: generation.Ask, call: Call, put: Callable[[bytes], Awaitable[None]]
    ) -> None:
        manifest = self._runtime.manifest(message.model_name, message.model_version or None)
        counted = self._counted.setdefault((manifest.name, manifest.version), models.Counted())
        header = pb.ModelInferResponse(model_name=manifest.name, model_version=manifest.version, id=message.id)
        start = time.monotonic()
        try:
            with self._runtime.use_generator(manifest.name, version=manifest.version) as model:
                async with aclosing(generation.pieces(model, ask, call)) as pieces:
                    async for outputs in pieces:
                        wanted = {name: outputs[name] for name in _wanted(message, list(outputs))}
                        await put(codec.stream_response(codec.write_response(header, wanted.items())))
        except UnderstudyError:
            counted.failed(time.monotonic() - start)
            raise
        took = time.monotonic() - start
        counted.answered(1, took, Timings(run=took))
        if _flag(message, _FINAL):
            await put(pb.ModelStreamInferResponse(infer_response=header).SerializeToString() + _FINAL_RESPONSE)

    def _failed(self, message: pb.ModelInferRequest, error: UnderstudyError) -> bytes:
        head = pb.ModelInferResponse(model_name=message.model_name, model_version=message.model_version, id=message.id)
        text = f"[{error.reason}] {error.message}"
        response = pb.ModelStreamInferResponse(error_message=text, infer_response=head).SerializeToString()
        return response + _FINAL_RESPONSE if _flag(message, _FINAL) else response

    async def _infer_one(self, request: codec.Request, call: Call) -> bytes:
        """One request of a stream: its response, or its own error."""
        message = request.message
        try:
            _apply(message, call)
            response = codec.stream_response(await self._infer_in_time(request, call))
        except UnderstudyError as error:
            return self._failed(message, error)
        return response + _FINAL_RESPONSE if _flag(message, _FINAL) else response

    async def _infer_in_time(self, request: codec.Request, call: Call) -> bytes:
        """As `_infer`, ended at the request's own timeout; the RPC's deadline is the guard's to hold."""
        if "timeout" not in request.message.parameters or call.deadline is None:
            return await self._infer(request, call)
        try:
            async with asyncio.timeout(call.remaining()):
                return await self._infer(request, call)
        except TimeoutError:
            call.cancelled = True  # engines skip what still waits
            stage = call.stage or "run"
            text = f"the request's timeout passed in the stage {stage!r}; expected more time, or a smaller request."
            raise DeadlineExceeded(text, stage=stage) from None

    async def _infer(self, request: codec.Request, call: Call) -> bytes:
        message = request.message
        codec.check_request(message)
        manifest = self._runtime.manifest(message.model_name, message.model_version or None)
        counted = self._counted.setdefault((manifest.name, manifest.version), models.Counted())
        start = time.monotonic()
        try:
            outputs, results, entries = await self._run(request, manifest, call)
        except UnderstudyError:
            counted.failed(time.monotonic() - start)
            raise
        counted.answered(entries, time.monotonic() - start, results.timings)
        calls.current().note(results)
        header = pb.ModelInferResponse(model_name=manifest.name, model_version=manifest.version, id=message.id)
        return codec.write_response(header, outputs.items())

    async def _run(self, request: codec.Request, manifest: Manifest, call: Call) -> tuple[dict[str, Array], Results[Any], int]:
        """Outputs in the order asked for, what they took, and the entries along the batch axis."""
        message = request.message
        heavy = not request.raw and message.ByteSize() > _LIGHT_BYTES
        inputs = await asyncio.to_thread(codec.read_inputs, request) if heavy else codec.read_inputs(request)
        form = form_of(manifest)
        if manifest.form in ("decoder", "seq2seq"):
            return await self._run_generation(message, inputs, manifest, call)
        if form is not None and any(name in inputs for name in _names(form)):
            with self._runtime.use(manifest.name, None, manifest.version) as model:
                wanted = _wanted(message, [tensor.name for tensor in form.outputs])
                options = TextOptions(_flag(message, "truncate"), self._max_items)
                answer = await infer_text(model, form, inputs, options, call)
            found = {name: answer.outputs[name] for name in wanted}
            return _classified(message, found, manifest, True), answer.results, answer.items
        if "truncate" in message.parameters:
            raise InvalidArgument("parameter 'truncate' is for text; raw tensors are never cut. Leave it out.", field="parameters")
        if not inputs and form is not None:
            raise InvalidTensor(
                f"the request has no inputs; give text as {', '.join(_names(form))}, or the graph's inputs.", field="inputs"
            )
        with self._runtime.use_tensors(manifest.name, manifest.version) as engine:
            wanted = _wanted(message, [spec.name for spec in engine.outputs])
            start = time.monotonic()
            found = await engine.infer(inputs, wanted, call)
            results: Results[Any] = Results([None], model=manifest.name, version=manifest.version)
            results.timings.run = time.monotonic() - start
            entries = next((len(array) for array in inputs.values() if array.ndim), 1) if engine.batched else 1
            return _classified(message, {name: found[name] for name in wanted}, manifest, engine.batched), results, entries

    async def _run_generation(
        self, message: pb.ModelInferRequest, inputs: dict[str, Array], manifest: Manifest, call: Call
    ) -> tuple[dict[str, Array], Results[Any], int]:
        """As `_run`, for the models whose graphs take no raw tensors."""
        if manifest.form == "seq2seq":
            form = form_of(manifest)
            assert form is not None, "every such task has a text form"
            with self._runtime.use_seq2seq(manifest.name, manifest.task, manifest.version) as rewriter:
                answer = await rewrite_text(rewriter, form, inputs, TextOptions(_flag(message, "truncate"), self._max_items), call)
            return {name: answer.outputs[name] for name in _wanted(message, list(answer.outputs))}, answer.results, answer.items
        ask = generation.read(inputs)
        if ask.stream:
            raise InvalidArgument("stream is true in ModelInfer, which gives one response; expected ModelStreamInfer.", field="stream")
        with self._runtime.use_generator(manifest.name, version=manifest.version) as model:
            outputs, answers = await generation.whole(model, ask, call)
        summary = answers.summary()
        results: Results[Any] = Results([None], usage=summary.usage, model=manifest.name, version=manifest.version)
        results.timings.tokenize, results.timings.queue = summary.timings.tokenize, summary.timings.queue
        results.timings.run = max(0.0, summary.timings.total - summary.timings.queue - summary.timings.tokenize)
        return {name: outputs[name] for name in _wanted(message, list(outputs))}, results, 1


def _names(form: TextForm) -> list[str]:
    return [tensor.name for tensor in form.inputs]


def _apply(message: pb.ModelInferRequest, call: Call) -> None:
    """Takes priority and timeout into the call. Raises InvalidArgument for parameters that are unknown or cannot be."""
    for key, parameter in message.parameters.items():
        if key.startswith("sequence_"):
            text = "sequences of requests are not offered: every request stands alone. Leave the sequence parameters out."
            raise InvalidArgument(text, field="parameters")
        if key not in (*_PARAMETERS, _FINAL):
            raise InvalidArgument(f"parameter {key[:64]!r} is not known; known are {', '.join(_PARAMETERS)}.", field="parameters")
        if key == "priority":
            value = _whole(key, parameter)
            if value not in _PRIORITIES:
                text = f"parameter 'priority' is {value}; it is 0 (default), 1 (critical), 2 (interactive) or 3 (bulk)."
                raise InvalidArgument(text, field="parameters.priority", limit=3)
            call.priority = _PRIORITIES[value]
        elif key == "timeout":
            value = _whole(key, parameter)
            if value < 0:
                raise InvalidArgument(f"parameter 'timeout' is {value}; give microseconds from 0, 0 for none.", field="parameters.timeout")
            if value:
                end = time.monotonic() + value / 1e6
                call.deadline = end if call.deadline is None else min(call.deadline, end)
        elif parameter.WhichOneof("parameter_choice") != "bool_param":
            raise InvalidArgument(f"parameter {key!r} is true or false; give it as bool_param.", field=f"parameters.{key}")


def _whole(key: str, parameter: pb.InferParameter) -> int:
    choice = parameter.WhichOneof("parameter_choice")
    if choice not in ("int64_param", "uint64_param"):
        raise InvalidArgument(f"parameter {key!r} is a whole number; give it as int64_param or uint64_param.", field=f"parameters.{key}")
    return int(getattr(parameter, choice))


def _flag(message: pb.ModelInferRequest, key: str) -> bool:
    return key in message.parameters and message.parameters[key].bool_param


def _wanted(message: pb.ModelInferRequest, known: list[str]) -> list[str]:
    for output in message.outputs:
        if output.name not in known:
            text = f"output {output.name[:64]!r} is not known; this model gives {', '.join(known)}."
            raise InvalidTensor(text, tensor=output.name[:64], expected=", ".join(known))
    return [output.name for output in message.outputs] or known


def _classified(message: pb.ModelInferRequest, outputs: dict[str, Array], manifest: Manifest, batched: bool) -> dict[str, Array]:
    """Replaces the outputs whose best classes alone are wanted."""
    for output in message.outputs:
        if "classification" not in output.parameters:
            continue
        count = _whole("classification", output.parameters["classification"])
        if count < 1:
            raise InvalidArgument(
                f"output {output.name[:64]!r}: 'classification' is {count}; give the number of classes, from 1.", field="outputs"
            )
        array = outputs[output.name]
        if array.dtype.kind not in "fiu" or array.size == 0:
            raise InvalidTensor(f"output {output.name[:64]!r} has no scores to sort; leave 'classification' out.", tensor=output.name[:64])
        outputs[output.name] = codec.classification(array, count, manifest.labels, batched)
    return outputs


def _check_repository(name: str) -> None:
    if name:
        text = f"repository {name[:64]!r} is not known; there is one, whose name is empty. Leave repository_name out."
        raise InvalidArgument(text, field="repository_name")


def _repository_version(parameters: Mapping[str, pb.ModelRepositoryParameter], known: tuple[str, ...]) -> str | None:
    for key in parameters:
        if key not in known:
            text = (
                f"parameter {key[:64]!r} is not taken: settings and files of a model come from the repository. Known: {', '.join(known)}."
            )
            raise InvalidArgument(text, field="parameters")
    if "version" not in parameters:
        return None
    if parameters["version"].WhichOneof("parameter_choice") != "string_param":
        raise InvalidArgument("parameter 'version' is text; give it as string_param.", field="parameters.version")
    return str(parameters["version"].string_param)
