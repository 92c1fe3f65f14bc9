"""Adapters come into the bank, are lent, lose their slots to others and leave, and nothing that a request holds is ever rewritten."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.core import FloatArray
from server.errors import AdapterNotFound, AlreadyExists, InvalidArgument, ManifestInvalid, ModelRejected, Overloaded
from server.runtime.lora.bank import AdapterBank, to_bfloat16
from server.runtime.lora.folder import FOR_OTHERS, read_adapter, spec_of, write_adapter
from server.runtime.lora.layout import base_of, base_sha256, layout_of
from server.runtime.lora.store import AdapterSet
from server.runtime.lora.weights import Delta, LoraWeights, PrefixWeights, PromptWeights, Weights
from server.runtime.manifest import Manifest
from tests.runtime.lora.models import HEAD_DIM, HIDDEN, KV_HEADS, LAYERS, manifest, random_lora

SCALE = 0.5


def weights_of(seed: int, rank: int = 4) -> LoraWeights:
    return LoraWeights({name: Delta(a, b, SCALE) for name, (a, b) in random_lora(np.random.default_rng(seed), rank).items()})


def publish(root: Path, base: Manifest, name: str, weights: Weights, version: str = "1") -> Path:
    folder = root / base.name / name / version
    write_adapter(folder, spec_of(weights, name=name, version=version, base=base_of(base)), weights)
    return folder


def bank_of(base: Manifest, slots: int = 2, rank: int = 8) -> AdapterBank:
    layout = layout_of(base)
    assert layout is not None
    return AdapterBank(layout, slots, rank)


def holds(bank: AdapterBank, slot: int, weights: LoraWeights) -> bool:
    found = bank.read(slot)
    return set(found) == set(weights.deltas) and all(
        np.array_equal(found[name][0], delta.a) and np.allclose(found[name][1], delta.b * SCALE, rtol=1e-6)
        for name, delta in weights.deltas.items()
    )


class Pages:
    """The engine's part, remembered."""

    def __init__(self) -> None:
        self.held: dict[str, Any] = {}
        self.dropped: list[str] = []

    async def add_prefix(self, key: str, keys: FloatArray, values: FloatArray) -> int:
        self.held[key] = (keys, values)
        return int(keys.shape[2])

    async def add_prompt(self, key: str, rows: FloatArray) -> int:
        self.held[key] = rows
        return len(rows)

    async def drop_prefix(self, key: str) -> None:
        self.held.pop(key, None)
        self.dropped.append(key)


async def test_an_adapter_is_lent_by_name_and_by_version(tmp_path: Path) -> None:
    base = manifest()
    old, new = weights_of(1), weights_of(2, rank=8)
    publish(tmp_path, base, "french", old)
    publish(tmp_path, base, "french", new, "2")
    bank = bank_of(base)
    adapters = AdapterSet(base, tmp_path, bank)
    await adapters.load("french", "1")
    first = await adapters.acquire("french")
    assert first.key == "french@1"
    assert holds(bank, first.slot, old)
    assert (await adapters.load("french")).manifest.version == "2"
    second, named = await adapters.acquire("french"), await adapters.acquire("french@1")
    assert (second.key, named.key, named.slot) == ("french@2", "french@1", first.slot)
    assert holds(bank, second.slot, new)
    assert holds(bank, first.slot, old)
    assert [(one.manifest.key, one.users, one.default) for one in adapters.loaded()] == [("french@2", 1, True), ("french@1", 2, False)]


async def test_slots_go_to_whoever_needs_them_and_never_away_from_a_holder(tmp_path: Path) -> None:
    base = manifest()
    wanted = {name: weights_of(i) for i, name in enumerate("abcd")}
    for name, weights in wanted.items():
        publish(tmp_path, base, name, weights)
    bank = bank_of(base, slots=2)
    pages = Pages()
    adapters = AdapterSet(base, tmp_path, bank, pages)
    await adapters.start()
    assert len(adapters.loaded()) == 4
    assert sum(one.resident for one in adapters.loaded()) == 2
    a = await adapters.acquire("a")
    b, again = await asyncio.gather(adapters.acquire("b"), adapters.acquire("b"))
    assert (b.slot, a.slot) in ((0, 1), (1, 0))
    assert again.slot == b.slot
    with pytest.raises(Overloaded) as busy:
        await adapters.acquire("c")
    assert busy.value.retry_after_s
    assert holds(bank, a.slot, wanted["a"])
    assert holds(bank, b.slot, wanted["b"])
    b.release()
    with pytest.raises(Overloaded):  # someone else still holds it
        await adapters.acquire("c")
    again.release()
    again.release()
    c = await adapters.acquire("c")
    assert c.slot == b.slot
    assert holds(bank, c.slot, wanted["c"])
    assert holds(bank, a.slot, wanted["a"])
    c.release()
    a.release()
    d = await adapters.acquire("d")  # "a" was used last, so "c" goes
    assert d.slot == c.slot
    assert pages.dropped == []  # a prefix that is cached under its key stays right


