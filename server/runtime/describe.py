"""What a Hugging Face folder says of its model: task, pooling, limits, labels, prefixes; as fields of our manifest.

Read from config.json and, where they are, the files of sentence-transformers: modules.json, <n>_Pooling/config.json,
sentence_bert_config.json and config_sentence_transformers.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.core import Task
from server.errors import InvalidArgument, ModelRejected
from server.runtime.verify import read_json

_POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}
_POOLING_NAMES = {"mean": "mean", "cls": "cls", "lasttoken": "last"}  # the single key of newer releases
_MAX_CONFIG = 4 << 20
# BERT's word pieces can be rebuilt from vocab.txt alone; other vocabularies of that name have other rules.
_WORD_PIECE_TYPES = frozenset({"bert", "distilbert"})


@dataclass(slots=True)
class Description:
    """`fields` go into the manifest; `notes` are for the person who pulls; `config` is config.json, {} without one."""

    task: Task
    config: dict[str, Any]
    fields: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def describe(read: Callable[[str], Path | None], task: Task | None = None) -> Description:
    """Description of a model; `read` gives the path of one of its files, or None. `task` overrides what the files say.

    Raises:
        ModelRejected: a file is broken, or asks for something that is not served (a Dense module, max pooling).
        InvalidArgument: the task cannot be told; with `field`.
    """
    config = _object(read("config.json"))
    modules = _modules(read("modules.json"))
    if task is None:
        task = Task.FEATURE_EXTRACTION if modules else _task_of(config)
    description = Description(task, config)
    fields = description.fields
    fields["task"] = task.value
    fields["architecture"] = str(config.get("model_type", ""))[:64]
    positions = _whole(config.get("max_position_embeddings")) or _whole(config.get("n_positions")) or 512
    if config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= (_whole(config.get("pad_token_id")) or 1) + 1  # their position tables begin after the padding's row
    fields["max_tokens"] = max(1, positions)
    if task is Task.FEATURE_EXTRACTION:
        _read_embedding(description, read, modules)
    else:
        fields["labels"] = _labels(config, task)
        fields["multi_label"] = config.get("problem_type") == "multi_label_classification"
    return description


def _read_embedding(description: Description, read: Callable[[str], Path | None], modules: list[tuple[str, str]]) -> None:
    fields, config = description.fields, description.config
    fields["hidden_size"] = _whole(config.get("hidden_size")) or _whole(config.get("dim")) or 0
    fields["pooling"], fields["normalize"] = "mean", False
    if not modules:
        description.notes.append("No modules.json: tokens are averaged, vectors not normalised; set --pooling if the model wants other.")
    for kind, path in modules:
        if kind == "Pooling":
            fields["pooling"] = _pooling(_object(read(f"{path}/config.json")), path)
        elif kind == "Normalize":
            fields["normalize"] = True
        elif kind not in ("Transformer", "Dropout"):
            raise ModelRejected(
                f"modules.json: a module of type {kind!r} is not served; Transformer, Pooling and Normalize are. "
                "Merge it into the model, or use a model without it.",
                module=kind,
            )
    stated = _whole(_object(read("sentence_bert_config.json")).get("max_seq_length"))
    if stated and stated < fields["max_tokens"]:
        fields["extra"] = {"max_seq_length": stated}
        description.notes.append(
            f"sentence-transformers cuts this model's texts at {stated} tokens; the model, and so the server, takes {fields['max_tokens']}."
        )
    prompts = _object(read("config_sentence_transformers.json")).get("prompts")
    if isinstance(prompts, dict):
        fields["query_prefix"] = _prompt(prompts, "query")
        fields["passage_prefix"] = _prompt(prompts, "passage", "document", "corpus")


def _prompt(prompts: dict[str, Any], *keys: str) -> str:
    return next((str(prompts[key])[:4096] for key in keys if isinstance(prompts.get(key), str)), "")


def _task_of(config: dict[str, Any]) -> Task:
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    if name.endswith("ForSequenceClassification"):
        return Task.TEXT_RANKING if len(_id2label(config)) == 1 else Task.TEXT_CLASSIFICATION
    for ending, task in (
        ("ForTokenClassification", Task.TOKEN_CLASSIFICATION),
        ("ForQuestionAnswering", Task.QUESTION_ANSWERING),
        ("ForMaskedLM", Task.FEATURE_EXTRACTION),
        ("ForCausalLM", Task.TEXT_GENERATION),
        ("MarianMTModel", Task.TRANSLATION),
        ("M2M100ForConditionalGeneration", Task.TRANSLATION),
        ("MBartForConditionalGeneration", Task.TRANSLATION),
        ("BartForConditionalGeneration", Task.SUMMARIZATION),
        ("PegasusForConditionalGeneration", Task.SUMMARIZATION),
        ("Model", Task.FEATURE_EXTRACTION),
    ):
        if name.endswith(ending):
            return task
    shown = repr(name[:80]) if name else "nothing"
    raise InvalidArgument(f"config.json names {shown} as architecture, which tells no task. Give one with --task.", field="task")


def _labels(config: dict[str, Any], task: Task) -> list[str]:
    if task in (Task.QUESTION_ANSWERING, Task.TENSOR, Task.TEXT_GENERATION, Task.TRANSLATION, Task.SUMMARIZATION):
        return []
    return _id2label(config)


def _id2label(config: dict[str, Any]) -> list[str]:
    names = config.get("id2label")
    if names is None:
        count = _whole(config.get("num_labels")) or 2
        return [f"LABEL_{i}" for i in range(min(count, 100_000))]
    try:
        by_number = {int(key): str(value) for key, value in names.items()}
    except (AttributeError, TypeError, ValueError):
        by_number = {}
    if not by_number or sorted(by_number) != list(range(len(by_number))):
        raise ModelRejected("config.json: id2label must map 0, 1, 2, ... without a gap to names. Mend the file.", field="id2label")
    return [by_number[i] for i in range(len(by_number))]


def _modules(path: Path | None) -> list[tuple[str, str]]:
    """(type, path) of the modules in order; the type without its package."""
    if path is None:
        return []
    content = read_json(path, _MAX_CONFIG)
    modules = []
    for entry in content if isinstance(content, list) else [None]:
        kind, where = (entry.get("type"), entry.get("path", "")) if isinstance(entry, dict) else (None, "")
        if not isinstance(kind, str) or not isinstance(where, str) or ".." in where or where.startswith(("/", "\\")) or len(where) > 64:
            raise ModelRejected("modules.json is no list of modules with type and path. Pull the model again.", file="modules.json")
        modules.append((kind.rsplit(".", 1)[-1], where))
    return modules


def _pooling(config: dict[str, Any], path: str) -> str:
    named = config.get("pooling_mode")
    chosen = [named] if isinstance(named, str) else [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    known = [_POOLING.get(key) or _POOLING_NAMES.get(key) for key in chosen]
    if len(known) != 1 or known[0] is None:
        shown = ", ".join(str(key)[:64] for key in chosen) or "none"
        raise ModelRejected(f"{path}/config.json asks for pooling {shown}; one of mean, cls and last token is served.", field="pooling")
    return known[0]


def _object(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    content = read_json(path, _MAX_CONFIG)
    if not isinstance(content, dict):
        raise ModelRejected(f"{path.name} holds no JSON object. Pull the model again.", file=path.name)
    return content


def _whole(value: object) -> int:
    """`value` if it is a sensible positive whole number, else 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1_000_000 else 0


