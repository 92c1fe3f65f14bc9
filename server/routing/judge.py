"""How good an answer is, for a route: the quality package's score of what was observed, and how far answers agree."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from server.core import Call, Task
from server.errors import UnderstudyError
from server.quality.agreement import agree, support
from server.quality.model import QualityModel, cold_start
from server.quality.scorer import Observed, score
from server.routing.candidates import Answer, Brief
from server.routing.items import Item
from server.runtime.runtime import Runtime

_log = logging.getLogger(__name__)
# Tasks whose answers are words; labels, spans and vectors have a quality of their candidate's own, or none.
SCORED = ("text-generation", "translation", "summarization", "question-answering", "table-question-answering", "fill-mask")
_TASKS = {task.value: task for task in Task}
FILE = "quality.json"
_LOOK_S = 1.0


class QualityBook:
    """The quality model of each skill: `<root>/<skill>/quality.json` where the trainer has written one, else the cold-start model."""

    def __init__(self, root: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._clock = clock
        self._cold: QualityModel | None = None
        self._models: dict[str, tuple[float, int, QualityModel | None]] = {}  # looked at, changed at, the model

    def of(self, skill: str) -> tuple[QualityModel, bool]:
        """The model, and whether it is the skill's own. Looks at the disk once a second at most."""
        now = self._clock()
        looked, changed, model = self._models.get(skill, (-_LOOK_S, 0, None))
        if now - looked >= _LOOK_S:
            path = self._root / skill / FILE
            try:
                stamp = path.stat().st_mtime_ns
                if stamp != changed:
                    changed, model = stamp, self._load(path)
            except OSError:
                changed, model = 0, None
            self._models[skill] = (now, changed, model)
        if model is not None:
            return model, True
        if self._cold is None:
            self._cold = cold_start()
        return self._cold, False

    def _load(self, path: Path) -> QualityModel | None:
        try:
            return QualityModel.load(path)
        except UnderstudyError as error:
            _log.error("quality model refused", extra={"path": str(path), "error": error.message})
            return None


class QualityJudge:
    """One a process; see server.routing.cascade.Judge. `embedder` names the model whose vectors compare texts; it raises without one."""

    def __init__(self, runtime: Runtime, embedder: Callable[[], str], book: QualityBook) -> None:
        self._runtime = runtime
        self._embedder = embedder
        self._book = book

    def look(self, brief: Brief, item: Item, answer: Answer) -> Answer:
        """The answer with its quality and what was found wanting; as it is where its candidate knows better, or nobody can tell."""
        skill, reply = brief.skill, answer.reply
        if answer.quality is not None and answer.signals.agreement is None:
            return answer
        if skill.task not in SCORED or reply.spans or reply.tool_calls:
            return answer
        signals = answer.signals
        observed = Observed(
            prompt=item.work.plain,
            answer=reply.text,
            task=_TASKS.get(skill.task, Task.TEXT_GENERATION),
            finish=reply.finish,
            logprobs=signals.logprobs if len(signals.logprobs) else None,
            entropies=signals.entropies if len(signals.entropies) else None,
            margins=signals.margins if len(signals.margins) else None,
            valid=signals.valid,
            agreement=signals.agreement,
        )
        model, own = (answer.judged_by, True) if answer.judged_by is not None else self._book.of(skill.name)
        quality = score(model, observed)
        return replace(answer, quality=quality.value, findings=quality.findings, basis="" if own else "the cold-start model")

    async def agree(self, prompt: str, answers: Sequence[Answer], call: Call) -> tuple[int, float]:
        """A vote of closed answers, a medoid of texts; without an embedder texts that differ do not agree. How much: `support`."""
        texts = [answer.reply.text for answer in answers]
        vectors = None
        try:
            with self._runtime.use(self._embedder(), Task.FEATURE_EXTRACTION) as model:
                found = await model.embed(texts, call=call, normalize=True, truncate=True)
            rows = [row for row in found.items if not isinstance(row, Exception)]
            vectors = np.stack(rows) if len(rows) == len(texts) else None
        except UnderstudyError:
            pass
        index = agree(texts, vectors).index
        return index, float(np.nan_to_num(support(prompt, texts)[index]))
