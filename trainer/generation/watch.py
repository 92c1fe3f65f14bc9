"""What a job sees of transformers' Trainer: curves, progress, checkpoints by the clock, an end at the deadline or when nothing improves."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from trainer.context import JobContext

WHOLE = "whole"  # a file that a checkpoint gets last: one without it was being written when the trainer died
BEST = "best.safetensors"
_CURVES = {"loss": "train/loss", "eval_loss": "watched/loss", "learning_rate": "train/rate", "grad_norm": "train/gradient"}


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    found = [path for path in folder.glob("checkpoint-*") if (path / WHOLE).is_file() and path.name.rpartition("-")[2].isdigit()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


@dataclass(eq=False)
class Watch(TrainerCallback):  # type: ignore[misc]
    """One a stage. `weights` gives the trained tensors by name; the best of them are kept in `folder`, by the loss on the watched rows.

    `reserve_s`: what the job needs after training. Training that was stopped by the clock says so in `stopped`.
    """

    context: JobContext
    folder: Path
    stage: str
    weights: Callable[[], dict[str, Any]]
    patience: int = 3
    reserve_s: float = 0.0
    stopped: str = ""
    best: float = field(default=float("inf"))
    _saved: float = field(default_factory=time.monotonic)
    _worse: int = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes up what earlier attempts saw: the log of a checkpoint has it."""
        self._saved = time.monotonic()
        for entry in state.log_history:
            if "eval_loss" in entry:
                self._look(float(entry["eval_loss"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Between two steps: is the job wanted, has it time, is a checkpoint due."""
        self.context.check()
        self.context.progress(self.stage, state.global_step, state.max_steps)
        if self.context.left_s() < self.reserve_s:
            self.stopped = f"the time budget ended at step {state.global_step} of {state.max_steps}"
            control.should_training_stop = True
        due = time.monotonic() - self._saved >= self.context.checkpoint_s and state.global_step < state.max_steps
        # At a point of the curve: it is a mean since the point before, and no checkpoint has what has been added up since.
        if due and state.global_step % args.logging_steps == 0:
            control.should_save = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Points of the curves."""
        for key, value in (logs or {}).items():
            if key in _CURVES:
                self.context.metric(f"{self.stage}/{_CURVES[key]}", state.global_step, float(value))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any) -> Any:
        """Keeps the best weights; ends where nothing gets better."""
        loss = float((metrics or {}).get("eval_loss", float("nan")))
        if self._look(loss):
            weights = self.weights()  # by all processes: where weights are split over them, each gives its part
            if state.is_world_process_zero:
                self._keep(state.global_step, loss, weights)
        if self._worse >= self.patience:
            self.stopped = self.stopped or f"no better loss on watched rows in {self._worse} looks, at step {state.global_step}"
            control.should_training_stop = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Marks the checkpoint as whole, and removes those before it."""
        self._saved = time.monotonic()
        if not state.is_world_process_zero:
            return
        newest = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (newest / WHOLE).touch()
        for path in Path(args.output_dir).glob("checkpoint-*"):
            if path != newest:
                shutil.rmtree(path, ignore_errors=True)

    def restore(self) -> dict[str, Any] | None:
        """The best weights that were seen, or None where nothing was."""
        from safetensors.torch import load_file

        path = self.folder / BEST
        return load_file(path) if path.is_file() and self.best < float("inf") else None

    def _look(self, loss: float) -> bool:
        if loss < self.best:
            self.best, self._worse = loss, 0
            return True
        self._worse += 1
        return False

    def _keep(self, step: int, loss: float, weights: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{BEST}.part"
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, part)
        part.replace(self.folder / BEST)
        (self.folder / "best.json").write_text(json.dumps({"step": step, "watched_loss": loss}))
