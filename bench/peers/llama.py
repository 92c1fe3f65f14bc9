"""llama.cpp's server: built from the source distribution of llama-cpp-python, with GGUF files of the very weights that we serve.

Its HTTP server takes token ids and streams server-sent events, so tokenizers play no part in what is measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.harness import BUILD, free_port
from bench.peers.start import answers, environment, process

VERSION = "0.3.36"
FORMS = ("Q4_0", "Q8_0")
TOOLS = ("llama-server", "llama-quantize")
FOLDER = BUILD / "llama"


def tools() -> Path:
    """The folder of llama.cpp's programs; built once, which takes some ten minutes on two cores."""
    out = FOLDER / "bin"
    if all((out / name).is_file() for name in TOOLS):
        return out
    python = environment("llama-build", ["cmake", "ninja", "scikit-build-core", "flit-core"])
    with tempfile.TemporaryDirectory(dir=BUILD) as place:
        source = f"llama-cpp-python=={VERSION}"
        command = [
            str(python),
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
            ":all:",
            source,
            "-d",
            place,
        ]
        subprocess.run(command, check=True)
        with tarfile.open(next(Path(place).glob("*.tar.gz"))) as archive:
            archive.extractall(place, filter="data")
        code = next(Path(place).glob("llama_cpp_python-*/vendor/llama.cpp"))
        path = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}
        options = ["CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "LLAMA_CURL=OFF", "LLAMA_OPENSSL=OFF", "LLAMA_BUILD_TESTS=OFF"]
        options += ["LLAMA_BUILD_EXAMPLES=OFF", "BUILD_SHARED_LIBS=OFF"]
        subprocess.run(["cmake", "-G", "Ninja", "-B", "build", *(f"-D{o}" for o in options), "."], cwd=code, env=path, check=True)
        subprocess.run(["ninja", "-C", "build", "-j", str(os.cpu_count()), *TOOLS], cwd=code, env=path, check=True)
        out.mkdir(parents=True, exist_ok=True)
        for name in TOOLS:
            shutil.copy2(code / "build" / "bin" / name, out / name)
    return out


def weights(folder: Path) -> dict[str, Path]:
    """GGUF files of the Llama checkpoint in `folder`, by form; made once, beside the other build products."""
    made = FOLDER / folder.name
    paths = {form: made / f"{form}.gguf" for form in FORMS}
    if not all(path.is_file() for path in paths.values()):
        made.mkdir(parents=True, exist_ok=True)
        plain = made / "BF16.gguf"
        write_gguf(folder, plain)
        for form, path in paths.items():
            subprocess.run([str(tools() / "llama-quantize"), str(plain), str(path), form, "2"], check=True, capture_output=True)
        plain.unlink()
    return paths


def _pairs(weight: Any, heads: int) -> Any:
    """GGUF's Llama turns neighbouring rows of Q and K; Hugging Face's turns the two halves of a head."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(folder: Path, path: Path) -> None:
    """Writes a Hugging Face Llama checkpoint with bfloat16 or float32 weights; tokens are named by their number."""
    import gguf
    import torch
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(str(file))
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    writer = gguf.GGUFWriter(str(path), "llama")
    _describe(writer, config, heads, kv_heads)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in tensors.items():
        if name.endswith("q_proj.weight"):
            tensor = _pairs(tensor, heads)
        elif name.endswith("k_proj.weight"):
            tensor = _pairs(tensor, kv_heads)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target, name
        if tensor.ndim == 1:
            writer.add_tensor(target, tensor.float().numpy())
        else:
            data = tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint8)
            writer.add_tensor(target, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: Mapping[str, Any], heads: int, kv_heads: int) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


class Llama:
    """A running server. `port` of its HTTP API."""

    def __init__(self, port: int, pid: int) -> None:
        self.port = port
        self.process = psutil.Process(pid)

    def memory_mb(self) -> float:
        """Resident memory; the mapped weights count."""
        return float(self.process.memory_info().rss / 1e6)


@contextlib.contextmanager
def llama_server(gguf_file: Path, streams: int, context: int) -> Iterator[Llama]:
    """A server with `streams` slots of `context` positions each, two threads or as many as there are cores, and its own defaults."""
    port = free_port()
    threads = str(os.cpu_count() or 1)
    command = [str(tools() / "llama-server"), "-m", str(gguf_file), "--host", "127.0.0.1", "--port", str(port), "-np", str(streams)]
    command += ["-c", str(streams * context), "-t", threads, "-tb", threads, "--no-webui", "--no-slots"]
    with process(command, lambda: answers(f"http://127.0.0.1:{port}/health"), FOLDER / "server.log") as popen:
        yield Llama(port, popen.pid)


def body(prompt: list[int], tokens: int) -> dict[str, Any]:
    """A request that generates exactly `tokens` tokens greedily, without reuse of earlier prompts."""
    return {
        "prompt": prompt,
        "n_predict": tokens,
        "ignore_eos": True,
        "stream": True,
        "cache_prompt": False,
        "temperature": 0.0,
        "samplers": ["temperature"],
        "return_tokens": True,
    }


if __name__ == "__main__":
    print(weights(Path(sys.argv[1])))