def write_tokenizer(read: Callable[[str], Path | None], config: dict[str, Any], target: Path) -> None:
    """Writes tokenizer.json: the model's own, or one built from BERT's vocab.txt.

    Raises:
        ModelRejected: neither is there, or it is broken.
    """
    own = read("tokenizer.json")
    if own is not None:
        target.write_bytes(own.read_bytes())
        return
    vocabulary = read("vocab.txt")
    kind = config.get("model_type")
    if vocabulary is None or kind not in _WORD_PIECE_TYPES:
        raise ModelRejected(
            f"the model has no tokenizer.json, and only BERT's and DistilBERT's can be built, from vocab.txt (this is {str(kind)[:64]!r}). "
            "Make one where transformers is installed: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER).",
            file="tokenizer.json",
        )
    _word_pieces(vocabulary, _object(read("tokenizer_config.json"))).save(str(target))


def _word_pieces(vocabulary: Path, config: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    lines = vocabulary.read_text(encoding="utf-8").split("\n")
    tokens = {token.rstrip("\r"): number for number, token in enumerate(lines) if token.rstrip("\r")}
    defaults = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = {key: str(config.get(key, default)) for key, default in defaults.items()}
    for name in names.values():
        if name not in tokens:
            message = f"vocab.txt has no {name[:64]!r} entry, which BERT's tokenizer needs. Pull the model again."
            raise ModelRejected(message, file="vocab.txt")
    lowercase = config.get("do_lower_case", True) is not False
    accents = config.get("strip_accents")
    tokenizer = Tokenizer(models.WordPiece(tokens, unk_token=names["unk_token"], max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True) is not False,
        strip_accents=accents if isinstance(accents, bool) else None,
        lowercase=lowercase,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    cls, sep = names["cls_token"], names["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0", pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1", special_tokens=[(cls, tokens[cls]), (sep, tokens[sep])]
    )
    tokenizer.add_special_tokens([name for name in (*names.values(), "[PAD]", "[MASK]") if name in tokens])
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer
