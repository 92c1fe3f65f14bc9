import { useState } from "preact/hooks";
import { hasKey, setKey } from "./api";
import { roleWord, useSession } from "./session";
import { Facts, Field, Problem } from "./ui/basics";
import { Dialog } from "./ui/dialog";

/** Shows who the caller is, and takes another key. */
export function KeyDialog({ onClose }: { onClose: () => void }) {
  const { caller, error, locked, refresh } = useSession();
  const [text, setText] = useState("");
  const take = (value: string): void => {
    setKey(value);
    refresh();
    onClose();
  };
  return (
    <Dialog title="Key" onClose={onClose}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          if (text.trim()) take(text);
        }}
      >
        {caller && (
          <Facts
            of={[
              ["Caller", caller.name],
              ["Role", roleWord(caller.role)],
              ["Skills", caller.skills?.length ? caller.skills.map((one) => one.replace("skills/", "")).join(", ") : "all"],
              ["Keys", caller.keysRequired ? "asked for" : "not asked for on this server"],
            ]}
          />
        )}
        {!locked && <Problem error={error} what="keys" />}
        <Field label="API key" hint="Kept in this tab until it is closed, and sent to this gateway alone.">
          {(id, hint) => (
            <input
              id={id}
              aria-describedby={hint}
              type="password"
              autocomplete="off"
              spellcheck={false}
              placeholder="und_…"
              value={text}
              onInput={(event) => setText(event.currentTarget.value)}
            />
          )}
        </Field>
        <div class="dialog-buttons">
          {hasKey() && (
            <button type="button" class="button plain" onClick={() => take("")}>
              Forget the key
            </button>
          )}
          <button type="button" class="button plain" onClick={onClose}>
            Cancel
          </button>
          <button type="submit" class="button primary">
            Use this key
          </button>
        </div>
      </form>
    </Dialog>
  );
}
