"""Bars `correct` and `precision`: what is generated against transformers, and int8 against float32, on models that were really trained."""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bench import trained_llama
from bench.generation_models import Shape, pulled
from bench.harness import BUILD, ROOT, SHARED, Row, part, row_of
from bench.measures.generation_speed import client, our_server
from understudy.client import Client

CORRECT = (
    "greedy text equal to transformers for 64 real prompts of mixed lengths at 16 in flight (fp32), with and without adapters, with chunked"
    " prefill and with prefix reuse; stories260K tells its known story"
)
PRECISION = (
    "W8A8 as exported: top-1 agreement with fp32 >= 0.98 and mean KL <= 0.01 on held-out text for stories260K and for a LLaMA of some"
    " 10-20M parameters that the bench trains for minutes on public text, outlier channels injected on purpose included"
)
TOKENS = 32
# Tokens of held-out text that distributions are compared on, and of one sequence.
MOST_TOKENS, LONGEST = 6000, 256
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."


@functools.cache
def stories() -> Path:
    """stories260K as published, beside its tokenizer."""
    return SHARED / "data" / "tiny_weights" / "stories260K"


def real_prompts(count: int) -> list[list[int]]:
    """Token ids of held-out texts for the trained model, 8 to 400 tokens long."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(trained_llama.folders()[0] / "tokenizer.json"))
    lengths = np.random.default_rng(4).integers(8, 401, count).tolist()
    _, held = trained_llama.split()
    stream = [i for text in held for i in tokenizer.encode(text).ids]
    found, at = [], 0
    for length in lengths:
        found.append([1, *stream[at : at + length]])
        at += length
    return found


def adapters(base: Shape, count: int = 3, rank: int = 8) -> dict[str, Path]:
    """PEFT folders of LoRA adapters over the trained model: every linear layer, weights that matter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    found = {}
    for n in range(count):
        folder = BUILD / "adapters" / f"{base.name}-{n}"
        found[f"skill-{n}"] = folder
        if (folder / "adapter_config.json").is_file():
            continue
        torch.manual_seed(n)
        model = AutoModelForCausalLM.from_pretrained(base.checkpoint, dtype=torch.float32)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        wrapped = get_peft_model(model, config)
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)
        wrapped.save_pretrained(folder)
    return found


