"""Entities, answers and labels against transformers' pipelines, item by item, on small random models of each architecture.

The models are random but not tame (large weights, biases everywhere), so that every tensor matters and labels vary; the tokenizers are
trained on the very texts, so that words break into pieces as they do in practice. Needs the `trainer` extra; the served side is the
server's own: graph writer, engine, tasks.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from bench.vocabularies import unigrams, word_pieces
from server.core import Call, Task
from server.runtime.encoder import EncoderModel
from server.runtime.engine import Engine, GraphForm
from server.runtime.graphs.build import build
from server.runtime.manifest import Manifest
from server.runtime.sessions import Sessions
from server.runtime.tokenizers import TextTokenizer

T = TypeVar("T")
ARCHITECTURES = ("bert", "roberta", "xlm-roberta", "distilbert", "mpnet")
AGGREGATIONS = ("none", "simple", "first", "average", "max")
TOLERANCE = 1e-4
MAX_TOKENS = 192
ENTITY_LABELS = ["O", "B-person", "I-person", "B-location", "I-location", "product"]
TOPIC_LABELS = ["card", "transfer", "top-up", "exchange", "identity"]
NLI_LABELS = ["contradiction", "neutral", "entailment"]
CANDIDATES = ["a lost card", "an exchange rate", "a late transfer"]


@dataclass(frozen=True)
class Parity:
    """`equal` of `total` items agree in words, offsets and order, with scores within 1e-4; `worst` is the largest score difference."""

    name: str
    total: int
    equal: int
    worst: float
    first_difference: str = ""


@dataclass(frozen=True)
class Material:
    """What the pipelines are fed with: texts to label, sentences with names, (question, context)."""

    topics: list[str]
    sentences: list[str]
    questions: list[tuple[str, str]]


def material(count: int, shared: Path | None = None) -> Material:
    """`count` real inputs of each kind from the data folder, or fewer examples of our own where there is none."""
    shared = shared or Path(os.environ.get("UNDERSTUDY_SHARED", str(Path(__file__).resolve().parents[2] / "shared")))
    data = shared / "data"
    if not (data / "wnut17").is_dir():
        return Material(OWN_SENTENCES, OWN_SENTENCES, OWN_QUESTIONS)
    lines = (data / "wnut17" / "emerging.test.annotated").read_text(encoding="utf-8").splitlines()
    sentences = [" ".join(words) for words in _sentences(lines) if len(words) > 3]
    articles = json.loads((data / "xquad" / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    questions = [(qa["question"], p["context"]) for article in articles for p in article["paragraphs"] for qa in p["qas"]]
    topics = _first_column(data / "banking77" / "test.csv")
    return Material(_spread(topics, count), _spread(sentences, count), _spread(questions, count))


def _spread(items: list[T], count: int) -> list[T]:
    return items[:: max(1, len(items) // count)][:count]


def _sentences(lines: Sequence[str]) -> list[list[str]]:
    sentences: list[list[str]] = [[]]
    for line in lines:
        word = line.split("\t")[0].strip()
        if word:
            sentences[-1].append(word)
        elif sentences[-1]:
            sentences.append([])
    return [sentence for sentence in sentences if sentence]


def _first_column(path: Path) -> list[str]:
    import csv

    with path.open(encoding="utf-8", newline="") as handle:
        return [row["text"] for row in csv.DictReader(handle)]


def make_tokenizer(architecture: str, texts: Sequence[str]) -> Any:
    """A fast tokenizer of the architecture's kind (word pieces, byte pairs, unigrams), trained on `texts`."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    size, limit = 1500, MAX_TOKENS
    if architecture in ("bert", "distilbert"):
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer = _word_piece_tokenizer(texts, special, size)
        kind = transformers.BertTokenizerFast if architecture == "bert" else transformers.DistilBertTokenizerFast
        template = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    elif architecture == "mpnet":
        special = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"]
        tokenizer = _word_piece_tokenizer(texts, special, size)
        kind = transformers.MPNetTokenizerFast
        template = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    elif architecture == "roberta":
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        kind = transformers.RobertaTokenizerFast
        template = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False)
    else:
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        tokenizer.model = models.Unigram(*unigrams(tokenizer, texts, special, size, "<unk>"))
        tokenizer.add_special_tokens(special)
        kind = transformers.XLMRobertaTokenizerFast
        template = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    tokenizer.post_processor = template
    return kind(tokenizer_object=tokenizer, model_max_length=limit)


