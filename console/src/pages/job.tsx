import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { ask, resource, stream } from "../api";
import { bare, figure, integer, moment } from "../format";
import { usePolled } from "../hooks";
import { Link } from "../router";
import type { Job, JobMetric, JobMetricList, LogLine, LogPart } from "../types";
import { Action, Card, Empty, Facts, Meter, Page, Problem } from "../ui/basics";
import { Chart } from "../ui/chart";
import { Confirm } from "../ui/dialog";
import { StateBadge, active, kindOf, ranFor } from "./jobs";

const AGAIN_MS = 2000;

export function JobDetail({ id }: { id: string }) {
  const path = `/v1/trainingJobs/${resource(id)}`;
  const [cancelling, setCancelling] = useState(false);
  const found = usePolled(async (signal) => (await ask<{ trainingJob: Job }>(path, { signal })).trainingJob, 2000, [id]);
  const job = found.data;
  const running = job === undefined || active(job);
  const metrics = usePolled(
    async (signal) => (await ask<JobMetricList>(`${path}/metrics`, { signal })).points ?? [],
    running ? 3000 : 0,
    [id, running],
  );
  const cancel = (
    <Action
      role="ROLE_OPERATOR"
      tone="danger"
      because={job && !active(job) ? "The job has ended." : job?.cancelRequested ? "Its end was asked for already." : ""}
      onPress={() => setCancelling(true)}
    >
      Cancel the job
    </Action>
  );
  return (
    <Page title={job ? `Job of ${bare(job.skill)}` : "Job"} lead={<Link page="jobs">All jobs</Link>} tools={cancel}>
      <Problem error={found.error} what="training jobs" />
      {job && (
        <>
          <div class="grid">
            <Card title="State" note={<StateBadge job={job} />}>
              <About job={job} />
            </Card>
            <Card title="Stages">
              <Stages job={job} />
            </Card>
          </div>
          <Curves points={metrics.data ?? []} error={metrics.error} running={running} />
          <Logs id={id} key={id} />
          {job.report && (
            <Card title="Report">
              <details>
                <summary>The whole report</summary>
                <pre class="text" tabIndex={0}>
                  {JSON.stringify(job.report, null, 2)}
                </pre>
              </details>
            </Card>
          )}
        </>
      )}
      {cancelling && (
        <Confirm
          title="Cancel the job?"
          verb="Cancel the job"
          danger
          onClose={() => setCancelling(false)}
          act={async () => {
            await ask(`${path}:cancel`, { body: {} });
            found.refresh();
          }}
        >
          <p>A job that waits ends at once, one that runs at its trainer's next step. What it has learned is lost; versions that were published stay.</p>
        </Confirm>
      )}
    </Page>
  );
}

function About({ job }: { job: Job }) {
  const metrics = Object.entries(job.metrics ?? {});
  return (
    <>
      {job.error?.reason && <Problem error={new Error(`${job.error.reason}: ${job.error.message}`)} />}
      {job.rejection && <p>{job.rejection}</p>}
      <Facts
        of={[
          ["Skill", <Link page="skills" item={bare(job.skill)}>{bare(job.skill)}</Link>],
          ["Kind", [kindOf(job), job.method || "as configured", `seed ${job.seed ?? 0}`].join(", ")],
          ["Created", moment(job.createTime)],
          ["Began", moment(job.startTime)],
          ["Ran for", ranFor(job)],
          ["Attempt", integer(job.attempt) || "not taken yet"],
          ["Published", job.version ? `version ${job.version}` : "nothing"],
          metrics.length > 0 && ["Measured", metrics.map(([name, value]) => `${name.replaceAll("_", " ")} ${figure(value)}`).join(", ")],
        ]}
      />
    </>
  );
}