def reference(base: Shape, requests: list[dict[str, Any]], folders: dict[str, Path]) -> list[list[int]]:
    """transformers' greedy tokens, one prompt at a time, float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # a model this small gains nothing by more, and its threads spin
    model: Any = AutoModelForCausalLM.from_pretrained(base.checkpoint, dtype=torch.float32).eval()
    for name, folder in folders.items():
        model = (
            model.load_adapter(str(folder), name) and model
            if isinstance(model, PeftModel)
            else PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        )
    made = []
    for request in requests:
        adapter = request.get("more", {}).get("adapter", "")
        ids = torch.tensor([request["prompt"]])
        with torch.inference_mode(), contextlib.ExitStack() as stack:
            if adapter:
                model.set_adapter(adapter)
            elif folders:
                stack.enter_context(model.disable_adapter())
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request["tokens"],
                min_new_tokens=request["tokens"],
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
        made.append(out[0, ids.shape[1] :].tolist())
    return made


def correct() -> Row:
    base = pulled("trained-llama", trained_llama.folders()[0], "float32")
    folders = adapters(base)
    prompts = real_prompts(64)
    plain = [{"prompt": p, "tokens": TOKENS} for p in prompts]
    mixed = [{**r, "more": {"adapter": ["", *folders][i % 4]}} for i, r in enumerate(plain)]
    shared = [{"prompt": [*prompts[0][:200], *p[1:]], "tokens": TOKENS} for p in prompts]
    add_adapters(base, folders)
    parts = []
    references: dict[str, list[list[int]]] = {}
    for name, requests, settings in (
        ("plain", plain, {}),
        ("with adapters", mixed, {}),
        ("chunked prefill, 48 tokens a step", plain, {"generation.token_budget": 48, "generation.prefix_cache": False}),
        ("prefix reuse, 200 tokens in common", shared, {}),
    ):
        key = str(requests)
        wanted = references[key] = references.get(key) or reference(base, requests, folders if "adapters" in name else {})
        with our_server(base, **settings) as server:
            load = client()
            tagged = [{**r, "tag": i} for i, r in enumerate(requests)]
            plan = {"server": "ours", "address": server.address, "model": base.name, "streams": 16, "requests": tagged}
            seen = {report["tag"]: report for report in load.ask(**plan)}
            load.close()
        errors = [r["error"] for r in seen.values() if r["error"]]
        equal = sum(seen[i]["ids"] == w for i, w in enumerate(wanted))
        parts.append(part(name, "64 of 64 equal", f"{equal} of {len(wanted)}" + (f", {errors[0]}" if errors else ""), equal == len(wanted)))
    parts.append(_story())
    return row_of("correct", CORRECT, parts)


def add_adapters(base: Shape, folders: dict[str, Path]) -> None:
    """Converts PEFT folders and puts them where a server of this repository finds them."""
    for name, folder in folders.items():
        if (base.models / "adapters" / base.name / name).is_dir() or (base.models / "adapters" / name).is_dir():
            continue
        command = [sys.executable, "-m", "server.cli", "adapters", "add", str(folder), "--base", base.name, "--name", name]
        done = subprocess.run([*command, "--models", str(base.models)], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"adapter {name} could not be added: {(done.stdout + done.stderr)[-800:]}")


def _story() -> dict[str, Any]:
    if not stories().is_dir():
        return part("stories260K", "its known story", "the checkpoint is not at hand", False)
    told = {}
    for dtype in ("float32", "int8"):
        model = pulled("stories260k", stories(), dtype)
        with our_server(model) as server, Client(server.address) as caller:
            told[dtype] = caller.generate_text(token_ids=[1], model=model.name, max_tokens=40, temperature=0.0).text
    # int8 is held to `precision`; what it tells is shown beside.
    return part("stories260K", "its known story (fp32)", told, told["float32"].startswith(STORY))


def held_out(checkpoint: Path) -> list[str]:
    """Text that neither training nor calibration has seen: held-out public text, or stories for the story teller."""
    if checkpoint == stories():
        return STORIES
    return trained_llama.split()[1]


def precision() -> Row:
    parts = []
    cases = [("trained LLaMA", trained_llama.folders()[0]), ("with outlier channels", trained_llama.folders()[1])]
    if stories().is_dir():
        cases.insert(0, ("stories260K", stories()))
    for name, checkpoint in cases:
        base = checkpoint.name.lower()
        exact, coarse = pulled(base, checkpoint, "float32"), pulled(base, checkpoint, "int8")
        seen = compare(exact, coarse, held_out(checkpoint))
        met = seen["top1"] >= 0.98 and seen["kl"] <= 0.01
        parts.append(part(name, "top-1 >= 0.98, KL <= 0.01", {k: round(seen[k], 5) for k in ("top1", "kl")}, met, more=seen))
    return row_of("precision", PRECISION, parts)


STORIES = [
    "One day, a boy named Tim went to the park with his mom. He saw a big dog and wanted to play with it.",
    "Lily had a red ball. She liked to throw it high in the sky. Her friend Ben wanted to play too, so they took turns.",
    "Once there was a small bird who could not fly. The bird was sad, but her mother said, do not give up.",
    "The sun was hot and the cat was tired. It found a tree and slept in the shade until it was dark.",
    "Sam and Mia made a cake for their dad. They put too much sugar in it, but he smiled and ate it all.",
    "A little fish lived in a blue pond. Every day it swam to the other side to see the frogs jump.",
    "Tom did not want to share his toys. Then his sister shared her cookie with him, and he felt sorry.",
    "The old truck was slow, but it was strong. When the new car got stuck in the mud, the truck pulled it out.",
]


def compare(exact: Shape, coarse: Shape, texts: list[str]) -> dict[str, Any]:
    """Next-token distributions of the two exports over the same tokens, each with the pages that it was exported with."""
    from tokenizers import Tokenizer

    from server.runtime.graphs.decoder.checkpoint import DecoderCheckpoint
    from server.runtime.graphs.decoder.parity import Runner, measure

    tokenizer = Tokenizer.from_file(str(version(exact) / "tokenizer.json"))
    model = DecoderCheckpoint.open(converted(exact.checkpoint))
    sequences = [[1, *encoded.ids][:LONGEST] for encoded in tokenizer.encode_batch(texts, add_special_tokens=False)]
    if exact.checkpoint == stories():
        sequences += told(version(exact) / "model.onnx", model)
    total, kept = 0, []
    for sequence in sequences:
        if total < MOST_TOKENS:
            kept.append(sequence)
            total += len(sequence)
    answers = []
    for one in (exact, coarse):
        kv_dtype = json.loads((version(one) / "manifest.json").read_text())["decoder"]["kv_dtype"]
        runner = Runner(version(one) / "model.onnx", model, sequences=len(kept), length=LONGEST, kv_dtype=kv_dtype)
        answers.append(np.concatenate([runner.run([i], [sequence]) for i, sequence in enumerate(kept)]))
        runner.close()
    manifest = json.loads((version(coarse) / "manifest.json").read_text())
    layers = manifest["quantization"]["layers"]
    forms = {form: sum(v == form for k, v in layers.items() if not k.startswith("int4/")) for form in sorted(set(layers.values()))}
    return {**measure(answers[1], answers[0]), "tokens": total, "products": forms, "kv_dtype": manifest["decoder"]["kv_dtype"]}


def converted(checkpoint: Path) -> Path:
    """The checkpoint as a Hugging Face folder."""
    from server.runtime.graphs.decoder.llama2c import convert

    if (checkpoint / "config.json").is_file():
        return checkpoint
    folder = BUILD / "shapes" / checkpoint.name
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        convert(checkpoint / "stories260K.bin", checkpoint / "tok512.bin", folder)
    return folder


def told(graph: Path, model: Any, count: int = 16, length: int = 200) -> list[list[int]]:
    """Stories drawn from the float32 model itself at temperature 1: text as it was trained on, of which none is at hand."""
    from server.runtime.graphs.decoder.parity import Runner

    rng = np.random.default_rng(8)
    runner = Runner(graph, model, sequences=count, length=LONGEST, kv_dtype="float32")
    found = [[1] for _ in range(count)]
    for _ in range(length):
        logits = runner.run(range(count), [sequence[-1:] for sequence in found])
        drawn = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
        for sequence, token in zip(found, drawn.tolist(), strict=True):
            sequence.append(token)
    runner.close()
    return found


def version(model: Shape) -> Path:
    return model.models / model.name / "1"


def main() -> None:
    print(json.dumps(precision().parts, indent=1))


if __name__ == "__main__":
    main()
