"""Tiny random encoder-decoders of each family, with real tokenizers trained on a few sentences, as `save_pretrained` leaves them."""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from server.runtime.graphs.calibrate import default_texts

FAMILIES = ("bart", "mbart", "marian", "pegasus", "m2m_100", "nllb", "t5", "t5_gated")
PIECES = 320


def build(family: str, folder: Path) -> transformers.PreTrainedModel:
    """Writes model, tokenizer and configuration to `folder`, which must not exist; returns the model as it is read from there."""
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers on where settings are kept, and on its own tokenizers
        _write(family, folder)
        return transformers.AutoModelForSeq2SeqLM.from_pretrained(str(folder)).eval()


def _write(family: str, folder: Path) -> None:
    tokenizer = _tokenizer(family, folder)
    torch.manual_seed(7)
    vocabulary = max(tokenizer.lang_code_to_id.values()) + 9 if family == "m2m_100" else len(tokenizer)
    model = _model(family, vocabulary, tokenizer).eval()
    _randomise(model, family)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _model(family: str, vocabulary: int, tokenizer: Any) -> transformers.PreTrainedModel:
    if family.startswith("t5"):
        gated = family == "t5_gated"
        specific = {
            "summarization": {"prefix": "summarize: ", "num_beams": 3, "length_penalty": 2.0, "early_stopping": True, "max_length": 20},
            "translation_en_to_de": {"prefix": "translate English to German: ", "num_beams": 2, "max_length": 24},
            "translation_en_to_fr": {"prefix": "translate English to French: ", "num_beams": 2, "max_length": 24},
        }
        config = transformers.T5Config(
            vocab_size=vocabulary,
            d_model=32,
            d_kv=12,
            d_ff=48,
            num_layers=2,
            num_heads=3,
            feed_forward_proj="gated-gelu" if gated else "relu",
            tie_word_embeddings=not gated,
            decoder_start_token_id=tokenizer.pad_token_id,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            task_specific_params=None if gated else specific,
        )
        return transformers.T5ForConditionalGeneration(config)
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 40,
        "max_position_embeddings": 96,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "scale_embedding": family != "bart",
    }
    if family == "marian":
        more = {
            "activation_function": "swish",
            "decoder_start_token_id": tokenizer.pad_token_id,
            "forced_eos_token_id": tokenizer.eos_token_id,
        }
        config = transformers.MarianConfig(
            **sizes, **more, num_beams=4, max_length=32, bad_words_ids=[[tokenizer.pad_token_id]], renormalize_logits=True
        )
        return transformers.MarianMTModel(config)
    if family == "pegasus":
        more = {"activation_function": "relu", "decoder_start_token_id": 0, "forced_eos_token_id": tokenizer.eos_token_id}
        return transformers.PegasusForConditionalGeneration(
            transformers.PegasusConfig(**sizes, **more, num_beams=4, length_penalty=0.8, max_length=28)
        )
    if family in ("m2m_100", "nllb"):
        config = transformers.M2M100Config(**sizes, activation_function="relu", decoder_start_token_id=2, max_length=30, num_beams=3)
        return transformers.M2M100ForConditionalGeneration(config)
    if family == "mbart":
        config = transformers.MBartConfig(**sizes, decoder_start_token_id=2, forced_eos_token_id=2, num_beams=5, max_length=26)
        return transformers.MBartForConditionalGeneration(config)
    summary = {"num_beams": 4, "length_penalty": 2.0, "max_length": 36, "min_length": 12, "no_repeat_ngram_size": 3, "early_stopping": True}
    config = transformers.BartConfig(**sizes, decoder_start_token_id=2, forced_eos_token_id=2, forced_bos_token_id=0, **summary)
    return transformers.BartForConditionalGeneration(config)


def _randomise(model: transformers.PreTrainedModel, family: str) -> None:
    """Weights of a size at which answers are neither constant nor flat."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "embed_positions" in name and family in ("marian", "pegasus"):
                continue
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * noise if name.endswith("weight") else 0.2 * noise)
            elif any(part in name for part in ("shared", "embed", "lm_head")):
                parameter.copy_(noise * (1.0 if family.startswith("t5") else 0.4))
            else:
                parameter.copy_(noise * 0.25)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(torch.randn_like(model.final_logits_bias) * 0.5)


def _sentencepiece(kind: str, reverse: bool = False) -> bytes:
    import sentencepiece

    texts = [text[::-1] if reverse else text for text in default_texts()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=PIECES, model_type=kind, character_coverage=0.98, minloglevel=2
    )
    return model.getvalue()


def _tokenizer(family: str, folder: Path) -> Any:
    if family == "bart":
        return _byte_level()
    if family == "marian":
        return _marian(folder)
    if family == "m2m_100":
        return _m2m(folder)
    kind = "unigram" if family in ("t5", "t5_gated", "pegasus") else "bpe"
    path = folder.parent / f"{folder.name}.spm"
    path.write_bytes(_sentencepiece(kind))
    if family.startswith("t5"):
        return transformers.T5TokenizerFast(str(path), extra_ids=4, legacy=False)
    if family == "pegasus":
        return transformers.PegasusTokenizerFast(str(path), offset=3, additional_special_tokens=["<mask_2>"])
    if family == "nllb":
        return transformers.NllbTokenizerFast(str(path), src_lang="eng_Latn", tgt_lang="fra_Latn")
    return transformers.MBart50TokenizerFast(str(path), src_lang="en_XX", tgt_lang="ro_RO")


def _byte_level() -> Any:
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(default_texts(), vocab_size=PIECES, special_tokens=names, show_progress=False)
    content = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in content["merges"]]
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "vocab.json").write_text(json.dumps(content["vocab"]))
        (Path(place) / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in merges))
        return transformers.BartTokenizerFast(str(Path(place) / "vocab.json"), str(Path(place) / "merges.txt"))


def _pieces(model: bytes) -> list[str]:
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString(model)
    return [piece.piece for piece in proto.pieces if piece.type == 1]


def _marian(folder: Path) -> Any:
    """Two sentencepiece models and one vocabulary of both, numbered as neither of them is, some pieces left out."""
    source, target = _sentencepiece("unigram"), _sentencepiece("unigram", reverse=True)
    (folder / "source.spm").write_bytes(source)
    (folder / "target.spm").write_bytes(target)
    both = sorted({*_pieces(source)[:-5], *_pieces(target)})
    names = ["</s>", "<unk>", ">>fra<<", ">>deu<<", *both, "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}, ensure_ascii=False))
    paths = [str(folder / name) for name in ("source.spm", "target.spm", "vocab.json")]
    return transformers.MarianTokenizer(*paths, source_lang="en", target_lang="fr")


def _m2m(folder: Path) -> Any:
    model = _sentencepiece("bpe")
    (folder / "sentencepiece.bpe.model").write_bytes(model)
    names = ["<s>", "<pad>", "</s>", "<unk>", *sorted(_pieces(model))]
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}, ensure_ascii=False))
    paths = str(folder / "vocab.json"), str(folder / "sentencepiece.bpe.model")
    return transformers.M2M100Tokenizer(*paths, src_lang="en", tgt_lang="fr")
