"""Bars `adapters` and `structured`: many adapters in one batch, and answers that must have a form."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from bench import trained_llama
from bench.generation_models import Shape, pulled, shape
from bench.harness import BUILD, Row, Server, median, part, row_of
from bench.measures.generation_speed import client, our_server, plan_of, rate_of, requests_of
from bench.measures.generation_truth import adapters as trained_adapters
from bench.measures.generation_truth import add_adapters, real_prompts, version
from tests.runtime.decoder.schemas_for_tests import WRITTEN, generated

ADAPTERS = (
    "8 adapters mixed over 32 rows >= 0.75 of the base's speed (r=16, all projections); each row equal to PEFT's own output (fp32, 1e-4 on"
    " logits); load <= 200 ms, no running stream pauses longer than two steps"
)
STRUCTURED = "500 schemas (generated and real) x random weights: 100 % valid, decode speed >= 0.85 of unconstrained"
RANK, COUNT, ROWS = 16, 8, 32


def random_adapters(model: Shape, count: int = COUNT + 4) -> dict[str, Path]:
    """PEFT folders of random LoRA adapters for every projection of a Llama shape, without its weights in memory."""
    from safetensors.numpy import save_file

    config = json.loads((model.checkpoint / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = dim * config["num_attention_heads"], dim * config["num_key_value_heads"]
    sizes = {
        "self_attn.q_proj": (hidden, q),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (q, hidden),
    }
    sizes |= {"mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner), "mlp.down_proj": (inner, hidden)}
    found = {}
    for n in range(count):
        folder = BUILD / "adapters" / f"{model.name}-{n}"
        found[f"skill-{n}"] = folder
        if (folder / "adapter_config.json").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(n)
        tensors = {}
        for i in range(config["num_hidden_layers"]):
            for name, (inputs, outputs) in sizes.items():
                base = f"base_model.model.model.layers.{i}.{name}"
                tensors[f"{base}.lora_A.weight"] = (rng.standard_normal((RANK, inputs)) / inputs**0.5).astype(np.float32)
                tensors[f"{base}.lora_B.weight"] = (rng.standard_normal((outputs, RANK)) * 0.01).astype(np.float32)
        save_file(tensors, str(folder / "adapter_model.safetensors"))
        described = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "bias": "none", "fan_in_fan_out": False}
        described |= {
            "target_modules": sorted({name.rsplit(".", 1)[1] for name in sizes}),
            "base_model_name_or_path": str(model.checkpoint),
        }
        (folder / "adapter_config.json").write_text(json.dumps(described))
    return found


def adapters(rounds: int = 4) -> Row:
    model = shape("smollm2-135m")
    folders = random_adapters(model)
    add_adapters(model, folders)
    names = list(folders)
    parts = []
    seen: dict[str, list[float]] = {}
    # Every token travels alone: a pause is one of the engine, not of messages that wait for company.
    with our_server(model, **{"generation.adapter_slots": 12, "generation.message_rate": 1e6}) as server:
        load = client()
        for i in range(rounds + 1):
            for name, used in (("base", [""]), ("one", names[:1]), ("mixed", names[:COUNT])):
                requests = requests_of(model, ROWS, 1, 300 + i, tokens=96)
                requests = [{**r, "more": {"adapter": used[j % len(used)]}} for j, r in enumerate(requests)]
                rate = rate_of(load.ask(**plan_of(server, model, ROWS, requests)))
                if i:
                    seen.setdefault(name, []).append(rate)
        share = round(median([m / b for m, b in zip(seen["mixed"], seen["base"], strict=True)]), 3)
        shown = {name: round(median(rates), 1) for name, rates in seen.items()}
        parts.append(part("8 adapters over 32 rows, of the base's speed", ">= 0.75", share, share >= 0.75, tokens_s=shown))
        parts += _loading(server, model, names, load)
        load.close()
    parts.append(_equal())
    return row_of("adapters", ADAPTERS, parts)


def _loading(server: Server, model: Shape, names: list[str], load: Any) -> list[dict[str, Any]]:
    """Unloads and loads adapters while eight answers run: time of each load, and the longest pause against the usual step."""
    from understudy.v1 import model_service_pb2 as service
    from understudy.v1 import model_service_pb2_grpc as stubs

    done: list[Any] = []
    plan = plan_of(server, model, 8, requests_of(model, 8, 1, 77, tokens=400))
    running = threading.Thread(target=lambda: done.append(load.ask(**plan)))
    running.start()
    time.sleep(1.5)  # the answers have begun; nothing is judged by this
    times, spans = [], []
    with grpc.insecure_channel(server.address) as channel:
        stub = stubs.ModelServiceStub(channel)
        for name in names[COUNT:]:
            full = f"models/{model.name}/adapters/{name}"
            stub.UnloadAdapter(service.UnloadAdapterRequest(name=full))
            start = time.monotonic()
            stub.LoadAdapter(service.LoadAdapterRequest(name=full))
            spans.append((start, time.monotonic()))
            times.append((spans[-1][1] - start) * 1e3)
    running.join()
    gaps, beside = [], []
    for r in done[0]:
        for (before, _), (now, n) in zip(r["arrivals"], r["arrivals"][1:], strict=False):
            gaps.append((now - before) / n)
            if any(before < end and now > begin for begin, end in spans):
                beside.append(now - before)
    pause = round(max(beside) / median(gaps), 2) if beside else 0.0
    took = round(median(times), 1)
    return [
        part("load, ms", "<= 200", took, took <= 200, each=[round(t, 1) for t in times], rank=RANK),
        part("longest pause of a stream while adapters load, in steps", "<= 3 (two missed)", pause, pause <= 3.0),
    ]


def _equal() -> dict[str, Any]:
    """Logits of rows with three adapters and none in one run of the float32 graph, against PEFT's own."""
    import asyncio

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from server.runtime.graphs.decoder.checkpoint import DecoderCheckpoint
    from server.runtime.graphs.decoder.parity import Runner
    from server.runtime.lora.bank import AdapterBank
    from server.runtime.lora.layout import layout_of
    from server.runtime.lora.store import AdapterSet
    from server.runtime.repository import Repository

    base = pulled("trained-llama", trained_llama.folders()[0], "float32")
    folders = trained_adapters(base)
    add_adapters(base, folders)
    manifest = Repository(base.models).manifest(base.name)
    layout = layout_of(manifest)
    assert layout is not None
    prompts = real_prompts(8)

    async def logits() -> np.ndarray:
        bank = AdapterBank(layout, 4, 16)
        loaded = AdapterSet(manifest, base.models / "adapters", bank)
        await loaded.start()
        slots = [-1 if not name else (await loaded.acquire(name)).slot for name in used]
        runner = Runner(version(base) / "model.onnx", DecoderCheckpoint.open(base.checkpoint), sequences=8, length=512, kv_dtype="float32")
        runner.adapters = bank.feeds()
        tokens = np.concatenate([np.full(len(p), s, np.int32) for p, s in zip(prompts, slots, strict=True)])
        return runner.run(range(8), prompts, slots=tokens)

    used = ["", *folders, *folders, ""]
    got = asyncio.run(logits())
    model: Any = AutoModelForCausalLM.from_pretrained(base.checkpoint, dtype=torch.float32).eval()
    first, *rest = folders
    model = PeftModel.from_pretrained(model, str(folders[first]), adapter_name=first)
    for name in rest:
        model.load_adapter(str(folders[name]), name)
    worst, at = 0.0, 0
    for prompt, name in zip(prompts, used, strict=True):
        with torch.inference_mode():
            if name:
                model.set_adapter(name)
                want = model(torch.tensor([prompt])).logits[0].numpy()
            else:
                with model.disable_adapter():
                    want = model(torch.tensor([prompt])).logits[0].numpy()
        worst = max(worst, float(np.abs(got[at : at + len(prompt)] - want).max()))
        at += len(prompt)
    return part("largest difference to PEFT's logits, fp32", "<= 1e-4", float(f"{worst:.2g}"), worst <= 1e-4)


