"""Which answer is wanted: may the teacher's be learnt from, who is believed, is it good enough, do equal questions agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from server.routing.skills import normalised as normalised_label
from server.settings import CurationConfig
from trainer.curate.drafts import Draft
from trainer.curate.licences import Licences
from trainer.curate.rows import normalised

NO_TEACHER = "no answer from a teacher or a person"
FOREIGN_LABEL = "label is not one of the skill's"
THUMBS_DOWN = "thumbs down without a correction"
LOW_RATING = "rated too low (curation.above_rating)"
LOW_QUALITY = "quality is too low (curation.above_quality)"
DISPUTED = "equal texts with labels that disagree"
OUTVOTED = "most rows of the same text have another label"
BAD_STARS = 2  # a rating up to this says that the answer was bad, as a thumb down does

Drop = Callable[[Draft, str], None]


def sources(drafts: Sequence[Draft], licences: Licences, drop: Drop) -> list[Draft]:
    """Takes away teachers' answers that may not be learnt from; a row that a person corrected, or may have liked, stays without it."""
    kept = []
    for one in drafts:
        refusal = licences.refusal(one.source_model, one.training_allowed) if one.teacher is not None else ""
        if refusal:
            one.teacher, one.refused = None, refusal
            if one.correction is None and not (one.local and one.student is not None):
                drop(one, refusal)
                continue
        kept.append(one)
    return kept


@dataclass(slots=True, frozen=True)
class Judge:
    """Decides each draft's answer: a person's correction, else the teacher's, else the student's own that a person liked.

    `labels`: of a skill that classifies, else empty. What people say is about the answer that they saw: where the wanted answer is
    another one, it does not count against it.

    `measured`: since when a quality model of the skill's own scores its answers; None: there is none. What the general model thinks of a
    teacher's answer is no reason to leave it out: it was never measured on this skill, and thinks little of short JSON, for one.
    """

    settings: CurationConfig
    labels: Mapping[str, str]  # normalised -> as the skill has it
    measured: datetime | None = None

    @classmethod
    def of(cls, settings: CurationConfig, labels: Iterable[str], measured: datetime | None = None) -> Judge:
        return cls(settings, {normalised_label(label): label for label in labels}, measured)

    def choose(self, drafts: Sequence[Draft], drop: Drop) -> list[Draft]:
        """Sets `answer`, `origin` and `rejected`, or drops with a reason."""
        kept = []
        for one in drafts:
            reason = self._choose(one)
            if reason:
                drop(one, reason)
            else:
                kept.append(one)
        return kept

    def _choose(self, one: Draft) -> str:
        correction = self._known(one.correction)
        delivered = one.delivered if one.delivered is not None else (one.student if one.local else one.teacher)
        # A correction that is none of the labels still says that the answer was wrong, unless the person also put a thumb up.
        bad = self._bad(one) or (one.correction is not None and correction is None and one.thumb != "up")
        if correction is not None:
            one.answer, one.origin = correction, "person"
            one.rejected = delivered if delivered is not None and not self.same(delivered, correction) else ""
            return ""
        teacher = self._known(one.teacher)
        if bad and delivered is not None and not self.labels:
            one.rejected = delivered
        if teacher is not None and not (bad and (delivered is None or self.same(delivered, teacher))):
            one.answer, one.origin = teacher, "teacher"
            return ""
        own = self._known(one.student)
        if own is not None and one.local and self.settings.own_answers and self._liked(one):
            one.answer, one.origin = own, "student"
            return ""
        if one.rejected:
            return ""
        if bad:
            return THUMBS_DOWN
        return one.refused or (NO_TEACHER if one.teacher is None else FOREIGN_LABEL)

    def good(self, drafts: Sequence[Draft], drop: Drop) -> list[Draft]:
        """Leaves out what was rated or scored too low, and gives weight to what people and students agree with."""
        kept = []
        for one in drafts:
            reason = self._too_bad(one)
            if reason and one.rejected:
                one.answer, one.origin = "", ""  # what is not wanted is known all the same
            elif reason:
                drop(one, reason)
                continue
            if one.origin == "person" or (one.answer and self._seen(one) and self._liked(one)):
                one.weight += self.settings.feedback_bonus
            if one.origin != "student" and one.student is not None and one.answer and self.same(one.student, one.answer):
                one.weight += self.settings.agreement_bonus
            kept.append(one)
        return kept

    def _too_bad(self, one: Draft) -> str:
        if one.origin in ("", "person"):
            return ""
        if self._seen(one) and one.rating is not None and one.rating <= self.settings.above_rating:
            return LOW_RATING
        quality = one.student_quality if one.origin == "student" else None
        if quality is None and self._seen(one) and self.measured is not None and one.time >= self.measured:
            quality = one.quality
        return LOW_QUALITY if quality is not None and quality <= self.settings.above_quality else ""

    def _seen(self, one: Draft) -> bool:
        """Whether the caller got the answer that is wanted, so that feedback is about it."""
        if one.delivered is None:
            return one.local == (one.origin == "student")
        return self.same(one.delivered, one.answer)

    def same(self, mine: str, other: str) -> bool:
        """Whether two answers say the same in the same words."""
        return normalised_label(mine) == normalised_label(other) if self.labels else normalised(mine) == normalised(other)

    def _known(self, answer: str | None) -> str | None:
        return self.labels.get(normalised_label(answer)) if self.labels and answer is not None else answer

    def _bad(self, one: Draft) -> bool:
        return one.thumb == "down" or (not one.thumb and one.rating is not None and one.rating <= BAD_STARS)

    def _liked(self, one: Draft) -> bool:
        return not self._bad(one) and (one.thumb == "up" or (one.rating is not None and one.rating > self.settings.above_rating))


def agreement(drafts: Sequence[Draft], bonus: float, drop: Drop) -> list[Draft]:
    """Of equal texts with several labels the one that most rows have counts, a person's before any teacher's; a draw drops them all."""
    groups: dict[str, list[Draft]] = {}
    for one in drafts:
        groups.setdefault(normalised(one.text), []).append(one)
    kept = []
    for same in groups.values():
        voters = [one for one in same if one.corrected] or same
        votes = Counter(one.answer for one in voters).most_common(2)
        if len(votes) == 2 and votes[0][1] == votes[1][1]:
            for one in same:
                drop(one, DISPUTED)
            continue
        for one in same:
            if one.answer != votes[0][0]:
                drop(one, OUTVOTED)
                continue
            if len(votes) == 1 and len(same) > 1 and all(other.answer == one.answer for other in same):
                one.weight += bonus
            kept.append(one)
    return kept
