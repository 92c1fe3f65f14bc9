"""A folder with config.json and safetensors becomes a decoder's ONNX graphs that are known to answer as the original does."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from server.core import FloatArray, Task
from server.errors import InvalidArgument
from server.runtime.decoder.contract import page_bytes
from server.runtime.graphs.build import Built
from server.runtime.graphs.decoder import parity
from server.runtime.graphs.decoder.calibrate import Choices, Chooser, Scratch, choose_forms
from server.runtime.graphs.decoder.checkpoint import DecoderCheckpoint
from server.runtime.graphs.decoder.cuda import GRAPH as CUDA_GRAPH
from server.runtime.graphs.decoder.cuda import check_cuda, write_cuda
from server.runtime.graphs.decoder.describe import CHAT_TEMPLATE, describe_decoder
from server.runtime.graphs.decoder.int8 import weight_bits
from server.runtime.graphs.decoder.parity import Expected
from server.runtime.graphs.decoder.reference import Sequences
from server.runtime.graphs.decoder.selfmade import SEQUENCES, affordable, write_texts
from server.runtime.graphs.decoder.texts import encode, random_sequences, split
from server.runtime.graphs.decoder.writer import PAGE, Options, Shared, with_kv_dtype, write_graph, write_shared
from server.runtime.graphs.parity import Tolerances, failures
from server.runtime.manifest import Decoder, Quantization

Form = Literal["float32", "int8", "int4", "cuda"]
Progress = Callable[[str, float], None]
GRAPH = "model.onnx"
METHOD = "w8a8-smoothed-compensated-pair-safe/int4-blocks-compensated"
# How often the worst products may be sent back to float32 before the build gives up, and which share of them each time.
RETRIES = 4
BACK_TO_FLOAT = 0.1
# Pages are made smaller as long as that costs no more than this against pages in float32.
KV_CANDIDATES = ("bfloat16", "int8")
KV_KL, KV_TOP1 = 0.001, 0.995
# Below this, tokens that change places were level before: models without an opinion have many of them.
KV_NOTHING = 1e-4
MEND = {
    "float32": "Please report it with the model's config.json.",
    "int8": "Calibrate on text like the traffic, or serve the model in float32.",
    "int4": "Leave the int4 form out, or calibrate on text like the traffic.",
}
Effort = Literal["fast", "normal", "best"]
# Tokens to calibrate on.
TOKENS: Mapping[str, int] = {"fast": 512, "normal": 4096, "best": 8192}


@dataclass(frozen=True)
class Recipe:
    """What is to be made. `limits`: tolerance of each form's parity check, where it is not the usual one; `cuda`: that form beside them."""

    forms: tuple[Form, ...]
    effort: Effort
    limits: Mapping[str, Tolerances]
    cuda: bool = False

    def limit(self, form: str) -> Tolerances:
        """The figures that `form` must reach."""
        usual = {"float32": parity.FLOAT32, "int8": parity.INT8, "int4": parity.INT4}
        return self.limits.get(form, usual[form])

    @property
    def bank_dtype(self) -> Literal["float32", "bfloat16"]:
        """Adapters of a float32 model keep all their bits."""
        return "float32" if "float32" in self.forms else "bfloat16"

    def file(self, form: str) -> str:
        """model.onnx is the form that is always there: the first one."""
        return GRAPH if form == self.forms[0] else f"model.{form}.onnx"


