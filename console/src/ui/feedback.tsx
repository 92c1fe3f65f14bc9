import { useState } from "preact/hooks";
import { ask } from "../api";
import { useAction } from "../hooks";
import { useSession } from "../session";
import { Action, Field, Problem } from "./basics";

type Thumb = "" | "THUMB_UP" | "THUMB_DOWN";

/** Thumb, rating, correction and comment on an interaction. */
export function FeedbackForm({ interaction, onDone, brief }: { interaction: string; onDone?: () => void; brief?: boolean }) {
  const [thumb, setThumb] = useState<Thumb>("");
  const [rating, setRating] = useState("");
  const [correction, setCorrection] = useState("");
  const [comment, setComment] = useState("");
  const [kept, setKept] = useState("");
  const { refusal } = useSession();
  const { run, busy, error } = useAction(async (given: Thumb) => {
    const body = {
      interactionId: interaction,
      ...(given ? { thumb: given } : {}),
      ...(rating ? { rating: Number(rating) } : {}),
      ...(correction.trim() ? { correction: correction.trim() } : {}),
      ...(comment.trim() ? { comment: comment.trim() } : {}),
    };
    await ask("/v1/feedback", { body });
    setKept(`Kept${given ? (given === "THUMB_UP" ? ": liked" : ": disliked") : ""}. Thank you.`);
    onDone?.();
  });
  const said = thumb || rating || correction.trim() || comment.trim();
  const press = (pressed: Exclude<Thumb, "">): void => {
    const next = thumb === pressed ? "" : pressed;
    setThumb(next);
    if (brief && next) void run(next);
  };
  const why = refusal("ROLE_USER");
  return (
    <form
      class="feedback"
      aria-label="Give feedback"
      onSubmit={(event) => {
        event.preventDefault();
        if (said && !why && !busy) void run(thumb);
      }}
    >
      <div class="thumbs" role="group" aria-label="Thumb">
        {(["THUMB_UP", "THUMB_DOWN"] as const).map((one) => (
          <button key={one} type="button" class="button plain" aria-pressed={thumb === one} aria-disabled={why ? true : undefined} title={why || undefined} onClick={() => !why && !busy && press(one)}>
            {one === "THUMB_UP" ? "Good" : "Not good"}
          </button>
        ))}
        <span role="status">{kept}</span>
      </div>
      {!brief && (
        <>
          <Field label="Rating">
            {(id) => (
              <select id={id} value={rating} onChange={(event) => setRating(event.currentTarget.value)}>
                <option value="">none</option>
                {["5 – perfect", "4", "3", "2", "1 – useless"].map((text) => (
                  <option key={text} value={text[0]}>
                    {text}
                  </option>
                ))}
              </select>
            )}
          </Field>
          <Field label="Correction" hint="What the answer should have been: the right label, or the right text.">
            {(id, hint) => <textarea id={id} aria-describedby={hint} rows={2} value={correction} onInput={(event) => setCorrection(event.currentTarget.value)} />}
          </Field>
          <Field label="Comment">{(id) => <input id={id} value={comment} onInput={(event) => setComment(event.currentTarget.value)} />}</Field>
          <Action role="ROLE_USER" tone="primary" type="submit" busy={busy} because={said ? "" : "Say something first."}>
            Send feedback
          </Action>
        </>
      )}
      <Problem error={error} what="feedback" />
    </form>
  );
}
