"""What a loaded model is to its callers: the faces it has, and the tasks it does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from server.core import Task
from server.runtime.manifest import Manifest

if TYPE_CHECKING:
    from server.runtime.decoder.generator import GeneratorModel
    from server.runtime.encoder import EncoderModel
    from server.runtime.lora.store import AdapterSet
    from server.runtime.seq2seq.contract import Seq2SeqModel
    from server.runtime.tensor_engine import TensorEngine


class Served(Protocol):
    """What a loader makes of verified files; None where the model is none of the kind. Raw tensors reach no graph of generation."""

    @property
    def encoder(self) -> EncoderModel | None: ...

    @property
    def generator(self) -> GeneratorModel | None: ...

    @property
    def seq2seq(self) -> Seq2SeqModel | None: ...

    @property
    def tensors(self) -> TensorEngine | None: ...

    @property
    def adapters(self) -> AdapterSet | None: ...

    async def close(self, drain: bool) -> None:
        """Finishes accepted work if `drain`, stops the threads and frees the session; called once."""


def tasks_of(manifest: Manifest) -> frozenset[Task]:
    """Tasks that calls may ask of a model. Embeddings also rank and match labels; NLI labels also do zero-shot."""
    if manifest.form in ("decoder", "seq2seq"):
        return frozenset((manifest.task,))
    tasks = {manifest.task, Task.TENSOR}
    if manifest.task is Task.FEATURE_EXTRACTION:
        tasks |= {Task.TEXT_RANKING, Task.ZERO_SHOT_CLASSIFICATION}
    elif manifest.task is Task.ZERO_SHOT_CLASSIFICATION:
        tasks.add(Task.TEXT_CLASSIFICATION)
    elif manifest.task is Task.TEXT_CLASSIFICATION and any(label.lower().startswith("entail") for label in manifest.labels):
        tasks.add(Task.ZERO_SHOT_CLASSIFICATION)
    return frozenset(tasks)
