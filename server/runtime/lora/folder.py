"""An adapter's own folder: `adapters/<base>/<name>/<version>/{manifest.json, adapter.safetensors, adapter.onnx_adapter}`.

Tensors of adapter.safetensors, float32: of a LoRA "<layer>.lora_A" [rank, inputs] and "<layer>.lora_B" [outputs, rank], the scale being in
the manifest; of prefix tuning "keys" and "values" [layers, kv_heads, positions, head_dim]; of prompt tuning "rows" [positions, H].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.core import FloatArray
from server.errors import ModelRejected
from server.runtime.adapter_folder import MANIFEST, WEIGHTS, Base, read_manifest, verify_files, write_folder
from server.runtime.graphs.tensors import Tensors, open_file
from server.runtime.lora.bank import Breath
from server.runtime.lora.layout import base_sha256, layout_of
from server.runtime.lora.onnx_adapter import write_onnx_adapter
from server.runtime.lora.weights import Delta, LoraWeights, PrefixWeights, PromptWeights, Weights
from server.runtime.manifest import FileEntry, FileName, Manifest, Name, Version
from server.runtime.verify import check_safetensors, entry_of

FOR_OTHERS = "adapter.onnx_adapter"
_MAX_TARGETS = 100_000


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Target(_Part):
    """What an adapter does to one layer: a product of this rank, times `scale` (alpha / r, or alpha / sqrt(r) if rank-stabilized)."""

    rank: int = Field(ge=1, le=1024)
    scale: float = Field(allow_inf_nan=False)


class AdapterSpec(_Part):
    """Everything that a manifest says but the files. `targets` by the layer's path in the base (LoRA); `positions` of the other kinds."""

    schema_version: Literal[1] = 1
    kind: Literal["lora", "prefix", "prompt"]
    name: Name
    version: Version
    base: Base
    rank: int = Field(default=0, ge=0, le=1024)  # the largest of the targets
    targets: dict[str, Target] = Field(default={}, max_length=_MAX_TARGETS)
    positions: int = Field(default=0, ge=0, le=1_000_000)
    lineage: dict[str, Any] = {}
    license: str = ""
    created: str = ""  # RFC 3339

    @model_validator(mode="after")
    def _check_kind(self) -> AdapterSpec:
        lora = self.kind == "lora"
        if lora != bool(self.targets) or lora == bool(self.positions):
            raise ValueError("a LoRA has targets and no positions, the other kinds have positions and no targets")
        if self.rank != max((target.rank for target in self.targets.values()), default=0):
            raise ValueError("rank must be the largest of the targets'")
        return self

    @property
    def key(self) -> str:
        """name@version."""
        return f"{self.name}@{self.version}"


class AdapterManifest(AdapterSpec):
    """`manifest.json` of the folder."""

    files: dict[FileName, FileEntry]

    @model_validator(mode="after")
    def _check_files(self) -> AdapterManifest:
        if set(self.files) not in ({WEIGHTS}, {WEIGHTS, FOR_OTHERS}):
            raise ValueError(f"files must be {WEIGHTS}, and may be {FOR_OTHERS}")
        return self


def kind_of(weights: Weights) -> Literal["lora", "prefix", "prompt"]:
    """The manifest's name of the kind."""
    return "lora" if isinstance(weights, LoraWeights) else "prefix" if isinstance(weights, PrefixWeights) else "prompt"


def spec_of(weights: Weights, **fields: Any) -> AdapterSpec:
    """The spec that describes `weights`; `fields`: name, version, base, and lineage, license, created where they are known."""
    if isinstance(weights, LoraWeights):
        targets = {layer: Target(rank=delta.rank, scale=float(delta.scale)) for layer, delta in weights.deltas.items()}
        return AdapterSpec(kind="lora", rank=weights.rank, targets=targets, **fields)
    return AdapterSpec(kind=kind_of(weights), positions=weights.positions, **fields)


