"""From a PEFT folder to an adapter version of ours that names its base by hash."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from server.errors import AlreadyExists, ModelRejected
from server.runtime.hub import is_hub_id
from server.runtime.lora.folder import AdapterManifest, spec_of, write_adapter
from server.runtime.lora.layout import base_of
from server.runtime.lora.peft import PeftAdapter, read_peft
from server.runtime.lora.repository import ADAPTERS as ADAPTERS
from server.runtime.lora.repository import next_version
from server.runtime.manifest import Manifest
from server.runtime.verify import check_name

_RETRIES = 20


def add_peft(folder: Path, base: Manifest, root: Path, name: str, *, license: str = "", any_base: bool = False) -> AdapterManifest:
    """Converts the PEFT adapter in `folder` for `base` and adds it as the next version under `root` (the repository's adapters).

    A PEFT folder names its base by a hub's id or a path and no hash. Where it names another hub id than the one that `base` came from, it
    is refused, unless `any_base`.

    Raises:
        ModelRejected: as read_peft; or the bases' names differ.
        InvalidArgument: `name` is none.
    """
    check_name(name)
    adapter = read_peft(folder, base)
    if not any_base:
        _check_name_of_base(adapter, base)
    fields = {
        "name": name,
        "base": base_of(base),
        "lineage": {"format": "peft", "method": adapter.kind, "base_model": adapter.base_model},
        "license": license,
        "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    }
    parent = root / base.name / name
    for _ in range(_RETRIES):
        version = next_version(root, base.name, name)
        spec = spec_of(adapter.weights, version=version, **fields)
        try:
            return write_adapter(parent / version, spec, adapter.weights)
        except AlreadyExists:  # another writer was faster
            continue
    raise AlreadyExists(f"{parent} gets new versions faster than this one can be added. Try again.", adapter=name)


def _check_name_of_base(adapter: PeftAdapter, base: Manifest) -> None:
    source = base.source.id if base.source is not None and base.source.kind == "hub" else ""
    if source and is_hub_id(adapter.base_model) and adapter.base_model.lower() != source.partition("@")[0].lower():
        raise ModelRejected(
            f"the adapter was trained on {adapter.base_model!r}; model {base.name!r} came from {source!r}. "
            "Name the right base, or say --any-base where the two have the same weights.",
            field="base_model_name_or_path",
            expected=adapter.base_model,
            got=source,
        )
