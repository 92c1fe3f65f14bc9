import { useRef, useState } from "preact/hooks";
import { ApiError, ask, resource } from "../api";
import { ago, bare, count, figure, integer, moment, percent } from "../format";
import { usePolled } from "../hooks";
import { Link } from "../router";
import { sequenceOf, type Looked } from "../sequence";
import type { Rollout, RolloutAnswer, RolloutEvent, RolloutEventList, Skill } from "../types";
import { Action, Badge, Card, Empty, Facts, Field, Loaded, Page, Problem } from "../ui/basics";
import { Chart } from "../ui/chart";
import { Confirm } from "../ui/dialog";
import { Table } from "../ui/table";
import { StageBadge } from "./skills";

type Verb = "promote" | "hold" | "resume" | "rollback";

export function SkillDetail({ name }: { name: string }) {
  const path = `/v1/skills/${resource(name)}`;
  const skill = usePolled(async (signal) => (await ask<{ skill: Skill }>(path, { signal })).skill, 10_000, [name]);
  const rollout = usePolled(async (signal) => (await ask<RolloutAnswer>(`${path}/rollout`, { signal })).rollout ?? {}, 2000, [name]);
  const events = usePolled(async (signal) => (await ask<RolloutEventList>(`${path}/rolloutEvents`, { signal })).events ?? [], 5000, [name]);
  const [verb, setVerb] = useState<Verb>();
  const looked = useRef<Looked[]>([]);
  if (rollout.data) looked.current = sequenceOf(looked.current, rollout.data, events.data ?? []);
  const manual = rollout.error instanceof ApiError && rollout.error.status === "FAILED_PRECONDITION";
  const done = (): void => {
    rollout.refresh();
    events.refresh();
    skill.refresh();
  };
  return (
    <Page title={name} lead={<Link page="skills">All skills</Link>} tools={rollout.data && <Buttons rollout={rollout.data} onVerb={setVerb} />}>
      <Problem error={skill.error} what="skills" />
      {manual ? (
        <Card title="Rollout">
          <Empty>
            <p>This rollout does not move by itself. {rollout.error?.message}</p>
          </Empty>
        </Card>
      ) : (
        <Loaded of={rollout} what="rollouts">
          {(found) => <State rollout={found} looked={looked.current} />}
        </Loaded>
      )}
      <Events events={events} />
      {skill.data && <About skill={skill.data} />}
      {verb && rollout.data && <VerbDialog verb={verb} name={name} rollout={rollout.data} onDone={done} onClose={() => setVerb(undefined)} />}
    </Page>
  );
}

function Buttons({ rollout, onVerb }: { rollout: Rollout; onVerb: (verb: Verb) => void }) {
  const nobody = rollout.student ? "" : "No student is on its way. Train one first.";
  return (
    <>
      <Action role="ROLE_OPERATOR" tone="primary" because={rollout.student || rollout.refused?.length ? "" : nobody} onPress={() => onVerb("promote")}>
        Promote
      </Action>
      {rollout.paused ? (
        <Action role="ROLE_OPERATOR" onPress={() => onVerb("resume")}>
          Resume
        </Action>
      ) : (
        <Action role="ROLE_OPERATOR" onPress={() => onVerb("hold")}>
          Hold
        </Action>
      )}
      <Action role="ROLE_OPERATOR" tone="danger" because={nobody && (rollout.champion ? "" : nobody)} onPress={() => onVerb("rollback")}>
        Roll back
      </Action>
    </>
  );
}

const WORDS: Record<Verb, { title: string; verb: string; says: (rollout: Rollout) => string }> = {
  promote: {
    title: "Promote the student?",
    verb: "Promote",
    says: (rollout) =>
      `It goes on to the next stage whatever the evidence says. Now: ${rollout.stage} ${rollout.percent} %, ${count(rollout.agreed)} of ${count(rollout.compared)} comparisons agreed.`,
  },
  hold: { title: "Hold the rollout?", verb: "Hold", says: () => "It stays where it is, whatever the evidence says, until somebody resumes it." },
  resume: { title: "Resume the rollout?", verb: "Resume", says: () => "The evidence decides again." },
  rollback: {
    title: "Roll the student back?",
    verb: "Roll back",
    says: (rollout) =>
      `Version ${rollout.student || rollout.champion || "?"} stops answering at once; ${rollout.champion && rollout.champion !== rollout.student ? `version ${rollout.champion}` : "the version before it, or else the teacher,"} goes on. It is not taken again unless somebody promotes it by its version.`,
  },
};

