import { useEffect, useRef, useState } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import { moment } from "../format";
import { colour, onTheme } from "../theme";

export type Value = number | null;

export interface Line {
  name: string;
  /** A colour of the style sheet, for example "--local". */
  colour: string;
  values: readonly Value[];
  /** Bars are stacked: each line's bars stand on those of the lines before it. */
  bars?: boolean;
  /** A limit, drawn with dashes. */
  limit?: boolean;
}

interface ChartProps {
  /** What it shows, for screen readers and above the table. */
  title: string;
  /** Seconds since 1970, or steps. */
  x: readonly number[];
  lines: readonly Line[];
  /** A value in words. */
  say: (value: number) => string;
  time?: boolean;
  xName?: string;
  height?: number;
  /** Lowest and highest value of the axis; what is left out follows the values. */
  range?: readonly [number | null, number | null];
  /** Names of two lines between which the plot is tinted: the upper, the lower. */
  band?: readonly [string, string];
}

/** A chart with its legend, and the same as a table. */
export function Chart(props: ChartProps) {
  const { title, x, lines, say, time = true, xName = "Step" } = props;
  const box = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | undefined>(undefined);
  const [at, setAt] = useState<number | null>(null);
  const [paint, setPaint] = useState(0);
  const shape = JSON.stringify([lines.map((line) => [line.name, line.colour, line.bars, line.limit]), time, props.range, props.height, props.band]);

  useEffect(() => onTheme(() => setPaint((old) => old + 1)), []);

  useEffect(() => {
    const place = box.current;
    if (!place) return;
    const made = new uPlot(options(props, place.clientWidth, setAt), stacked(x, lines), place);
    plot.current = made;
    const watch = new ResizeObserver(() => made.setSize({ width: place.clientWidth, height: made.height }));
    watch.observe(place);
    return () => {
      watch.disconnect();
      made.destroy();
      plot.current = undefined;
    };
  }, [shape, paint]);

  useEffect(() => plot.current?.setData(stacked(x, lines)), [x, lines]);

  // Without a pointer the legend tells the last place at which there is anything.
  const last = x.findLastIndex((_value, i) => lines.some((line) => line.values[i]));
  const index = at !== null && at < x.length ? at : last < 0 ? x.length - 1 : last;
  const when = (value: number | undefined): string =>
    value === undefined ? "" : time ? moment(new Date(value * 1000).toISOString()) : `${xName} ${value.toLocaleString("en-US")}`;
  const told = (value: Value | undefined): string => (value === null || value === undefined ? "–" : say(value));
  return (
    <figure class="chart">
      <figcaption class="legend">
        {lines.map((line) => (
          <span key={line.name}>
            <i style={{ background: `var(${line.colour})` }} />
            {line.name} <b>{told(line.values[index])}</b>
          </span>
        ))}
        <span class="when">{when(x[index])}</span>
      </figcaption>
      <div ref={box} class="plot" role="img" aria-label={`${title}. The table below has the same figures.`} />
      <details class="alternative">
        <summary>
          Table<span class="sr"> of {title}</span>
        </summary>
        <div class="scroll" tabIndex={0} role="region" aria-label={`Table of ${title}`}>
          <table>
            <thead>
              <tr>
                <th scope="col">{time ? "Time" : xName}</th>
                {lines.map((line) => (
                  <th key={line.name} scope="col" class="figure">
                    {line.name}
                  </th>
                ))}
              </tr>
            </thead>
            <tbody>
              {x.map((value, row) => (
                <tr key={value}>
                  <th scope="row">{time ? when(value) : value}</th>
                  {lines.map((line) => (
                    <td key={line.name} class="figure">
                      {told(line.values[row])}
                    </td>
                  ))}
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      </details>
    </figure>
  );
}

// Bars are drawn the highest first, each as high as itself and all before it, so that what is seen of it is its own part.
function stacked(x: readonly number[], lines: readonly Line[]): uPlot.AlignedData {
  const sums = x.map(() => 0);
  const rows = lines.map((line) =>
    line.bars ? line.values.map((value, i) => (sums[i] = (sums[i] ?? 0) + (value ?? 0))) : [...line.values],
  );
  return [[...x], ...rows.reverse()] as uPlot.AlignedData;
}

function options({ x, lines, say, time = true, height = 168, range, band }: ChartProps, width: number, setAt: (index: number | null) => void): uPlot.Options {
  const muted = colour("--muted");
  const rule = colour("--rule");
  const axis = { stroke: muted, font: "11px system-ui, sans-serif", grid: { stroke: rule, width: 1 }, ticks: { show: false } };
  const place = (name: string | undefined): number => lines.length - lines.findIndex((line) => line.name === name);
  const bars = uPlot.paths.bars?.({ size: [0.7, 28], align: 1 });
  return {
    width,
    height,
    legend: { show: false },
    cursor: { y: false, drag: { x: false, y: false }, points: { size: 6 } },
    scales: { x: { time, range: (_plot, from, until) => (time ? [from, until + (x[1] ?? 0) - (x[0] ?? 0)] : [Math.min(from, x.length > 1 ? from : 0), until]) }, y: { range: (_plot, low, high) => limits(low, high, range) } },
    axes: [
      { ...axis, grid: { show: false }, space: 70, size: 30, ...(time ? { values: (_plot, ticks, _axis, _space, step) => ticks.map((tick) => clock(tick, step)) } : {}) },
      { ...axis, size: 62, values: (_plot, ticks) => ticks.map(say) },
    ],
    series: [
      {},
      ...[...lines].reverse().map((line): uPlot.Series => {
        const paint = colour(line.colour);
        if (line.bars) return { label: line.name, stroke: paint, fill: paint, width: 0, paths: bars, points: { show: false } };
        if (line.limit) return { label: line.name, stroke: paint, width: 1.25, dash: [5, 4], points: { show: false } };
        return { label: line.name, stroke: paint, width: 1.75, spanGaps: true, points: { show: sparse, size: 5, fill: paint } };
      }),
    ],
    bands: band ? [{ series: [place(band[0]), place(band[1])], fill: colour("--tint") }] : [],
    hooks: { setCursor: [(plot) => setAt(plot.cursor.idx ?? null)] },
  };
}

// Few values are drawn as points too: one alone would draw no line.
const SPARSE = 40;
const sparse = (plot: uPlot, series: number): boolean => (plot.data[series] ?? []).filter((value) => value !== null).length <= SPARSE;

function clock(tick: number, step: number): string {
  const when = new Date(tick * 1000);
  const day = when.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
  const midnight = when.getHours() === 0 && when.getMinutes() === 0;
  return step >= 86_400 || midnight ? day : when.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
}

function limits(low: number | null, high: number | null, range: ChartProps["range"]): [number, number] {
  const from = range?.[0] ?? Math.min(0, low ?? 0);
  const until = range?.[1] ?? (high ?? 0) * 1.08;
  return until > from ? [from, until] : [from, from + 1];
}
