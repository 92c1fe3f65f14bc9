import { useState } from "preact/hooks";
import { ask, resource } from "../api";
import { bytes, moment, word } from "../format";
import { useAction, usePolled } from "../hooks";
import { Link } from "../router";
import type { Adapter, AdapterList, Model, ModelList } from "../types";
import { Action, Badge, Card, Empty, Facts, Loaded, Page, Problem, type Tone } from "../ui/basics";
import { Confirm } from "../ui/dialog";
import { Table } from "../ui/table";

const TONES: Record<string, Tone> = {
  MODEL_STATE_READY: "good",
  MODEL_STATE_LOADING: "accent",
  MODEL_STATE_UNLOADING: "warn",
  MODEL_STATE_FAILED: "bad",
  ADAPTER_STATE_READY: "good",
  ADAPTER_STATE_FAILED: "bad",
};

function StateBadge({ state }: { state: string | undefined }) {
  return <Badge tone={TONES[state ?? ""] ?? "plain"}>{word(state, "").replace(/^(model|adapter) state /, "")}</Badge>;
}

const listModels = async (signal: AbortSignal): Promise<Model[]> =>
  (await ask<ModelList>("/v1/models", { query: { pageSize: 1000 }, signal })).models ?? [];

export function Models({ item }: { item: string }) {
  const list = usePolled(listModels, 3000, []);
  const [unloading, setUnloading] = useState<Model>();
  const load = useAction(async (model: Model) => {
    await ask(`/v1/${resource(model.name ?? "")}:load`, { body: {} });
    list.refresh();
  });
  const rows = (list.data ?? []).filter((one) => !item || one.modelId === item);
  const table = (
    <Table<Model>
      caption="Model versions in the repository"
      rows={rows}
      id={(row) => row.name ?? ""}
      columns={[
        {
          name: "Model",
          head: true,
          cell: (row) => (
            <>
              <Link page="models" item={row.modelId}>{row.modelId}</Link> <span class="note">version {row.version}</span>
            </>
          ),
        },
        { name: "Task", cell: (row) => row.task },
        { name: "State", cell: (row) => <ModelState model={row} /> },
        { name: "Form", cell: (row) => [row.architecture, row.dtype].filter(Boolean).join(", ") || "raw graph" },
        { name: "Size", figure: true, cell: (row) => bytes(row.sizeBytes) },
        { name: "Loaded", cell: (row) => moment(row.loadTime) },
        {
          name: "Do",
          cell: (row) =>
            row.state === "MODEL_STATE_READY" ? (
              <Action role="ROLE_OPERATOR" name={`Unload ${row.modelId} version ${row.version}`} onPress={() => setUnloading(row)}>
                Unload
              </Action>
            ) : (
              <Action role="ROLE_OPERATOR" name={`Load ${row.modelId} version ${row.version}`} busy={load.busy} onPress={() => void load.run(row)}>
                Load
              </Action>
            ),
        },
      ]}
    />
  );
  return (
    <Page
      title={item || "Models and adapters"}
      lead={item ? <Link page="models">All models</Link> : "What lies in the repository, and what of it is in memory and answers."}
    >
      <Problem error={load.error} what="loading" />
      <Card title={item ? "Versions" : "Models"}>
        <Loaded of={list} what="models">
          {() => (rows.length ? table : <NoModels item={item} />)}
        </Loaded>
      </Card>
      {item && <Adapters model={item} />}
      {item && rows[0] && <About model={rows[0]} />}
      {unloading && (
        <Confirm
          title={`Unload ${unloading.modelId}, version ${unloading.version}?`}
          verb="Unload"
          danger
          onClose={() => setUnloading(undefined)}
          act={async () => {
            await ask(`/v1/${resource(unloading.name ?? "")}:unload`, { body: {} });
            list.refresh();
          }}
        >
          <p>It finishes what it has accepted, then leaves memory. Later requests of it are refused until somebody loads it again.</p>
        </Confirm>
      )}
    </Page>
  );
}

function ModelState({ model }: { model: Model }) {
  return (
    <>
      <StateBadge state={model.state} /> {model.current && model.state === "MODEL_STATE_READY" && <span class="note">current</span>}
      {model.stateMessage && <p class="note">{model.stateMessage}</p>}
    </>
  );
}

function NoModels({ item }: { item: string }) {
  return (
    <Empty>
      <p>{item ? `The repository has no model ${item}.` : "The repository is empty. Put a model into it:"}</p>
      {!item && <pre tabIndex={0}>understudy models pull starter</pre>}
    </Empty>
  );
}

function Adapters({ model }: { model: string }) {
  const list = usePolled(
    async (signal) => (await ask<AdapterList>(`/v1/models/${resource(model)}/adapters`, { query: { pageSize: 1000 }, signal })).adapters ?? [],
    5000,
    [model],
  );
  const change = useAction(async (adapter: Adapter, verb: "load" | "unload") => {
    await ask(`/v1/${resource(adapter.name ?? "")}:${verb}`, { body: {} });
    list.refresh();
  });
  return (
    <Card title="Adapters" note="trained weights over this model, chosen by each request">
      <Problem error={change.error} what="adapters" />
      <Loaded of={list} what="adapters">
        {(rows) =>
          rows.length ? (
            <Table<Adapter>
              caption={`Adapters of ${model}`}
              rows={rows}
              id={(row) => row.name ?? ""}
              columns={[
                { name: "Adapter", head: true, cell: (row) => `${row.adapterId}@${row.version}` },
                { name: "Kind", cell: (row) => `${word(row.kind, "ADAPTER_KIND_")}${row.rank ? `, rank ${row.rank}` : ""}` },
                {
                  name: "State",
                  cell: (row) => (
                    <>
                      <StateBadge state={row.state} /> {row.current && <span class="note">current</span>} {row.resident && <span class="note">in memory</span>}
                      {row.stateMessage && <p class="note">{row.stateMessage}</p>}
                    </>
                  ),
                },
                { name: "Requests now", figure: true, cell: (row) => row.activeRequests ?? 0 },
                { name: "Size", figure: true, cell: (row) => bytes(row.sizeBytes) },
                {
                  name: "Do",
                  cell: (row) => {
                    const verb = row.state === "ADAPTER_STATE_READY" ? "unload" : "load";
                    return (
                      <Action role="ROLE_OPERATOR" name={`${verb} adapter ${row.adapterId} version ${row.version}`} busy={change.busy} onPress={() => void change.run(row, verb)}>
                        {verb === "load" ? "Load" : "Unload"}
                      </Action>
                    );
                  },
                },
              ]}
            />
          ) : (
            <Empty>
              <p>This model has no adapters.</p>
              <pre tabIndex={0}>understudy adapters add ./my-peft-folder --base {model} --name french</pre>
            </Empty>
          )
        }
      </Loaded>
    </Card>
  );
}

function About({ model }: { model: Model }) {
  return (
    <Card title="About">
      <Facts
        of={[
          ["Task", model.task],
          ["Most tokens of an input", model.maxTokens || "–"],
          ["Size of the vectors", model.hiddenSize || "–"],
          (model.labels?.length ?? 0) > 0 && ["Labels", model.labels?.slice(0, 30).join(", ")],
          ["Licence", model.license || "not stated"],
          ["Source", model.source || "not stated"],
          ["Try it", <Link page="playground" item={`local:${model.modelId}`}>in the playground</Link>],
        ]}
      />
    </Card>
  );
}
