"""Supervised fine-tuning on teachers' answers and people's corrections, by transformers' Trainer; a killed job goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.context import JobContext
from trainer.generation.batches import Collate
from trainer.generation.losses import answer_loss
from trainer.generation.material import Example
from trainer.generation.recipe import Recipe
from trainer.generation.student import put_back, trained
from trainer.generation.watch import BEST, Watch, last_checkpoint

STAGE = "fine-tune"
_LOOKS = 12  # at the watched rows, over the whole training
_LOGS = 100
_MOST_BETWEEN = 10  # steps between points of the curve: checkpoints are written at those alone


@dataclass(slots=True, frozen=True)
class Tuned:
    """What a stage did: steps of how many, the best loss on watched rows, and why it ended early, or ""."""

    steps: int
    planned: int
    loss: float
    stopped: str = ""


def fine_tune(
    student: Any, train: Sequence[Example], watched: Sequence[Example], recipe: Recipe, context: JobContext, reserve_s: float = 0.0
) -> Tuned:
    """Trains `student` in place and leaves it with the weights that were best on the watched rows.

    Checkpoints lie in `context.folder`/<method>; the next attempt goes on from the newest whole one, to the same curve and weights
    (on one machine, with the same number of threads). Raises Cancelled.
    """
    folder = context.folder / recipe.method
    args = arguments(recipe, folder / "checkpoints", steps_of(recipe, len(train)))
    trainer: Any = None
    watch = Watch(context, folder, STAGE, lambda: weights_of(trainer), recipe.patience, reserve_s)
    trainer = _make_trainer(student, args, (list(train), list(watched) or list(train[:64])), watch, recipe.distil)
    resume = last_checkpoint(folder / "checkpoints")
    if resume is not None:
        context.log(f"{STAGE}: goes on from {resume.name}")
    trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
    best = watch.restore()
    if best is not None:
        put_back(student, best)
    return Tuned(trainer.state.global_step, trainer.state.max_steps, watch.best, watch.stopped)


def steps_of(recipe: Recipe, rows: int) -> int:
    """Steps of the whole training."""
    return max(1, round(recipe.epochs * rows / recipe.batch))


def arguments(recipe: Recipe, folder: Path, steps: int, kind: Any = None, **more: Any) -> Any:
    """TrainingArguments, or those of a trainer of TRL (`kind`): nothing is saved but when Watch says so, nothing is sent anywhere."""
    import torch
    from transformers import TrainingArguments

    cuda = torch.cuda.is_available()
    micro = min(recipe.micro, recipe.batch)
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": 2 * micro,
        "gradient_accumulation_steps": max(1, recipe.batch // micro),
        "max_steps": steps,
        "learning_rate": recipe.rate,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": recipe.warmup,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_strategy": "steps",
        "logging_steps": min(max(1, steps // _LOGS), _MOST_BETWEEN),
        "eval_strategy": "steps",
        "eval_steps": max(1, steps // _LOOKS),
        "save_strategy": "no",
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "use_cpu": not cuda,
        "bf16": cuda and torch.cuda.is_bf16_supported(),
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "dataloader_pin_memory": cuda,
        "report_to": [],
        "disable_tqdm": True,
    }
    return (kind or TrainingArguments)(**values | more)


def weights_of(trainer: Any) -> dict[str, Any]:
    """The trained tensors, gathered where they are split over processes."""
    if trainer.accelerator.num_processes == 1:
        return trained(trainer.model)
    names = set(trained(trainer.accelerator.unwrap_model(trainer.model)))
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {name: value for name, value in whole.items() if name in names}


def _make_trainer(student: Any, args: Any, rows: tuple[list[Example], list[Example]], watch: Watch, distil: float) -> Any:
    from transformers import PrinterCallback, Trainer

    class AnswerTrainer(Trainer):  # type: ignore[misc]
        """With the loss of answers alone, and rows that count by their weight; see answer_loss."""

        def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            # Prefixes of prompt tuning stand before the row's own positions.
            logits = outputs.logits[:, outputs.logits.shape[1] - inputs["labels"].shape[1] :]
            loss = answer_loss(logits, inputs, distil)
            return (loss, outputs) if return_outputs else loss

        def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            import torch

            with torch.no_grad():
                return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    train, watched = rows
    trainer = AnswerTrainer(model=student, args=args, data_collator=Collate(), train_dataset=train, eval_dataset=watched, callbacks=[watch])
    trainer.remove_callback(PrinterCallback)
    trainer.model_accepts_loss_kwargs = False  # the mean of a batch is ours
    return trainer


def best_of(recipe: Recipe, context: JobContext) -> dict[str, Any]:
    """The best weights of a training that ended, from their file."""
    from safetensors.torch import load_file

    return dict(load_file(context.folder / recipe.method / BEST))
