"""Each row of a mixed batch of a decoder gets its own adapter's answer: PEFT's."""

from __future__ import annotations

import asyncio
import copy
import json
import warnings
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.core import Call
from server.errors import Overloaded
from server.runtime.decoder.contract import Job, Sampling
from server.runtime.decoder.engine import EngineParts, GenerationEngine, run_offline
from server.runtime.decoder.settings import GenerationSettings
from server.runtime.graphs.decoder.build import build_decoder
from server.runtime.graphs.decoder.checkpoint import DecoderCheckpoint
from server.runtime.graphs.decoder.parity import Runner
from server.runtime.lora.bank import AdapterBank
from server.runtime.lora.convert import ADAPTERS, add_peft
from server.runtime.lora.layout import layout_of
from server.runtime.lora.store import AdapterSet
from server.runtime.manifest import Manifest
from server.runtime.sessions import Sessions
from tests.runtime.lora.models import WORDS, causal_model, lora, peft_adapter

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTER_CONFIGS: dict[str, dict[str, Any]] = {
    "small": {"r": 2, "lora_alpha": 4},
    "all": {"r": 8, "target_modules": ALL, "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    "stable": {"r": 5, "use_rslora": True, "target_modules": ["o_proj", "down_proj"], "layers_to_transform": [1]},
}
FUSED: dict[str, dict[str, Any]] = {
    "small": {"r": 2, "lora_alpha": 4, "target_modules": ["qkv_proj"]},
    "all": {"r": 8, "target_modules": ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"], "rank_pattern": {"qkv_proj": 3}},
    "stable": {"r": 5, "use_rslora": True, "target_modules": ["gate_up_proj"]},
}


def build(folder: Path, model: Any) -> Manifest:
    """The checkpoint's float32 graph in `folder`/graph, and a manifest as the repository would publish it."""
    model.save_pretrained(folder)
    out = folder / "graph"
    out.mkdir()
    built = build_decoder(folder, out, forms=["float32"])
    fields = {key: value.model_dump() if hasattr(value, "model_dump") else value for key, value in built.manifest.items()}
    files = {path.name: {"sha256": "0" * 64, "size": path.stat().st_size} for path in built.files}
    content = {**fields, "name": "tiny", "version": "1", "task": "text-generation", "form": "decoder", "files": files}
    return Manifest.model_validate_json(json.dumps(content, default=lambda part: part.model_dump(mode="json")))


def logits_of(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
async def test_each_row_of_a_mixed_batch_is_pefts(architecture: str, tmp_path: Path) -> None:
    base = causal_model(architecture)
    manifest = build(tmp_path, base)
    layout = layout_of(manifest)
    assert layout is not None
    models = {"": base}
    bank = AdapterBank(layout, 4, 8)
    adapters = AdapterSet(manifest, tmp_path / ADAPTERS, bank)
    for seed, (name, config) in enumerate((FUSED if architecture == "phi3" else ADAPTER_CONFIGS).items()):
        models[name] = peft_adapter(copy.deepcopy(base), lora(**config), seed, tmp_path / name)
        add_peft(tmp_path / name, manifest, tmp_path / ADAPTERS, name)
    await adapters.start()
    slots = {name: (await adapters.acquire(name)).slot if name else -1 for name in models}
    runner = Runner(tmp_path / "graph" / "model.onnx", DecoderCheckpoint.open(tmp_path), sequences=6, length=64, kv_dtype="float32")
    runner.adapters = dict(bank.feeds())
    rng = np.random.default_rng(1)
    names = ["all", "", "small", "stable", "all", ""]
    prompts = [rng.integers(3, WORDS, n).tolist() for n in (9, 4, 17, 1, 6, 30)]

    def run(tokens: list[list[int]]) -> list[np.ndarray]:
        ids = np.repeat([slots[name] for name in names], [len(one) for one in tokens])
        output = runner.run(range(6), tokens, slots=ids)
        return np.split(output, np.cumsum([len(one) for one in tokens])[:-1])

    first = run([one[: max(1, len(one) // 2)] for one in prompts])
    second = run([[*one[max(1, len(one) // 2) :], 5] for one in prompts])
    for name, prompt, head, tail in zip(names, prompts, first, second, strict=True):
        want = logits_of(models[name], [*prompt, 5])
        got = np.concatenate([head, tail])
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * max(1.0, float(np.abs(want).max())))
    assert not np.allclose(logits_of(models["all"], prompts[0]), logits_of(base, prompts[0]), atol=0.1)
    runner.close()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """A tiny LLaMA in an engine, with places for two LoRA adapters."""
    base = causal_model()
    manifest = build(tmp_path, base)
    layout = layout_of(manifest)
    assert layout is not None
    bank = AdapterBank(layout, 2, 8)
    session = Sessions().open(tmp_path / "graph" / "model.onnx")
    settings = GenerationSettings(max_sequences=8, token_budget=32, kv_cache_bytes=1 << 20)
    engine = GenerationEngine(EngineParts(manifest, {"float32": session}, bank.feeds()), settings)
    await engine.ready()
    yield Served(base, manifest, engine, AdapterSet(manifest, tmp_path / ADAPTERS, bank, engine), tmp_path)
    await engine.close(drain=False)
    session.close()


@dataclass
class Served:
    base: Any
    manifest: Manifest
    engine: GenerationEngine
    adapters: AdapterSet
    folder: Path

    def add(self, name: str, config: Any, seed: int) -> Any:
        """Saves an adapter of PEFT's, converts it, and returns PEFT's model."""
        model = peft_adapter(copy.deepcopy(self.base), config, seed, self.folder / name)
        add_peft(self.folder / name, self.manifest, self.folder / ADAPTERS, name)
        return model

    async def greedy(self, adapter: str, prompt: list[int], count: int) -> list[int]:
        use = await self.adapters.acquire(adapter) if adapter else None
        try:
            job = Job(prompt, Sampling(temperature=0.0), count, Call("test"), adapter=use)
            (piece,) = (await run_offline(self.engine, [job]))[0]
            return [token.id for token in piece.tokens]
        finally:
            if use is not None:
                use.release()


def pefts_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=None)
    return [int(one) for one in found[0][len(prompt) :]]


async def test_all_kinds_together_write_what_peft_writes(served: Served) -> None:
    configs = {
        "lora": lora(r=8, target_modules=ALL),
        "other": lora(r=3),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=19),
        "projected": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16, prefix_projection=True, encoder_hidden_size=8),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "p": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=7, encoder_hidden_size=16),
    }
    models = {"": served.base} | {name: served.add(name, config, seed) for seed, (name, config) in enumerate(configs.items())}
    await served.adapters.start()
    rng = np.random.default_rng(3)
    shared = rng.integers(3, WORDS, 20).tolist()  # equal beginnings of different adapters share no page
    jobs = [(name, [*shared, *rng.integers(3, WORDS, n).tolist()]) for name in models for n in (1, 9)]
    got = await asyncio.gather(*(served.greedy(name, prompt, 12) for name, prompt in jobs))
    again = await asyncio.gather(*(served.greedy(name, prompt, 12) for name, prompt in jobs))  # with the prefixes cached
    want = [pefts_greedy(models[name], prompt, 12) for name, prompt in jobs]
    assert got == want
    assert again == want
    assert len({tuple(one) for one in want}) > len(models)
    assert not any(one.users for one in served.adapters.loaded())
    for name in configs:
        await served.adapters.unload(name)
    assert await served.greedy("", jobs[0][1], 12) == want[0]


async def test_more_adapters_than_slots_while_generating(served: Served) -> None:
    models = {f"a{i}": served.add(f"a{i}", lora(r=4, target_modules=ALL), i) for i in range(4)}
    await served.adapters.start()
    prompt = [5, 6, 7, 8, 9]
    want = {name: pefts_greedy(model, prompt, 8) for name, model in models.items()}

    async def ask(name: str) -> None:
        while True:
            try:
                assert await served.greedy(name, prompt, 8) == want[name]
                return
            except Overloaded:
                await asyncio.sleep(0)

    await asyncio.gather(*(ask(name) for _ in range(5) for name in models))
