"""OpenAI's files and fine-tuning endpoints, through its own library; and those of whoever imitates them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from server.errors import FailedPrecondition, InvalidArgument, UnderstudyError
from server.providers.failures import refusal_of
from server.providers.presets import key_of, presets
from server.providers.quiet import keep_quiet
from server.settings import ProviderConfig
from trainer.hosted.base import HostedEvent, HostedJob, HostedState, Order
from trainer.hosted.offers import LOCAL

T = TypeVar("T")
TAG = "understudy_job"  # the key of our tag in the vendor's metadata
_PAGE = 100
_MOST_PAGES = 50
_LONGEST_LINE = 300
_UPLOAD_TIMEOUT_S = 600.0
_STATES = {
    "validating_files": HostedState.QUEUED,
    "queued": HostedState.QUEUED,
    "running": HostedState.RUNNING,
    "paused": HostedState.RUNNING,
    "succeeded": HostedState.SUCCEEDED,
    "failed": HostedState.FAILED,
    "cancelled": HostedState.CANCELLED,
}
_WORD = re.compile(r"[A-Za-z0-9_.:/-]{1,160}")


class OpenAITrainer:
    """See trainer.hosted.base.HostedTrainer. Opens no connection before the first call."""

    def __init__(self, name: str, config: ProviderConfig, environ: Mapping[str, str] | None = None) -> None:
        """Raises InvalidArgument where the kind speaks another format, or its key is missing."""
        preset = presets()[config.kind]
        if preset.wire != "openai":
            message = f"{name!r} is of kind {config.kind!r}, which has no fine-tuning that is known here. Take a provider of kind openai."
            raise InvalidArgument(message, field="provider", provider=name)
        self.name = name
        self._key = key_of(config, preset, os.environ if environ is None else environ)
        self._base_url = config.base_url.rstrip("/") or preset.base_url
        self._config = config
        self._client: Any = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def upload(self, path: Path) -> str:
        """See HostedTrainer."""
        content = path.read_bytes()  # the library would read it inside the event of sending; a missing file is our own mistake
        sent = self._call(
            lambda client: client.files.create(
                file=(path.name, content, "application/jsonl"), purpose="fine-tune", timeout=max(self._config.timeout_s, _UPLOAD_TIMEOUT_S)
            )
        )
        return self._word(sent.id)

    def create(self, order: Order) -> HostedJob:
        """See HostedTrainer."""
        asked: dict[str, Any] = {
            "model": order.model,
            "training_file": order.training,
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": order.epochs}}},
            "seed": order.seed,
            "suffix": order.suffix,
            "metadata": {TAG: order.tag},
        }
        if order.validation:
            asked["validation_file"] = order.validation
        return self._job(self._call(lambda client: client.fine_tuning.jobs.create(**asked)))

    def find(self, tag: str) -> HostedJob | None:
        """See HostedTrainer."""
        page = self._call(lambda client: client.fine_tuning.jobs.list(limit=_PAGE, metadata={TAG: tag}))
        for job in page.data:
            # A vendor that does not know the filter sends all of them.
            if (job.metadata or {}).get(TAG) == tag and job.status != "failed":
                return self._job(job)
        return None

    def poll(self, job: str) -> HostedJob:
        """See HostedTrainer."""
        return self._job(self._call(lambda client: client.fine_tuning.jobs.retrieve(job)))

    def events(self, job: str, after: str = "") -> list[HostedEvent]:
        """See HostedTrainer. The vendor lists the newest first."""
        found: list[HostedEvent] = []
        cursor: dict[str, str] = {}
        for _ in range(_MOST_PAGES):
            page = self._call(lambda client, c=dict(cursor): client.fine_tuning.jobs.list_events(job, limit=_PAGE, **c))
            for event in page.data:
                if event.id == after:
                    return found[::-1]
                found.append(self._event(event))
            if not page.data or not page.has_more:
                break
            cursor = {"after": page.data[-1].id}
        return found[::-1]

    def cancel(self, job: str) -> HostedJob:
        """See HostedTrainer."""
        present = self.poll(job)
        return present if present.state.ended else self._job(self._call(lambda client: client.fine_tuning.jobs.cancel(job)))

    def close(self) -> None:
        """See HostedTrainer."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _call(self, ask: Any) -> Any:
        import openai

        keep_quiet(self._key)
        if self._client is None:
            self._client = openai.OpenAI(
                api_key=self._key or "none",
                base_url=self._base_url,
                timeout=self._config.timeout_s,
                max_retries=0,  # what may be repeated is known above
            )
        try:
            return ask(self._client)
        except Exception as error:
            raise self._ours(error, openai) from None

    def _ours(self, error: Exception, sdk: Any) -> UnderstudyError:
        """The vendor's refusals by what can be done about them; everything else as for its answers."""
        refusal = refusal_of(error, sdk, self.name, self._key)
        found = refusal.error
        status = found.metadata.get("status", "")
        if status == "403":
            message = (
                f"{self.name} refuses fine-tuning to this organisation (HTTP status 403). OpenAI has closed it to organisations that are "
                f"new to it. {LOCAL}"
            )
            return _same(FailedPrecondition(message), found)
        if status in ("400", "404", "422"):
            code = found.metadata.get("vendor_code", "no code given")
            message = (
                f"{self.name} refuses the fine-tuning job (HTTP status {status}, {code}). "
                "Look at the model's name and at what the vendor fine-tunes."
            )
            return _same(InvalidArgument(message, field="model"), found)
        return found

    def _job(self, job: Any) -> HostedJob:
        state = _STATES.get(str(job.status))
        if state is None:
            raise InvalidArgument(f"{self.name} says a state of a job that is not known here. Look at its base_url.", field="provider")
        code = str(job.error.code) if job.error is not None and job.error.code else ""
        return HostedJob(
            id=self._word(job.id),
            state=state,
            model=str(job.model),
            result=self._word(job.fine_tuned_model) if job.fine_tuned_model else "",
            trained_tokens=int(job.trained_tokens) if job.trained_tokens is not None else None,
            error=code if _WORD.fullmatch(code) and not (self._key and self._key in code) else "",
        )

    def _event(self, event: Any) -> HostedEvent:
        text = " ".join(str(event.message).split())[:_LONGEST_LINE]
        data = event.data if isinstance(event.data, dict) else {}
        values = {
            str(name): float(value)
            for name, value in data.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in ("step", "total_steps")
        }
        step = data.get("step")
        return HostedEvent(
            id=str(event.id),
            text=text.replace(self._key, "***") if self._key else text,
            step=int(step) if isinstance(step, (int, float)) else 0,
            values=values if event.type == "metrics" else {},
        )

    def _word(self, value: object) -> str:
        text = str(value or "")
        if not _WORD.fullmatch(text):
            raise InvalidArgument(f"{self.name} gave something that is no id. Look at its base_url.", field="provider")
        return text


def _same(error: T, source: UnderstudyError) -> T:
    """With what is known of the refusal."""
    assert isinstance(error, UnderstudyError)
    error.metadata = {**source.metadata, **error.metadata}
    return error
