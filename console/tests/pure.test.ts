// What needs no browser: words for figures, the even grid of a timeline, the confidence sequence, addresses.
import { describe, expect, it } from "vitest";
import { ago, bytes, count, figure, millis, moment, money, percent, span, word } from "../src/format";
import { pathOf, placeOf } from "../src/router";
import { sequenceOf } from "../src/sequence";
import { SPANS, beginOf, columnsOf, type Span } from "../src/timeline";

describe("figures in words", () => {
  it.each([
    [money("0"), "$0"],
    [money(350), "$0.00035"],
    [money("1500000"), "$1.50"],
    [money(-1234567890), "−$1,234.57"],
    [money(null), "–"],
    [percent(0.8731), "87.3 %"],
    [percent(1), "100 %"],
    [percent(undefined), "–"],
    [span(0), "0 ms"],
    [span(0.0123), "12.3 ms"],
    [span(0.85), "850 ms"],
    [span(1.239), "1.24 s"],
    [span(185), "3 min 5 s"],
    [span(7200), "2 h"],
    [span(273_600), "3 d 4 h"],
    [millis(2.5), "2.5 ms"],
    [bytes("1536"), "1.5 KiB"],
    [bytes(98_304), "96 KiB"],
    [count("1234567"), "1,234,567"],
    [figure(0.000012), "1.20e-5"],
    [figure(0.123456), "0.1235"],
    [word("TRAINING_JOB_STATE_RUNNING", "TRAINING_JOB_STATE_"), "running"],
    [ago(undefined), "never"],
    [ago("2026-11-28T09:00:00Z", Date.parse("2026-11-28T09:03:05Z")), "3 min 5 s ago"],
  ])("%s is %s", (said, expected) => expect(said).toBe(expected));

  it("names the year where it is another one", () => {
    expect(moment("2025-03-01T12:00:00Z", new Date("2026-11-28"))).toContain("2025");
    expect(moment("2026-03-01T12:00:00Z", new Date("2026-11-28"))).not.toContain("2026");
  });
});

describe("timeline", () => {
  const hour = SPANS[0] as Span;
  it("lays points on an even grid that does not wander, and fills what is missing", () => {
    const begin = beginOf(hour, 7_225);
    expect(begin).toBe(beginOf(hour, 7_259));
    const point = (at: number) => ({ time: new Date(at * 1000).toISOString(), requests: "10", local: "6", failed: "1", latencyP50: "0.010s" });
    const columns = columnsOf([point(begin + 60), point(begin + 3_540)], hour, begin);
    expect(columns.x).toHaveLength(60);
    expect(columns.x[59]).toBe(begin + 3_540);
    expect([columns.local[0], columns.local[1], columns.provider[1], columns.failed[59]]).toEqual([0, 6, 3, 1]);
    expect([columns.share[0], columns.share[1], columns.p50[1], columns.quality[1]]).toEqual([null, 6 / 9, 0.01, null]);
  });
});

describe("confidence sequence", () => {
  const rollout = { student: "2", compared: "40", agreed: "38", lower: 0.8, upper: 0.99 };
  const event = (student: string, all: number) => ({ student, evidence: { compared: 20, agreed: 19, all_compared: all, lower: 0.7, upper: 1 } });
  it("joins events and what was seen, of the present student alone, in the order of comparisons", () => {
    const seen = [{ student: "2", compared: 30, share: 0.9, lower: 0.75, upper: 0.99 }, { student: "1", compared: 35, share: 1, lower: 0.9, upper: 1 }];
    const found = sequenceOf(seen, rollout, [event("2", 20), event("1", 10), event("2", 25)]);
    expect(found.map((one) => one.compared)).toEqual([20, 25, 30, 40]);
    expect(found.map((one) => one.share)).toEqual([19 / 20, null, 0.9, 38 / 40]);
  });
});

describe("addresses", () => {
  it.each(["overview", "skills/support intent", "interactions/a%b", "playground/local:x"])("%s is found again", (text) => {
    const [page = "", item = ""] = text.split("/");
    expect(placeOf(pathOf(page, item))).toEqual({ page, item });
  });
});
