"""A small decoder whose greedy answers are known: every token has one successor, and a conversation is answered by a script.

It is a real LLaMA with random attention: what a token is followed by is written into its head. Needs no torch.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from server.runtime.graphs.decoder.build import build_decoder
from server.runtime.repository import Repository
from tests.runtime.decoder.chat_templates import QWEN

NAME = "scripted"
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, CONTEXT = 64, 96, 2, 4, 2, 2048
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
# What follows the line break after "assistant", token by token, until the turn ends.
SCRIPT = ["Sure, ", "let me ", "look: ", CALL, "<|im_end|>"]
ANSWER = "Sure, let me look: "
# What "tell" is followed by: one token each, and no end.
STORY = ["tell", " me", " a", " sto", "ry", " about", " Gr", "eta", "."]
ADDED = [*SCRIPT[:4], *STORY]


def write_checkpoint(folder: Path) -> None:
    """config.json, model.safetensors, tokenizer.json, tokenizer_config.json, generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab_size()
    stop = tokenizer.token_to_id("<|im_end|>")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": vocabulary,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.token_to_id("<s>"),
        "eos_token_id": stop,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": QWEN, "bos_token": "<s>", "eos_token": "<|im_end|>"}))
    save_file(_weights(tokenizer), str(folder / "model.safetensors"))


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE with "<s>" before every prompt; the script's parts are tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=360, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["where is my card", "user assistant system weather", "you are a helpful assistant"] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def successors(tokenizer: Tokenizer) -> np.ndarray:
    """int64[vocabulary]: the greedy next token of each token. One great cycle, but for the script."""
    size = tokenizer.get_vocab_size()
    specials = [tokenizer.token_to_id(text) for text in SPECIAL]
    ordinary = np.array([i for i in range(size) if i not in specials])
    order = np.random.default_rng(5).permutation(ordinary)
    follows = np.zeros(size, np.int64)
    follows[order] = np.roll(order, -1)
    follows[specials] = order[0]
    for chain in (["\u010a", *SCRIPT], [*STORY, "tell"]):
        ids = [tokenizer.token_to_id(text) for text in chain]
        for one, after in pairwise(ids):
            follows[one] = after
    return follows


def _weights(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    size = tokenizer.get_vocab_size()
    embeddings = rng.standard_normal((size, HIDDEN)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    head = np.zeros((size, HIDDEN), np.float32)
    for one, after in enumerate(successors(tokenizer)):
        head[after] += embeddings[one]
    found = {"model.embed_tokens.weight": embeddings, "lm_head.weight": head, "model.norm.weight": np.ones(HIDDEN, np.float32)}
    head_dim = HIDDEN // HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * head_dim, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * head_dim, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    for i in range(LAYERS):
        for name, shape in shapes.items():
            found[f"model.layers.{i}.{name}.weight"] = (rng.standard_normal(shape) * 0.01).astype(np.float32)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{name}.weight"] = np.ones(HIDDEN, np.float32)
    return found


def publish(repository: Repository, work: Path) -> None:
    """Builds the model and puts it into a repository as `NAME`."""
    folder = work / NAME
    write_checkpoint(folder)
    with repository.staging() as staged:
        built = build_decoder(folder, staged, forms=["float32"])
        (staged / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        repository.publish(staged, NAME, {**built.manifest, "license": "apache-2.0"})