function Stages({ job }: { job: Job }) {
  const stages = job.progress ?? [];
  if (stages.length === 0) {
    return (
      <Empty>
        <p>{active(job) ? "It waits for a trainer." : "No stage was begun."}</p>
        {active(job) && (
          <p class="note">
            Start one by <code>understudy jobs work</code>.
          </p>
        )}
      </Empty>
    );
  }
  return (
    <ol class="stages">
      {stages.map((one) => {
        const [done, total] = [integer(one.done), integer(one.total)];
        return (
          <li key={one.stage}>
            <span>{one.stage}</span>
            <Meter share={total ? done / total : 0} tone={done >= total ? "good" : "accent"} label={`${done} of ${total}`} />
            <span class="figure">
              {done.toLocaleString("en-US")} / {total.toLocaleString("en-US")}
            </span>
          </li>
        );
      })}
    </ol>
  );
}

/** Curves by name; those of one group ("lora/loss", "lora/lr") stand alone, for their units differ. */
function Curves({ points, error, running }: { points: readonly JobMetric[]; error: Error | undefined; running: boolean }) {
  const curves = useMemo(() => {
    const found = new Map<string, JobMetric[]>();
    for (const point of points) {
      const name = point.metric ?? "";
      found.set(name, [...(found.get(name) ?? []), point]);
    }
    return [...found].map(([name, all]) => ({ name, x: all.map((one) => integer(one.step)), values: all.map((one) => Number(one.value)) }));
  }, [points]);
  const once = curves.filter((curve) => curve.values.length === 1);
  return (
    <Card title="Curves">
      <Problem error={error} what="a job's curves" />
      {curves.length === 0 && !error && <Empty>{running ? "The trainer has measured nothing yet." : "This job drew no curves."}</Empty>}
      <div class="grid charts">
        {curves.filter((curve) => curve.values.length > 1).map((curve) => (
          <div key={curve.name}>
            <h3>{curve.name}</h3>
            <Chart
              title={curve.name}
              x={curve.x}
              time={false}
              say={figure}
              height={140}
              lines={[{ name: curve.name.split("/").at(-1) ?? curve.name, colour: "--local", values: curve.values }]}
            />
          </div>
        ))}
      </div>
      <Facts of={once.map((curve) => [curve.name, figure(curve.values[0])] as const)} />
    </Card>
  );
}

/** A job's lines as they are said; a stream that breaks is taken up after the last line. */
function Logs({ id }: { id: string }) {
  const [lines, setLines] = useState<LogLine[]>([]);
  const [live, setLive] = useState(true);
  const [error, setError] = useState<Error>();
  const box = useRef<HTMLPreElement>(null);
  const after = useRef(0);

  useEffect(() => {
    const abort = new AbortController();
    const follow = async (): Promise<void> => {
      try {
        for await (const part of stream<LogPart>(`/v1/trainingJobs/${resource(id)}:logs`, { query: { after: after.current }, signal: abort.signal })) {
          const news = (part.lines ?? []).filter((line) => (line.number ?? 0) > after.current);
          after.current = news.at(-1)?.number ?? after.current;
          setError(undefined);
          if (news.length) setLines((old) => [...old, ...news]);
        }
        if (!abort.signal.aborted) setLive(false);
      } catch (failed) {
        if (abort.signal.aborted) return;
        setError(failed as Error);
        window.setTimeout(() => !abort.signal.aborted && void follow(), AGAIN_MS);
      }
    };
    void follow();
    return () => abort.abort();
  }, [id]);

  useEffect(() => {
    // It follows the end unless the reader has scrolled up.
    const shown = box.current;
    if (shown && shown.scrollHeight - shown.scrollTop - shown.clientHeight < 120) shown.scrollTop = shown.scrollHeight;
  }, [lines]);

  return (
    <Card title="Log" note={live ? "live" : `${lines.length} lines`}>
      <Problem error={error} what="a job's log" />
      <pre ref={box} class="log" tabIndex={0} role="log" aria-label="Log of the job">
        {lines.map((line) => (
          <div key={line.number}>
            <span class="note">{moment(line.time).split(" ").at(-1)}</span> {line.text}
          </div>
        ))}
        {lines.length === 0 && !error && (live ? "Nothing was said yet." : "This job said nothing.")}
      </pre>
    </Card>
  );
}
