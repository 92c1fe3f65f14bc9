import { useState } from "preact/hooks";
import { ask, resource } from "../api";
import { ago, count, money, moment } from "../format";
import { useAction, usePolled } from "../hooks";
import { roleWord, useSession } from "../session";
import type { ApiKey, AuditEvent, AuditList, CreatedKey, KeyList, Role } from "../types";
import { Action, Badge, Card, Empty, Field, Loaded, Page, Problem, Select } from "../ui/basics";
import { Confirm, Dialog } from "../ui/dialog";
import { Table } from "../ui/table";

export function Keys() {
  const session = useSession();
  const [creating, setCreating] = useState(false);
  const why = session.refusal("ROLE_ADMIN");
  const create = (
    <Action role="ROLE_ADMIN" tone="primary" onPress={() => setCreating(true)}>
      Make a key
    </Action>
  );
  return (
    <Page title="Keys and audit" lead="Who may call, and who changed what." tools={create}>
      {why ? (
        <Empty>
          <p>{why}</p>
        </Empty>
      ) : (
        <Lists creating={creating} onClose={() => setCreating(false)} />
      )}
    </Page>
  );
}

function Lists({ creating, onClose }: { creating: boolean; onClose: () => void }) {
  const keys = usePolled((signal) => ask<KeyList>("/v1/apiKeys", { query: { pageSize: 1000 }, signal }), 10_000, []);
  const audit = usePolled((signal) => ask<AuditList>("/v1/auditEvents", { signal }), 10_000, []);
  const [revoking, setRevoking] = useState<ApiKey>();
  const { caller } = useSession();
  return (
    <>
      <Card title="Keys" note={caller && !caller.keysRequired ? "this server asks for none" : "newest first"}>
        <Loaded of={keys} what="keys">
          {(found) =>
            found.apiKeys?.length ? (
              <KeyTable rows={found.apiKeys} onRevoke={setRevoking} />
            ) : (
              <Empty>
                <p>There is no key yet. Make one: it is shown once, and the server keeps a hash of it.</p>
              </Empty>
            )
          }
        </Loaded>
      </Card>
      <Card title="Audit log" note="calls that changed something, or were refused for want of a role; newest first">
        <Loaded of={audit} what="the audit log">
          {(found) => (found.auditEvents?.length ? <AuditTable rows={found.auditEvents} /> : <Empty>Nothing was changed yet.</Empty>)}
        </Loaded>
      </Card>
      {creating && (
        <CreateDialog
          onClose={() => {
            onClose();
            keys.refresh();
            audit.refresh();
          }}
        />
      )}
      {revoking && (
        <Confirm
          title={`Revoke ${revoking.displayName || revoking.name}?`}
          verb="Revoke"
          danger
          onClose={() => setRevoking(undefined)}
          act={async () => {
            await ask(`/v1/${resource(revoking.name ?? "")}:revoke`, { body: {} });
            keys.refresh();
            audit.refresh();
          }}
        >
          <p>Whoever uses it is refused within a few seconds, on every server, for good.</p>
        </Confirm>
      )}
    </>
  );
}

function KeyTable({ rows, onRevoke }: { rows: ApiKey[]; onRevoke: (key: ApiKey) => void }) {
  return (
    <Table<ApiKey>
      caption="Keys"
      rows={rows}
      id={(row) => row.name ?? ""}
      columns={[
        {
          name: "Key",
          head: true,
          cell: (row) => (
            <>
              {row.displayName || "unnamed"} <code class="note">{(row.name ?? "").replace("apiKeys/", "")}</code>
            </>
          ),
        },
        { name: "Role", cell: (row) => roleWord(row.role) },
        { name: "Skills", cell: (row) => row.skills?.map((one) => one.replace("skills/", "")).join(", ") || "all" },
        { name: "State", cell: (row) => <KeyState of={row} /> },
        { name: "Limits", cell: (row) => limitsOf(row) },
        { name: "Made", cell: (row) => `${moment(row.createTime)} by ${row.creator || "?"}` },
        { name: "Last used", cell: (row) => ago(row.lastUseTime) },
        {
          name: "Do",
          cell: (row) => (
            <Action role="ROLE_ADMIN" name={`Revoke ${row.displayName || row.name}`} because={row.revokeTime ? "It is revoked already." : ""} onPress={() => onRevoke(row)}>
              Revoke
            </Action>
          ),
        },
      ]}
    />
  );
}

function KeyState({ of }: { of: ApiKey }) {
  if (of.revokeTime) return <Badge tone="bad">revoked</Badge>;
  if (of.expireTime && Date.parse(of.expireTime) < Date.now()) return <Badge tone="warn">ended</Badge>;
  return <Badge tone="good">{of.expireTime ? `until ${moment(of.expireTime)}` : "holds"}</Badge>;
}