async def test_many_requests_for_more_adapters_than_slots_always_read_their_own(tmp_path: Path) -> None:
    base = manifest()
    wanted = {f"n{i}": weights_of(i) for i in range(6)}
    for name, weights in wanted.items():
        publish(tmp_path, base, name, weights)
    bank = bank_of(base, slots=3)
    adapters = AdapterSet(base, tmp_path, bank)
    await adapters.start()
    rng = np.random.default_rng(0)
    served = 0

    async def request(name: str) -> None:
        nonlocal served
        try:
            use = await adapters.acquire(name)
        except Overloaded:
            return
        for _ in range(3):
            assert holds(bank, use.slot, wanted[name])
            await asyncio.sleep(0)
        use.release()
        served += 1

    for _ in range(12):
        await asyncio.gather(*(request(f"n{i}") for i in rng.integers(0, 6, 5)))
    assert served > 12
    assert not any(one.users for one in adapters.loaded())


async def test_unloading_waits_for_holders_and_is_final(tmp_path: Path) -> None:
    base = manifest()
    publish(tmp_path, base, "a", weights_of(1))
    publish(tmp_path, base, "b", weights_of(2))
    pages = Pages()
    bank = bank_of(base, slots=1)
    adapters = AdapterSet(base, tmp_path, bank, pages)
    await adapters.load("a")
    use = await adapters.acquire("a")
    leaving = asyncio.create_task(adapters.unload("a"))
    await asyncio.sleep(0)
    with pytest.raises(AdapterNotFound):
        await adapters.acquire("a")
    assert holds(bank, use.slot, weights_of(1))
    with pytest.raises(Overloaded):
        await adapters.load("b")
    releaser = threading.Thread(target=use.release)  # as the engine does
    releaser.start()
    releaser.join()
    (gone,) = await leaving
    assert (gone.manifest.key, gone.resident) == ("a@1", False)
    assert pages.dropped == ["a@1"]
    assert (await adapters.load("b")).resident
    held = await adapters.acquire("b")
    (pending,) = await adapters.unload("b", grace_s=0.01)
    assert pending.users == 1
    held.release()
    assert (await adapters.load("a")).resident


async def test_unknown_names_say_what_is_loaded(tmp_path: Path) -> None:
    base = manifest()
    publish(tmp_path, base, "french", weights_of(1))
    adapters = AdapterSet(base, tmp_path, bank_of(base))
    with pytest.raises(AdapterNotFound, match="'french'"):
        await adapters.load("frensh")
    with pytest.raises(AdapterNotFound, match="versions 1"):
        await adapters.load("french", "2")
    with pytest.raises(AdapterNotFound, match="there are none"):
        await adapters.acquire("french")
    await adapters.load("french")
    with pytest.raises(AdapterNotFound) as unknown:
        await adapters.acquire("french@2")
    assert unknown.value.metadata["loaded"] == "french"
    for bad in ("", "../x", "a/b", "french@", "french@x", "french@1@1", "A", "x" * 200, "adapters"):
        with pytest.raises(InvalidArgument):
            await adapters.acquire(bad)
    with pytest.raises(AdapterNotFound):
        await adapters.unload("german")


async def test_an_adapter_of_another_base_is_refused_by_hash(tmp_path: Path) -> None:
    mine, other = manifest(), manifest(weights=b"other weights, same shape")
    assert base_sha256(mine) != base_sha256(other)
    publish(tmp_path, other, "a", weights_of(1))
    bank = bank_of(mine)
    adapters = AdapterSet(mine, tmp_path, bank)
    with pytest.raises(ModelRejected) as refused:
        await adapters.load("a")
    assert refused.value.metadata["expected"] == base_sha256(other)
    assert refused.value.metadata["got"] == base_sha256(mine)
    await adapters.start()  # logs it, and goes on
    assert adapters.loaded() == []
    assert not bank.ranks.any()


