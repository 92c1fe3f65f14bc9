import { useState } from "preact/hooks";
import { ask } from "../api";
import { ago, bare, integer, moment, span, word } from "../format";
import { useAction, usePolled } from "../hooks";
import { Link, go } from "../router";
import type { Job, JobList, JobState, SkillList } from "../types";
import { Action, Badge, Card, Empty, Field, Loaded, Meter, Page, Problem, Select, type Tone } from "../ui/basics";
import { Dialog } from "../ui/dialog";
import { Table } from "../ui/table";
import { JobDetail } from "./job";

const TONES: Partial<Record<JobState, Tone>> = {
  TRAINING_JOB_STATE_RUNNING: "accent",
  TRAINING_JOB_STATE_SUCCEEDED: "good",
  TRAINING_JOB_STATE_REJECTED: "warn",
  TRAINING_JOB_STATE_FAILED: "bad",
};

export function StateBadge({ job }: { job: Job }) {
  const words = word(job.state, "TRAINING_JOB_STATE_");
  return <Badge tone={TONES[job.state ?? "TRAINING_JOB_STATE_UNSPECIFIED"] ?? "plain"}>{job.cancelRequested && active(job) ? `${words}, ending` : words}</Badge>;
}

export const active = (job: Job): boolean => job.state === "TRAINING_JOB_STATE_QUEUED" || job.state === "TRAINING_JOB_STATE_RUNNING";

export const kindOf = (job: Job): string => (job.kind === "TRAINING_JOB_KIND_UNSPECIFIED" ? "train" : word(job.kind, "TRAINING_JOB_KIND_"));

/** How long it ran, or has run. */
export function ranFor(job: Job, now = Date.now()): string {
  if (!job.startTime) return "–";
  return span(((job.endTime ? Date.parse(job.endTime) : now) - Date.parse(job.startTime)) / 1000);
}

export function Jobs({ item }: { item: string }) {
  const [starting, setStarting] = useState(false);
  const [state, setState] = useState("");
  const list = usePolled((signal) => ask<JobList>("/v1/trainingJobs", { query: { states: state ? [state] : [] }, signal }), 3000, [state]);
  if (item) return <JobDetail id={item} key={item} />;
  const states = ["QUEUED", "RUNNING", "SUCCEEDED", "REJECTED", "FAILED", "CANCELLED"];
  const tools = (
    <>
      <Select
        label="State"
        value={state}
        onChange={setState}
        options={[{ value: "", text: "All" }, ...states.map((one) => ({ value: `TRAINING_JOB_STATE_${one}`, text: one[0] + one.slice(1).toLowerCase() }))]}
      />
      <Action role="ROLE_OPERATOR" tone="primary" onPress={() => setStarting(true)}>
        Start a job
      </Action>
    </>
  );
  return (
    <Page title="Training jobs" lead="A trainer takes waiting jobs: it learns from what was recorded, proves the student and publishes it." tools={tools}>
      <Card title="Jobs" note="newest first">
        <Loaded of={list} what="training jobs">
          {(found) => (found.trainingJobs?.length ? <JobTable rows={found.trainingJobs} /> : <NoJobs filtered={state !== ""} />)}
        </Loaded>
      </Card>
      {starting && <StartDialog onClose={() => setStarting(false)} />}
    </Page>
  );
}

function NoJobs({ filtered }: { filtered: boolean }) {
  return (
    <Empty>
      <p>{filtered ? "No job is in this state." : "There is no job yet. Start one here, or give a skill a schedule."}</p>
      <p class="note">
        A trainer has to run: <code>understudy jobs work</code>, on this machine or another.
      </p>
    </Empty>
  );
}

