"""`understudy doctor`: what is wrong with this machine, this configuration, this repository."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console

from server.config import Config, load_config
from server.errors import UnderstudyError

Check = Callable[[], str]


def doctor(file: str | None, flags: Mapping[str, object]) -> int:
    """Prints one line a check; returns 1 where one fails."""
    console = Console(highlight=False, soft_wrap=True)
    loaded: list[Config] = []

    def configuration() -> str:
        loaded.append(load_config(file, flags=flags))
        return "every key is known"

    good = _report(console, "configuration", configuration)
    config = loaded[0] if loaded else Config()
    checks: list[tuple[str, Check]] = [
        ("onnx runtime", onnx_runtime),
        ("native code", native_code),
        ("kernels", kernels),
        ("repository", lambda: repository(Path(config.models.path))),
        ("tls", lambda: tls_files(config)),
        ("secrets", lambda: secrets(config)),
        ("port", lambda: port(config.server.host, config.server.port)),
        ("metrics port", lambda: port(config.server.metrics_host, config.server.metrics_port) if config.server.metrics_port else "off"),
    ]
    for name, check in checks:
        good = _report(console, name, check) and good
    return 0 if good else 1


def onnx_runtime() -> str:
    """Its release, its providers, and that it does not phone home."""
    from server.runtime.ort import import_ort

    ort = import_ort()
    return f"{ort.__version__}, {', '.join(ort.get_available_providers())}, telemetry off"


def native_code() -> str:
    """Whether the compiled modules are used."""
    from native import batch

    module = batch.BatchQueue.__module__
    if module.endswith("_py"):
        return f"slow: {module} stands in for the compiled module; run `make setup` for the fast one"
    return module


def kernels() -> str:
    """The instruction set, after each kernel was compared with its twin."""
    from server.runtime import kernels as library

    library.self_test()
    return f"{library.isa_name()}, every kernel agrees with its twin"


def repository(path: Path) -> str:
    """Every version of every model, verified to the last byte."""
    from server.runtime.repository import Repository

    store = Repository(path)
    versions = [(name, version) for name in store.names() for version in store.versions(name)]
    for name, version in versions:
        store.verify(name, version)
    if not versions:
        return f"{path} is empty; `understudy models pull starter` fetches a first model"
    return f"{len(versions)} versions in {path}, all verified"


def tls_files(config: Config) -> str:
    """Whether certificate and key fit."""
    from server.api import tls

    found = tls.credentials(config.server.tls)
    return "off" if found is None else "mutual" if config.server.tls.client_ca_file else "on"


def secrets(config: Config) -> str:
    """Whether each place that is named holds a secret; the secrets are not shown."""
    from server.providers.make import make_providers

    make_providers(config.providers)  # opens no connection; a key that is missing raises
    config.registry.read_password()
    return f"{len(config.providers)} providers"


def port(host: str, number: int) -> str:
    """Whether somebody listens there already."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, number))
    return f"{host}:{number} is free"


def _report(console: Console, name: str, check: Check) -> bool:
    try:
        console.print(f"[green]ok[/]    {name:14} {check()}")
        return True
    except UnderstudyError as error:
        console.print(f"[red]wrong[/] {name:14} {error.message}", markup=True)
    except OSError as error:
        console.print(f"[red]wrong[/] {name:14} {error}")
    return False