def build_decoder(
    folder: Path,
    out: Path,
    *,
    forms: Sequence[Form],
    calibration: Sequence[str] | None = None,
    effort: Effort = "normal",
    limits: Mapping[str, Tolerances] | None = None,
    progress: Progress | None = None,
) -> Built:
    """Writes the graphs of the checkpoint in `folder` to `out`, which must exist; `forms` share one embedding table and one K/V layout.

    int8 and int4 are calibrated on `calibration` (at least 16 texts; by default our own), through `folder/tokenizer.json`. `effort`:
    "fast" for measures of speed (few tokens, plain rounding, top-1 agreement is recorded and not required), "best" rounds large products
    with error compensation too. "cuda" stands beside another form, was never executed on a GPU, and its answers are not checked here;
    server/runtime/graphs/decoder/cuda.py says more. `progress` is called with a stage ("quantize", "write", "check") and its share that is
    done.

    Raises:
        ModelRejected: config, tensors or tokenizer are broken or unknown, or a graph's answers are out of tolerance.
        InvalidArgument: no form, one that is not made, or too few calibration texts.
    """
    order = ("float32", "int8", "int4")
    plain = set(forms) - {"cuda"}
    if not plain or plain - set(order) or effort not in TOKENS:
        known = f"some of {', '.join(order)}, cuda beside one of them, and effort {', '.join(TOKENS)}"
        raise InvalidArgument(f"forms {list(forms)} with effort {effort!r} are not made; expected {known}.", field="forms")
    chosen = dict(limits or {})
    if effort == "fast":
        chosen.setdefault("int8", {"kl": parity.INT8["kl"]})
    recipe = Recipe(tuple(form for form in order if form in plain), effort, chosen, "cuda" in forms)  # type: ignore[arg-type]
    model = DecoderCheckpoint.open(folder)
    if recipe.cuda:
        check_cuda(model.config)
    build = _Build(model, folder, out, recipe, progress or (lambda _stage, _share: None))
    return build.run(calibration)


def _with_margin(limit: float, least: bool) -> float:
    """A limit that is kept by a quarter."""
    return 1 - (1 - limit) * 0.75 if least else limit * 0.75


