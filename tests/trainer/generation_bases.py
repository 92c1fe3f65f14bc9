"""A tiny LLaMA of random weights that students are trained on, in a repository, and a lake of what a teacher answered."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

from server.config import Config, load_config
from server.core import Task
from server.lake import table
from server.lake.ids import IdKey
from server.lake.log import Log
from server.lake.schema import INTERACTIONS
from server.registry.registry import Registry
from server.runtime.pull import pull
from server.runtime.repository import Repository
from tests.generation_models import make_tokenizer
from tests.runtime.decoder.chat_templates import QWEN
from trainer.context import JobContext

BASE = "tiny"
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["card", "rain"]}},
    "required": ["kind"],
    "additionalProperties": False,
}
# The word that decides, and what the teacher says.
ANSWERS = {"card": '{"kind": "card"}', "weather": '{"kind": "rain"}'}
_OTHERS = ["where", "is", "my", "you", "are", "a", "the", "user", "system", "helpful"]


def write_base(folder: Path, *, template: str = QWEN, layers: int = 2, seed: int = 0) -> None:
    """A Hugging Face folder: random weights, large enough to learn a choice between two answers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=192,
        bos_token_id=tokenizer.token_to_id("<s>"),
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        tie_word_embeddings=False,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"bos_token": "<s>", "eos_token": "<|im_end|>"} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(words))


def add_base(root: Path, folder: Path, name: str = BASE) -> None:
    """Pulls it in float32."""
    pull(str(folder), Repository(root), name=name, task=Task.TEXT_GENERATION, dtype="float32")


def texts(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Different sentences of a few words, one of which decides the answer."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        word = rng.choice(sorted(ANSWERS))
        words = [*(rng.choice(_OTHERS) for _ in range(rng.randint(2, 5))), word]
        rng.shuffle(words)
        found[" ".join(words)] = ANSWERS[word]
    return list(found.items())


def fill(lake: Path, rows: list[tuple[str, str]], **more: object) -> list[str]:
    """Writes interactions that a teacher answered; their ids."""
    key = IdKey.open(lake / "id.key")
    log = Log(table.log_folder(lake, INTERACTIONS))
    base = {"skill": "kind", "task": "text-generation", "input_kind": "text", "training_allowed": True, "source_model": "big", **more}
    ids = []
    for text, answer in rows:
        ids.append(key.new())
        said = {"teacher_text": answer, "output_text": answer, "candidate": "vendor/big", "local": False}
        log.append([{"time_ns": time.time_ns(), "interaction_id": ids[-1], "input": text, **said, **base}])
    log.close()
    table.convert(lake, INTERACTIONS)
    return ids


def site(folder: Path, models: Path, checkpoint: Path, **skill: object) -> Config:
    """A configuration over `models`, whose base was pulled from `checkpoint`, with a lake and a registry of its own."""
    wanted = {
        "task": "text-generation",
        "instruction": "Which kind?",
        "json_schema": json.dumps(SCHEMA),
        "teacher": "vendor/big",
        "student_model": BASE,
        "max_tokens": 24,
        "min_rows": 60,
        "deliver_bar": 0.8,
        **skill,
    }
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in wanted.items())
    (folder / "understudy.toml").write_text(f"""
[models]
path = {json.dumps(str(models))}
[lake]
path = {json.dumps(str(folder / "lake"))}
[registry]
url = {json.dumps(f"sqlite:///{folder / 'registry.db'}")}
[curation]
pii = "off"
near_duplicates = 1.0
label_errors = "off"
[training.sources]
{BASE} = {json.dumps(str(checkpoint))}
[providers.vendor]
[skills.kind]
{lines}
""")
    return load_config(folder / "understudy.toml", environ={})


def job(config: Config, folder: Path, **fields: object) -> JobContext:
    """A job of the registry, as a trainer would begin it."""
    registry = Registry(config.registry)
    name = registry.start_job("kind", "train")
    registry.close()
    return JobContext(name, folder / name, **fields)  # type: ignore[arg-type]
