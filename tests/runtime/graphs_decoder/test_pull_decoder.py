"""From a checkpoint to a version of the repository: forms, files, stop tokens, chat template; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench.shapes import TEMPLATE, write_shape
from server.core import Task
from server.errors import InvalidArgument, ManifestInvalid, ModelRejected
from server.runtime.pull import pull
from server.runtime.repository import Repository
from tests.runtime.graphs_decoder.stories import stories_source


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shape("tiny", tmp_path_factory.mktemp("shape") / "tiny")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "models")


def test_both_forms_share_pages_and_embeddings(tiny: Path, repository: Repository) -> None:
    files = pull(str(tiny), repository, effort="fast")
    manifest = repository.verify("tiny").manifest
    assert manifest == files.manifest and manifest.task is Task.TEXT_GENERATION and manifest.form == "decoder" and manifest.dtype == "int8"
    decoder = manifest.decoder
    assert decoder is not None and decoder.graphs == {"int8": "model.onnx", "int4": "model.int4.onnx"}
    assert decoder.kv_dtype in ("bfloat16", "int8") and set(decoder.kv_error) == {"bfloat16", "int8"}
    assert (files.folder / "chat_template.jinja").read_text() == TEMPLATE
    # <|endoftext|> of the configuration, <|im_end|> of the template.
    assert decoder.stop_token_ids == [0, 2] and decoder.bos_token_id == 0
    assert set(files.paths) >= {"embedding.onnx.data", "model.onnx.data", "model.int4.onnx.data", "tokenizer.json"}
    names = [target.name for target in decoder.lora.targets] if decoder.lora else []
    assert names[:7] == [f"model.layers.0.{m}" for m in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
    )]  # fmt: skip
    assert manifest.quantization is not None and manifest.quantization.layers["head"] in ("static", "row", "int4-32")


def test_float32_keeps_its_bits(tiny: Path, repository: Repository) -> None:
    decoder = pull(str(tiny), repository, dtype="float32", task=Task.TEXT_GENERATION).manifest.decoder
    assert decoder is not None and decoder.graphs == {"float32": "model.onnx"} and decoder.kv_dtype == "float32"
    assert decoder.lora is not None and decoder.lora.dtype == "float32"


def test_a_folder_of_llama2c(tmp_path: Path, repository: Repository) -> None:
    folder = shutil.copytree(stories_source(), tmp_path / "stories")
    manifest = pull(str(folder), repository, dtype="float32").manifest
    assert manifest.name == "stories" and manifest.max_tokens == 512 and manifest.task is Task.TEXT_GENERATION
    weights = folder / "stories260K.bin"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ModelRejected):
        pull(str(folder), repository)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llamma"),
        ("num_attention_heads", 3),
        ("num_key_value_heads", 3),
        ("head_dim", 15),
        ("hidden_act", "relu"),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "linear", "factor": "2"}),
        ("rms_norm_eps", 0),
        ("vocab_size", 1 << 40),
        ("vocab_size", 1025),
        ("intermediate_size", None),
        ("quantization_config", {"quant_method": "gptq"}),
        ("max_position_embeddings", True),
    ],
)
def test_configurations_that_are_refused(field: str, value: object, tiny: Path, tmp_path: Path, repository: Repository) -> None:
    folder = shutil.copytree(tiny, tmp_path / "bad")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ModelRejected) as refused:
        pull(str(folder), repository, dtype="float32")
    assert len(refused.value.message) > 40 and repository.names() == []
    assert not list(repository.root.glob("*"))


def test_missing_parts_are_refused(tiny: Path, tmp_path: Path, repository: Repository) -> None:
    for name in ("tokenizer.json", "model.safetensors"):
        folder = shutil.copytree(tiny, tmp_path / name)
        (folder / name).unlink()
        with pytest.raises(ModelRejected, match=name):
            pull(str(folder), repository)
    with pytest.raises(InvalidArgument, match="graph"):
        pull(str(tiny), repository, graph="export")
    with pytest.raises(InvalidArgument, match="calibration texts"):
        pull(str(tiny), repository, calibration=["one"])


def test_a_manifest_whose_pages_do_not_fit_is_refused(tiny: Path, tmp_path: Path, repository: Repository) -> None:
    files = pull(str(tiny), repository, dtype="float32")
    fields = files.manifest.model_dump(mode="json", exclude={"name", "version", "files", "created"})
    for key, value in (("page_bytes", 64), ("graphs", {"float32": "other.onnx"}), ("stop_token_ids", [5000])):
        with repository.staging() as staged, pytest.raises(ManifestInvalid):
            for path in files.paths.values():
                shutil.copyfile(path, staged / path.name)
            repository.publish(staged, "tiny", {**fields, "decoder": {**fields["decoder"], key: value}})