def _word_piece_tokenizer(texts: Sequence[str], special: list[str], size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.model = models.WordPiece(word_pieces(tokenizer, texts, special, size), unk_token="[UNK]")
    tokenizer.add_special_tokens(special)
    return tokenizer


def make_model(architecture: str, task: Task, labels: Sequence[str], tokenizer: Any, folder: Path) -> Any:
    """A random model with its tokenizer, saved in `folder`; in evaluation mode."""
    import torch
    import transformers

    torch.manual_seed(sum(map(ord, architecture + task.value)))
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if architecture == "distilbert":
        sizes |= {"dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 128, "max_position_embeddings": MAX_TOKENS}
    else:
        sizes |= {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
        # These architectures count positions from the padding token's id on.
        sizes["max_position_embeddings"] = MAX_TOKENS + (0 if architecture == "bert" else tokenizer.pad_token_id + 1)
        if "roberta" in architecture:
            sizes["type_vocab_size"] = 1
    if labels:
        sizes |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    config = transformers.AutoConfig.for_model(architecture, **sizes)
    kinds = {
        Task.FEATURE_EXTRACTION: transformers.AutoModel,
        Task.TEXT_RANKING: transformers.AutoModelForSequenceClassification,
        Task.TEXT_CLASSIFICATION: transformers.AutoModelForSequenceClassification,
        Task.TOKEN_CLASSIFICATION: transformers.AutoModelForTokenClassification,
        Task.QUESTION_ANSWERING: transformers.AutoModelForQuestionAnswering,
    }
    model = kinds[task].from_config(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            norm = "norm" in name.lower() and name.endswith("weight")
            # Spans need logits that stand out: the likeliest of some ten thousand has to be likely.
            spread = 1.0 if name == "qa_outputs.weight" else 0.1 if norm or name.endswith("bias") else 0.2
            tensor.copy_(torch.randn_like(tensor) * spread + (1.0 if norm else 0.0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


Check = Callable[[EncoderModel, Any, str, Any, int | None], Awaitable[list[Parity]]]


def same(ours: Sequence[tuple[Any, ...]], theirs: Sequence[tuple[Any, ...]]) -> tuple[bool, float]:
    """Whether two lists of (..., score) are equal but for scores within the tolerance, and the largest difference of scores."""
    if [one[:-1] for one in ours] != [one[:-1] for one in theirs]:
        return False, 0.0
    worst = max((abs(mine[-1] - their[-1]) for mine, their in zip(ours, theirs, strict=True)), default=0.0)
    return worst <= TOLERANCE, worst


def compare(name: str, items: Sequence[Any], ours: Sequence[Any], theirs: Sequence[Any]) -> Parity:
    equal, worst, first = 0, 0.0, ""
    for item, mine, their in zip(items, ours, theirs, strict=True):
        good, difference = same(mine, their) if not isinstance(mine, Exception) else (False, 0.0)
        equal += good
        worst = max(worst, difference)
        if not good and not first:
            first = f"{str(item)[:200]!r}: ours {str(mine)[:400]}, theirs {str(their)[:400]}"
    return Parity(name, len(items), equal, worst, first)


async def entities(model: EncoderModel, pipe: Any, name: str, texts: Sequence[str], few: int | None) -> list[Parity]:
    """Every aggregation strategy on every text, and windows on texts that are too long for the model."""
    found = []
    long_texts = [" ".join(texts[i : i + 20]) for i in range(0, len(texts), 20)][: few and max(1, few // 5)]
    for aggregation in AGGREGATIONS:
        part = texts if aggregation == "simple" else texts[:few]
        ours = await model.extract_entities(part, call=Call("parity"), aggregation=aggregation, truncate=True)
        theirs = [_entities(pipe(text, aggregation_strategy=aggregation), text) for text in part]
        found.append(compare(f"{name} entities {aggregation}", part, _rows(ours.items), theirs))
        if aggregation != "none":
            ours = await model.extract_entities(long_texts, call=Call("parity"), aggregation=aggregation, stride=24)
            theirs = [_first_once(_entities(pipe(text, aggregation_strategy=aggregation, stride=24), text)) for text in long_texts]
            found.append(compare(f"{name} entities {aggregation}, windows", long_texts, _rows(ours.items), theirs))
    return found


def _rows(items: Sequence[Any]) -> list[Any]:
    return [
        item if isinstance(item, Exception) else [(one.label, one.text, one.start, one.end, one.score) for one in item] for item in items
    ]


def _entities(found: Sequence[dict[str, Any]], text: str) -> list[tuple[Any, ...]]:
    return [
        (one.get("entity_group", one.get("entity")), text[one["start"] : one["end"]], one["start"], one["end"], float(one["score"]))
        for one in found
    ]


async def answers(model: EncoderModel, pipe: Any, name: str, questions: Sequence[tuple[str, str]], few: int | None) -> list[Parity]:
    """The best answer of every question, three answers, and "no answer" allowed, over contexts of several windows."""
    found = []
    for label, ours_options, their_options in (
        ("best", {}, {}),
        ("best 3", {"top_k": 3, "max_answer_tokens": 8, "doc_stride": 32}, {"top_k": 3, "max_answer_len": 8, "doc_stride": 32}),
        ("or none", {"allow_no_answer": True}, {"handle_impossible_answer": True}),
    ):
        part = questions if label == "best" else questions[:few]
        ours = await model.answer(part, call=Call("parity"), **ours_options)
        mine = [item if isinstance(item, Exception) else [(one.text, one.start, one.end, one.score) for one in item] for item in ours.items]
        theirs = []
        for question, context in part:
            answer = pipe(question=question, context=context, **their_options)
            several = answer if isinstance(answer, list) else [answer]
            theirs.append([(one["answer"], one["start"], one["end"], one["score"]) for one in several])
        found.append(compare(f"{name} answers, {label}", part, mine, theirs))
    return found


async def labels(model: EncoderModel, pipe: Any, name: str, texts: Sequence[str], few: int | None) -> list[Parity]:
    ours = await model.classify(texts, call=Call("parity"), truncate=True)
    theirs = [[(one["label"], one["score"]) for one in pipe(text, top_k=None, truncation=True)] for text in texts]
    return [compare(f"{name} labels", texts, _labels(ours.items), theirs)]


async def zero_shot(model: EncoderModel, pipe: Any, name: str, texts: Sequence[str], few: int | None) -> list[Parity]:
    found = []
    texts = texts[:few]
    for multi_label in (False, True):
        ours = await model.classify_zero_shot(texts, CANDIDATES, call=Call("parity"), multi_label=multi_label, truncate=True)
        answers = [pipe(text, candidate_labels=CANDIDATES, multi_label=multi_label) for text in texts]
        theirs = [list(zip(answer["labels"], answer["scores"], strict=True)) for answer in answers]
        found.append(compare(f"{name} zero-shot{' multi-label' if multi_label else ''}", texts, _labels(ours.items), theirs))
    return found


def _first_once(found: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The pipeline lists the first entity of several windows twice when it has no character (a blank that is a token of its own)."""
    return found[1:] if found[:1] == found[1:2] else found


def _labels(items: Sequence[Any]) -> list[Any]:
    return [item if isinstance(item, Exception) else [(one.name, one.score) for one in item] for item in items]


@asynccontextmanager
async def served(folder: Path, out: Path, task: Task, **manifest_fields: Any) -> AsyncIterator[EncoderModel]:
    """The model of `folder` as the server runs it: our graph in fp32, engine and tasks."""
    out.mkdir(parents=True, exist_ok=True)
    built = build(folder, out, task=task, form="float32")
    manifest = Manifest(**{"name": "parity", "version": "1", "files": {}} | dict(built.manifest) | manifest_fields)
    assert manifest.max_tokens == MAX_TOKENS, "the model is as long as its tokenizer says"
    tokenizer = TextTokenizer.load(folder / "tokenizer.json", max_tokens=MAX_TOKENS, token_types=manifest.token_types)
    session = Sessions().open(built.model)
    engine = Engine(session, GraphForm.of(manifest))
    try:
        yield EncoderModel(manifest, tokenizer, engine)
    finally:
        await engine.close(drain=False)
        session.close()


async def measure_architecture(architecture: str, inputs: Material, folder: Path, *, few: int | None = None) -> list[Parity]:
    """All comparisons for one architecture; `folder` takes the models.

    `few`: so many inputs for all but the default options (aggregation "simple", the best answer, labels), None: all.
    """
    import torch
    import transformers

    # For such small models a second thread only waits, and on a busy machine it waits in a loop.
    torch.set_num_threads(1)
    contexts = [text for pair in inputs.questions[:20] for text in pair]
    tokenizer = make_tokenizer(architecture, [*inputs.topics, *inputs.sentences, *contexts])
    checks: list[tuple[str, Task, list[str], str, Check, Any]] = [
        ("entities", Task.TOKEN_CLASSIFICATION, ENTITY_LABELS, "token-classification", entities, inputs.sentences),
        ("answers", Task.QUESTION_ANSWERING, [], "question-answering", answers, inputs.questions),
        ("labels", Task.TEXT_CLASSIFICATION, TOPIC_LABELS, "text-classification", labels, inputs.topics),
        ("nli", Task.TEXT_CLASSIFICATION, NLI_LABELS, "zero-shot-classification", zero_shot, inputs.topics),
    ]
    found: list[Parity] = []
    for name, task, names, pipeline, check, items in checks:
        source = folder / f"{architecture}-{name}"
        model = make_model(architecture, task, names, tokenizer, source)
        pipe = transformers.pipeline(pipeline, model=model, tokenizer=tokenizer, device="cpu")
        async with served(source, folder / f"{architecture}-{name}-onnx", task) as encoder:
            found.extend(await check(encoder, pipe, architecture, items, few))
    return found


def measure(count: int = 200) -> list[dict[str, Any]]:
    """Every architecture on `count` real inputs a task: rows of name, equal, total, worst (score difference), first_difference."""
    import tempfile

    rows = []
    for architecture in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            for one in asyncio.run(measure_architecture(architecture, material(count), Path(folder))):
                rows.append(asdict(one))
    return rows


OWN_SENTENCES = [
    "Ada Lovelace wrote to Charles Babbage from Ockham Park in 1843.",
    "The ferry from Piraeus to Naxos was late again, said @nikos on the radio.",
    "Is the new Falcon 9 booster landing at Cape Canaveral tonight?",
    "I lost my card in São Paulo and the app won't let me freeze it!",
    "Dr. Müller's clinic in Zürich-Oerlikon opens at 7:30 a.m.",
    "My transfer of €250 to Jean-Luc never arrived; who can help?",
    "Tokyo's Shinjuku station handles 3.6 million passengers a day.",
    "Why was the exchange rate different from the one you showed me?",
    "The Rolling Stones played Hyde Park, and we stood in the rain.",
    "Top-up by Apple Pay failed twice but the money left my account.",
]
OWN_QUESTIONS = [
    (question, context)
    for context, questions in (
        (
            "The lighthouse of Vel was built in 1821 by the engineer Anna Torv on a rock six miles off the coast. Its lamp burned whale "
            "oil until 1874, when it was changed to paraffin, and electricity came in 1951 with a cable from the village of Sund. " * 3,
            ("Who built the lighthouse?", "When did electricity come?", "What did the lamp burn at first?"),
        ),
        (
            "Bees of the genus Osmia nest in hollow stems and beetle holes. The female closes each cell with mud, lays one egg on a loaf "
            "of pollen, and leaves; the young bee spends the winter in its cocoon and comes out in early spring.",
            ("Where do the bees nest?", "What closes each cell?"),
        ),
    )
    for question in questions
]


def main() -> None:
    for row in measure():
        print(f"{row['name']:45} {row['equal']:4}/{row['total']:4} worst score difference {row['worst']:.1e} {row['first_difference']}")


if __name__ == "__main__":
    main()
