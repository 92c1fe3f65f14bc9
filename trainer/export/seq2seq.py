"""Encoder-decoders for translation and summarization: graphs, tokenizers and manifest, checked against transformers.

The graphs are our own (server/runtime/seq2seq/graph.py) and not optimum's: its decoder takes one past for all rows, without a mask, so that
answers of different ages cannot run together, and repeats every text's cross-attention for each of its beams.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from server.core import Task
from server.errors import ModelRejected
from server.runtime.graphs.calibrate import default_texts
from server.runtime.manifest import Seq2Seq
from server.runtime.seq2seq.checkpoint import Checkpoint, Config
from server.runtime.seq2seq.graph import DECODER, ENCODER, write_graphs
from server.runtime.seq2seq.rules import KEYS, make_rules
from server.runtime.sessions import Session, Sessions, SessionSettings
from trainer.export.check import Figures
from trainer.export.seq2seq_tokenizer import SOURCE, TARGET, Converted, convert, load_tokenizer

TASKS = (Task.TRANSLATION, Task.SUMMARIZATION)
# Relative error of the encoder's output and of the decoder's logits against transformers; a graph outside is not written.
ERROR = 1e-3
# Share of texts that the written tokenizer must split as transformers' does.
SAME_TOKENS = 0.95
_T5_OUTPUT_TOKENS = 512
_T5_INPUT_TOKENS = 512
_STEPS = 6
_CODES = {"English": "en", "French": "fr", "German": "de", "Romanian": "ro", "Spanish": "es", "Italian": "it", "Dutch": "nl"}
# Settings of generation_config.json that change answers and are not kept to, with the value that changes nothing.
_REFUSED = {
    "encoder_repetition_penalty": (None, 1.0),
    "diversity_penalty": (None, 0.0),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None,),
    "guidance_scale": (None, 1.0),
    "sequence_bias": (None,),
    "exponential_decay_length_penalty": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
}


def export_seq2seq(source: Path, out: Path, task: Task) -> Figures:
    """Writes graphs, weights, tokenizers and manifest.json to `out`; returns how the graphs compare with the original.

    Raises ModelRejected: an architecture that is not served, broken files, a setting that cannot be kept to, or answers out of tolerance.
    """
    if not any(source.glob("*.safetensors")):
        raise ModelRejected(f"There is no safetensors file in {source}; pickled checkpoints are not opened. Convert it, then export again.")
    out.mkdir(parents=True, exist_ok=True)
    try:
        checkpoint = Checkpoint(source)
        write_graphs(checkpoint, out)
        converted = convert(source, out, checkpoint.config.model_type)
        manifest = _manifest(source, checkpoint.config, converted, task)
        figures = _compare(source, out, checkpoint.config, manifest)
    except ModelRejected:
        shutil.rmtree(out)
        raise
    (out / "manifest.json").write_text(json.dumps({**manifest, "parity": figures}, indent=1), encoding="utf-8")
    return figures


def _manifest(source: Path, config: Config, converted: Converted, task: Task) -> dict[str, Any]:
    from transformers import AutoConfig, GenerationConfig

    full = AutoConfig.from_pretrained(str(source), local_files_only=True)
    if (source / "generation_config.json").is_file():
        settings = GenerationConfig.from_pretrained(str(source), local_files_only=True)
    else:
        settings = GenerationConfig.from_model_config(full)
    generation, prefixes = _generation(settings, full, config, task)
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    start = settings.decoder_start_token_id if settings.decoder_start_token_id is not None else settings.bos_token_id
    if ends == [None] or start is None:
        raise ModelRejected(
            "config.json and generation_config.json name no end token or no start token; add eos_token_id and decoder_start_token_id."
        )
    limit = min(config.positions or _T5_INPUT_TOKENS, _stated_limit(source))
    seq2seq: dict[str, Any] = {
        "encoder": ENCODER,
        "decoder": DECODER,
        "layers": config.layers["decoder"],
        "heads": config.heads["decoder"],
        "head_dim": config.head_dim,
        "vocabulary": config.vocabulary,
        "decoder_start_token_id": int(start),
        "eos_token_ids": [int(token) for token in ends],
        "pad_token_id": int(settings.pad_token_id if settings.pad_token_id is not None else config.pad_token_id),
        "max_output_tokens": config.positions or max(_T5_OUTPUT_TOKENS, int(generation.get("max_length", 1)) - 1),
        "generation": generation,
        "languages": converted.languages,
        "prefixes": prefixes,
        "source_prefix": converted.prefix,
        "source_suffix": converted.suffix,
        "target_by": converted.target_by,
        "source_language": converted.source_language,
        "target_language": converted.target_language or _forced_language(generation, converted),
        "source_vocabulary": config.source_vocabulary,
        "unknown_token_id": converted.unknown,
    }
    if any(token >= min(config.vocabulary, config.source_vocabulary) for token in converted.languages.values()):
        raise ModelRejected("the tokenizer has language tokens that the model's vocabulary lacks; take the tokenizer of this very model.")
    make_rules(Seq2Seq(**seq2seq))
    return {
        "task": task.value,
        "form": "seq2seq",
        "architecture": config.model_type,
        "dtype": "float32",
        "hidden_size": config.hidden,
        "max_tokens": limit,
        "seq2seq": seq2seq,
    }


def _generation(settings: Any, full: Any, config: Config, task: Task) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings that a search keeps to, those of the task above the model's own, and the texts that the task puts before an input."""
    stated = dict(settings.to_diff_dict())
    prefixes: dict[str, str] = {}
    specific = getattr(full, "task_specific_params", None)
    for name, values in specific.items() if isinstance(specific, dict) else ():
        if name != task.value and not (task is Task.TRANSLATION and name.startswith("translation_")):
            continue
        stated |= {key: value for key, value in values.items() if key != "prefix"}
        prefix = values.get("prefix")
        if prefix:
            prefixes[_pair(name, str(prefix)) if task is Task.TRANSLATION else ""] = str(prefix)
    for key, harmless in _REFUSED.items():
        if stated.get(key) not in harmless:
            raise ModelRejected(
                f"generation_config.json sets {key} to {str(stated[key])[:60]}, which is not kept to here; remove it.", field=key
            )
    generation = {key: stated[key] for key in sorted(KEYS) if stated.get(key) is not None}
    return generation, prefixes