def structured(rounds: int = 3) -> Row:
    model = shape("smollm2-135m")
    parts = []
    with our_server(model) as server:
        parts.append(_valid(server, model, [*WRITTEN, *(generated(i) for i in range(500 - len(WRITTEN)))]))
        load = client()
        seen: dict[str, list[float]] = {}
        # A form that goes on for as long as it is asked to, so that both kinds of answers have the same length.
        form = {"responseFormat": {"regex": "([a-z]{1,9} ){1,400}"}}
        schema = {"responseFormat": {"jsonSchema": json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 400})}}
        for i in range(rounds + 1):
            for name, more in (("unconstrained", {}), ("regex", form), ("json schema", schema)):
                requests = [{**r, "more": more, "sampling": {"temperature": 1.0}} for r in requests_of(model, 16, 1, 60 + i, tokens=96)]
                reports = load.ask(**plan_of(server, model, 16, requests))
                if i:
                    seen.setdefault(name, []).append(rate_of(reports))
        load.close()
    for name in ("regex", "json schema"):
        share = round(median([s / u for s, u in zip(seen[name], seen["unconstrained"], strict=True)]), 3)
        parts.append(part(f"speed with {name}, 16 streams", ">= 0.85", share, share >= 0.85))
    parts.append({"name": "tokens a second", "measured": {k: round(median(v), 1) for k, v in seen.items()}, "met": True})
    return row_of("structured", STRUCTURED, parts)


