// The confidence sequence of a rollout, as far as it was seen: at its steps, and since the page was opened. Pure.
import { integer } from "./format";
import type { Rollout, RolloutEvent } from "./types";

/** What the evidence said after so many comparisons. */
export interface Looked {
  student: string;
  compared: number;
  /** Unknown where an event counted its stage alone. */
  share: number | null;
  lower: number;
  upper: number;
}

/** `before` with what the events and the present state add, of the present student alone, in the order of comparisons. */
export function sequenceOf(before: readonly Looked[], rollout: Rollout, events: readonly RolloutEvent[]): Looked[] {
  const student = rollout.student ?? "";
  const found = new Map<number, Looked>();
  const add = (one: Looked): void => {
    if (one.student === student && one.compared > 0 && one.compared <= integer(rollout.compared)) found.set(one.compared, one);
  };
  for (const event of events) {
    const evidence = (event.evidence ?? {}) as Record<string, unknown>;
    const [compared, lower, upper] = [Number(evidence.all_compared), Number(evidence.lower), Number(evidence.upper)];
    const share = Number(evidence.compared) === compared ? Number(evidence.agreed) / compared : null;
    if ([compared, lower, upper].every(Number.isFinite)) add({ student: event.student ?? "", compared, lower, upper, share });
  }
  for (const one of before) add(one);
  const compared = integer(rollout.compared);
  add({ student, compared, share: integer(rollout.agreed) / compared, lower: Number(rollout.lower), upper: Number(rollout.upper) });
  return [...found.values()].sort((a, b) => a.compared - b.compared);
}