async def test_a_rank_above_the_banks_and_a_bank_that_is_off_are_refused(tmp_path: Path) -> None:
    base = manifest()
    publish(tmp_path, base, "a", weights_of(1, rank=9))
    with pytest.raises(ModelRejected, match=r"generation\.adapter_rank"):
        await AdapterSet(base, tmp_path, bank_of(base, rank=8)).load("a")
    off = bank_of(base, slots=0)
    assert off.weights.shape[:2] == (1, 1)
    with pytest.raises(ModelRejected, match=r"generation\.adapter_slots"):
        await AdapterSet(base, tmp_path, off).load("a")
    with pytest.raises(ModelRejected, match="--adapters"):
        await AdapterSet(base, tmp_path, None).load("a")


async def test_prefixes_and_prompts_go_to_the_engine(tmp_path: Path) -> None:
    base = manifest()
    rng = np.random.default_rng(0)
    shape = (LAYERS, KV_HEADS, 5, HEAD_DIM)
    prefix = PrefixWeights(rng.standard_normal(shape).astype(np.float32), rng.standard_normal(shape).astype(np.float32))
    prompt = PromptWeights(rng.standard_normal((3, HIDDEN)).astype(np.float32))
    publish(tmp_path, base, "prefix", prefix)
    publish(tmp_path, base, "prompt", prompt)
    pages = Pages()
    adapters = AdapterSet(base, tmp_path, bank_of(base), pages)
    await adapters.start(["tiny/prefix", "tiny/prompt@1", "other/prompt", "tiny/unknown"])
    use, other = await adapters.acquire("prefix"), await adapters.acquire("prompt")
    assert (use.slot, use.prefix, other.slot, other.prefix) == (-1, 5, -1, 3)
    np.testing.assert_array_equal(pages.held["prefix@1"][1], prefix.values)
    np.testing.assert_array_equal(pages.held["prompt@1"], prompt.rows)
    use.release()
    await adapters.unload("prefix")
    assert "prefix@1" not in pages.held
    with pytest.raises(ModelRejected, match="generate text"):
        await AdapterSet(base, tmp_path, bank_of(base)).load("prompt")