class _Build:
    def __init__(self, model: DecoderCheckpoint, folder: Path, out: Path, recipe: Recipe, report: Progress) -> None:
        self.model = model
        self.folder = folder
        self.out = out
        self.recipe = recipe
        self.report = report
        self.kv_dtype = "float32"
        self.kv_error: dict[str, float] = {}
        self.figures: dict[str, dict[str, float]] = {}
        self.layers: dict[str, str] = {}

    def run(self, calibration: Sequence[str] | None) -> Built:
        stops, bos, template = describe_decoder(self.folder, self.model.config)
        before = set(self.out.iterdir())
        try:
            with tempfile.TemporaryDirectory(prefix=".scratch-", dir=self.out) as scratch:
                self._graphs(calibration, Path(scratch))
            if template:
                (self.out / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
        except BaseException:
            for path in set(self.out.iterdir()) - before:
                path.unlink()
            raise
        self.report("check", 1.0)
        files = tuple(sorted(set(self.out.iterdir()) - before))
        # The first form's figures have no prefix: it is what the model is known by.
        first = self.recipe.forms[0]
        figures = {key if form == first else f"{form}_{key}": v for form, found in self.figures.items() for key, v in found.items()}
        return Built(self.out / GRAPH, files, self._manifest(stops, bos, figures), figures)

    def _graphs(self, calibration: Sequence[str] | None, scratch: Path) -> None:
        model, recipe = self.model, self.recipe
        chosen: dict[str, Choices] = {}
        if recipe.forms == ("float32",):
            expected = Expected.of(model, random_sequences(model.config))
        else:
            texts = self._texts(calibration, scratch)
            chooser = Chooser(recipe.forms, recipe.effort, len(texts[0].ids), Scratch(scratch))
            expected = choose_forms(model, texts, chooser, self.report)
            chosen = chooser.chosen
        self.report("write", 0.0)
        shared = write_shared(model, self.out)
        for done, form in enumerate(recipe.forms):
            self._form(form, chosen.get(form, {}), shared, expected)
            self.report("write", (done + 1) / len(recipe.forms))
        if recipe.cuda:
            write_cuda(model, self.out)

    def _texts(self, calibration: Sequence[str] | None, scratch: Path) -> tuple[Sequences, Sequences]:
        """Tokens to calibrate on and tokens to check with.

        Without texts given, a small model writes its own: half of what it is calibrated on, and all that it is checked with. On text that
        is foreign to it a model has no opinion that could be kept.
        """
        budget = TOKENS[self.recipe.effort]
        encoded = encode(self.folder, calibration, self.model.config)
        if calibration is not None or self.recipe.effort == "fast" or not affordable(self.model):
            return split(encoded, budget)
        self.report("write texts", 0.0)
        own = write_texts(self.model, [ids[: 1 + i % 4] for i, ids in enumerate(encoded[:SEQUENCES])], scratch)
        foreign, _ = split(encoded, budget // 2)
        fitted = [ids for i, ids in enumerate(own) if i % 3]
        return Sequences.of([*fitted, *foreign.split()]), Sequences.of(own[::3])

    def _form(self, form: Form, chosen: Choices, shared: Shared, expected: Expected) -> None:
        """Writes and checks one form. While int8 fails, its worst products go back to float32, a few at a time."""
        path, limits = self.out / self.recipe.file(form), self.recipe.limit(form)
        worst = sorted(chosen, key=lambda name: chosen[name].error, reverse=True)
        floats: set[str] = set()
        for attempt in range(RETRIES + 1 if form == "int8" else 1):
            floats = set(worst[: math.ceil(attempt * BACK_TO_FLOAT * len(worst))])
            plan = {name: choice.product for name, choice in chosen.items() if name not in floats}
            write_graph(self.model, plan, path, shared, Options(self.kv_dtype, self.recipe.bank_dtype))
            self.report("check", attempt / (RETRIES + 1))
            got = expected.answers(path, self.model, self.kv_dtype)
            figures = parity.measure(got, expected.values)
            # Held-out text is a sample: another one may come out a little worse.
            if not failures(figures, {key: (_with_margin(*limit), limit[1]) for key, limit in limits.items()}):
                break
        parity.require(form, figures, limits, MEND[form])
        if form == self.recipe.forms[0] and form != "float32":
            figures = self._choose_kv(path, got, expected, figures)
        self.figures[form] = figures
        names = {name: "fp32" if name in floats else choice.form for name, choice in chosen.items()}
        self.layers |= names if form == "int8" else {f"int4/{name}": mark for name, mark in names.items()}

    def _choose_kv(self, path: Path, exact: FloatArray, expected: Expected, figures: dict[str, float]) -> dict[str, float]:
        """Gives the graph the smallest pages that cost next to nothing against pages in float32; its figures with them."""
        limits = self.recipe.limit("int8")
        probe = path.with_name("probe.onnx")
        for dtype in KV_CANDIDATES:
            with_kv_dtype(path, probe, self.model.config, dtype)
            got = expected.answers(probe, self.model, dtype)
            cost = parity.measure(got, exact)
            self.kv_error[dtype] = cost["kl"]
            total = parity.measure(got, expected.values)
            level = self.recipe.effort == "fast" or cost["kl"] <= KV_NOTHING
            cheap = cost["kl"] <= KV_KL and (level or cost["top1"] >= KV_TOP1)
            if cheap and not failures(total, limits if path.name == self.recipe.file("int8") else parity.INT4):
                self.kv_dtype, figures = dtype, total
        probe.unlink(missing_ok=True)
        with_kv_dtype(path, path, self.model.config, self.kv_dtype)
        return figures

    def _manifest(self, stops: list[int], bos: int | None, figures: Mapping[str, float]) -> dict[str, Any]:
        c, recipe = self.model.config, self.recipe
        decoder = Decoder.model_validate(
            {
                "layers": c.layers,
                "heads": c.heads,
                "kv_heads": c.kv_heads,
                "head_dim": c.head_dim,
                "vocabulary": c.vocabulary,
                "page": PAGE,
                "page_bytes": page_bytes(c.kv_heads, c.head_dim, self.kv_dtype, PAGE),
                "kv_dtype": self.kv_dtype,
                "kv_error": self.kv_error,
                "window": c.window,
                "graphs": {form: recipe.file(form) for form in recipe.forms} | ({"cuda": CUDA_GRAPH} if recipe.cuda else {}),
                "bos_token_id": bos,
                "stop_token_ids": stops,
                "lora": self.model.lora_layout(recipe.bank_dtype)[0],
            }
        )
        return {
            "task": Task.TEXT_GENERATION,
            "form": "decoder",
            "architecture": c.model_type,
            "dtype": recipe.forms[0],
            "quantization": Quantization(method=METHOD, weight_bits=weight_bits(self.model.config.hidden), layers=self.layers)
            if self.layers
            else None,
            "hidden_size": c.hidden,
            "max_tokens": c.positions,
            "decoder": decoder,
            "parity": dict(figures),
        }
