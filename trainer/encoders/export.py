"""From the torch model to the file that serves: int8 where it answers as the torch model does, else float32, else nothing."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from server.config import Config
from server.core import Task
from server.errors import ModelRejected
from server.runtime.pull import pull
from server.runtime.repository import ModelFiles, Repository
from trainer.encoders.base import save_folder
from trainer.encoders.examples import ENTITIES, RANKING
from trainer.encoders.judge import LEAST_PARITY, Judge
from trainer.encoders.serving import served_output
from trainer.encoders.students import Trial

_CALIBRATION = 400
_MIN_CALIBRATION = 16
_TASKS = {ENTITIES: Task.TOKEN_CLASSIFICATION, RANKING: Task.TEXT_RANKING}


@dataclass(frozen=True, slots=True)
class Exported:
    """A version in the draft repository, and both outputs on the judge's rows: the torch model's and the file's."""

    files: ModelFiles
    judge: Judge
    torch: Any
    served: Any
    parity: dict[str, float]


def export(config: Config, trial: Trial, judge: Judge, name: str, texts: Sequence[str], fields: Mapping[str, Any]) -> Exported | str:
    """Writes the graph with the server's own writers, and asks it through server.runtime what the torch model was asked.

    `texts`: of the training part, that int8 is fitted to. A string: why no form of it answers as the torch model does.
    """
    student, context = trial.student, trial.student.context
    folder = context.folder / "draft" / "torch"
    save_folder(student.learner.model, student.source, folder)
    torch_output = student.output(judge)
    draft = Repository(context.folder / "draft" / "models")
    shutil.rmtree(draft.root, ignore_errors=True)
    rng = np.random.default_rng(context.seed)
    chosen = [texts[i] for i in rng.permutation(len(texts))[:_CALIBRATION]] if len(texts) >= _MIN_CALIBRATION else None
    why = ""
    for dtype in ("int8", "float32"):
        context.progress("export", int(dtype == "float32"), 2)
        task = _TASKS.get(student.task, Task.FEATURE_EXTRACTION)
        try:
            files = pull(str(folder), draft, name=name, task=task, dtype=dtype, calibration=chosen, fields=fields)
            served = asyncio.run(served_output(config, draft.root, name, files.manifest.version, judge))
        except ModelRejected as error:
            why = f"the {dtype} file is refused: {error.message}"
        else:
            parity = judge.parity(torch_output, served)
            if parity["agreement"] >= LEAST_PARITY[dtype]:
                return Exported(files, judge, torch_output, served, parity)
            why = f"the {dtype} file agrees with the torch model in {parity['agreement']:.4f}, at least {LEAST_PARITY[dtype]} is asked"
        context.log(why)
    return f"{why}."
