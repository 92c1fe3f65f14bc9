"""The stage after fine-tuning: what people corrected (DPO) or put a thumb on (KTO), by TRL's trainers on our own tokens."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from trainer.context import JobContext
from trainer.generation.batches import Collate
from trainer.generation.losses import IGNORED
from trainer.generation.material import Example, Material, Opinion
from trainer.generation.recipe import Recipe
from trainer.generation.student import put_back, trained
from trainer.generation.tune import Tuned, arguments, weights_of
from trainer.generation.watch import Watch, last_checkpoint

BETA = 0.1  # how far the student may move from what fine-tuning made of it
_EPOCHS = 2.0
_RATE = 0.1  # of fine-tuning's
_REFERENCE = "ref"  # the name that TRL gives the frozen copy of an adapter


def prefer(student: Any, material: Material, recipe: Recipe, context: JobContext, tokenizer: Path, reserve_s: float = 0.0) -> Tuned:
    """Trains `student` in place. Where it then writes fewer watched answers to the letter than before, beyond chance, the weights of before
    are put back and the reason is in `stopped`. `tokenizer`: the base's tokenizer.json. Raises Cancelled.
    """
    kept = {name: value.detach().clone() for name, value in trained(student).items()}
    before = exact_share(student, material.watched)
    tuned = _run(student, material, recipe, context, tokenizer, reserve_s)
    after = exact_share(student, material.watched)
    slack = 2 * (before * (1 - before) / max(len(material.watched), 1)) ** 0.5
    context.log(f"{recipe.preference}: watched answers right to the letter {before:.1%} before, {after:.1%} after")
    if after < before - slack:
        put_back(student, kept)
        return Tuned(
            tuned.steps, tuned.planned, tuned.loss, f"undone: {after:.1%} of the watched answers were right, {before:.1%} before it"
        )
    return tuned


def exact_share(student: Any, rows: Sequence[Example], batch: int = 16) -> float:
    """Share of rows whose answer is greedy decoding's: every token the likeliest one behind those before it."""
    import torch

    right = 0
    student.eval()
    for start in range(0, len(rows), batch):
        tensors = Collate()(rows[start : start + batch])
        device = next(student.parameters()).device
        with torch.no_grad():
            logits = student(input_ids=tensors["input_ids"].to(device), attention_mask=tensors["attention_mask"].to(device)).logits
        wanted = tensors["labels"][:, 1:]
        best = logits[:, logits.shape[1] - tensors["labels"].shape[1] : -1].argmax(-1).cpu()
        right += int(((best == wanted) | (wanted == IGNORED)).all(dim=1).sum())
    return right / max(len(rows), 1)


def _run(student: Any, material: Material, recipe: Recipe, context: JobContext, tokenizer: Path, reserve_s: float) -> Tuned:
    from transformers import PreTrainedTokenizerFast, PrinterCallback

    datasets: Any = import_module("datasets")

    words = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    words.eos_token = words.pad_token = words.convert_ids_to_tokens(0)  # only asked for by name: our rows are tokens already
    rows = _pairs(material) if recipe.preference == "dpo" else _opinions(material, recipe)
    folder = context.folder / recipe.method / recipe.preference
    steps = max(1, round(_EPOCHS * len(rows) / recipe.batch))
    kind, made = _trainer(recipe.preference)
    more: dict[str, Any] = {"eval_strategy": "no", "learning_rate": recipe.rate * _RATE, "beta": BETA, "max_length": None}
    args = arguments(recipe, folder / "checkpoints", steps, kind, gradient_checkpointing=False, **more)
    trainer: Any = None
    watch = Watch(context, folder, recipe.preference, lambda: weights_of(trainer), recipe.patience, reserve_s)
    reference = copy.deepcopy(student) if recipe.method == "full" else None
    trainer = made(
        model=student,
        ref_model=reference,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=words,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    resume = last_checkpoint(folder / "checkpoints")
    trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
    if recipe.method != "full" and _REFERENCE in student.peft_config:
        student.delete_adapter(_REFERENCE)
        student.set_adapter("default")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Tuned(trainer.state.global_step, trainer.state.max_steps, float(losses[-1]) if losses else float("nan"), watch.stopped)


def _trainer(preference: str) -> tuple[Any, Any]:
    """Configuration and trainer of TRL, which takes our rows as they are: they were made by the server's own template and tokenizer."""
    trl: Any = import_module("trl")  # which names what it has at run time alone
    config, base = (trl.DPOConfig, trl.DPOTrainer) if preference == "dpo" else (trl.KTOConfig, trl.KTOTrainer)

    class Ours(base):  # type: ignore[misc,valid-type]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    return config, Ours


def _pairs(material: Material) -> list[dict[str, Any]]:
    return [{"prompt_ids": one.prompt, "chosen_ids": one.chosen, "rejected_ids": one.rejected} for one in material.pairs]


def _opinions(material: Material, recipe: Recipe) -> list[dict[str, Any]]:
    """KTO's rows: its estimate of the KL needs each prompt with the answer of another row of its batch, so the order is ours to shuffle."""
    said = list(material.opinions)
    for pair in material.pairs:
        said += [Opinion(pair.prompt, pair.chosen, True), Opinion(pair.prompt, pair.rejected, False)]
    random.Random(recipe.seed).shuffle(said)
    size = min(recipe.micro, recipe.batch)
    said = said[: max(len(said) - len(said) % size, min(size, len(said)))]
    rows = []
    for start in range(0, len(said), size):
        group = said[start : start + size]
        for place, one in enumerate(group):
            other = group[place - 1]
            rows.append({"prompt_ids": one.prompt, "completion_ids": one.answer, "KL_completion_ids": other.answer, "label": one.good})
    return rows
