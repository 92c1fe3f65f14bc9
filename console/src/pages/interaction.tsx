import { integer, millis, moment, money, percent, count } from "../format";
import { Link } from "../router";
import type { Feedback, Interaction, RecordedInteraction } from "../types";
import { Badge, Card, Empty, Facts, type Tone } from "../ui/basics";
import { FeedbackForm } from "../ui/feedback";
import { Table } from "../ui/table";

export function outputOf(row: Interaction | undefined): string {
  if (!row) return "";
  if (row.error) return "–";
  return row.outputText || row.labels?.[0] || (row.sealed ? "sealed or erased" : "–");
}

interface StoredHop {
  candidate: string;
  outcome: string;
  reason: string;
  quality: number | null;
  cost_micro_usd: number;
  elapsed_s: number;
  tries: number;
}

function hopsOf(row: Interaction): StoredHop[] {
  try {
    return row.hops ? (JSON.parse(row.hops) as StoredHop[]) : [];
  } catch {
    return [];
  }
}

const TONES: Record<string, Tone> = { delivered: "good", failed: "bad", below_bar: "warn", shadow: "accent" };

export function OutcomeBadge({ outcome }: { outcome: string }) {
  return <Badge tone={TONES[outcome] ?? "plain"}>{outcome.replaceAll("_", " ")}</Badge>;
}

export function Detail({ of, onFeedback }: { of: RecordedInteraction; onFeedback: () => void }) {
  const row = of.interaction;
  if (!row) return <Empty>This interaction is empty.</Empty>;
  return (
    <>
      <div class="grid">
        <Card title="Input" note={moment(row.time)}>
          {row.instruction && <p class="note">{row.instruction}</p>}
          <pre class="text" tabIndex={0}>
            {row.input ?? "Sealed, or erased with its user."}
          </pre>
        </Card>
        <Card title="Answer" note={<Badge tone={row.error ? "bad" : row.local ? "good" : "accent"}>{row.error ?? (row.local ? "local" : "provider")}</Badge>}>
          <pre class="text" tabIndex={0}>
            {outputOf(row)}
          </pre>
          {(row.labels?.length ?? 0) > 1 && (
            <p class="note">{row.labels?.map((label, i) => `${label} ${percent(row.scores?.[i])}`).join(", ")}</p>
          )}
          {row.findings?.map((one) => (
            <p key={one} class="note">
              Found wanting: {one}
            </p>
          ))}
        </Card>
      </div>
      <Route row={row} />
      <div class="grid">
        <Card title="Figures">
          <Facts of={factsOf(row)} />
        </Card>
        <Card title="Feedback">
          <Said of={of.feedback ?? []} />
          <FeedbackForm interaction={row.interactionId ?? ""} onDone={onFeedback} />
        </Card>
      </div>
    </>
  );
}

function Route({ row }: { row: Interaction }) {
  const hops = hopsOf(row);
  return (
    <Card title="Route" note={row.preference ?? undefined}>
      {hops.length ? (
        <Table<StoredHop>
          caption="Candidates in the order of the route"
          rows={hops}
          id={(hop) => `${hop.candidate}${hop.outcome}`}
          columns={[
            { name: "Candidate", head: true, cell: (hop) => hop.candidate },
            { name: "Outcome", cell: (hop) => <OutcomeBadge outcome={hop.outcome} /> },
            { name: "Why", cell: (hop) => hop.reason },
            { name: "Quality", figure: true, cell: (hop) => percent(hop.quality) },
            { name: "Cost", figure: true, cell: (hop) => money(hop.cost_micro_usd) },
            { name: "Time", figure: true, cell: (hop) => millis(hop.elapsed_s * 1000) },
            { name: "Tries", figure: true, cell: (hop) => hop.tries },
          ]}
        />
      ) : (
        <Empty>Nobody was asked.</Empty>
      )}
    </Card>
  );
}

function factsOf(row: Interaction): (readonly [string, preact.ComponentChildren] | false)[] {
  const stages = [
    ["queue", row.queueMs],
    ["tokens", row.tokenizeMs],
    ["model", row.runMs],
    ["after", row.postMs],
    ["provider", row.providerMs],
  ] as const;
  const spent = stages.filter(([, value]) => Number(value) > 0).map(([name, value]) => `${name} ${millis(value)}`);
  return [
    ["Skill", <Link page="skills" item={row.skill}>{row.skill}</Link>],
    ["Task", row.task],
    ["Quality", percent(row.quality)],
    row.difficulty !== undefined && row.difficulty !== null && ["Difficulty", percent(row.difficulty)],
    ["Cost", money(integer(row.costMicroUsd))],
    ["Time", `${millis(row.totalMs)}${spent.length ? ` (${spent.join(", ")})` : ""}`],
    row.firstTokenMs !== undefined && row.firstTokenMs !== null && ["First token", millis(row.firstTokenMs)],
    ["Tokens", `${count(row.inputTokens)} read, ${count(row.outputTokens)} written`],
    !!row.studentLabel && ["Student said", row.studentLabel],
    !!row.teacherLabel && ["Teacher said", row.teacherLabel],
    !!row.tenant && ["Key", row.tenant],
    ["Interaction", <code>{row.interactionId}</code>],
    ["Request", <code>{row.requestId}</code>],
  ];
}

function Said({ of }: { of: readonly Feedback[] }) {
  if (of.length === 0) return <p class="note">Nobody has said anything of it yet.</p>;
  return (
    <ul class="said">
      {of.map((one) => (
        <li key={one.feedbackId}>
          <span class="note">{moment(one.createTime)}</span> {feedbackWords(one)}
        </li>
      ))}
    </ul>
  );
}

function feedbackWords(one: Feedback): string {
  const metrics = Object.entries(one.metrics ?? {}).map(([name, value]) => `${name} ${value}`);
  const words = [
    one.thumb === "THUMB_UP" ? "liked" : one.thumb === "THUMB_DOWN" ? "disliked" : "",
    one.rating ? `${one.rating} of 5` : "",
    one.correction === undefined || one.correction === null ? "" : `right would have been “${one.correction}”`,
    one.comment ? `“${one.comment}”` : "",
    ...metrics,
  ];
  return words.filter(Boolean).join(", ");
}
