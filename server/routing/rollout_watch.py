"""Signs that something changed, cheap enough to be looked at for every answer: what a student says, how sure it is, what people say of it.

None of them decides. A sign raises the share of answers beside which the teacher is asked, and those decide. Pure; no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from server.routing.rollout_bounds import evidence_of_change, same_distribution

# Look k of a kind is taken at alpha * 6 / (pi^2 k^2): however many looks there are, all false alarms together stay below alpha.
_SUM = 0.6079
# Fewer answers are no reference, and fewer thumbs tell nothing of what is usual.
_LEAST_REFERENCE, _LEAST_THUMBS = 100, 20
_THUMBS_BLOCK, _MOST_THUMBS_BLOCKS = 5, 40
_USUAL_DOWN = 0.25  # share of thumbs down that is usual where nothing is known: some people press the wrong one
LABELS, QUALITY, THUMBS, AGREEMENT = "labels", "quality", "thumbs", "agreement"
TEACHER_CHANGED, INPUTS_CHANGED = "the teacher changed", "inputs changed"
WORDS = {
    AGREEMENT: "the student agrees with its teacher less than was promised, or its answers fail",
    LABELS: "what the student answers is distributed otherwise than before",
    QUALITY: "how sure the student is is distributed otherwise than before",
    THUMBS: "more thumbs are down than before",
}


@dataclass(slots=True)
class Reference:
    """What is usual: counts of what was said before. `sure`: by tenths of quality."""

    labels: Mapping[str, int] = field(default_factory=dict)
    sure: Mapping[str, int] = field(default_factory=dict)
    thumbs: tuple[int, int] = (0, 0)  # up, down

    @property
    def answers(self) -> int:
        """How many answers it knows of."""
        return max(sum(self.sure.values()), sum(self.labels.values()))


class Watch:
    """One of a student on one server. The newest `window` answers are compared with the reference; without one, the first are."""

    def __init__(self, reference: Reference, window: int, alpha: float) -> None:
        self.reference = reference
        self.alarms: dict[str, int] = {}  # kind: after how many answers
        self.answers = 0
        self._window = window
        self._alpha = alpha / 3  # three kinds of signs
        self._recent: deque[tuple[str, str]] = deque(maxlen=window)
        self._learnt: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self._looks: dict[str, int] = {}
        self._every = max(window // 10, 10)
        self._thumbs: list[tuple[int, int]] = []  # thumbs of consecutive stretches, and how many were up
        self._thumbs_forgotten = 0

    def saw(self, label: str | None, quality: float | None) -> list[str]:
        """An answer of the student; returns the kinds of signs that are new with it."""
        self.answers += 1
        sure = "" if quality is None else str(min(int(quality * 10), 9))
        said = "" if label is None else label
        if self.reference.answers < _LEAST_REFERENCE:
            self._learn(said, sure)
            return []
        self._recent.append((said, sure))
        if self.answers % self._every:
            return []
        return [kind for kind in self._look() if self._tell(kind)]

    def thumb(self, up: bool) -> list[str]:
        """A thumb for an answer of the student."""
        if not self._thumbs or self._thumbs[-1][0] >= _THUMBS_BLOCK:
            self._thumbs.append((0, 0))
            if len(self._thumbs) > _MOST_THUMBS_BLOCKS:
                del self._thumbs[0]
                self._thumbs_forgotten += 1
        self._thumbs[-1] = (self._thumbs[-1][0] + 1, self._thumbs[-1][1] + up)
        before_up, before_down = self.reference.thumbs
        known = before_up + before_down
        # One standard deviation above what was seen before: that is an estimate too.
        usual = _USUAL_DOWN
        if known >= _LEAST_THUMBS:
            share = (before_down + 1) / (known + 2)
            usual = min(share + (share * (1 - share) / known) ** 0.5, 0.9)
        sign = evidence_of_change(self._thumbs, 1.0 - usual, self._thumbs_forgotten) >= 1.0 / self._alpha
        return [THUMBS] if sign and self._tell(THUMBS) else []

    def _learn(self, label: str, sure: str) -> None:
        for counts, key in zip(self._learnt, (label, sure), strict=True):
            if key:
                counts[key] = counts.get(key, 0) + 1
        if max(sum(counts.values()) for counts in self._learnt) >= max(self._window, _LEAST_REFERENCE):
            self.reference = Reference(*self._learnt, self.reference.thumbs)

    def _look(self) -> list[str]:
        found = []
        for size in (self._every * 2, self._every * 5, self._window):
            if len(self._recent) < size:
                break
            newest = list(self._recent)[-size:]
            for kind, place, usual in ((LABELS, 0, self.reference.labels), (QUALITY, 1, self.reference.sure)):
                counts: dict[str, int] = {}
                for one in newest:
                    if one[place]:
                        counts[one[place]] = counts.get(one[place], 0) + 1
                name = f"{kind} {size}"
                self._looks[name] = self._looks.get(name, 0) + 1
                bar = self._alpha / 3 * _SUM / self._looks[name] ** 2
                if counts and usual and same_distribution(dict(usual), counts) < bar:
                    found.append(kind)
        return list(dict.fromkeys(found))

    def _tell(self, kind: str) -> bool:
        """Whether a sign is new: the same one is told once until twice the window of answers has gone by."""
        last = self.alarms.get(kind)
        if last is not None and self.answers - last < 2 * self._window:
            return False
        self.alarms[kind] = self.answers
        return True


def forgiven(asked: int) -> int:
    """How many of so many old inputs may be answered otherwise than before: an API model does not repeat itself to the letter."""
    return max(1, asked // 8)


def cause(student_same: int, teacher_same: int, asked: int, signs: Mapping[str, int]) -> str:
    """What changed, from old inputs that were asked again: how many of `asked` the student and the teacher answered as they did before."""
    if asked < 4:
        return (
            "inputs, student or teacher changed: there are no old inputs to ask again" if signs else "unknown: no old inputs to ask again"
        )
    allowed = forgiven(asked)
    if asked - student_same > allowed:
        return f"the student changed: it answers {asked - student_same} of {asked} old inputs otherwise than before"
    if asked - teacher_same > allowed:
        return f"{TEACHER_CHANGED}: it answers {asked - teacher_same} of {asked} old inputs otherwise than before"
    return f"{INPUTS_CHANGED}: student and teacher answer {student_same} and {teacher_same} of {asked} old inputs as before"
