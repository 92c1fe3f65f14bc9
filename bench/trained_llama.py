"""A small LLaMA that is really trained, for measures that random weights cannot answer: `python -m bench.trained_llama FOLDER`.

About 12M parameters, a byte-level BPE of 4,096 tokens, some minutes of AdamW on public text. With `outliers`, some channels of the
activations are made large without changing what the model computes, as large language models grow them by themselves
(arXiv 2208.07339): a norm's gain times a factor and the weights that read it divided by it, and the same between up and down projection.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from bench.harness import BUILD, SHARED

VOCABULARY = 4096
LENGTH = 192
BATCH = 12
FACTORS = (16.0, 32.0, 64.0)


def texts() -> list[str]:
    """Public text of several kinds where it is at hand, else the project's own calibration sentences."""
    data = SHARED / "data"
    found: list[str] = []
    if data.is_dir():
        with gzip.open(data / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
            found += [row["question"] + "\n" + row["answer"] for row in map(json.loads, file)]
        with gzip.open(data / "summarization" / "scitldr_a_train.jsonl.gz", "rt", encoding="utf-8") as file:
            found += [" ".join(row["source"]) for row in map(json.loads, file)]
        with (data / "banking77" / "train.csv").open(newline="", encoding="utf-8") as file:
            rows = [row["text"] for row in csv.DictReader(file)]
        found += ["\n".join(rows[i : i + 12]) for i in range(0, len(rows), 12)]
        instructions = json.loads((data / "instructions" / "lf_alpaca_en_demo.json").read_text())
        found += [f"{r['instruction']}\n{r['input']}\n{r['output']}" for r in instructions]
    else:
        from server.runtime.graphs.calibrate import default_texts

        found = default_texts()
    import random

    random.Random(3).shuffle(found)
    return found


def split() -> tuple[list[str], list[str]]:
    """(training texts, held-out texts): the last twentieth is held out."""
    found = texts()
    cut = len(found) * 19 // 20
    return found[:cut], found[cut:]


def _tokenizer(training: list[str], path: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training, trainer)
    tokenizer.save(str(path))
    return tokenizer


def train(folder: Path, seconds: float = 300.0) -> None:
    """Trains and saves a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    training, _ = split()
    tokenizer = _tokenizer(training, folder / "tokenizer.json")
    ids = [i for encoded in tokenizer.encode_batch(training) for i in (1, *encoded.ids, 2)]
    stream = torch.tensor(ids)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=320,
        intermediate_size=896,
        num_hidden_layers=8,
        num_attention_heads=10,
        num_key_value_heads=5,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {len(ids)} tokens of text", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, betas=(0.9, 0.95), weight_decay=0.1)
    begun, step, shown, losses = time.monotonic(), 0, 0.0, []
    while (spent := time.monotonic() - begun) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1.0, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * spent / seconds)))
        starts = torch.randint(0, len(stream) - LENGTH - 1, (BATCH,))
        batch = torch.stack([stream[s : s + LENGTH] for s in starts])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        step += 1
        if spent - shown > 30:
            shown = spent
            print(f"{spent:4.0f} s  step {step}  loss {sum(losses[-50:]) / len(losses[-50:]):.3f}", flush=True)
    model.eval()
    model.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps({"steps": step, "seconds": seconds, "loss": sum(losses[-50:]) / 50}))


def with_outliers(source: Path, folder: Path) -> None:
    """The same function with outlier channels in what every matrix product of the blocks reads."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder, dirs_exist_ok=True)
    tensors = load_file(str(source / "model.safetensors"))
    generator = torch.Generator().manual_seed(1)
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]

    def grow(gain: Any, readers: list[str]) -> None:
        channels = torch.randperm(gain.shape[0], generator=generator)[: len(FACTORS)]
        for channel, factor in zip(channels.tolist(), FACTORS, strict=True):
            gain[channel] *= factor
            for name in readers:
                tensors[name][:, channel] /= factor

    for i in range(layers):
        base = f"model.layers.{i}."
        grow(tensors[f"{base}input_layernorm.weight"], [f"{base}self_attn.{p}_proj.weight" for p in "qkv"])
        grow(tensors[f"{base}post_attention_layernorm.weight"], [f"{base}mlp.gate_proj.weight", f"{base}mlp.up_proj.weight"])
        grow(tensors[f"{base}mlp.up_proj.weight"], [f"{base}mlp.down_proj.weight"])
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def folders(seconds: float = 300.0) -> tuple[Path, Path]:
    """(trained, with outliers), made once under build/bench."""
    plain, large = BUILD / "trained-llama", BUILD / "trained-llama-outliers"
    if not (plain / "training.json").is_file():
        train(plain, seconds)
    if not (large / "training.json").is_file():
        with_outliers(plain, large)
    return plain, large


if __name__ == "__main__":
    train(Path(sys.argv[1]))
