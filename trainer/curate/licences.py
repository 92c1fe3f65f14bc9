"""Whose answers may be learnt from: the provider's terms as the operator stated them, and the licence of the model's weights.

Of an answer, the lake knows whether its provider was configured with `training_allowed`, and the source model's name. Weights that are
published come with a licence, which says something of what a model writes, whoever runs it; vendors' closed models have terms instead,
which only the operator can have read. A licence that is known to forbid it is heard even where the provider's setting says yes. This
table is a help and no legal advice; `curation.licences` and `curation.allowed_licences` add to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

NOT_ALLOWED = "the provider's terms do not allow training (training_allowed)"
FORBIDDEN = "the licence of the source model forbids it"
# Licences that let one train any model on what the licensed model writes.
ALLOWING = frozenset({
    "apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc0-1.0",  # say nothing of outputs, and so do not restrict them
    "llama3.1", "llama3.2", "llama3.3", "llama4",  # allow it; the new model's name has to begin with "Llama", see there
    "deepseek",  # allows derivatives and distillation by name
})  # fmt: skip
# Licences that forbid it, or forbid commercial use: not even `training_allowed` of the provider overrides them.
FORBIDDING = frozenset({
    "llama2", "llama3",  # 3.0: outputs must not improve any other large language model
    "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "mrl", "qwen-research", "stabilityai-nc",  # non-commercial or research use
})  # fmt: skip
# Beginnings of source models' names, without an organisation before "/", in lower case. The longest that fits counts.
MODELS: Mapping[str, str] = {
    "mistral-7b": "apache-2.0", "mixtral": "apache-2.0", "mistral-nemo": "apache-2.0", "open-mistral": "apache-2.0",
    "open-mixtral": "apache-2.0", "mistral-small-3": "apache-2.0", "mistral-large-instruct": "mrl",
    "qwen2.5-": "apache-2.0", "qwen2.5-3b": "qwen-research", "qwen2.5-72b": "qwen", "qwen3-": "apache-2.0", "qwq-": "apache-2.0",
    "phi-3": "mit", "phi-4": "mit", "smollm": "apache-2.0", "olmo": "apache-2.0", "gpt-oss": "apache-2.0",
    "deepseek-r1": "mit", "deepseek-v3": "mit", "deepseek-v2": "deepseek",
    "llama-2": "llama2", "llama-3-": "llama3", "meta-llama-3-": "llama3", "llama-3.1": "llama3.1", "meta-llama-3.1": "llama3.1",
    "llama-3.2": "llama3.2", "llama-3.3": "llama3.3", "llama-4": "llama4",
    "gemma": "gemma", "c4ai-command-r": "cc-by-nc-4.0", "aya-": "cc-by-nc-4.0", "granite-3": "apache-2.0", "tulu-3": "llama3.1",
}  # fmt: skip


@dataclass(slots=True, frozen=True)
class Licences:
    """The table with the configuration's additions."""

    models: Mapping[str, str] = field(default_factory=dict)
    allowed: Sequence[str] = ()
    enough: bool = False  # an allowing licence is enough, whatever the provider's setting says

    def of(self, source_model: str) -> str:
        """The licence id of a source model, or "" where none is known."""
        name = source_model.lower()
        short = name.rpartition("/")[2]
        for pattern in sorted(self.models, key=len, reverse=True):
            known = pattern.lower()
            if name == known or (known.endswith("*") and name.startswith(known[:-1])):
                return self.models[pattern].lower()
        fits = [beginning for beginning in MODELS if short.startswith(beginning)]
        return MODELS[max(fits, key=len)] if fits else ""

    def refusal(self, source_model: str, training_allowed: bool) -> str:
        """Why one may not train on the model's answers, or "" where one may. `training_allowed`: the provider's setting, as recorded."""
        licence = self.of(source_model)
        known = licence in self.allowed or licence in ALLOWING
        if licence in FORBIDDING and not known:
            return FORBIDDEN
        return "" if training_allowed or (self.enough and known) else NOT_ALLOWED
