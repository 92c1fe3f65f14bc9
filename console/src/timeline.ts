// Points of a timeline on an even grid of times. Pure.
import { integer, seconds } from "./format";
import type { TimelinePoint } from "./types";

export interface Span {
  value: string;
  text: string;
  /** Length of the whole, in seconds. */
  length: number;
  /** Length of a point, in seconds. */
  step: number;
}

export const SPANS: readonly Span[] = [
  { value: "1h", text: "Last hour", length: 3600, step: 60 },
  { value: "24h", text: "Last 24 hours", length: 86_400, step: 1800 },
  { value: "7d", text: "Last 7 days", length: 7 * 86_400, step: 4 * 3600 },
  { value: "30d", text: "Last 30 days", length: 30 * 86_400, step: 86_400 },
];

/** When a span begins, a whole number of steps ago, so that points do not wander from one refresh to the next. */
export function beginOf(span: Span, now: number): number {
  return (Math.floor(now / span.step) + 1) * span.step - span.length;
}

/** Columns of the charts; where nothing was asked, counts are 0 and measures are null. */
export interface Columns {
  x: number[];
  local: number[];
  provider: number[];
  failed: number[];
  share: (number | null)[];
  cost: number[];
  saved: number[];
  quality: (number | null)[];
  p50: (number | null)[];
  p95: (number | null)[];
  liked: number[];
  disliked: number[];
}

export function columnsOf(points: readonly TimelinePoint[], span: Span, begin: number): Columns {
  const found: Columns = { x: [], local: [], provider: [], failed: [], share: [], cost: [], saved: [], quality: [], p50: [], p95: [], liked: [], disliked: [] };
  const places = new Map<number, TimelinePoint>();
  for (const point of points) places.set(Math.floor((Date.parse(point.time ?? "") / 1000 - begin) / span.step), point);
  for (let place = 0; place < span.length / span.step; place += 1) {
    const point = places.get(place);
    const requests = integer(point?.requests);
    const local = integer(point?.local);
    const failed = integer(point?.failed);
    found.x.push(begin + place * span.step);
    found.local.push(local);
    found.failed.push(failed);
    found.provider.push(Math.max(0, requests - local - failed));
    found.share.push(requests > failed ? local / (requests - failed) : null);
    found.cost.push(integer(point?.costMicroUsd));
    found.saved.push(integer(point?.savedMicroUsd));
    found.quality.push(point?.quality === undefined || point.quality === null ? null : Number(point.quality));
    found.p50.push((requests > failed && seconds(point?.latencyP50)) || null);
    found.p95.push((requests > failed && seconds(point?.latencyP95)) || null);
    found.liked.push(integer(point?.liked));
    found.disliked.push(integer(point?.disliked));
  }
  return found;
}

export const sum = (values: readonly number[]): number => values.reduce((total, value) => total + value, 0);