interface VerbProps {
  verb: Verb;
  name: string;
  rollout: Rollout;
  onDone: () => void;
  onClose: () => void;
}

function VerbDialog({ verb, name, rollout, onDone, onClose }: VerbProps) {
  const [version, setVersion] = useState("");
  const words = WORDS[verb];
  const act = async (reason: string): Promise<void> => {
    const body = verb === "promote" ? { reason, version } : { reason };
    await ask(`/v1/skills/${resource(name)}:${verb}Rollout`, { body });
    onDone();
  };
  return (
    <Confirm title={words.title} verb={words.verb} danger={verb === "rollback"} reason act={act} onClose={onClose}>
      <p>{words.says(rollout)}</p>
      {verb === "promote" && (
        <Field label="Version" hint={rollout.refused?.length ? `Rolled back before: ${rollout.refused.join(", ")}.` : "Empty: the student that is on its way."}>
          {(id, hint) => <input id={id} aria-describedby={hint} inputMode="numeric" value={version} onInput={(event) => setVersion(event.currentTarget.value.trim())} />}
        </Field>
      )}
    </Confirm>
  );
}

const STEPS = ["shadow", "10 %", "50 %", "80 %", "full"];

function placeOf(rollout: Rollout): number {
  if (rollout.stage === "shadow") return 0;
  if (rollout.stage === "full") return 4;
  return rollout.stage === "canary" ? ((rollout.percent ?? 0) >= 80 ? 3 : (rollout.percent ?? 0) >= 50 ? 2 : 1) : -1;
}

function Rail({ rollout }: { rollout: Rollout }) {
  const place = placeOf(rollout);
  return (
    <ol class="rail" aria-label="Stages">
      {STEPS.map((step, i) => (
        <li key={step} class={i < place ? "past" : i === place ? "now" : ""} aria-current={i === place ? "step" : undefined}>
          {step}
        </li>
      ))}
    </ol>
  );
}

function State({ rollout, looked }: { rollout: Rollout; looked: readonly Looked[] }) {
  const agreed = integer(rollout.compared) ? integer(rollout.agreed) / integer(rollout.compared) : undefined;
  return (
    <div class="grid">
      <Card title="Rollout" note={<StageBadge stage={rollout.stage} percent={rollout.percent} />}>
        <Rail rollout={rollout} />
        <p class="reason">
          {rollout.paused && <Badge tone="warn">held by a person</Badge>} {rollout.reason || "Nothing is on its way."}
        </p>
        {rollout.frozen && <Problem error={new Error(`It cannot move: ${rollout.frozen}`)} />}
        {rollout.alarms?.map((alarm) => (
          <p key={alarm}>
            <Badge tone="warn">alarm</Badge> {alarm}
          </p>
        ))}
        <Facts
          of={[
            ["Student", rollout.student ? `version ${rollout.student}` : "none"],
            ["Answers the others", rollout.champion ? `version ${rollout.champion}` : "the teacher"],
            ["Student's share", `${rollout.percent ?? 0} % of the requests`],
            ["Teacher asked beside it", percent(rollout.teacherShare)],
            ["Rolled back", rollout.refused?.length ? rollout.refused.map((one) => `version ${one}`).join(", ") : "none"],
          ]}
        />
      </Card>
      <Card title="Evidence" note={`${count(rollout.compared)} comparisons, ${count(rollout.stageCompared)} in this stage`}>
        {integer(rollout.compared) === 0 ? (
          <Empty>
            <p>Nothing was compared yet. Comparisons come with requests: the student is asked beside whoever answers.</p>
          </Empty>
        ) : (
          <>
            <Interval rollout={rollout} agreed={agreed ?? 0} />
            {looked.length > 1 ? (
              <Sequence rollout={rollout} looked={looked} />
            ) : (
              <p class="note">The confidence sequence is drawn as comparisons come.</p>
            )}
          </>
        )}
      </Card>
    </div>
  );
}

/** The bounds after so many comparisons: they hold at every moment at once, so one may look whenever one likes. */
function Sequence({ rollout, looked }: { rollout: Rollout; looked: readonly Looked[] }) {
  const least = Number(rollout.target) - Number(rollout.tolerance);
  const from = Math.max(0, Math.min(0.9, least, ...looked.map((one) => one.lower)) - 0.02);
  return (
    <Chart
      title="confidence sequence of the share that agrees with the teacher"
      x={looked.map((one) => one.compared)}
      time={false}
      xName="Comparison"
      say={(value) => percent(value)}
      range={[from, 1.005]}
      band={["Upper bound", "Lower bound"]}
      lines={[
        { name: "Upper bound", colour: "--provider", values: looked.map((one) => one.upper) },
        { name: "Agreement", colour: "--local", values: looked.map((one) => one.share) },
        { name: "Lower bound", colour: "--provider", values: looked.map((one) => one.lower) },
        { name: "Least for full", colour: "--bad", limit: true, values: looked.map(() => least) },
      ]}
    />
  );
}

