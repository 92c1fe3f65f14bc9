"""A model card for what a job made: what it is, what it was made of, how good it is and where it ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from server.errors import FailedPrecondition, Unavailable, UnderstudyError
from trainer.context import JobContext
from trainer.report import SUCCEEDED, Report

CARD = "README.md"
# Metrics that a reader outside needs; the rest stands in the report.
_MEANING = {
    "accuracy": "agreement with the teacher on held-out rows",
    "local_share": "share of held-out rows whose quality reaches the bar",
    "local_accuracy": "agreement with the teacher among those",
    "local_right_estimate": "estimated probability that those are right",
    "teacher_accuracy_estimate": "estimated accuracy of the teacher's labels",
    "ece": "expected calibration error of the agreement, cross-fitted",
    "parity_agreement": "equal labels of the exported file and the trained model",
    "agreement": "share of held-out rows with the wanted answer",
    "f1": "micro F1 of exact entities",
    "concordance": "share of pairs of rows that are ordered as wanted",
    "ndcg": "nDCG@10",
    "mrr": "reciprocal rank of the first relevant one, among 10",
    "acceptable": "share of held-out rows answered acceptably",
    "exact_match": "share of held-out rows answered in the wanted words",
    "parity/agreement": "how far the exported file answers as the trained model",
}
_SHOWN = tuple(_MEANING)


@dataclass(slots=True, frozen=True)
class Lineage:
    """Where a student comes from: `dataset` is the registry's id, `table_version` the Delta table's."""

    dataset: str
    fingerprint: str
    table_version: int
    license: str = ""
    limits: tuple[str, ...] = field(default=())


@dataclass(slots=True, frozen=True)
class Published:
    """What may be pushed: folders by their path in the Hub's repository; `repository` "owner/name", or "" for nowhere."""

    folders: Mapping[str, Path]
    repository: str = ""


def tell(context: JobContext, report: Report, task: str, lineage: Lineage, published: Published) -> None:
    """Writes the card into the job's folder, and pushes what was published to the Hub where the job says so."""
    if find_spec("huggingface_hub") is None:
        return
    path = write_card(context.folder, report, task, lineage)
    report.card = str(path)
    if not published.repository or report.state != SUCCEEDED:
        return
    try:
        context.log(f"pushed to {push(published.repository, published.folders, path)}")
    except UnderstudyError as error:  # the student serves all the same
        context.log(f"not pushed: {error.message}")
        report.details["hub"] = error.message


def write_card(folder: Path, report: Report, task: str, lineage: Lineage) -> Path:
    """Writes `folder`/README.md with the Hub's metadata (licence, base, results) at its head; returns its path."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    name = f"{report.skill} version {report.version or 'draft'}"
    results = [
        EvalResult(
            task_type=task,
            dataset_type="private",
            dataset_name=f"{report.skill}: held-out interactions",
            metric_type=key,
            metric_value=value,
        )
        for key in _SHOWN
        if (value := _number(report.metrics, key)) is not None
    ]
    data = ModelCardData(
        license=lineage.license or None,
        pipeline_tag=task,
        library_name="understudy",
        base_model=report.base.partition("@")[0] or None,
        model_name=name,
        tags=["understudy", report.method],
        eval_results=results or None,
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CARD
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(name, report, task, lineage)}").save(path)
    return path


def push(repository: str, folders: Mapping[str, Path], card: Path, *, endpoint: str | None = None, token: str | None = None) -> str:
    """Uploads the card and folders (path in the repository -> folder) to a private repository of the Hub; returns its address.

    Raises FailedPrecondition where the Hub refuses (token, name), Unavailable where it cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    operations = [CommitOperationAdd(CARD, str(card))]
    for place, folder in folders.items():
        operations += [CommitOperationAdd(f"{place}/{file.name}", str(file)) for file in sorted(folder.iterdir()) if file.is_file()]
    api = HfApi(endpoint=endpoint, token=token)
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.create_commit(repository, operations, commit_message="Publish a student")
    except HfHubHTTPError as error:
        message = f"The Hub refuses {repository[:200]!r}: {str(error).splitlines()[0][:300]}. Check the name and HF_TOKEN."
        raise FailedPrecondition(message, field="hub_repo") from error
    except (OSError, OfflineModeIsEnabled) as error:
        raise Unavailable(f"The Hub cannot be reached for {repository[:200]!r}: {type(error).__name__}. Push again later.") from error
    return f"{api.endpoint}/{repository}"


def _number(metrics: Mapping[str, float], key: str) -> float | None:
    value = metrics.get(key)
    return None if value is None else round(float(value), 4)


def _text(name: str, report: Report, task: str, lineage: Lineage) -> str:
    lines = [f"# {name}", "", f"A student for `{task}`, made by Understudy: {report.method} on `{report.base}`.", "", "## Results", ""]
    lines += ["| metric | value | meaning |", "|---|---|---|"]
    for key in _SHOWN:
        if (value := _number(report.metrics, key)) is not None:
            lines.append(f"| {key} | {value} | {_MEANING[key]} |")
    lines += [
        "",
        f"On {report.held_out_rows} rows that no training sees, by the exported file. Agreement with a teacher is not truth.",
        "",
    ]
    lines += [
        "## Data",
        "",
        f"- data set `{lineage.dataset}`, fingerprint `{lineage.fingerprint}`, version {lineage.table_version} of the lake's table",
    ]
    lines += [f"- {report.train_rows} rows to train, {report.held_out_rows} held out, {report.labels} labels"]
    lines += [f"- {count} rows by `{source}`" for source, count in sorted(report.sources.items())]
    lines += [f"- left out: {count} rows, {why}" for why, count in sorted(report.dropped.items())]
    lines += [
        "",
        "## Training",
        "",
        *(f"- {key}: {_plain(value)}" for key, value in sorted(report.parameters.items())),
        f"- job: `{report.job}`",
    ]
    lines += ["", "## Licence", "", lineage.license or "Not stated by the base.", "", "## Limits", ""]
    limits = [
        "It knows the traffic that it was trained on; where traffic changes its quality is to be measured again.",
        "It repeats mistakes that its teacher makes always.",
        *lineage.limits,
    ]
    if report.labels_without_rows:
        limits.append(f"Labels that no row had, and that it cannot give: {', '.join(report.labels_without_rows[:20])}.")
    return "\n".join([*lines, *(f"- {limit}" for limit in limits), ""])


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