def _pair(name: str, prefix: str) -> str:
    """The languages, as en-de, from T5's "translation_en_to_de" or from the prefix's own words."""
    codes = name.removeprefix("translation_").split("_to_")
    if len(codes) == 2:
        return "-".join(codes)
    named = [_CODES[word.strip(":")] for word in prefix.split() if word.strip(":") in _CODES]
    return "-".join(named)


def _forced_language(generation: dict[str, Any], converted: Converted) -> str:
    forced = generation.get("forced_bos_token_id")
    return next((code for code, token in converted.languages.items() if token == forced), "")


def _stated_limit(source: Path) -> int:
    path = source / "tokenizer_config.json"
    value = json.loads(path.read_text(encoding="utf-8")).get("model_max_length") if path.is_file() else None
    return value if isinstance(value, int) and 0 < value <= 1_000_000 else 1_000_000


def _compare(source: Path, out: Path, config: Config, manifest: dict[str, Any]) -> Figures:
    """Relative errors (RMS over RMS) of what the decoder reads of the encoder, and of its logits over the first steps; top-1 agreement."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForSeq2SeqLM

    spec = manifest["seq2seq"]
    fast = Tokenizer.from_file(str(out / "tokenizer.json"))
    texts = default_texts()[:: max(1, len(default_texts()) // 24)]
    bare = [[min(i, config.source_vocabulary) for i in fast.encode(text).ids] for text in texts]
    bare = [[spec["unknown_token_id"] if i >= config.source_vocabulary else i for i in ids] for ids in bare]
    original = load_tokenizer(source)
    same = float(np.mean([ids == original(text, add_special_tokens=False).input_ids for ids, text in zip(bare, texts, strict=True)]))
    any_language = next(iter(spec["languages"].values()), None)
    language = {
        mark: spec["languages"].get(spec[key], any_language) for mark, key in ((SOURCE, "source_language"), (TARGET, "target_language"))
    }
    around = [[language.get(t, t) for t in spec[key]] for key in ("source_prefix", "source_suffix")]
    room = manifest["max_tokens"] - len(around[0]) - len(around[1])
    sources = [np.array([*around[0], *ids[: min(room, 96)], *around[1]], np.int64) for ids in bare]
    model = AutoModelForSeq2SeqLM.from_pretrained(str(source), use_safetensors=True, local_files_only=True).eval()
    random = np.random.default_rng(0)
    # Padding is left out: M2M100 counts no positions for it, wherever it stands.
    tokens = np.setdiff1d(np.arange(config.vocabulary), [config.pad_token_id])
    answers = [np.array([spec["decoder_start_token_id"], *random.choice(tokens, _STEPS - 1)], np.int64) for _ in sources]
    memory, logits = _run(out, spec, sources, answers)
    wanted_memory, wanted = [], []
    with torch.no_grad():
        for ids, answer in zip(sources, answers, strict=True):
            result = model(input_ids=torch.from_numpy(ids[None]), decoder_input_ids=torch.from_numpy(answer[None]))
            wanted.append(result.logits[0].numpy())
            wanted_memory.append(_cross(model, result.encoder_last_hidden_state[0]))
    want, want_memory = np.stack(wanted), np.concatenate(wanted_memory)
    figures = {
        "encoder_error": _relative(memory, want_memory),
        "error": _relative(logits, want),
        "top1": float((logits.argmax(-1) == want.argmax(-1)).mean()),
        "tokenizer": same,
    }
    if not (figures["encoder_error"] <= ERROR and figures["error"] <= ERROR and same >= SAME_TOKENS):
        raise ModelRejected(
            f"The exported model does not work as the original: relative errors {figures['encoder_error']:.3g} (encoder) and "
            f"{figures['error']:.3g} (logits), at most {ERROR:g} is allowed; {same:.0%} of texts have the same tokens, "
            f"at least {SAME_TOKENS:.0%} must.",
            figures=", ".join(f"{name}={value:.6g}" for name, value in figures.items()),
        )
    return figures


def _relative(got: Any, want: Any) -> float:
    difference = np.asarray(got, np.float64) - want
    return float(np.sqrt(np.square(difference).mean()) / max(np.sqrt(np.square(want, dtype=np.float64).mean()), 1e-30))


def _cross(model: Any, hidden: Any) -> Any:
    """K and V of every decoder layer's cross-attention, float32[tokens, W], from transformers' own layers."""
    import torch

    if hasattr(model, "model"):
        parts = [(layer.encoder_attn.k_proj, layer.encoder_attn.v_proj) for layer in model.model.decoder.layers]
    else:
        parts = [(block.layer[1].EncDecAttention.k, block.layer[1].EncDecAttention.v) for block in model.decoder.block]
    return torch.cat([project(hidden) for pair in parts for project in pair], dim=1).numpy()


def _run(out: Path, spec: dict[str, Any], sources: list[Any], answers: list[Any]) -> tuple[Any, Any]:
    """Memory [T, W] of all sources, and logits [texts, steps, vocabulary] with the answers given."""
    sessions = Sessions(SessionSettings())
    encoder, decoder = sessions.open(out / ENCODER), sessions.open(out / DECODER)
    lengths = [len(ids) for ids in sources]
    starts = np.cumsum([0, *lengths], dtype=np.int32)
    feeds: dict[str, Any] = {"input_ids": np.concatenate(sources), "cu_seqlens": starts}
    feeds["position_ids"] = np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])
    memory = _feed(encoder, feeds, "memory")
    rows, steps = len(sources), len(answers[0])
    table = np.arange(rows * steps, dtype=np.int32).reshape(rows, steps)
    past = np.zeros((rows * steps, memory.shape[1]), np.float32)
    logits = []
    for step in range(steps):
        given: dict[str, Any] = {
            "input_ids": np.array([answer[step] for answer in answers], np.int64),
            "position_ids": np.full(rows, step, np.int64),
            "past": past,
            "table": np.ascontiguousarray(table[:, : step + 1]),
            "lengths": np.full(rows, step + 1, np.int32),
            "memory": memory,
            "spans": np.stack([starts[:-1], np.array(lengths, np.int32)], axis=1),
            "top": np.array([1], np.int64),
        }
        logits.append(_feed(decoder, given, "logits"))
    encoder.close()
    decoder.close()
    return memory, np.stack(logits, axis=1)


def _feed(session: Session, feeds: dict[str, Any], output: str) -> Any:
    return np.array(session.run({one.name: feeds[one.name] for one in session.inputs}, [output])[0])