/** The confidence interval of now against what is wanted. */
function Interval({ rollout, agreed }: { rollout: Rollout; agreed: number }) {
  const [lower, upper, target] = [Number(rollout.lower), Number(rollout.upper), Number(rollout.target)];
  const least = target - Number(rollout.tolerance);
  const from = Math.max(0, Math.floor((Math.min(lower, least) - 0.04) * 20) / 20);
  const at = (share: number): string => `${((Math.min(1, Math.max(from, share)) - from) / (1 - from)) * 100}%`;
  const width = `calc(${at(upper)} - ${at(lower)})`;
  return (
    <div class="interval">
      <div
        class="scale"
        role="img"
        aria-label={`${percent(agreed)} agreed; surely between ${percent(lower)} and ${percent(upper)}. Target ${percent(target)}, least ${percent(least)}.`}
      >
        <span class="wanted" style={{ left: at(least), width: `calc(${at(target)} - ${at(least)})` }} />
        <span class="range" style={{ left: at(lower), width }} />
        <span class="mark" style={{ left: at(agreed) }} />
        <span class="goal" style={{ left: at(target) }} />
      </div>
      <div class="ends" aria-hidden="true">
        <span>{percent(from, 0)}</span>
        <span>100 %</span>
      </div>
      <Facts
        of={[
          ["Agreed with the teacher", `${count(rollout.agreed)} of ${count(rollout.compared)}, ${percent(agreed)}`],
          ["Surely between", `${percent(lower)} and ${percent(upper)}`],
          ["Target", `${percent(target)}, less at most ${percent(rollout.tolerance)}`],
        ]}
      />
    </div>
  );
}

function Events({ events }: { events: { data: RolloutEvent[] | undefined; error: Error | undefined } }) {
  return (
    <Card title="Events" note="newest first">
      <Loaded of={events} what="rollout events">
        {(rows) =>
          rows.length ? (
            <Table<RolloutEvent>
              caption="Steps and alarms of this rollout"
              rows={rows}
              id={(row) => `${row.time}${row.toStage}${row.reason}`}
              columns={[
                { name: "When", head: true, cell: (row) => <span title={ago(row.time)}>{moment(row.time)}</span> },
                { name: "Step", cell: (row) => (row.fromStage === row.toStage ? row.toStage : `${row.fromStage} → ${row.toStage}`) },
                { name: "Version", figure: true, cell: (row) => row.student || "–" },
                { name: "By", cell: (row) => row.actor },
                { name: "Why", cell: (row) => row.reason },
                { name: "Evidence", cell: (row) => evidenceWords(row) },
              ]}
            />
          ) : (
            <Empty>
              <p>No step was taken yet.</p>
            </Empty>
          )
        }
      </Loaded>
    </Card>
  );
}

function evidenceWords(event: RolloutEvent): string {
  const found = Object.entries(event.evidence ?? {}).filter(([, value]) => typeof value === "number" && value !== 0);
  return found.map(([name, value]) => `${name.replaceAll("_", " ")} ${figure(value as number)}`).join(", ") || "–";
}

function About({ skill }: { skill: Skill }) {
  const labels = skill.labels ?? [];
  return (
    <Card title="Skill">
      <Facts
        of={[
          ["Task", skill.task],
          ["Teacher", [skill.teacher, ...(skill.fallbacks ?? [])].filter(Boolean).join(", then ") || "none"],
          ["Base of students", skill.base || skill.studentModel || "none"],
          ["Bars", `delivered from ${percent(skill.deliverBar)}, a second try from ${percent(skill.secondTryBar)}`],
          ["Instruction", skill.instruction || "none"],
          labels.length > 0 && ["Labels", `${labels.slice(0, 30).join(", ")}${labels.length > 30 ? ` and ${labels.length - 30} more` : ""}`],
          ["Try it", <Link page="playground" item={bare(skill.name)}>in the playground</Link>],
          ["Train it", <Link page="jobs">a training job</Link>],
        ]}
      />
    </Card>
  );
}
