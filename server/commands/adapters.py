"""`understudy adapters ...`: adapters of the models in the repository, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from server.commands.shared import JsonOption, ModelsOption, new_table, open_repository, show
from server.errors import InvalidArgument, ModelRejected

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Adapters of models in the repository.")

BaseOption = Annotated[str, typer.Option("--base", help="The model that it was trained on: name or name@version of the repository.")]
BaseArgument = Annotated[str, typer.Argument(help="The model.")]
AdapterArgument = Annotated[str, typer.Argument(help="name or name@version.")]


@app.command()
def add(
    folder: Annotated[Path, typer.Argument(help="A folder as PEFT saves it: adapter_config.json and adapter_model.safetensors.")],
    base: BaseOption,
    name: Annotated[str, typer.Option(help="What requests call it.")],
    license: Annotated[str, typer.Option(help="The adapter's licence.")] = "",
    any_base: Annotated[bool, typer.Option("--any-base", help="Take it though it names another base than the model came from.")] = False,
    models: ModelsOption = None,
) -> None:
    """Converts an adapter for a model and adds it as the next version. A server loads it by ModelService.LoadAdapter, or at its start."""
    from server.runtime.lora.convert import add_peft
    from server.runtime.lora.repository import ADAPTERS

    if not folder.is_dir():
        raise InvalidArgument(f"{folder} is not a folder. Give the one that PEFT's save_pretrained wrote.", field="folder")
    repository = open_repository(models)
    model, _, version = base.partition("@")
    manifest = repository.manifest(model, version or None)
    added = add_peft(folder, manifest, repository.root / ADAPTERS, name, license=license, any_base=any_base)
    what = f"rank {added.rank}, {len(added.targets)} layers" if added.targets else f"{added.positions} positions"
    typer.echo(f"Added {added.key} for {model}@{manifest.version}: {added.kind}, {what}.")


@app.command(name="list")
def list_adapters(
    base: Annotated[str | None, typer.Argument(help="A model; all of them without.")] = None,
    models: ModelsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Shows every version of the adapters in the repository."""
    from server.runtime.lora.repository import ADAPTERS, entries

    repository = open_repository(models)
    wanted = [base] if base is not None else repository.names()
    found = [(model, entry) for model in wanted for entry in entries(repository.root / ADAPTERS, model)]
    if as_json:
        rows = [
            {
                "base": model,
                "name": entry.name,
                "version": entry.version,
                "error": entry.error,
                "manifest": entry.manifest.model_dump(mode="json", exclude={"files"}) if entry.manifest else None,
            }
            for model, entry in found
        ]
        typer.echo(json.dumps(rows, indent=1))
        return
    if not found:
        typer.echo("No adapters. Add one: understudy adapters add FOLDER --base MODEL --name NAME")
        return
    table = new_table("base", "name", "version", "kind", "rank", "positions", "MB", "licence")
    for model, entry in found:
        manifest = entry.manifest
        if manifest is None:
            table.add_row(model, entry.name, entry.version, f"broken: {entry.error}")
            continue
        size = f"{sum(file.size for file in manifest.files.values()) / 1e6:.1f}"
        cells = (manifest.kind, str(manifest.rank or ""), str(manifest.positions or ""), size, manifest.license)
        table.add_row(f"{manifest.base.name}@{manifest.base.version}", entry.name, entry.version, *cells)
    show(table)


@app.command()
def verify(base: BaseArgument, adapter: AdapterArgument, models: ModelsOption = None) -> None:
    """Checks an adapter's hashes and tensors against its model. Exit code 1 where something is wrong."""
    from server.runtime.lora.folder import read_adapter
    from server.runtime.lora.repository import ADAPTERS, locate

    repository = open_repository(models)
    model, _, model_version = base.partition("@")
    manifest = repository.manifest(model, model_version or None)
    name, _, version = adapter.partition("@")
    good = True
    for number in locate(repository.root / ADAPTERS, model, name, version or None):
        try:
            read_adapter(repository.root / ADAPTERS / model / name / number, manifest, all_files=True)
            typer.echo(f"{name}@{number}: good")
        except ModelRejected as error:
            good = False
            typer.echo(f"{name}@{number}: refused: {error.message}")
    if not good:
        raise typer.Exit(1)


@app.command()
def remove(
    base: BaseArgument,
    adapter: AdapterArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    models: ModelsOption = None,
) -> None:
    """Deletes a version from the repository. Unload it from running servers first."""
    from server.runtime.lora import repository as adapters

    root = open_repository(models).root / adapters.ADAPTERS
    name, _, version = adapter.partition("@")
    doomed = adapters.locate(root, base, name, version or None)
    if not yes:
        typer.confirm(f"Delete {name} {', '.join(doomed)} of {base}?", abort=True)
    gone = adapters.remove(root, base, name, version or None)
    typer.echo(f"Deleted {', '.join(f'{name}@{number}' for number in gone)}.")