function JobTable({ rows }: { rows: Job[] }) {
  return (
    <Table<Job>
      caption="Training jobs"
      rows={rows}
      id={(row) => row.name ?? ""}
      columns={[
        { name: "Created", head: true, cell: (row) => <Link page="jobs" item={bare(row.name)}>{moment(row.createTime)}</Link> },
        { name: "Skill", cell: (row) => <Link page="skills" item={bare(row.skill)}>{bare(row.skill)}</Link> },
        { name: "Kind", cell: (row) => [kindOf(row), row.method].filter(Boolean).join(", ") },
        { name: "State", cell: (row) => <StateBadge job={row} /> },
        { name: "Stage", cell: (row) => <Stage job={row} /> },
        { name: "Ran for", figure: true, cell: (row) => <span title={ago(row.startTime)}>{ranFor(row)}</span> },
        { name: "Outcome", cell: (row) => <span class="clip">{outcomeOf(row)}</span> },
      ]}
    />
  );
}

function Stage({ job }: { job: Job }) {
  const last = job.progress?.at(-1);
  if (!last) return <>–</>;
  const share = integer(last.total) ? integer(last.done) / integer(last.total) : 0;
  return (
    <>
      {last.stage} {job.state === "TRAINING_JOB_STATE_RUNNING" && <Meter share={share} label={`${integer(last.done)} of ${integer(last.total)}`} />}
    </>
  );
}

function outcomeOf(job: Job): string {
  if (job.version) return `version ${job.version}`;
  return job.rejection || job.error?.message || "–";
}

const KINDS = [
  { value: "TRAINING_JOB_KIND_TRAIN", text: "Train a student" },
  { value: "TRAINING_JOB_KIND_ASSESS", text: "Refit quality and difficulty" },
];
const METHODS = ["", "auto", "linear-head", "lora", "full", "prefix", "prompt"].map((value) => ({ value, text: value || "as configured" }));

function StartDialog({ onClose }: { onClose: () => void }) {
  const skills = usePolled((signal) => ask<SkillList>("/v1/skills", { query: { pageSize: 1000 }, signal }), 0, []);
  const [skill, setSkill] = useState("");
  const [kind, setKind] = useState("TRAINING_JOB_KIND_TRAIN");
  const [method, setMethod] = useState("");
  const [seed, setSeed] = useState("0");
  const own = (skills.data?.skills ?? []).filter((one) => !one.builtIn);
  const chosen = skill || own[0]?.name || "";
  const { run, busy, error } = useAction(async () => {
    const body = { skill: chosen, kind, method: kind === "TRAINING_JOB_KIND_TRAIN" ? method : "", seed: Number(seed) || 0 };
    const made = await ask<{ trainingJob: Job }>("/v1/trainingJobs", { body });
    onClose();
    go("jobs", bare(made.trainingJob.name));
  });
  return (
    <Dialog title="Start a training job" onClose={onClose}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          if (!busy && chosen) void run();
        }}
      >
        <Problem error={skills.error} what="skills" />
        {skills.data && own.length === 0 && <p>No skill is configured, so there is nothing to train. Name one in understudy.toml.</p>}
        <Select label="Skill" value={chosen} options={own.map((one) => ({ value: one.name ?? "", text: bare(one.name) }))} onChange={setSkill} />
        <Select label="What" value={kind} options={KINDS} onChange={setKind} />
        {kind === "TRAINING_JOB_KIND_TRAIN" && <Select label="Method" value={method} options={METHODS} onChange={setMethod} />}
        <Field label="Seed" hint="The same seed and rows give the same student.">
          {(id, hint) => <input id={id} aria-describedby={hint} type="number" min="0" max="2147483647" value={seed} onInput={(event) => setSeed(event.currentTarget.value)} />}
        </Field>
        <Problem error={error} what="training jobs" />
        <div class="dialog-buttons">
          <button type="button" class="button plain" onClick={onClose}>
            Cancel
          </button>
          <button type="submit" class="button primary" aria-disabled={busy || !chosen || undefined}>
            Start
          </button>
        </div>
      </form>
    </Dialog>
  );
}
