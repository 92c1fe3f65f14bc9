import { useMemo, useState } from "preact/hooks";
import { ask } from "../api";
import { bare, bytes, count, duration, integer, money, percent, seconds, span } from "../format";
import { usePolled } from "../hooks";
import { Link } from "../router";
import { SPANS, beginOf, columnsOf, sum, type Columns, type Span } from "../timeline";
import type { SkillList, SkillStats, Stats, Status, Timeline } from "../types";
import { Badge, Card, Empty, Facts, Loaded, Loading, Meter, Page, Problem, Select, Stat } from "../ui/basics";
import { Chart } from "../ui/chart";
import { Table } from "../ui/table";

const DAY = SPANS[1] as Span;

export function Overview() {
  const [name, setName] = useState("24h");
  const [skill, setSkill] = useState("");
  const chosen = SPANS.find((one) => one.value === name) ?? DAY;
  const stats = usePolled((signal) => ask<Stats>("/v1/stats", { signal }), 5000, []);
  const status = usePolled((signal) => ask<Status>("/v1/status", { signal }), 5000, []);
  const skills = usePolled((signal) => ask<SkillList>("/v1/skills", { signal }), 60_000, []);
  const timeline = usePolled(
    async (signal) => {
      const begin = beginOf(chosen, Date.now() / 1000);
      const query = { skill, sinceTime: new Date(begin * 1000).toISOString(), step: `${chosen.step}s` };
      return { begin, points: (await ask<Timeline>("/v1/timeline", { query, signal })).points ?? [] };
    },
    10_000,
    [chosen.value, skill],
  );
  const columns = useMemo(() => timeline.data && columnsOf(timeline.data.points, chosen, timeline.data.begin), [timeline.data, chosen]);
  const options = [{ value: "", text: "All skills" }, ...(skills.data?.skills ?? []).map((one) => ({ value: one.name ?? "", text: bare(one.name) }))];
  const tools = (
    <>
      <Select label="Skill" value={skill} options={options} onChange={setSkill} />
      <Select label="Time" value={name} options={SPANS} onChange={setName} />
    </>
  );
  return (
    <Page title="Overview" tools={tools}>
      <Totals stats={stats} />
      <Problem error={timeline.error} what="the timeline" />
      {!timeline.data && !timeline.error && <Loading what="the timeline" />}
      {columns && timeline.data?.points.length === 0 && <Quiet span={chosen} />}
      {columns && timeline.data && timeline.data.points.length > 0 && <Charts of={columns} />}
      <div class="grid">
        <BySkill stats={stats} />
        <Server status={status} />
      </div>
    </Page>
  );
}

function Totals({ stats }: { stats: { data: Stats | undefined; error: Error | undefined } }) {
  const total = stats.data?.total;
  return (
    <section aria-label="Totals since the server started">
      <Problem error={stats.error} what="totals" />
      <dl class="stats">
        <Stat label="Requests" value={count(total?.requests)} note="since the server started" />
        <Stat
          label="Answered locally"
          value={percent(total?.localShare)}
          note={<Meter share={total?.localShare ? Number(total.localShare) : 0} label={`${percent(total?.localShare)} local`} />}
        />
        <Stat label="Saved" value={total?.saved ? money(total.saved.microUsd ?? 0) : "–"} note={`paid ${money(total?.cost?.microUsd ?? 0)}`} />
        <Stat label="Quality" value={percent(total?.qualityMean)} note={`mean of ${count(total?.qualityCount)} answers`} />
        <Stat label="Latency" value={duration(total?.latencyP50)} note={`95 % within ${duration(total?.latencyP95)}`} />
        <Stat label="Failed" value={count(total?.failed)} note={`${count(total?.escalations)} asked further`} />
      </dl>
    </section>
  );
}

function Quiet({ span: chosen }: { span: Span }) {
  return (
    <Empty>
      <p>Nothing was recorded in this time ({chosen.text.toLowerCase()}). What was answered within the last seconds comes a little later.</p>
      <p>
        Ask something in the <Link page="playground">playground</Link>, or send requests of a skill to this gateway.
      </p>
    </Empty>
  );
}

