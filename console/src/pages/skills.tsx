import { ask } from "../api";
import { bare, percent } from "../format";
import { usePolled } from "../hooks";
import { Link } from "../router";
import type { Skill, SkillList } from "../types";
import { Badge, Card, Empty, Loaded, Meter, Page, type Tone } from "../ui/basics";
import { Table } from "../ui/table";
import { SkillDetail } from "./skill";

const TONES: Record<string, Tone> = { full: "good", canary: "accent", shadow: "plain", held: "plain", rolled_back: "bad" };

export function StageBadge({ stage, percent: share }: { stage: string | undefined; percent: number | undefined }) {
  const words = (stage ?? "").replace("_", " ") || "none";
  return <Badge tone={TONES[stage ?? ""] ?? "plain"}>{stage === "canary" ? `canary ${share} %` : words}</Badge>;
}

export function Skills({ item }: { item: string }) {
  const list = usePolled((signal) => ask<SkillList>("/v1/skills", { query: { pageSize: 1000 }, signal }), 5000, []);
  if (item) return <SkillDetail name={item} key={item} />;
  return (
    <Page title="Skills and rollouts" lead="A skill is a job that callers ask for by name. Its student takes over from its teacher as far as the evidence goes.">
      <Loaded of={list} what="skills">
        {(found) => {
          const all = found.skills ?? [];
          const own = all.filter((one) => !one.builtIn);
          const tasks = all.filter((one) => one.builtIn);
          return (
            <>
              <Card title="Configured skills">{own.length ? <SkillTable rows={own} caption="Configured skills" /> : <NoSkills />}</Card>
              {tasks.length > 0 && (
                <Card title="Tasks as such" note="need no configuration: local models of the task answer, else the default teacher">
                  <TaskTable rows={tasks} />
                </Card>
              )}
            </>
          );
        }}
      </Loaded>
    </Page>
  );
}

function NoSkills() {
  return (
    <Empty>
      <p>No skill is configured. Name one in understudy.toml, with its task and its teacher, and start the server again:</p>
      <pre tabIndex={0}>{`[skills.support-intent]
task = "text-classification"
teacher = "openai/gpt-4o-mini"
base = "all-minilm-l6-v2"`}</pre>
    </Empty>
  );
}

function TaskTable({ rows }: { rows: Skill[] }) {
  return (
    <Table<Skill>
      caption="Tasks as such"
      rows={rows}
      id={(row) => row.name ?? ""}
      columns={[
        { name: "Task", head: true, cell: (row) => <Link page="skills" item={bare(row.name)}>{bare(row.name)}</Link> },
        { name: "Asked after local models", cell: (row) => row.teacher || "nobody" },
      ]}
    />
  );
}

function SkillTable({ rows, caption }: { rows: Skill[]; caption: string }) {
  return (
    <Table<Skill>
      caption={caption}
      rows={rows}
      id={(row) => row.name ?? ""}
      columns={[
        { name: "Skill", head: true, cell: (row) => <Link page="skills" item={bare(row.name)}>{bare(row.name)}</Link> },
        { name: "Task", cell: (row) => row.task },
        { name: "Teacher", cell: (row) => row.teacher || "none" },
        { name: "Student", cell: (row) => studentWords(row) },
        { name: "Stage", cell: (row) => <StageBadge stage={row.rolloutStage} percent={row.rolloutPercent} /> },
        {
          name: "Student's share",
          cell: (row) => (
            <>
              <Meter share={(row.rolloutPercent ?? 0) / 100} label={`${row.rolloutPercent ?? 0} % of the requests`} /> {row.rolloutPercent ?? 0} %
            </>
          ),
        },
      ]}
    />
  );
}

function studentWords(skill: Skill): string {
  const serving = skill.student ? `${skill.student.adapter}@${skill.student.version}` : skill.studentModel || "none yet";
  const measured = skill.student?.accuracy ? `, ${percent(skill.student.accuracy)} as its teacher` : "";
  return `${serving}${measured}${skill.challenger ? `; on its way: version ${skill.challenger.version}` : ""}`;
}
