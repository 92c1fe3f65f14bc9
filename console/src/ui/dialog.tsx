import type { ComponentChildren } from "preact";
import { useEffect, useId, useRef, useState } from "preact/hooks";
import { useAction } from "../hooks";
import { Field, Problem } from "./basics";

interface DialogProps {
  title: string;
  onClose: () => void;
  children: ComponentChildren;
}

/** A modal dialog of the browser: focus stays in it, Escape closes it, and focus goes back to where it came from. */
export function Dialog({ title, onClose, children }: DialogProps) {
  const dialog = useRef<HTMLDialogElement>(null);
  const id = useId();
  useEffect(() => {
    const shown = dialog.current;
    const before = document.activeElement as HTMLElement | null;
    shown?.showModal();
    return () => {
      shown?.close();
      before?.focus();
    };
  }, []);
  return (
    <dialog ref={dialog} aria-labelledby={id} onCancel={(event) => (event.preventDefault(), onClose())}>
      <h2 id={id}>{title}</h2>
      {children}
    </dialog>
  );
}

interface ConfirmProps {
  title: string;
  /** What will happen, in words. */
  children: ComponentChildren;
  verb: string;
  danger?: boolean;
  /** Whether a reason is asked for, for the audit trail. */
  reason?: boolean;
  act: (reason: string) => Promise<void>;
  onClose: () => void;
}

/** Asks before something is done, and says where it failed. */
export function Confirm({ title, children, verb, danger, reason, act, onClose }: ConfirmProps) {
  const [words, setWords] = useState("");
  const { run, busy, error } = useAction(act);
  const submit = async (event: Event): Promise<void> => {
    event.preventDefault();
    if (!busy && (await run(words.trim()))) onClose();
  };
  return (
    <Dialog title={title} onClose={onClose}>
      <form onSubmit={(event) => void submit(event)}>
        <div class="dialog-text">{children}</div>
        {reason && (
          <Field label="Reason" hint="Kept in the audit trail.">
            {(id, hint) => (
              <textarea id={id} aria-describedby={hint} rows={2} required value={words} onInput={(event) => setWords(event.currentTarget.value)} />
            )}
          </Field>
        )}
        <Problem error={error} />
        <div class="dialog-buttons">
          <button type="button" class="button plain" onClick={onClose}>
            Cancel
          </button>
          <button type="submit" class={`button ${danger ? "danger" : "primary"}`} aria-disabled={busy || undefined}>
            {verb}
          </button>
        </div>
      </form>
    </Dialog>
  );
}
