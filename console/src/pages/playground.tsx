import { useEffect, useMemo, useState } from "preact/hooks";
import { ask } from "../api";
import { bare } from "../format";
import { useAction, usePolled } from "../hooks";
import { Link } from "../router";
import { askTarget, type Asked, type Given, type Target } from "../targets";
import type { Model, ModelList, Skill, SkillList } from "../types";
import { Action, Card, Empty, Field, Page, Problem, Select } from "../ui/basics";
import { Outcome } from "./outcome";

const PREFERENCES = [
  { value: "ROUTE_PREFERENCE_UNSPECIFIED", text: "As configured" },
  { value: "ROUTE_PREFERENCE_LOCAL_FIRST", text: "Local first" },
  { value: "ROUTE_PREFERENCE_LOCAL_ONLY", text: "Local only" },
  { value: "ROUTE_PREFERENCE_PROVIDER_ONLY", text: "Providers only" },
  { value: "ROUTE_PREFERENCE_CHEAPEST", text: "Cheapest" },
  { value: "ROUTE_PREFERENCE_BEST", text: "Best" },
  { value: "ROUTE_PREFERENCE_FASTEST", text: "Fastest" },
];
const LOCAL_TASKS = new Set(["text-generation", "text-classification", "feature-extraction"]);
const GENERATION = "text-generation";

function targetsOf(skills: readonly Skill[], models: readonly Model[]): Target[] {
  const own = skills.filter((one) => !one.builtIn || one.task === GENERATION || one.teacher);
  const ready = models.filter((one) => one.state === "MODEL_STATE_READY" && one.current && LOCAL_TASKS.has(one.task ?? ""));
  return [
    ...own.map((one): Target => ({ id: bare(one.name), kind: "skill", task: one.task ?? "", labels: one.labels ?? [] })),
    ...ready.map((one): Target => ({ id: `local:${one.modelId}`, kind: "model", task: one.task ?? "", labels: [] })),
  ];
}

export function Playground({ item }: { item: string }) {
  const skills = usePolled((signal) => ask<SkillList>("/v1/skills", { query: { pageSize: 1000 }, signal }), 0, []);
  const models = usePolled((signal) => ask<ModelList>("/v1/models", { query: { pageSize: 1000 }, signal }), 0, []);
  const targets = useMemo(() => targetsOf(skills.data?.skills ?? [], models.data?.models ?? []), [skills.data, models.data]);
  const [chosen, setChosen] = useState(item);
  const target = targets.find((one) => one.id === chosen) ?? targets[0];
  const ready = skills.data !== undefined && models.data !== undefined;
  return (
    <Page title="Playground" lead="Ask a skill or a local model, and see who answered, why, how well and for how much. What a skill is asked here is recorded like any request.">
      <Problem error={skills.error ?? models.error} what="skills and models" />
      {ready && targets.length === 0 && (
        <Empty>
          <p>
            Nothing can be asked: no skill is configured, and no model that writes, classifies or embeds is loaded. Load one under <Link page="models">models</Link>.
          </p>
        </Empty>
      )}
      {target && ready && <Ask target={target} targets={targets} onTarget={setChosen} />}
    </Page>
  );
}

function Ask({ target, targets, onTarget }: { target: Target; targets: readonly Target[]; onTarget: (id: string) => void }) {
  const [given, setGiven] = useState<Given>({ text: "", system: "", chat: target.kind === "skill", preference: "ROUTE_PREFERENCE_UNSPECIFIED", temperature: "", maxTokens: "256" });
  const [asked, setAsked] = useState<Asked>();
  const [abort, setAbort] = useState<AbortController>();
  const set = (change: Partial<Given>): void => setGiven((old) => ({ ...old, ...change }));
  const { run, busy, error } = useAction(async () => {
    const stop = new AbortController();
    setAbort(stop);
    setAsked({ target, text: "", running: true, sentMs: performance.now() });
    const show = (change: Partial<Asked>): void => setAsked((old) => old && { ...old, ...change });
    try {
      await askTarget(target, given, show, stop.signal);
    } catch (failed) {
      if (!stop.signal.aborted) throw failed;
      show({ stopped: true });
    } finally {
      show({ running: false, doneMs: performance.now() });
    }
  });
  useEffect(() => () => abort?.abort(), [abort]);
  useEffect(() => set({ chat: target.kind === "skill" }), [target.id]);
  const writes = target.task === GENERATION;
  const groups = (["skill", "model"] as const).map((kind) => ({ kind, all: targets.filter((one) => one.kind === kind) }));
  return (
    <div class="grid playground">
      <Card title="Request">
        <form
          onSubmit={(event) => {
            event.preventDefault();
            if (given.text.trim() && !busy) void run();
          }}
        >
          <Field label="Skill or model" hint={target.task}>
            {(id, hint) => (
              <select id={id} aria-describedby={hint} value={target.id} onChange={(event) => onTarget(event.currentTarget.value)}>
                {groups.map(({ kind, all }) =>
                  all.length ? (
                    <optgroup key={kind} label={kind === "skill" ? "Skills" : "Local models"}>
                      {all.map((one) => (
                        <option key={one.id} value={one.id}>
                          {one.id.replace("local:", "")}
                        </option>
                      ))}
                    </optgroup>
                  ) : null,
                )}
              </select>
            )}
          </Field>
          <Field label="Input" hint="Control and Enter send it.">
            {(id, hint) => (
              <textarea
                id={id}
                aria-describedby={hint}
                rows={6}
                value={given.text}
                onInput={(event) => set({ text: event.currentTarget.value })}
                onKeyDown={(event) => {
                  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) event.currentTarget.form?.requestSubmit();
                }}
              />
            )}
          </Field>
          {target.kind === "skill" && (
            <Select label="Who may answer" value={given.preference} options={PREFERENCES} onChange={(preference) => set({ preference })} />
          )}
          {writes && <WritingFields given={given} set={set} />}
          <div class="form-buttons">
            <Action role="ROLE_USER" tone="primary" type="submit" busy={busy} because={given.text.trim() ? "" : "Write an input first."}>
              Ask
            </Action>
            {busy && (
              <button type="button" class="button plain" onClick={() => abort?.abort()}>
                Stop
              </button>
            )}
          </div>
        </form>
      </Card>
      <div class="answer-column">
        <Problem error={error} />
        {asked ? (
          <Outcome of={asked} />
        ) : (
          <Card title="Answer">
            <Empty>Write an input and ask.</Empty>
          </Card>
        )}
      </div>
    </div>
  );
}

function WritingFields({ given, set }: { given: Given; set: (change: Partial<Given>) => void }) {
  return (
    <>
      <Select
        label="Input is"
        value={given.chat ? "chat" : "prompt"}
        options={[
          { value: "chat", text: "a message of a conversation" },
          { value: "prompt", text: "a text to go on with" },
        ]}
        onChange={(value) => set({ chat: value === "chat" })}
      />
      {given.chat && (
        <Field label="System message">{(id) => <textarea id={id} rows={2} value={given.system} onInput={(event) => set({ system: event.currentTarget.value })} />}</Field>
      )}
      <div class="pair">
        <Field label="Temperature" hint="Empty: 1.">
          {(id, hint) => (
            <input id={id} aria-describedby={hint} type="number" min="0" max="2" step="0.1" value={given.temperature} onInput={(event) => set({ temperature: event.currentTarget.value })} />
          )}
        </Field>
        <Field label="Most tokens">
          {(id) => <input id={id} type="number" min="1" value={given.maxTokens} onInput={(event) => set({ maxTokens: event.currentTarget.value })} />}
        </Field>
      </div>
    </>
  );
}
