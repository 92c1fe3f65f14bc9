import { useEffect, useState } from "preact/hooks";
import { ask, resource } from "../api";
import { bare, integer, millis, moment, money, percent } from "../format";
import { usePolled } from "../hooks";
import { Link } from "../router";
import { SPANS } from "../timeline";
import type { InteractionList, RecordedInteraction, SkillList } from "../types";
import { Badge, Card, Empty, Field, Loaded, Page, Problem, Select } from "../ui/basics";
import { Table } from "../ui/table";
import { Detail, outputOf } from "./interaction";

interface Filters {
  skill: string;
  answeredBy: string;
  time: string;
  maxQuality: string;
  withFeedback: boolean;
}

const NONE: Filters = { skill: "", answeredBy: "", time: "7d", maxQuality: "", withFeedback: false };
const PAGE = 50;

const BY = [
  { value: "", text: "Anybody" },
  { value: "ANSWERED_BY_LOCAL", text: "Local models" },
  { value: "ANSWERED_BY_PROVIDER", text: "Providers" },
  { value: "ANSWERED_BY_NOBODY", text: "Nobody: errors" },
];
const QUALITY = [
  { value: "", text: "Any" },
  ...[0.9, 0.8, 0.7, 0.5, 0.3].map((bar) => ({ value: String(bar), text: `At most ${percent(bar, 0)}` })),
];

export function Interactions({ item }: { item: string }) {
  const [filters, setFilters] = useState(NONE);
  const [older, setOlder] = useState<RecordedInteraction[]>([]);
  const [next, setNext] = useState<string>();
  const skills = usePolled((signal) => ask<SkillList>("/v1/skills", { query: { pageSize: 1000 }, signal }), 60_000, []);
  const query = (pageToken = "") => {
    const span = SPANS.find((one) => one.value === filters.time);
    const sinceTime = span && new Date(Date.now() - span.length * 1000).toISOString();
    const { skill, answeredBy, maxQuality, withFeedback } = filters;
    return { skill, answeredBy, maxQuality, withFeedback, sinceTime, pageSize: PAGE, pageToken };
  };
  const list = usePolled((signal) => ask<InteractionList>("/v1/interactions", { query: query(), signal }), 5000, [filters]);
  useEffect(() => {
    setOlder([]);
    setNext(undefined);
  }, [filters]);
  const token = next ?? list.data?.nextPageToken ?? "";
  const more = async (): Promise<void> => {
    const page = await ask<InteractionList>("/v1/interactions", { query: query(token) });
    setOlder((old) => [...old, ...(page.interactions ?? [])]);
    setNext(page.nextPageToken ?? "");
  };
  const set = (change: Partial<Filters>): void => setFilters((old) => ({ ...old, ...change }));
  const options = [{ value: "", text: "All skills" }, ...(skills.data?.skills ?? []).map((one) => ({ value: one.name ?? "", text: bare(one.name) }))];
  if (item) return <One id={item} />;
  return (
    <Page title="Interactions" lead="Every request of a skill, with its route, cost and quality, and what people said of the answer.">
      <form class="filters" aria-label="Filters" onSubmit={(event) => event.preventDefault()}>
        <Select label="Skill" value={filters.skill} options={options} onChange={(skill) => set({ skill })} />
        <Select label="Answered by" value={filters.answeredBy} options={BY} onChange={(answeredBy) => set({ answeredBy })} />
        <Select label="Time" value={filters.time} options={SPANS} onChange={(time) => set({ time })} />
        <Select label="Quality" value={filters.maxQuality} options={QUALITY} onChange={(maxQuality) => set({ maxQuality })} />
        <Field label="With feedback">
          {(id) => <input id={id} type="checkbox" checked={filters.withFeedback} onChange={(event) => set({ withFeedback: event.currentTarget.checked })} />}
        </Field>
      </form>
      <Card title="Found" note={list.data && `${merged(list.data, older).length}${token ? ", and older ones" : ""}`}>
        <Loaded of={list} what="interactions">
          {(found) => <Rows rows={merged(found, older)} filtered={filters !== NONE} />}
        </Loaded>
        {token && (
          <p class="after">
            <button type="button" class="button plain" onClick={() => void more()}>
              Show older ones
            </button>
          </p>
        )}
      </Card>
    </Page>
  );
}

// A refresh moves the first page; what was there before stays once.
function merged(first: InteractionList, older: readonly RecordedInteraction[]): RecordedInteraction[] {
  const rows = new Map<string, RecordedInteraction>();
  for (const row of [...(first.interactions ?? []), ...older]) rows.set(row.interaction?.interactionId ?? "", row);
  return [...rows.values()];
}

function Rows({ rows, filtered }: { rows: readonly RecordedInteraction[]; filtered: boolean }) {
  if (rows.length === 0) {
    return (
      <Empty>
        <p>
          {filtered
            ? "No interaction fits these filters. Widen them."
            : "Nothing was recorded in this time. What was answered within the last seconds comes a little later."}{" "}
          Ask something in the <Link page="playground">playground</Link>.
        </p>
      </Empty>
    );
  }
  return (
    <Table<RecordedInteraction>
      caption="Interactions, newest first"
      rows={rows}
      id={(row) => row.interaction?.interactionId ?? ""}
      columns={[
        { name: "When", head: true, cell: (row) => <Link page="interactions" item={row.interaction?.interactionId}>{moment(row.interaction?.time)}</Link> },
        { name: "Skill", cell: (row) => row.interaction?.skill },
        { name: "Input", cell: (row) => <span class="clip">{row.interaction?.input ?? "sealed or erased"}</span> },
        { name: "Answer", cell: (row) => <span class="clip">{outputOf(row.interaction)}</span> },
        { name: "By", cell: (row) => <By row={row} /> },
        { name: "Quality", figure: true, cell: (row) => percent(row.interaction?.quality) },
        { name: "Cost", figure: true, cell: (row) => money(integer(row.interaction?.costMicroUsd)) },
        { name: "Time", figure: true, cell: (row) => millis(row.interaction?.totalMs) },
        { name: "Said", cell: (row) => saidOf(row) },
      ]}
    />
  );
}

export function By({ row }: { row: RecordedInteraction }) {
  const found = row.interaction;
  if (found?.error) return <Badge tone="bad">{found.error.toLowerCase().replaceAll("_", " ")}</Badge>;
  return (
    <span class="clip">
      <Badge tone={found?.local ? "good" : "accent"}>{found?.local ? "local" : "provider"}</Badge> {(found?.candidate ?? "").replace("local:", "")}
    </span>
  );
}

function saidOf(row: RecordedInteraction): string {
  const words = (row.feedback ?? []).map((one) => {
    if (one.thumb === "THUMB_UP") return "liked";
    if (one.thumb === "THUMB_DOWN") return "disliked";
    if (one.rating) return `${one.rating} of 5`;
    return one.correction === undefined || one.correction === null ? "comment" : "corrected";
  });
  return [...new Set(words)].join(", ");
}

function One({ id }: { id: string }) {
  const found = usePolled(
    async (signal) => (await ask<{ interaction: RecordedInteraction }>(`/v1/interactions/${resource(id)}`, { signal })).interaction,
    5000,
    [id],
  );
  return (
    <Page title="Interaction" lead={<Link page="interactions">All interactions</Link>}>
      {found.data === undefined && found.error && <Problem error={found.error} what="interactions" />}
      {found.data !== undefined && <Detail of={found.data} onFeedback={found.refresh} />}
      {found.data === undefined && !found.error && <p class="loading">Loading the interaction …</p>}
    </Page>
  );
}
