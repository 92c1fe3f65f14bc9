"""`understudy models ...`: the model repository from the command line."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from server.commands.shared import JsonOption, ModelsOption
from server.commands.shared import new_table as _table
from server.commands.shared import open_repository as _repository
from server.commands.shared import show as _print
from server.core import Task
from server.errors import AlreadyExists, InvalidArgument, ModelRejected, UnderstudyError

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from server.runtime.pull import Graph, PullOptions
    from server.runtime.repository import ModelFiles

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="The model repository.")

NameOption = Annotated[str | None, typer.Option(help="Name in the repository; else from the source.")]
TaskOption = Annotated[str | None, typer.Option(help=f"One of {', '.join(task.value for task in Task)}; else from the model's files.")]
DtypeOption = Annotated[str, typer.Option(help="int8 or float32.")]
GraphOption = Annotated[
    str, typer.Option(help="Where the graph comes from: auto, repository (its ONNX file), own (our writer), export (optimum).")
]


@app.command()
def pull(
    source: Annotated[str, typer.Argument(help="'starter', a folder, or an id of a hub: owner/name or owner/name@revision.")],
    name: NameOption = None,
    task: TaskOption = None,
    dtype: DtypeOption = "int8",
    graph: GraphOption = "auto",
    pooling: Annotated[str | None, typer.Option(help="mean, cls or last; else from the model's files.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Texts, one a line, that int8 is fitted to; else general English.")] = None,
    effort: Annotated[str, typer.Option(help="Of a decoder's quantization: fast, normal or best.")] = "normal",
    adapters: Annotated[bool, typer.Option("--adapters", help="An encoder with places for LoRA adapters; decoders have them.")] = False,
    models: ModelsOption = None,
) -> None:
    """Fetches a model, turns it into ONNX where it is not, and adds it as the next version."""
    from server.runtime.pull import pull as run

    options = _options(name, task, dtype, graph)
    if effort not in ("fast", "normal", "best"):
        raise InvalidArgument(f"--effort {effort!r} is unknown; fast, normal and best are.", field="effort")
    options["effort"] = cast("Literal['fast', 'normal', 'best']", effort)
    if adapters:
        options["adapters"] = True
    if pooling is not None:
        options["fields"] = {"pooling": pooling}
    if calibration is not None:
        options["calibration"] = _lines(calibration)
    with _watch() as progress:
        files = run(source, _repository(models), progress=progress, **options)
    _say(files)


@app.command()
def add(
    folder: Annotated[Path, typer.Argument(help="A folder with model.onnx, and tokenizer.json and manifest.json where there are.")],
    name: NameOption = None,
    task: TaskOption = None,
    dtype: DtypeOption = "int8",
    graph: GraphOption = "auto",
    models: ModelsOption = None,
) -> None:
    """Adds a local folder as the next version: one of ours with its manifest, a Hugging Face checkpoint, or any ONNX model."""
    from server.runtime.pull import pull as run

    if not folder.is_dir():
        raise InvalidArgument(f"{folder} is not a folder. Give the folder that holds the model's files.", field="folder")
    with _watch() as progress:
        files = run(str(folder.absolute()), _repository(models), progress=progress, **_options(name, task, dtype, graph))
    _say(files)


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="name or name@version of the repository; or what `pull` takes.")],
    folder: Annotated[Path, typer.Argument(help="Where model.onnx, tokenizer.json and manifest.json are written; must not exist.")],
    task: TaskOption = None,
    dtype: DtypeOption = "int8",
    graph: GraphOption = "auto",
    models: ModelsOption = None,
) -> None:
    """Writes a model as a folder of ONNX, for another machine or another server. The repository stays as it is."""
    from server.runtime.pull import pull as run
    from server.runtime.repository import Repository

    if folder.exists():
        raise AlreadyExists(f"{folder} exists, and nothing is overwritten. Give a new folder.", field="folder")
    repository = _repository(models)
    name, _, version = source.partition("@")
    if name in repository.names():
        _copy_out(repository.open(name, version or None), folder)
    else:
        with tempfile.TemporaryDirectory(prefix="understudy-export-") as place, _watch() as progress:
            _copy_out(run(source, Repository(Path(place)), progress=progress, **_options(None, task, dtype, graph)), folder)
    typer.echo(f"Wrote {folder}.")


@app.command(name="list")
def list_models(models: ModelsOption = None, as_json: JsonOption = False) -> None:
    """Shows every version in the repository."""
    repository = _repository(models)
    entries = repository.entries()
    if as_json:
        rows = [
            {
                "name": entry.name,
                "version": entry.version,
                "bytes": entry.size,
                "error": entry.error,
                "manifest": entry.manifest.model_dump(mode="json", exclude={"files", "quantization"}) if entry.manifest else None,
            }
            for entry in entries
        ]
        typer.echo(json.dumps(rows, indent=1))
        return
    if not entries:
        typer.echo(f"No models in {repository.root}. Fetch a first one: understudy models pull starter")
        return
    table = _table("name", "version", "task", "form", "dtype", "tokens", "MB", "licence", "source")
    for entry in entries:
        manifest = entry.manifest
        if manifest is None:
            table.add_row(entry.name, entry.version, f"broken: {entry.error}")
            continue
        source = f"{manifest.source.kind}: {manifest.source.id}" if manifest.source else ""
        size = f"{entry.size / 1e6:.1f}"
        cells = (manifest.task.value, manifest.form, manifest.dtype, str(manifest.max_tokens), size, manifest.license, source)
        table.add_row(entry.name, entry.version, *cells)
    _print(table)


@app.command()
def verify(
    model: Annotated[str | None, typer.Argument(help="name or name@version; all versions of all models without.")] = None,
    models: ModelsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Checks hashes, manifests and the insides of every file. Exit code 1 where one is wrong."""
    repository = _repository(models)
    name, _, version = (model or "").partition("@")
    wanted = [name] if name else repository.names()
    rows = []
    for each in wanted:
        for number in [version] if version else repository.versions(each):
            try:
                repository.verify(each, number)
                rows.append({"name": each, "version": number, "ok": True, "error": "", "reason": ""})
            except ModelRejected as error:
                rows.append({"name": each, "version": number, "ok": False, "error": error.message, "reason": error.reason})
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        for row in rows:
            typer.echo(f"{row['name']}@{row['version']}: {'good' if row['ok'] else 'refused: ' + str(row['error'])}")
        if not rows:
            typer.echo(f"No models in {repository.root}.")
    if not all(row["ok"] for row in rows):
        raise typer.Exit(1)


