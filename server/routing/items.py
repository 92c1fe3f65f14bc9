"""Inputs under way: what became of each so far, and the end of its story."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from server.core import Hop, Outcome, Usage, Work
from server.errors import Cancelled, ProviderUnavailable, UnderstudyError
from server.routing.candidates import Answer, Candidate, Failure


@dataclass(slots=True)
class Place:
    """A candidate's place in a route. `shadow`: it is asked for comparison and never delivers; `version`: of a student of the skill."""

    candidate: Candidate
    reason: str
    shadow: bool = False
    version: str = ""


@dataclass(slots=True)
class Item:
    """One input, and what the lake wants to know of it. `passed_over`: candidates that are not asked for it, and why; `unshadowed`:
    candidates that are not asked in its shadow, because they may answer it.
    """

    work: Work
    outcome: Outcome
    passed_over: dict[str, str] = field(default_factory=dict)
    unshadowed: frozenset[str] = frozenset()
    answers: dict[str, Answer] = field(default_factory=dict)  # by candidate
    failures: dict[str, Failure] = field(default_factory=dict)  # by candidate
    recorded: frozenset[str] = frozenset()  # whose answers the lake's row has
    last: Failure | None = None
    done: bool = False
    input_tokens: int = 0
    output_tokens: int = 0
    provider_s: float = 0.0
    first_token_s: float = 0.0
    stream: bool = False
    committed: bool = False  # the caller has seen words of an answer that then failed

    def fail(self, candidate: Candidate, error: UnderstudyError) -> None:
        """A candidate gave no answer, and may have been paid all the same."""
        failure = Failure(error, cost_micro_usd=error.spent_micro_usd)
        self.note(candidate, failure)
        self.hop(candidate, "failed", error.message, failure)

    def note(self, candidate: Candidate, answer: Answer | Failure) -> None:
        """Counts what it used, and how long a provider took."""
        self.input_tokens += answer.usage.input
        self.output_tokens += answer.usage.output
        self.outcome.cost_micro_usd += answer.cost_micro_usd
        if not candidate.local:
            self.provider_s += answer.elapsed_s
        if isinstance(answer, Answer):
            self.answers[candidate.name] = answer
        else:
            self.failures[candidate.name] = answer
            self.last = answer

    def hop(self, candidate: Candidate, outcome: str, reason: str, answer: Answer | Failure | None = None) -> None:
        """Adds to the story."""
        quality, tries = (answer.quality, answer.tries) if isinstance(answer, Answer) else (None, 1)
        cost, elapsed = (answer.cost_micro_usd, answer.elapsed_s) if answer is not None else (0, 0.0)
        self.outcome.decision.hops.append(Hop(candidate.name, outcome, reason, quality, cost, elapsed, tries))

    def skip(self, candidate: Candidate, reason: str) -> None:
        """Passes a candidate over."""
        self.hop(candidate, "skipped", reason)

    def deliver(self, candidate: Candidate, answer: Answer, reason: str) -> None:
        """The answer goes out."""
        self.hop(candidate, "delivered", reason, answer)
        outcome = self.outcome
        outcome.decision.candidate = candidate.name
        outcome.decision.local = candidate.local
        outcome.reply = answer.reply
        outcome.quality = answer.quality
        outcome.findings = answer.findings
        self.done = True

    def close(self) -> None:
        """Gives an item that nobody answered its error, which names each candidate's reason."""
        outcome = self.outcome
        outcome.usage = Usage(self.input_tokens, self.output_tokens)
        if self.done:
            return
        hops = [hop for hop in outcome.decision.hops if hop.outcome != "shadow"]
        if not hops:
            outcome.error = Cancelled("The call ended before this item was answered.")
        elif self.last is None and not any(hop.outcome == "below_bar" for hop in hops):
            outcome.error = ProviderUnavailable(f"Nobody could be asked: {_reasons(hops)}")
        elif hops[-1].outcome == "below_bar" or self.last is None:
            below = next(hop for hop in reversed(hops) if hop.outcome == "below_bar")
            quality = "unknown" if below.quality is None else f"{below.quality:.3f}"
            message = f"The local answer's quality {quality} is below the bar, and no other candidate may answer. Allow the teacher."
            outcome.error = ProviderUnavailable(message, quality=quality)
        else:
            outcome.error = _joined(self.last.error, hops)


def _joined(last: UnderstudyError, hops: Sequence[Hop]) -> UnderstudyError:
    """The last candidate's error; where several failed, with each one's reason."""
    failed = [hop for hop in hops if hop.outcome in ("failed", "skipped", "below_bar")]
    if len(failed) < 2 or not isinstance(last, ProviderUnavailable):
        return last
    message = f"No candidate could answer: {_reasons(failed)}"
    return ProviderUnavailable(message, retry_after_s=last.retry_after_s, **{hop.candidate: hop.reason for hop in failed})


def _reasons(hops: Sequence[Hop]) -> str:
    return "; ".join(f"{hop.candidate}: {hop.reason}" for hop in hops)
