import { count, duration, money, percent, seconds, span, word } from "../format";
import { Link } from "../router";
import type { Asked } from "../targets";
import type { Hop } from "../types";
import { Badge, Card, Facts, Meter } from "../ui/basics";
import { FeedbackForm } from "../ui/feedback";
import { Table } from "../ui/table";
import { OutcomeBadge } from "./interaction";

/** The answer as it comes, and then its story. */
export function Outcome({ of }: { of: Asked }) {
  const done = !of.running;
  return (
    <>
      <Card title="Answer" note={<State of={of} />}>
        <div class="text answer" aria-live="polite" aria-busy={of.running}>
          {of.text}
          {of.running && <span class="caret" aria-hidden="true" />}
          {done && !of.text && <span class="note">Nothing was said.</span>}
        </div>
        {(of.labels?.length ?? 0) > 1 && (
          <ul class="bars" aria-label="Labels">
            {of.labels?.slice(0, 6).map((one) => (
              <li key={one.name}>
                <span>{one.name}</span>
                <Meter share={one.score} label={percent(one.score)} />
                <span class="figure">{percent(one.score)}</span>
              </li>
            ))}
          </ul>
        )}
        {done && of.interactionId && (
          <div class="after">
            <FeedbackForm interaction={of.interactionId} key={of.interactionId} brief />
          </div>
        )}
      </Card>
      {done && (
        <Card title="How it came about">
          <Story of={of} />
        </Card>
      )}
    </>
  );
}

function State({ of }: { of: Asked }) {
  if (of.running) return <Badge tone="accent">{of.text ? "streaming" : "asking"}</Badge>;
  if (of.stopped) return <Badge tone="warn">stopped</Badge>;
  if (of.decision) return <Badge tone={of.decision.local ? "good" : "accent"}>{of.decision.local ? "local" : "provider"}</Badge>;
  return of.model ? <Badge tone="good">local</Badge> : null;
}

function Story({ of }: { of: Asked }) {
  const took = of.doneMs === undefined ? undefined : (of.doneMs - of.sentMs) / 1000;
  const first = of.firstMs === undefined ? undefined : (of.firstMs - of.sentMs) / 1000;
  const pace = seconds(of.timings?.interToken);
  return (
    <>
      <Facts
        of={[
          of.decision ? ["Answered by", of.decision.candidate] : ["Model", of.model ?? "–"],
          !!of.decision && ["Quality", percent(of.quality)],
          !!of.decision && ["Cost", money(of.cost?.microUsd ?? 0)],
          ["Time", `${span(took)}${first === undefined ? "" : `, first words after ${span(first)}`}`],
          !!of.tokens && ["Tokens", `${count(of.tokens.read)} read, ${count(of.tokens.written)} written${pace ? `, ${(1 / pace).toFixed(0)} a second` : ""}`],
          !!of.finish && ["Ended", word(of.finish, "FINISH_REASON_")],
          !!of.decision?.rolloutStage && ["Rollout", `${of.decision.rolloutStage.replace("_", " ")}, by ${word(of.decision.preference, "")}`],
          of.decision?.difficulty !== undefined && of.decision.difficulty !== null && ["Difficulty", percent(of.decision.difficulty)],
          !!of.interactionId && ["Interaction", <Link page="interactions" item={of.interactionId}><code>{of.interactionId}</code></Link>],
        ]}
      />
      {of.decision?.hops?.length ? (
        <Table<Hop>
          caption="Candidates in the order of the route"
          rows={of.decision.hops}
          id={(hop) => `${hop.candidate}${hop.outcome}`}
          columns={[
            { name: "Candidate", head: true, cell: (hop) => hop.candidate },
            { name: "Outcome", cell: (hop) => <OutcomeBadge outcome={hop.outcome ?? ""} /> },
            { name: "Why", cell: (hop) => hop.reason },
            { name: "Quality", figure: true, cell: (hop) => percent(hop.quality) },
            { name: "Cost", figure: true, cell: (hop) => money(hop.cost?.microUsd ?? 0) },
            { name: "Time", figure: true, cell: (hop) => duration(hop.elapsed) },
          ]}
        />
      ) : null}
    </>
  );
}