def write_adapter(folder: Path, spec: AdapterSpec, weights: Weights) -> AdapterManifest:
    """Writes an adapter's folder, at once and only once. Raises AlreadyExists."""
    from safetensors.numpy import save_file

    def fill(part: Path) -> None:
        save_file(_tensors(weights), part / WEIGHTS)
        write_onnx_adapter(part / FOR_OTHERS, weights, adapter_version=int(spec.version), model_version=int(spec.base.version))
        manifest = AdapterManifest(**dict(spec), files={name: entry_of(part / name) for name in (WEIGHTS, FOR_OTHERS)})
        (part / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")

    write_folder(folder, fill)
    return read_adapter_manifest(folder)


def read_adapter_manifest(folder: Path) -> AdapterManifest:
    """The manifest in `folder`, without a look at the files. Raises ManifestInvalid."""
    return read_manifest(folder, AdapterManifest, "adapter")


def check_base(manifest: AdapterManifest, base: Manifest) -> None:
    """Raises ModelRejected where the adapter was made for another base than the one with the manifest `base`."""
    loaded = base_sha256(base)
    if manifest.base.sha256 != loaded:
        raise ModelRejected(
            f"adapter {manifest.key!r} was made for {manifest.base.name!r} version {manifest.base.version} with SHA-256 "
            f"{manifest.base.sha256}; the loaded base {base.name!r} version {base.version} has {loaded}. "
            "Load that base, or convert the adapter for this one with `understudy adapters add`.",
            adapter=manifest.key,
            expected=manifest.base.sha256,
            got=loaded,
        )


def read_adapter(folder: Path, base: Manifest, *, all_files: bool = False) -> tuple[AdapterManifest, Weights]:
    """Verifies and reads the adapter in `folder`; `all_files` hashes the one for other runtimes too, which nothing here opens.

    Raises:
        ManifestInvalid: the manifest cannot be understood.
        ModelRejected: another base, a wrong hash or size, foreign files, tensors that are not the manifest's or do not fit the base.
    """
    manifest = read_adapter_manifest(folder)
    check_base(manifest, base)
    verify_files(folder, manifest.files, "adapter", unread=() if all_files else (FOR_OTHERS,))
    check_safetensors(folder / WEIGHTS)
    tensors = open_file(folder / WEIGHTS)
    weights = _lora(tensors, manifest, base) if manifest.kind == "lora" else _prompt(tensors, manifest, base)
    wanted = set(_names(weights))
    foreign = sorted(set(tensors.shapes()) - wanted)
    if foreign:
        raise ModelRejected(
            f"{WEIGHTS} of adapter {manifest.key!r} holds {foreign[0][:128]!r}. Write the adapter again.", tensor=foreign[0][:128]
        )
    return manifest, weights


def _lora(tensors: Tensors, manifest: AdapterManifest, base: Manifest) -> LoraWeights:
    layout = layout_of(base)
    known = {target.name: target for target in layout.targets} if layout is not None else {}
    deltas, breathe = {}, Breath()
    for layer, wanted in manifest.targets.items():
        target = known.get(layer)
        if target is None:
            raise ModelRejected(
                f"adapter {manifest.key!r} changes {layer[:128]!r}, which is no layer that adapters may change in model {base.name!r}. "
                "Pull the model with --adapters, or convert the adapter for this base.",
                adapter=manifest.key,
                tensor=layer[:128],
            )
        a = tensors.take(f"{layer}.lora_A", (wanted.rank, target.inputs))
        deltas[layer] = Delta(a, tensors.take(f"{layer}.lora_B", (target.outputs, wanted.rank)), wanted.scale)
        breathe()
    return LoraWeights(deltas)


def _prompt(tensors: Tensors, manifest: AdapterManifest, base: Manifest) -> PrefixWeights | PromptWeights:
    decoder, positions = base.decoder, manifest.positions
    if decoder is None or positions >= base.max_tokens:
        raise ModelRejected(
            f"adapter {manifest.key!r} puts {positions} positions before a text; model {base.name!r} "
            + ("generates no text." if decoder is None else f"takes {base.max_tokens} in all.")
            + " Name another base.",
            adapter=manifest.key,
        )
    if manifest.kind == "prompt":
        return PromptWeights(tensors.take("rows", (positions, base.hidden_size)))
    shape = (decoder.layers, decoder.kv_heads, positions, decoder.head_dim)
    return PrefixWeights(tensors.take("keys", shape), tensors.take("values", shape))


def _names(weights: Weights) -> list[str]:
    if isinstance(weights, LoraWeights):
        return [f"{layer}.lora_{part}" for layer in weights.deltas for part in "AB"]
    return ["keys", "values"] if isinstance(weights, PrefixWeights) else ["rows"]


def _tensors(weights: Weights) -> dict[str, FloatArray]:
    if isinstance(weights, LoraWeights):
        parts = {f"{layer}.lora_{part}": getattr(delta, part.lower()) for layer, delta in weights.deltas.items() for part in "AB"}
    elif isinstance(weights, PrefixWeights):
        parts = {"keys": weights.keys, "values": weights.values}
    else:
        parts = {"rows": weights.rows}
    return {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in parts.items()}