async def test_a_file_that_changes_between_two_uses_is_refused(tmp_path: Path) -> None:
    base = manifest()
    folder = publish(tmp_path, base, "a", weights_of(1))
    publish(tmp_path, base, "b", weights_of(2))
    bank = bank_of(base, slots=1)
    adapters = AdapterSet(base, tmp_path, bank)
    await adapters.start(["tiny/a", "tiny/b"])
    data = bytearray((folder / "adapter.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "adapter.safetensors").write_bytes(data)
    with pytest.raises(ModelRejected, match="SHA-256"):
        await adapters.acquire("a")
    use = await adapters.acquire("b")
    assert holds(bank, use.slot, weights_of(2))
    await adapters.close()


def spoil(folder: Path, what: str) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    if what == "foreign file":
        (folder / "code.py").write_text("")
    elif what == "link":
        (folder / "adapter.safetensors").rename(folder.parent / "real")
        (folder / "adapter.safetensors").symlink_to(folder.parent / "real")
    elif what == "unknown key":
        path.write_text(json.dumps({**content, "code": 1}))
    elif what == "no json":
        path.write_text("{")
    elif what == "rank":
        content["targets"] = {name: {"rank": 5, "scale": 1.0} for name in content["targets"]}
        path.write_text(json.dumps({**content, "rank": 5}))
    elif what == "layer":
        content["targets"]["model.layers.7.self_attn.q_proj"] = {"rank": 4, "scale": 1.0}
        path.write_text(json.dumps(content))
    elif what == "fewer layers":
        content["targets"].popitem()
        path.write_text(json.dumps(content))
    elif what == "name":
        path.write_text(json.dumps({**content, "name": "b"}))
    elif what == "no weights":
        (folder / "adapter.safetensors").unlink()


@pytest.mark.parametrize("what", ["foreign file", "link", "unknown key", "no json", "rank", "layer", "fewer layers", "name", "no weights"])
async def test_hostile_folders_change_nothing(what: str, tmp_path: Path) -> None:
    base = manifest()
    folder = publish(tmp_path, base, "a", weights_of(1))
    spoil(folder, what)
    bank = bank_of(base)
    adapters = AdapterSet(base, tmp_path, bank)
    with pytest.raises((ModelRejected, ManifestInvalid)):
        await adapters.load("a")
    assert not bank.ranks.any()
    assert adapters.loaded() == []


def test_versions_are_written_once_and_read_back(tmp_path: Path) -> None:
    base = manifest()
    folder = publish(tmp_path, base, "a", weights_of(3))
    with pytest.raises(AlreadyExists):
        publish(tmp_path, base, "a", weights_of(4))
    found, weights = read_adapter(folder, base, all_files=True)
    assert (found.rank, found.kind, found.targets["model.layers.0.mlp.up_proj"].scale) == (4, "lora", SCALE)
    assert isinstance(weights, LoraWeights)
    np.testing.assert_array_equal(weights.deltas["model.layers.1.mlp.up_proj"].b, weights_of(3).deltas["model.layers.1.mlp.up_proj"].b)
    (folder / FOR_OTHERS).write_bytes(bytes((folder / FOR_OTHERS).stat().st_size))
    read_adapter(folder, base)
    with pytest.raises(ModelRejected):
        read_adapter(folder, base, all_files=True)


def test_other_users_of_onnx_runtime_can_read_the_weights(tmp_path: Path) -> None:
    import onnxruntime as ort

    weights = weights_of(3)
    folder = publish(tmp_path, manifest(), "a", weights, "7")
    file = ort.AdapterFormat.read_adapter(str(folder / FOR_OTHERS))
    assert (file.get_adapter_version(), file.get_model_version()) == (7, 1)
    values = file.get_parameters()
    parameters = {name: value.numpy() for name, value in values.items()}
    assert len(parameters) == 2 * len(weights.deltas)
    x = np.random.default_rng(1).standard_normal((3, HIDDEN)).astype(np.float32)
    for layer, delta in weights.deltas.items():
        if delta.a.shape[1] == HIDDEN:
            got = x @ parameters[f"{layer}.lora_A.weight"] @ parameters[f"{layer}.lora_B.weight"]
            np.testing.assert_allclose(got, x @ delta.a.T @ delta.b.T * SCALE, rtol=1e-4, atol=1e-4)


def test_the_bank_is_aligned_keeps_bfloat16_and_knows_its_size() -> None:
    base = manifest(dtype="bfloat16")
    layout = layout_of(base)
    assert layout is not None
    bank = AdapterBank(layout, 3, 4)
    assert bank.weights.dtype == np.uint16
    assert bank.weights.ctypes.data % 64 == 0
    assert bank.nbytes == 3 * 4 * layout.width * 2 + bank.ranks.nbytes
    ends = sorted((at, at + size) for t in layout.targets for at, size in ((t.a, t.inputs), (t.b, t.outputs)))
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(ends))
    assert ends[-1][1] <= layout.width
    weights = weights_of(5)
    before = bank.weights[[0, 2]].copy()
    bank.write(1, weights)
    np.testing.assert_array_equal(bank.weights[[0, 2]], before)
    for name, (a, b) in bank.read(1).items():
        np.testing.assert_allclose(a, weights.deltas[name].a, rtol=2**-8)
        np.testing.assert_allclose(b, weights.deltas[name].b * SCALE, rtol=2**-8)
    bank.clear(1)
    assert bank.read(1) == {}


@pytest.mark.parametrize("change", [{"a": 10**6}, {"index": 10**6}, {"index": 0}, {"name": "model.layers.0.self_attn.q_proj"}])
def test_a_layout_that_contradicts_itself_is_refused(change: dict[str, Any]) -> None:
    layout = layout_of(manifest())
    assert layout is not None
    targets = [*layout.targets[:-1], layout.targets[-1].model_copy(update=change)]
    with pytest.raises(ManifestInvalid, match="layout of adapters"):
        AdapterBank(layout.model_copy(update={"targets": targets}), 1, 1)


def test_rounding_to_bfloat16_is_that_of_torch() -> None:
    torch = pytest.importorskip("torch")
    values = np.concatenate([np.random.default_rng(0).standard_normal(10_000) * 10.0 ** np.arange(-20, 20).repeat(250), [0.0, -0.0, 1.0]])
    values = values.astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_bfloat16(values), expected)


async def test_names_from_the_disk_are_checked(tmp_path: Path) -> None:
    base = manifest()
    folder = publish(tmp_path, base, "a", weights_of(1))
    shutil.copytree(folder, tmp_path / base.name / "Not A Name" / "1")
    (tmp_path / base.name / "empty").mkdir()
    adapters = AdapterSet(base, tmp_path, bank_of(base))
    await adapters.start()
    assert [one.manifest.name for one in adapters.loaded()] == ["a"]
