"""`python -m trainer.export SOURCE OUT --task TASK`: any Hugging Face encoder to ONNX, through optimum; run as a process.

Writes OUT/model.onnx in the padded form, OUT/tokenizer.json and OUT/manifest.json (the fields that the export decides). Exits with 1 and
one paragraph on the error stream if the graph does not answer as the original does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from server.core import Task
from server.errors import UnderstudyError
from trainer.export.padded import ExportOptions, export

TASKS = [task.value for task in Task if task is not Task.TENSOR]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.export", description="Exports an encoder to ONNX through optimum.")
    parser.add_argument("source", type=Path, help="folder with config.json, safetensors and tokenizer files")
    parser.add_argument("out", type=Path, help="folder to write to; made if absent")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--dtype", choices=["float32", "int8"], default="float32")
    parser.add_argument(
        "--stock", action="store_true", help="as optimum makes it for this CPU: fused, int8 with scales over the whole batch"
    )
    given = parser.parse_args(arguments)
    options = ExportOptions(task=Task(given.task), dtype=given.dtype, stock=given.stock)
    try:
        figures = export(given.source, given.out, options)
    except UnderstudyError as error:
        print(error.message, file=sys.stderr)
        return 1
    print(", ".join(f"{name} {value:.6g}" for name, value in figures.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