function Charts({ of }: { of: Columns }) {
  const local = sum(of.local);
  const provider = sum(of.provider);
  const answered = local + provider;
  return (
    <div class="grid charts">
      <Card title="Requests" note={`${count(answered + sum(of.failed))} in this time, ${percent(answered ? local / answered : undefined)} answered locally`}>
        <Chart
          title="requests by who answered"
          x={of.x}
          say={compact}
          lines={[
            { name: "Local", colour: "--local", values: of.local, bars: true },
            { name: "Provider", colour: "--provider", values: of.provider, bars: true },
            { name: "Failed", colour: "--bad", values: of.failed, bars: true },
          ]}
        />
      </Card>
      <Card title="Answered locally" note="share of the answers">
        <Chart
          title="local share of the answers"
          x={of.x}
          say={(value) => percent(value, 0)}
          range={[0, 1]}
          lines={[{ name: "Local share", colour: "--local", values: of.share }]}
        />
      </Card>
      <Card title="Cost and savings" note={`${money(sum(of.cost))} paid, ${money(sum(of.saved))} saved`}>
        <Chart
          title="cost and savings"
          x={of.x}
          say={money}
          lines={[
            { name: "Paid", colour: "--provider", values: of.cost, bars: true },
            { name: "Saved", colour: "--local", values: of.saved, bars: true },
          ]}
        />
      </Card>
      <Card title="Latency" note="to the whole answer">
        <Chart
          title="latency"
          x={of.x}
          say={span}
          lines={[
            { name: "Median", colour: "--local", values: of.p50 },
            { name: "95 %", colour: "--provider", values: of.p95 },
          ]}
        />
      </Card>
      <Card title="Quality" note="mean probability that an answer is acceptable">
        <Chart
          title="quality"
          x={of.x}
          say={(value) => percent(value, 0)}
          range={[0, 1]}
          lines={[{ name: "Quality", colour: "--local", values: of.quality }]}
        />
      </Card>
      <Card title="Feedback" note={`${count(sum(of.liked))} liked, ${count(sum(of.disliked))} disliked`}>
        <Chart
          title="feedback"
          x={of.x}
          say={compact}
          lines={[
            { name: "Liked", colour: "--local", values: of.liked, bars: true },
            { name: "Disliked", colour: "--bad", values: of.disliked, bars: true },
          ]}
        />
      </Card>
    </div>
  );
}

function compact(value: number): string {
  return Number.isInteger(value) ? value.toLocaleString("en-US", { notation: value >= 10_000 ? "compact" : "standard" }) : "";
}

function BySkill({ stats }: { stats: { data: Stats | undefined; error: Error | undefined } }) {
  return (
    <Card title="Skills" note="since the server started" wide>
      <Loaded of={{ data: stats.data, error: undefined }} what="skills">
        {(found) =>
          found.skills?.length ? (
            <Table<SkillStats>
              caption="What became of each skill's requests since the server started"
              rows={found.skills}
              id={(row) => row.skill ?? ""}
              columns={[
                { name: "Skill", head: true, cell: (row) => <Link page="skills" item={row.skill}>{row.skill}</Link> },
                { name: "Requests", figure: true, cell: (row) => count(row.requests) },
                { name: "Local", figure: true, cell: (row) => percent(row.localShare) },
                { name: "Paid", figure: true, cell: (row) => money(row.cost?.microUsd ?? 0) },
                { name: "Saved", figure: true, cell: (row) => (row.saved ? money(row.saved.microUsd ?? 0) : "–") },
                { name: "Quality", figure: true, cell: (row) => percent(row.qualityMean) },
                { name: "Median", figure: true, cell: (row) => duration(row.latencyP50) },
                { name: "95 %", figure: true, cell: (row) => duration(row.latencyP95) },
                { name: "Failed", figure: true, cell: (row) => count(row.failed) },
              ]}
            />
          ) : (
            <Empty>
              <p>
                No skill was asked for yet. Skills stand in <code>understudy.toml</code>; each task is one too, for example <code>translation</code>.
              </p>
            </Empty>
          )
        }
      </Loaded>
    </Card>
  );
}

function Server({ status }: { status: { data: Status | undefined; error: Error | undefined } }) {
  return (
    <Card title="Server" wide>
      <Loaded of={status} what="the server's state">
        {(found) => (
          <Facts
            of={[
              ["State", found.draining ? <Badge tone="warn">stopping</Badge> : <Badge tone="good">serving</Badge>],
              ["Release", found.serverVersion],
              ["Running for", span(seconds(found.uptime))],
              ["Memory", bytes(found.residentBytes)],
              ["Kernels", `${found.kernelIsa}, ONNX Runtime ${found.onnxruntimeVersion}`],
              ["Models in memory", <Link page="models">{count(found.models?.length)}</Link>],
              ["Waiting in queues", count(sum((found.models ?? []).map((one) => integer(one.queuedSequences))))],
              ["Providers", <ProviderWords status={found} />],
            ]}
          />
        )}
      </Loaded>
    </Card>
  );
}

function ProviderWords({ status }: { status: Status }) {
  const all = status.providers ?? [];
  const resting = all.filter((one) => one.circuit !== "CIRCUIT_STATE_CLOSED");
  if (all.length === 0) return <Link page="providers">none configured</Link>;
  return (
    <Link page="providers">
      {resting.length ? `${resting.length} of ${all.length} not asked: ${resting.map((one) => one.provider).join(", ")}` : `${all.length} answering`}
    </Link>
  );
}