function limitsOf(key: ApiKey): string {
  const words = [
    key.requestsPerMinute ? `${count(key.requestsPerMinute)} calls a minute` : "",
    key.budgetDayMicroUsd ? `${money(key.budgetDayMicroUsd)} a day` : "",
    key.budgetMonthMicroUsd ? `${money(key.budgetMonthMicroUsd)} a month` : "",
  ];
  return words.filter(Boolean).join(", ") || "none";
}

function AuditTable({ rows }: { rows: AuditEvent[] }) {
  return (
    <Table<AuditEvent>
      caption="Audit log"
      rows={rows}
      id={(row) => `${row.time}${row.requestId}${row.method}`}
      columns={[
        { name: "When", head: true, cell: (row) => moment(row.time) },
        { name: "Who", cell: (row) => row.actor },
        { name: "Did", cell: (row) => (row.method ?? "").replace("understudy.v1.", "") },
        { name: "To", cell: (row) => row.resource || "–" },
        { name: "Outcome", cell: (row) => <Badge tone={row.code === "OK" ? "good" : "bad"}>{row.code}</Badge> },
        { name: "Request", cell: (row) => <code class="note">{row.requestId}</code> },
      ]}
    />
  );
}

const ROLES: readonly { value: Role; text: string }[] = [
  { value: "ROLE_VIEWER", text: "viewer: sees figures, no words of users" },
  { value: "ROLE_USER", text: "user: asks and gives feedback" },
  { value: "ROLE_OPERATOR", text: "operator: reads interactions, moves rollouts, loads, trains" },
  { value: "ROLE_ADMIN", text: "admin: everything" },
];

function CreateDialog({ onClose }: { onClose: () => void }) {
  const [name, setName] = useState("");
  const [role, setRole] = useState<string>("ROLE_USER");
  const [days, setDays] = useState("");
  const [rate, setRate] = useState("");
  const [budget, setBudget] = useState("");
  const [secret, setSecret] = useState("");
  const [copied, setCopied] = useState(false);
  const { run, busy, error } = useAction(async () => {
    const body = {
      displayName: name.trim(),
      role,
      ...(Number(days) > 0 ? { expireTime: new Date(Date.now() + Number(days) * 86_400_000).toISOString() } : {}),
      ...(Number(rate) > 0 ? { requestsPerMinute: Math.round(Number(rate)) } : {}),
      ...(budget !== "" ? { budgetDayMicroUsd: String(Math.round(Number(budget) * 1e6)) } : {}),
    };
    setSecret((await ask<CreatedKey>("/v1/apiKeys", { body })).secret ?? "");
  });
  if (secret) {
    return (
      <Dialog title="The key" onClose={onClose}>
        <p>This is the only time that it is shown. Keep it where secrets are kept.</p>
        <pre class="text secret" tabIndex={0}>
          {secret}
        </pre>
        <div class="dialog-buttons">
          <span role="status">{copied ? "Copied." : ""}</span>
          <button type="button" class="button plain" onClick={() => void navigator.clipboard.writeText(secret).then(() => setCopied(true))}>
            Copy
          </button>
          <button type="button" class="button primary" onClick={onClose}>
            I have kept it
          </button>
        </div>
      </Dialog>
    );
  }
  return (
    <Dialog title="Make a key" onClose={onClose}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          if (!busy) void run();
        }}
      >
        <Field label="What it is for">
          {(id) => <input id={id} required maxLength={128} value={name} onInput={(event) => setName(event.currentTarget.value)} />}
        </Field>
        <Select label="Role" value={role} options={ROLES} onChange={setRole} />
        <NumberField label="Ends after days" hint="Empty: never." value={days} onChange={setDays} />
        <NumberField label="Calls a minute" hint="Empty: no limit." value={rate} onChange={setRate} />
        <NumberField label="US dollars a day" hint="Empty: as configured for keys." value={budget} onChange={setBudget} step="0.01" />
        <Problem error={error} what="keys" />
        <div class="dialog-buttons">
          <button type="button" class="button plain" onClick={onClose}>
            Cancel
          </button>
          <button type="submit" class="button primary" aria-disabled={busy || undefined}>
            Make it
          </button>
        </div>
      </form>
    </Dialog>
  );
}

function NumberField({ label, hint, value, onChange, step = "1" }: { label: string; hint: string; value: string; onChange: (value: string) => void; step?: string }) {
  return (
    <Field label={label} hint={hint}>
      {(id, described) => (
        <input id={id} aria-describedby={described} type="number" min="0" step={step} value={value} onInput={(event) => onChange(event.currentTarget.value)} />
      )}
    </Field>
  );
}
