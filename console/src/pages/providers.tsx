import { ask } from "../api";
import { count, duration, integer, money, moment, percent, word } from "../format";
import { usePolled } from "../hooks";
import type { Budget, BudgetAnswer, ProviderStatus, Status } from "../types";
import { Badge, Card, Empty, Loaded, Meter, Page, type Tone } from "../ui/basics";
import { Table } from "../ui/table";

const CIRCUIT: Record<string, { tone: Tone; text: string }> = {
  CIRCUIT_STATE_CLOSED: { tone: "good", text: "asked" },
  CIRCUIT_STATE_OPEN: { tone: "bad", text: "left alone" },
  CIRCUIT_STATE_HALF_OPEN: { tone: "warn", text: "being tried" },
};
const BUDGET: Record<string, Tone> = { BUDGET_STATE_OK: "good", BUDGET_STATE_ALERT: "warn", BUDGET_STATE_STOPPED: "bad", BUDGET_STATE_EXHAUSTED: "bad" };

export function Providers() {
  const status = usePolled((signal) => ask<Status>("/v1/status", { signal }), 3000, []);
  const budget = usePolled((signal) => ask<BudgetAnswer>("/v1/budget", { signal }), 5000, []);
  return (
    <Page title="Providers and budgets" lead="Who answers what local models do not, how they do, and what they may cost.">
      <Card title="Providers" note="as this server sees them">
        <Loaded of={status} what="providers">
          {(found) => (found.providers?.length ? <ProviderTable rows={found.providers} /> : <NoProviders />)}
        </Loaded>
      </Card>
      <Card
        title="Budgets"
        note={budget.data && `days and months of ${budget.data.timeZone}; told at ${percent(budget.data.alertAt, 0)}, no paid call from ${percent(budget.data.stopAt, 0)}`}
      >
        <Loaded of={budget} what="budgets">
          {(found) => (found.budgets?.length ? <BudgetTable rows={found.budgets} /> : <NoBudgets />)}
        </Loaded>
      </Card>
    </Page>
  );
}

function Circuit({ provider }: { provider: ProviderStatus }) {
  const known = CIRCUIT[provider.circuit ?? ""] ?? { tone: "plain" as const, text: "unknown" };
  return (
    <>
      <Badge tone={known.tone}>{known.text}</Badge>
      {provider.circuit === "CIRCUIT_STATE_OPEN" && provider.rest && <span class="note"> for {duration(provider.rest)}</span>}
      {provider.message && <p class="note">{provider.message}</p>}
    </>
  );
}

function ProviderTable({ rows }: { rows: ProviderStatus[] }) {
  return (
    <Table<ProviderStatus>
      caption="Providers"
      rows={rows}
      id={(row) => row.provider ?? ""}
      columns={[
        { name: "Provider", head: true, cell: (row) => row.provider },
        { name: "Circuit", cell: (row) => <Circuit provider={row} /> },
        { name: "Running", figure: true, cell: (row) => count(row.inFlight) },
        { name: "Waiting", figure: true, cell: (row) => count(row.waiting) },
        { name: "Failed of late", figure: true, cell: (row) => `${count(row.failures)} of ${count(row.recent)}` },
        { name: "Median", figure: true, cell: (row) => duration(row.latencyP50) },
        { name: "95 %", figure: true, cell: (row) => duration(row.latencyP95) },
        { name: "First token", figure: true, cell: (row) => duration(row.firstTokenP50) },
        { name: "Limits left", cell: (row) => limits(row) },
      ]}
    />
  );
}

function limits(row: ProviderStatus): string {
  const room = Object.entries(row.room ?? {});
  return room.map(([name, left]) => `${name.replaceAll("_", " ")} ${percent(left, 0)}`).join(", ") || "none set";
}

function NoProviders() {
  return (
    <Empty>
      <p>No provider is configured: everything is answered locally, or not at all. Name one in understudy.toml, and start the server again:</p>
      <pre tabIndex={0}>{`[providers.openai]
api_key_env = "OPENAI_API_KEY"`}</pre>
    </Empty>
  );
}

function BudgetTable({ rows }: { rows: Budget[] }) {
  return (
    <Table<Budget>
      caption="Budgets and their use"
      rows={rows}
      id={(row) => `${row.scope}${row.window}`}
      columns={[
        { name: "Scope", head: true, cell: (row) => row.scope },
        { name: "Window", cell: (row) => word(row.window, "BUDGET_WINDOW_") },
        { name: "State", cell: (row) => <Badge tone={BUDGET[row.state ?? ""] ?? "plain"}>{word(row.state, "BUDGET_STATE_")}</Badge> },
        {
          name: "Used",
          cell: (row) => (
            <>
              <Meter
                share={Number(row.usedRatio ?? 0)}
                tone={BUDGET[row.state ?? ""] ?? "accent"}
                label={`${percent(row.usedRatio)} of the limit`}
              />{" "}
              {percent(row.usedRatio)}
            </>
          ),
        },
        { name: "Spent", figure: true, cell: (row) => money(row.spent?.microUsd ?? 0) },
        { name: "Reserved", figure: true, cell: (row) => (integer(row.reserved?.microUsd) ? money(row.reserved?.microUsd) : "–") },
        { name: "Limit", figure: true, cell: (row) => money(row.limit?.microUsd ?? 0) },
        { name: "Left", figure: true, cell: (row) => money(row.remaining?.microUsd ?? 0) },
        { name: "Begins anew", cell: (row) => moment(row.resetTime) },
      ]}
    />
  );
}

function NoBudgets() {
  return (
    <Empty>
      <p>No budget is set: providers may cost whatever they cost. Set one in understudy.toml, and start the server again:</p>
      <pre tabIndex={0}>{`[budget.total]
day_usd = 20.0`}</pre>
    </Empty>
  );
}
