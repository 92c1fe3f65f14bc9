"""InferenceService.Run, RunMany and ExplainRoute: requests to the router, outcomes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from server.api import calls, convert
from server.api.skill_requests import ask_of, check_user, to_result, to_route, work_of
from server.api.status import to_status
from server.api.wire import Context
from server.core import Call, Outcome, Results, Work
from server.errors import InternalError, InvalidArgument, RequestTooLarge, UnderstudyError
from server.logs import get
from server.routing.briefing import Ask
from server.routing.router import Router
from understudy.v1 import common_pb2
from understudy.v1 import inference_service_pb2 as pb

MAX_ID_BYTES = 128
_log = get("run")


class RunServicer:
    """Edges only: the inputs' form here, everything else in the router. `in_flight`: requests of one stream that run at once."""

    def __init__(self, router: Router, max_items: int, in_flight: int = 64) -> None:
        self._router = router
        self._max_items = max_items
        self._in_flight = in_flight

    async def Run(self, request: pb.RunRequest, _context: Context) -> pb.RunResponse:
        """Runs a skill on each input."""
        call = calls.current_call(request.priority)
        response, results = await self._run(request, call)
        scope = calls.current()
        scope.note(results)
        scope.items = len(response.results)
        scope.failed_items = sum(1 for one in response.results if one.HasField("error"))
        return response

    async def RunMany(self, requests: AsyncIterator[pb.RunManyRequest], _context: Context) -> AsyncIterator[pb.RunManyResponse]:
        """Runs requests as they come, so many at a time; answers go out as they are ready."""
        call = calls.current_call()
        done: asyncio.Queue[pb.RunManyResponse | BaseException | None] = asyncio.Queue()
        places = asyncio.Semaphore(self._in_flight)
        running: set[asyncio.Task[None]] = set()

        async def one(request: pb.RunManyRequest) -> None:
            try:
                done.put_nowait(await self._one_of_many(request, call))
            finally:
                places.release()

        async def read() -> None:
            try:
                async for request in requests:
                    await places.acquire()
                    task = asyncio.ensure_future(one(request))
                    running.add(task)
                    task.add_done_callback(running.discard)
                await asyncio.gather(*running)
                done.put_nowait(None)
            except BaseException as error:
                done.put_nowait(error)
                raise

        reading = asyncio.ensure_future(read())
        count = failed = 0
        try:
            while (response := await done.get()) is not None:
                if isinstance(response, BaseException):
                    raise response
                count += 1
                failed += response.HasField("error")
                yield response
        finally:
            reading.cancel()
            for task in running:
                task.cancel()
            await asyncio.gather(reading, *running, return_exceptions=True)
            scope = calls.current()
            scope.items, scope.failed_items = count, failed

    async def ExplainRoute(self, request: pb.ExplainRouteRequest, _context: Context) -> pb.ExplainRouteResponse:
        """How each input would be routed."""
        call = calls.current_call(request.request.priority)
        call.user = check_user(request.request.user)
        ask, works = self._ask(request.request)
        planned = iter(await self._router.explain(ask, call))
        routes = []
        for index, work in enumerate(works):
            refused = pb.ExplainedRoute(error=to_status(work)) if isinstance(work, UnderstudyError) else None
            routes.append(refused if refused is not None else to_route(next(planned), index))
        routes += [to_route(one, index) for index, one in enumerate(planned, len(works))]
        return pb.ExplainRouteResponse(routes=routes)

    async def _one_of_many(self, request: pb.RunManyRequest, call: Call) -> pb.RunManyResponse:
        """Errors belong to their request; the others go on."""
        name = request.id
        try:
            if not name or len(name.encode()) > MAX_ID_BYTES:
                raise InvalidArgument(f"id has {len(name.encode())} bytes; expected 1 to {MAX_ID_BYTES}.", field="id", limit=MAX_ID_BYTES)
            calls.admit(request.request)
            own = Call(call.request_id, call.deadline, call.priority, tenant=call.tenant)
            response, _ = await self._run(request.request, own)
            return pb.RunManyResponse(id=name, response=response)
        except UnderstudyError as error:
            return pb.RunManyResponse(id=name[:MAX_ID_BYTES], error=to_status(error))
        except Exception:
            _log.exception("a request of a RunMany stream failed", request_id=call.request_id)
            ours = InternalError(f"the server failed on this request; tell the operator the request id {call.request_id}.")
            return pb.RunManyResponse(id=name[:MAX_ID_BYTES], error=to_status(ours))

    async def _run(self, request: pb.RunRequest, call: Call) -> tuple[pb.RunResponse, Results[Outcome]]:
        call.user = check_user(request.user)
        ask, works = self._ask(request)
        if ask.works or not works:
            results = await self._router.run(ask, call)
        else:
            if ask.skill:
                self._router.skills.get(ask.skill)
            results = Results[Outcome]([])
        outcomes = iter(results.items)
        merged: list[Outcome | Exception] = [work if isinstance(work, UnderstudyError) else next(outcomes) for work in works]
        merged += outcomes  # of an instruction that was the whole request
        response = pb.RunResponse(
            results=[to_result(outcome, index) for index, outcome in enumerate(merged)],
            usage=convert.usage(results.usage),
            cost=common_pb2.Cost(micro_usd=sum(item.cost_micro_usd for item in merged if isinstance(item, Outcome))),
            timings=convert.timings(results.timings),
        )
        return response, results

    def _ask(self, request: pb.RunRequest) -> tuple[Ask, list[Work | UnderstudyError]]:
        """The request with the inputs that can be worked on, and each input or why it is none."""
        if not request.inputs and (request.skill or not request.instruction):
            if not request.skill:
                known = ", ".join(self._router.skills.names()[:20])
                raise InvalidArgument(f"skill is empty; expected the name of one, or an instruction. Known: {known}.", field="skill")
            raise InvalidArgument("inputs is empty; expected one at least.", field="inputs")
        if len(request.inputs) > self._max_items:
            message = f"inputs holds {len(request.inputs)}; expected at most {self._max_items}. Split the call."
            raise RequestTooLarge(message, field="inputs", limit=self._max_items)
        works = [work_of(item, index) for index, item in enumerate(request.inputs)]
        return ask_of(request, [work for work in works if not isinstance(work, UnderstudyError)]), works