@app.command()
def remove(
    model: Annotated[str, typer.Argument(help="name@version, or name for all its versions.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    models: ModelsOption = None,
) -> None:
    """Deletes a version from the repository. A server that has it loaded goes on with it until it is unloaded."""
    repository = _repository(models)
    name, _, version = model.partition("@")
    doomed = [version] if version else repository.versions(name)
    if not yes:
        typer.confirm(f"Delete {name} {', '.join(doomed)} from {repository.root}?", abort=True)
    gone = repository.remove(name, version or None)
    typer.echo(f"Deleted {', '.join(f'{name}@{number}' for number in gone)}.")


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="name or name@version.")],
    batch: Annotated[list[int] | None, typer.Option(help="Texts a call; repeatable. Default 1, 8, 32, 128.")] = None,
    seconds: Annotated[float, typer.Option(help="How long each is measured.", min=0.1, max=600)] = 3.0,
    texts: Annotated[Path | None, typer.Option(help="Texts, one a line; else general English sentences.")] = None,
    models: ModelsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measures a text model in this process, without gRPC: texts a second, and latency a call."""
    from server.commands.measure import measure

    name, _, version = model.partition("@")
    rows = measure(_repository(models), name, version or None, batch or [1, 8, 32, 128], seconds, _lines(texts) if texts else None)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = _table("texts a call", "calls", "texts/s", "tokens/s", "p50 ms", "p95 ms")
    for row in rows:
        table.add_row(*(f"{row[key]:,.{digits}f}" for key, digits in _BENCH_COLUMNS))
    _print(table)


_BENCH_COLUMNS = (("batch", 0), ("calls", 0), ("texts_per_s", 0), ("tokens_per_s", 0), ("p50_ms", 2), ("p95_ms", 2))


def _options(name: str | None, task: str | None, dtype: str, graph: str) -> PullOptions:
    if task is not None and task not in list(Task):
        known = ", ".join(one.value for one in Task)
        raise InvalidArgument(f"--task {task!r} is unknown; {known} are done.", field="task")
    # `pull` refuses other values of dtype and graph by name.
    return {"name": name, "task": Task(task) if task else None, "dtype": dtype, "graph": cast("Graph", graph)}


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} cannot be read as UTF-8 text: {error}. Give a file with one text a line.", field="file") from None


def _copy_out(files: ModelFiles, folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(files.folder, folder)
    except OSError as error:
        raise InvalidArgument(f"{folder} cannot be written: {error.strerror}. Give a folder that can be made.", field="folder") from error


def _say(files: ModelFiles) -> None:
    manifest = files.manifest
    parity = ", ".join(f"{key} {value:.5g}" for key, value in manifest.parity.items())
    typer.echo(
        f"Added {manifest.name}@{manifest.version}: {manifest.task.value}, {manifest.dtype}, {manifest.form}, {files.size / 1e6:.1f} MB."
    )
    if parity:
        typer.echo(f"Against the original: {parity}.")


class _Bars:
    """Progress on a terminal: a bar a stage, a bar a download. Elsewhere: a line a stage."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._tasks: dict[str, TaskID] = {}

    def stage(self, name: str, fraction: float, /) -> None:
        """See server.runtime.hub.Progress."""
        self._update(name, fraction, 1.0, "")

    def bytes(self, file: str, done: int, total: int, /) -> None:
        """See server.runtime.hub.Progress."""
        self._update(file, float(done), float(total), f"{done / 1e6:.1f} of {total / 1e6:.1f} MB")

    def note(self, text: str, /) -> None:
        """See server.runtime.hub.Progress."""
        self._bar.console.print(text, markup=False, highlight=False)

    def _update(self, name: str, done: float, total: float, detail: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=total, detail=detail)
            if not self._bar.console.is_terminal:
                self._bar.console.print(f"{name} ...", markup=False, highlight=False)
        self._bar.update(self._tasks[name], completed=done, detail=detail)


@contextmanager
def _watch() -> Iterator[_Bars]:
    """Bars on standard error; standard output is for results."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[detail]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield _Bars(bar)


def main() -> None:
    """`python -m server.commands.models`."""
    try:
        app()
    except UnderstudyError as error:
        print(f"understudy: {error.message}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
