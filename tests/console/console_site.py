"""A site with everything that the console shows: a skill whose student is on its way beside a teacher on loopback, models, budgets."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from server.config import RegistryConfig
from server.registry.jobs import JobStore
from server.registry.registry import Registry
from server.runtime.heads import Base, Features, HeadSpec, write_linear_head
from server.runtime.repository import Repository
from tests.gateway_process import GatewayProcess
from tests.made import ROOT
from tests.providers.loopback import OpenAIServer
from tests.routing.conftest import LABELS, SURE
from tests.server_process import ServerProcess
from tests.trainer_lake import WORDS, texts
from trainer import linear

MODELS = ("embedder", "scripted", "classifier", "ranker")
STORY = "Once there was a card that nobody missed until the day on which it was found again behind the money ."
END_S = 30.0


def intent_of(text: str) -> str:
    """The label whose words a text has."""
    found = {label: sum(text.split().count(word) for word in words) for label, words in WORDS.items()}
    return max(found, key=lambda label: found[label])


def answer(_number: int, text: str) -> str:
    """The teacher: right on every text, and a teller of one story."""
    return STORY if "story" in text else intent_of(text)


class ConsoleSite:
    """`url` is the console's; the site lives until `close`."""

    def __init__(self, folder: Path, small_models: Path, *, more: str = "", trained: bool = True) -> None:
        self.folder = folder
        self.models = folder / "models"
        for name in MODELS:
            shutil.copytree(small_models / name, self.models / name)
        self.vendor = OpenAIServer(answer)
        self.registry_url = f"sqlite:///{folder / 'registry.db'}"
        self.config = self._config(small_models) + more
        self.server = ServerProcess(folder / "server", self.config, models=self.models, env={"LOOP_KEY": "sk-loop"})
        self.server.wait_ready()
        self.gateway = GatewayProcess(self.server.address)
        self.url = self.gateway.url
        self.http = httpx.Client(base_url=self.url, timeout=30)
        self.registry = Registry(RegistryConfig(url=self.registry_url))
        self.jobs = JobStore(self.registry)
        self._users = itertools.count()
        if trained:
            self.publish(1)

    def _config(self, small_models: Path) -> str:
        return f"""
[models]
load = ["embedder", "scripted", "classifier"]
adapter_poll_s = 0.05
[lake]
path = {json.dumps(str(self.folder / "lake"))}
flush_s = 0.3
[registry]
url = {json.dumps(self.registry_url)}
[budget.total]
day_usd = 5.0
[budget.providers.loop]
month_usd = 100.0
[providers.loop]
base_url = "{self.vendor.base_url}"
api_key_env = "LOOP_KEY"
training_allowed = true
requests_per_minute = 100000
[providers.loop.prices."big"]
input_per_million_usd = 2.5
output_per_million_usd = 10.0
[rollout]
margin = 0.1
min_comparisons = 100000
poll_s = 0.05
[training]
path = {json.dumps(str(self.folder / "training"))}
[training.sources]
embedder = {json.dumps(str(small_models.parent / "checkpoints" / "embedder"))}
[skills.support-intent]
task = "text-classification"
instruction = "Which intent does the customer have?"
labels = {json.dumps(LABELS)}
teacher = "loop/big"
base = "embedder"
min_rows = 20
[skills.story]
task = "text-generation"
instruction = "Tell a short story."
teacher = "loop/big"
"""

    def close(self) -> None:
        self.http.close()
        self.registry.close()
        self.gateway.stop()
        self.server.stop(allow_errors=True)
        self.vendor.close()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A call by REST that has to be answered."""
        answered = self.http.post(path, json=body)
        assert answered.status_code == 200, answered.text
        return dict(answered.json())

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        answered = self.http.get(path, params=query)
        assert answered.status_code == 200, answered.text
        return dict(answered.json())

    def publish(self, version: int) -> None:
        """A head that was fitted to what the embedder makes of sixty texts; it is in the shadow when this returns."""
        known = texts(60, seed=1)
        vectors = self.post("/v1/inference:embed", {"model": {"name": "embedder"}, "texts": [text for text, _ in known]})["results"]
        classes = np.array([LABELS.index(label) for _, label in known])
        fitted = linear.fit(np.array([one["embedding"] for one in vectors], np.float32), classes, len(LABELS), strengths=(100.0,))
        manifest = Repository(self.models).manifest("embedder", "1")
        spec = HeadSpec(
            name="support-intent",
            version=str(version),
            base=Base(name="embedder", version="1", sha256=manifest.files["model.onnx"].sha256),
            features=Features(pooling="mean", normalize=True, size=manifest.hidden_size),
            labels=list(LABELS),
            calibration=SURE.to_json(),
            metrics={"local_accuracy": 0.94, "local_share": 1.0, "held_out_rows": 400.0, "accuracy": 0.94},
        )
        write_linear_head(self.models / "adapters" / "support-intent" / str(version), spec, fitted.weight, fitted.bias)
        self.wait_rollout(lambda now: str(now["student"]) == str(version))

    def rollout(self) -> dict[str, Any]:
        return dict(self.get("/v1/skills/support-intent/rollout")["rollout"])

    def wait_rollout(self, fits: Any) -> dict[str, Any]:
        """The rollout, once it fits."""
        return self.wait(self.rollout, fits)

    def wait(self, look: Any, fits: Any) -> Any:
        end = time.monotonic() + END_S
        while not fits(found := look()):
            assert time.monotonic() < end, found
            time.sleep(0.05)  # between looks from outside
        return found

    def ask(self, count: int, seed: int, batch: int = 20) -> list[dict[str, Any]]:
        """Requests of the skill support-intent, each batch by another user; returns the results."""
        known = [text for text, _ in texts(count, seed)]
        found: list[dict[str, Any]] = []
        for start in range(0, count, batch):
            body = {
                "skill": "support-intent",
                "inputs": [{"text": text} for text in known[start : start + batch]],
                "user": f"user {next(self._users)}",
            }
            found += self.post("/v1/inference:run", body)["results"]
        return found

    def wait_recorded(self, interaction: str) -> None:
        """Until the lake's tables have an interaction."""
        self.wait(lambda: self.http.get(f"/v1/interactions/{interaction}").status_code, lambda code: code == 200)


class LockedSite:
    """A server that asks for keys, with nothing loaded, and two keys of it."""

    def __init__(self, folder: Path, small_models: Path) -> None:
        config = f"""
[auth]
keys = "required"
[models]
load = []
[registry]
url = {json.dumps(f"sqlite:///{folder / 'registry.db'}")}
"""
        self.server = ServerProcess(folder / "server", config, models=small_models)
        self.server.wait_ready()
        self.gateway = GatewayProcess(self.server.address)
        self.url = self.gateway.url
        self._config = folder / "server" / "understudy.toml"
        self.admin, self.viewer = self._key("admin"), self._key("viewer")

    def _key(self, role: str) -> str:
        command = [sys.executable, "-m", "server.cli", "keys", "create", "--role", role, "--name", role, "--config", str(self._config)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    def close(self) -> None:
        self.gateway.stop()
        self.server.stop(allow_errors=True)
