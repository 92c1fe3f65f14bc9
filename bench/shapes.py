"""Random-weight checkpoints of known shapes as Hugging Face folders: `python -m bench.shapes smollm2-135m FOLDER`.

For measures of speed: no weights can be downloaded where the bench runs, and speed does not depend on them. Written tensor by tensor,
without torch, the same bytes for the same seed. Weights are normal numbers with the scale that trained models have, in bfloat16; the
tokenizer is a byte-level BPE of a few thousand tokens within the shape's vocabulary, trained on the project's own text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from server.runtime.graphs.calibrate import default_texts

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama. `rope` is config.json's rope_scaling."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    theta: float = 10_000.0
    tied: bool = True
    rope: Mapping[str, object] | None = field(default=None)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of the file."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for i in range(self.layers):
            base = f"model.layers.{i}."
            yield f"{base}input_layernorm.weight", (self.hidden,)
            yield f"{base}self_attn.q_proj.weight", (q, self.hidden)
            yield f"{base}self_attn.k_proj.weight", (kv, self.hidden)
            yield f"{base}self_attn.v_proj.weight", (kv, self.hidden)
            yield f"{base}self_attn.o_proj.weight", (self.hidden, q)
            yield f"{base}post_attention_layernorm.weight", (self.hidden,)
            yield f"{base}mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{base}mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{base}mlp.down_proj.weight", (self.hidden, self.intermediate)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)


LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SHAPES: Mapping[str, Shape] = {
    "smollm2-135m": Shape(49_152, 576, 1536, 30, 9, 3, 64, 8192, 100_000.0),
    "llama-3.2-1b": Shape(128_256, 2048, 8192, 16, 32, 8, 64, 131_072, 500_000.0, rope=LLAMA3),
    "llama-15m": Shape(8192, 320, 896, 8, 10, 5, 32, 2048),
    "tiny": Shape(1024, 64, 160, 2, 4, 2, 16, 512),
}


def write_shape(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Writes config.json, model.safetensors and the tokenizer's files to `folder`, and returns it; KeyError for an unknown shape."""
    shape = SHAPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(shape.vocabulary, folder)
    _write_weights(shape, folder / "model.safetensors", seed)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": shape.theta,
        "rope_scaling": shape.rope,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0}), encoding="utf-8")
    return folder


def shape_folder(name: str, root: Path) -> Path:
    """The folder of a shape under `root`, written if it is not there yet."""
    folder = root / name
    if not (folder / "generation_config.json").is_file():  # written last
        write_shape(name, folder)
    return folder


def _write_weights(shape: Shape, path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, size in shape.tensors():
        bytes_ = 2 * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [at, at + bytes_]}
        at += bytes_
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, size in shape.tensors():
            rows = max(1, (1 << 22) // size[-1])
            for start in range(0, size[0], rows) if len(size) == 2 else (0,):
                part = (min(rows, size[0] - start), size[1]) if len(size) == 2 else size
                # Residual branches stay of the size of what they are added to.
                scale = 0.02 if name.startswith(("model.embed", "lm_head")) else 1 / np.sqrt(size[-1])
                values = rng.standard_normal(part, np.float32) * np.float32(scale)
                if "norm" in name:
                    values = 1 + values * np.float32(0.1)
                bits = values.astype(np.float32).view(np.uint32)
                (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")).tofile(file)


def _write_tokenizer(vocabulary: int, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(default_texts(), trainer)
    # Ids up to the vocabulary, so that whatever random weights answer can be written.
    have = tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(f" token{i}", normalized=False) for i in range(have, vocabulary)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[0],
        "model_max_length": 1_000_000,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        sys.exit(f"usage: python -m bench.shapes {{{','.join(SHAPES)}}} FOLDER")
    print(write_shape(sys.argv[1], Path(sys.argv[2])))
