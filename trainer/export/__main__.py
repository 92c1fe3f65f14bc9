"""`python -m trainer.export SOURCE OUT --task TASK`: a Hugging Face model to ONNX; run as a process.

Encoders go through optimum to OUT/model.onnx in the padded form; models of translation and summarization become two graphs of our own.
Beside them OUT/tokenizer.json and OUT/manifest.json (the fields that the export decides). Exits with 1 and one paragraph on the error
stream if the graphs do not answer as the original does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from server.core import Task
from server.errors import UnderstudyError
from trainer.export import seq2seq
from trainer.export.padded import ExportOptions, export

TASKS = [task.value for task in Task if task is not Task.TENSOR]


def main(arguments: list[str] | None = None) -> int:
    description = "Exports a model to ONNX and checks it against the original."
    parser = argparse.ArgumentParser(prog="python -m trainer.export", description=description)
    parser.add_argument("source", type=Path, help="folder with config.json, safetensors and tokenizer files")
    parser.add_argument("out", type=Path, help="folder to write to; made if absent")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--dtype", choices=["float32", "int8"], default="float32")
    parser.add_argument(
        "--stock", action="store_true", help="as optimum makes it for this CPU: fused, int8 with scales over the whole batch"
    )
    given = parser.parse_args(arguments)
    task = Task(given.task)
    if task in seq2seq.TASKS and (given.dtype != "float32" or given.stock):
        parser.error(f"--task {given.task} is exported in float32 alone")
    try:
        if task in seq2seq.TASKS:
            figures = seq2seq.export_seq2seq(given.source, given.out, task)
        else:
            figures = export(given.source, given.out, ExportOptions(task=task, dtype=given.dtype, stock=given.stock))
    except UnderstudyError as error:
        print(error.message, file=sys.stderr)
        return 1
    print(", ".join(f"{name} {value:.6g}" for name, value in figures.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