def _valid(server: Server, model: Shape, given: list[dict[str, Any]]) -> dict[str, Any]:
    """Every schema once, sampled at temperature 1 from random weights, 16 at a time: what ended by itself must parse and be valid."""
    from concurrent.futures import ThreadPoolExecutor

    import jsonschema

    from understudy.v1 import generation_pb2, inference_service_pb2_grpc
    from understudy.v1 import inference_service_pb2 as service

    rng = random.Random(5)
    # Random weights never end a text that need not end: what closes strings, numbers, lists and objects is made likelier, for all alike.
    words = json.loads((version(model) / "tokenizer.json").read_text())["model"]["vocab"]
    stops = json.loads((version(model) / "manifest.json").read_text())["decoder"]["stop_token_ids"]
    ends = {number: 8.0 for word, number in words.items() if set(word) & set('"]},') or number in stops}
    counts = {"valid": 0, "invalid": 0, "length": 0, "failed": 0}
    first: list[str] = []

    def ask(schema: dict[str, Any], prompt: list[int]) -> None:
        request = service.GenerateTextRequest(
            model={"name": model.name},
            token_ids={"ids": prompt},
            sampling={"max_tokens": 4000, "temperature": 1.0, "logit_bias": ends},
            response_format={"json_schema": json.dumps(schema)},
        )
        try:
            answer = stub.GenerateText(request, timeout=900).results[0]
        except grpc.RpcError as error:
            counts["failed"] += 1
            first.append(f"{error.details()[:200]}: {json.dumps(schema)[:200]}")
            return
        if answer.finish_reason == generation_pb2.FINISH_REASON_LENGTH:
            counts["length"] += 1
            first.append(f"not ended, {answer.text[-60:]!r}: {json.dumps(schema)[:300]}")
            return
        try:
            jsonschema.validate(json.loads(answer.text), schema)
            counts["valid"] += 1
        except (ValueError, jsonschema.ValidationError) as error:
            counts["invalid"] += 1
            first.append(f"{str(error)[:200]}: {answer.text[:100]}")

    with grpc.insecure_channel(server.address) as channel, ThreadPoolExecutor(16) as pool:
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        jobs = [pool.submit(ask, schema, [rng.randrange(10, model.vocabulary) for _ in range(16)]) for schema in given]
        for job in jobs:
            job.result()
    met = counts["invalid"] == counts["failed"] == 0 and counts["valid"] == len(given)
    return part(f"{len(given)} schemas", "every answer ends within 4,000 tokens and is valid", counts, met, problems=first[:5])
