// Numbers, amounts and times as people read them. Pure: the same input gives the same words.

// protojson writes 64-bit integers and durations as strings, and unset messages as null.
type Wire<T> = T | null | undefined;

export const UNKNOWN = "–";

/** A 64-bit integer of the wire, 0 where it is unset. */
export function integer(value: Wire<string | number>): number {
  return value === null || value === undefined || value === "" ? 0 : Number(value);
}

/** Seconds of a protobuf Duration ("0.012s"), or undefined where it is unset. */
export function seconds(value: Wire<string>): number | undefined {
  return value ? Number.parseFloat(value) : undefined;
}

/** 1234567 -> "1,234,567". */
export function count(value: Wire<string | number>): string {
  return integer(value).toLocaleString("en-US");
}

/** 0.8731 -> "87.3 %"; whole numbers stay whole. */
export function percent(value: Wire<number | string>, digits = 1): string {
  if (value === null || value === undefined || Number.isNaN(Number(value))) return UNKNOWN;
  return `${trimmed((Number(value) * 100).toFixed(digits))} %`;
}

/** Millionths of a US dollar -> "$1.50"; small amounts keep two significant digits. */
export function money(microUsd: Wire<string | number>): string {
  if (microUsd === null || microUsd === undefined) return UNKNOWN;
  const usd = integer(microUsd) / 1e6;
  const size = Math.abs(usd);
  const sign = usd < 0 ? "−" : "";
  if (size === 0) return "$0";
  if (size >= 0.995) return `${sign}$${size.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 })}`;
  return `${sign}$${trimmed(size.toFixed(Math.min(6, 1 - Math.floor(Math.log10(size)))))}`;
}

/** Seconds -> "850 ms", "1.24 s", "3 min 5 s", "2 h 10 min", "3 d 4 h". */
export function span(value: Wire<number>): string {
  if (value === null || value === undefined || Number.isNaN(value)) return UNKNOWN;
  if (value < 0.001) return value === 0 ? "0 ms" : `${trimmed((value * 1000).toFixed(2))} ms`;
  if (value < 1) return `${trimmed((value * 1000).toFixed(value < 0.0995 ? 1 : 0))} ms`;
  if (value < 60) return `${trimmed(value.toFixed(value < 9.995 ? 2 : 1))} s`;
  const whole = Math.round(value);
  const parts: [number, string][] = [
    [Math.floor(whole / 86400), "d"],
    [Math.floor(whole / 3600) % 24, "h"],
    [Math.floor(whole / 60) % 60, "min"],
    [whole % 60, "s"],
  ];
  const first = parts.findIndex(([number]) => number > 0);
  return parts
    .slice(first, first + 2)
    .filter(([number]) => number > 0)
    .map(([number, unit]) => `${number} ${unit}`)
    .join(" ");
}

/** A Duration of the wire as `span` says it. */
export function duration(value: Wire<string>): string {
  return span(seconds(value));
}

/** Milliseconds of the wire as `span` says them. */
export function millis(value: Wire<number | string>): string {
  return value === null || value === undefined ? UNKNOWN : span(Number(value) / 1000);
}

/** 1536 -> "1.5 KiB". */
export function bytes(value: Wire<string | number>): string {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let size = integer(value);
  let unit = 0;
  while (size >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${trimmed(size.toFixed(size < 10 && unit > 0 ? 1 : 0))} ${units[unit]}`;
}

/** "2026-11-28T09:05:00Z" -> "28 Nov 09:05:00" in the reader's zone, with the year where it is not this one. */
export function moment(value: Wire<string>, now = new Date()): string {
  if (!value) return UNKNOWN;
  const time = new Date(value);
  const day = time.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
  const year = time.getFullYear() === now.getFullYear() ? "" : ` ${time.getFullYear()}`;
  return `${day}${year} ${time.toLocaleTimeString("en-GB")}`;
}

/** How long ago: "12 s ago", "3 h 4 min ago". */
export function ago(value: Wire<string>, now = Date.now()): string {
  if (!value) return "never";
  const passed = (now - new Date(value).getTime()) / 1000;
  return passed < 1 ? "just now" : `${span(passed < 60 ? Math.round(passed) : passed)} ago`;
}

/** "TRAINING_JOB_STATE_RUNNING", "TRAINING_JOB_STATE_" -> "running". */
export function word(value: Wire<string | number>, prefix: string): string {
  if (value === null || value === undefined) return "";
  return String(value).replace(prefix, "").toLowerCase().replaceAll("_", " ");
}

/** "skills/support-intent" -> "support-intent". */
export function bare(resource: Wire<string>): string {
  return resource ? resource.slice(resource.indexOf("/") + 1) : "";
}

/** A figure of a metric: at most four significant digits. */
export function figure(value: Wire<number | string>): string {
  if (value === null || value === undefined) return UNKNOWN;
  const number = Number(value);
  if (Number.isInteger(number)) return number.toLocaleString("en-US");
  return Math.abs(number) >= 0.001 && Math.abs(number) < 1e6 ? trimmed(number.toPrecision(4)) : number.toExponential(2);
}

function trimmed(text: string): string {
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}
