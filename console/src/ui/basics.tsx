import type { ComponentChildren } from "preact";
import { useEffect, useId, useRef } from "preact/hooks";
import { ApiError } from "../api";
import { useSession } from "../session";
import type { Role } from "../types";

export type Tone = "plain" | "good" | "warn" | "bad" | "accent";

interface PageProps {
  title: string;
  /** What stands beside the title: filters, buttons. */
  tools?: ComponentChildren;
  /** One sentence under it. */
  lead?: ComponentChildren;
  children: ComponentChildren;
}

/** A page: its heading gets the focus when the reader comes from another page, so that a screen reader begins there. */
export function Page({ title, tools, lead, children }: PageProps) {
  const heading = useRef<HTMLHeadingElement>(null);
  useEffect(() => {
    document.title = `${title} · Understudy`;
    if (document.body.dataset.moved) heading.current?.focus({ preventScroll: true });
    document.body.dataset.moved = "yes";
    scrollTo(0, 0);
  }, [title]);
  return (
    <>
      <header class="page-head">
        <div>
          <h1 ref={heading} tabIndex={-1}>
            {title}
          </h1>
          {lead && <p class="lead">{lead}</p>}
        </div>
        {tools && <div class="tools">{tools}</div>}
      </header>
      {children}
    </>
  );
}

interface CardProps {
  title: string;
  note?: ComponentChildren;
  tools?: ComponentChildren;
  wide?: boolean;
  children: ComponentChildren;
}

export function Card({ title, note, tools, wide, children }: CardProps) {
  const id = useId();
  return (
    <section class={wide ? "card wide" : "card"} aria-labelledby={id}>
      <header class="card-head">
        <h2 id={id}>{title}</h2>
        {note && <span class="note">{note}</span>}
        {tools && <div class="tools">{tools}</div>}
      </header>
      {children}
    </section>
  );
}

export function Badge({ tone = "plain", children }: { tone?: Tone; children: ComponentChildren }) {
  return <span class={`badge ${tone}`}>{children}</span>;
}

/** A figure with its name. */
export function Stat({ label, value, note }: { label: string; value: ComponentChildren; note?: ComponentChildren }) {
  return (
    <div class="stat">
      <dt>{label}</dt>
      <dd>
        <span class="value">{value}</span>
        {note && <span class="note">{note}</span>}
      </dd>
    </div>
  );
}

/** Names and values, one a row. */
export function Facts({ of }: { of: readonly (readonly [string, ComponentChildren] | false | undefined)[] }) {
  return (
    <dl class="facts">
      {of.map((row) =>
        row ? (
          <div key={row[0]}>
            <dt>{row[0]}</dt>
            <dd>{row[1]}</dd>
          </div>
        ) : null,
      )}
    </dl>
  );
}

/** What went wrong, in words. `what` is what was asked for, as in "the timeline". */
export function Problem({ error, what }: { error: Error | undefined; what?: string }) {
  if (!error) return null;
  const known = error instanceof ApiError ? error : undefined;
  if (known?.tooOld) {
    return (
      <div class="problem" role="status">
        <p>The server is older than this page and does not know {what ?? "this"}. Upgrade the server to see it.</p>
      </div>
    );
  }
  const code = known?.reason || known?.status;
  return (
    <div class="problem bad" role="alert">
      <p>
        {code && <code>{code}</code>} {error.message}
      </p>
      {known?.help && <p>{known.help}</p>}
      {known?.requestId && <p class="note">Request {known.requestId}</p>}
    </div>
  );
}

/** Nothing is there: what to do about it. */
export function Empty({ children }: { children: ComponentChildren }) {
  return <div class="empty">{children}</div>;
}

/** While the first answer is on its way. */
export function Loading({ what }: { what: string }) {
  return (
    <p class="loading" role="status">
      Loading {what} …
    </p>
  );
}

/** Data, the problem, or that it is on its way: the three states of everything that is asked for. */
export function Loaded<T>({
  of,
  what,
  children,
}: {
  of: { data: T | undefined; error: Error | undefined };
  what: string;
  children: (data: T) => ComponentChildren;
}) {
  return (
    <>
      <Problem error={of.error} what={what} />
      {of.data !== undefined ? children(of.data) : of.error ? null : <Loading what={what} />}
    </>
  );
}

interface ActionProps {
  /** The least role that may do it. */
  role: Role;
  tone?: "plain" | "primary" | "danger";
  busy?: boolean;
  /** A fuller name for screen readers, where the text is short. */
  name?: string;
  /** Why it cannot be done now, whatever the role. */
  because?: string;
  type?: "button" | "submit";
  onPress?: () => void;
  children: ComponentChildren;
}

/** A button that says why it does nothing, where it does nothing. It stays in the order of focus, so that everybody finds the reason. */
export function Action({ role, tone = "plain", busy, name, because, type = "button", onPress, children }: ActionProps) {
  const session = useSession();
  const why = session.refusal(role) || because || "";
  const id = useId();
  return (
    <>
      <button
        type={type}
        class={`button ${tone}`}
        aria-label={name}
        aria-disabled={why || busy ? true : undefined}
        aria-describedby={why ? id : undefined}
        title={why || undefined}
        onClick={(event) => {
          if (why || busy) event.preventDefault();
          else onPress?.();
        }}
      >
        {children}
        {busy && <span class="spinner" aria-hidden="true" />}
      </button>
      {why && (
        <span id={id} class="sr">
          {why}
        </span>
      )}
    </>
  );
}

interface FieldProps {
  label: string;
  hint?: string;
  children: (id: string, describedBy: string | undefined) => ComponentChildren;
}

/** A label, its control, and a hint. */
export function Field({ label, hint, children }: FieldProps) {
  const id = useId();
  return (
    <div class="field">
      <label for={id}>{label}</label>
      {children(id, hint ? `${id}-hint` : undefined)}
      {hint && (
        <span class="hint" id={`${id}-hint`}>
          {hint}
        </span>
      )}
    </div>
  );
}

export interface Choice {
  value: string;
  text: string;
}

export function Select({ label, value, options, onChange }: { label: string; value: string; options: readonly Choice[]; onChange: (value: string) => void }) {
  return (
    <Field label={label}>
      {(id) => (
        <select id={id} value={value} onChange={(event) => onChange(event.currentTarget.value)}>
          {options.map((one) => (
            <option key={one.value} value={one.value}>
              {one.text}
            </option>
          ))}
        </select>
      )}
    </Field>
  );
}

/** A share of a whole as a bar; its words stand beside it. */
export function Meter({ share, tone = "accent", label }: { share: number; tone?: Tone; label: string }) {
  const width = `${Math.min(1, Math.max(0, share)) * 100}%`;
  return (
    <span class={`meter ${tone}`} role="img" aria-label={label}>
      <span style={{ width }} />
    </span>
  );
}
