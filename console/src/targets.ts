// What the playground can ask, and how each is asked.
import { ask, stream } from "./api";
import { percent } from "./format";
import type { ClassifyAnswer, Cost, Decision, EmbedAnswer, GeneratePart, GenerationTimings, RunAnswer } from "./types";

/** A skill by its name, or a local model as "local:<name>". */
export interface Target {
  id: string;
  kind: "skill" | "model";
  task: string;
  labels: readonly string[];
}

/** What the form holds. */
export interface Given {
  text: string;
  system: string;
  /** Whether the text is a message of a conversation, for those that write. */
  chat: boolean;
  preference: string;
  temperature: string;
  maxTokens: string;
}

/** What has come of a request so far. Times are of `performance.now()`. */
export interface Asked {
  target: Target;
  text: string;
  running: boolean;
  stopped?: boolean;
  sentMs: number;
  firstMs?: number;
  doneMs?: number;
  model?: string;
  decision?: Decision;
  cost?: Cost;
  quality?: number;
  interactionId?: string;
  labels?: readonly { name: string; score: number }[];
  timings?: GenerationTimings;
  tokens?: { read: number; written: number };
  finish?: string;
}

type Show = (change: Partial<Asked>) => void;

/** Asks, and shows what comes as it comes. Throws ApiError. */
export async function askTarget(target: Target, given: Given, show: Show, signal: AbortSignal): Promise<void> {
  if (target.task === "text-generation") await generate(target, given, show, signal);
  else if (target.kind === "skill") await run(target, given, show, signal);
  else if (target.task === "text-classification") await classify(target, given, show, signal);
  else await embed(target, given, show, signal);
}

const selector = (target: Target): { name: string } => ({ name: target.id.replace("local:", "") });

async function generate(target: Target, given: Given, show: Show, signal: AbortSignal): Promise<void> {
  const messages = [...(given.system.trim() ? [{ role: "system", content: given.system }] : []), { role: "user", content: given.text }];
  const body = {
    ...(target.kind === "skill" ? { skill: target.id, preference: given.preference } : { model: selector(target) }),
    ...(given.chat ? { chat: { messages } } : { prompt: given.text }),
    sampling: {
      ...(given.temperature === "" ? {} : { temperature: Number(given.temperature) }),
      ...(Number(given.maxTokens) > 0 ? { maxTokens: Number(given.maxTokens) } : {}),
    },
  };
  let text = "";
  for await (const part of stream<GeneratePart>("/v1/inference:generate", { body, signal })) {
    for (const delta of part.deltas ?? []) {
      if (delta.text) {
        if (!text) show({ firstMs: performance.now() });
        text += delta.text;
      }
      if (delta.finishReason && delta.finishReason !== "FINISH_REASON_UNSPECIFIED") show({ finish: String(delta.finishReason) });
    }
    show({ text, ...storyOf(part) });
  }
}

function storyOf(part: GeneratePart): Partial<Asked> {
  return {
    ...(part.model?.name ? { model: part.model.name } : {}),
    ...(part.decision ? { decision: part.decision } : {}),
    ...(part.cost ? { cost: part.cost } : {}),
    ...(part.quality === undefined || part.quality === null ? {} : { quality: Number(part.quality) }),
    ...(part.interactionId ? { interactionId: part.interactionId } : {}),
    ...(part.timings ? { timings: part.timings } : {}),
    ...(part.usage ? { tokens: { read: Number(part.usage.inputTokens ?? 0), written: Number(part.usage.outputTokens ?? 0) } } : {}),
  };
}

async function run(target: Target, given: Given, show: Show, signal: AbortSignal): Promise<void> {
  const body = { skill: target.id, inputs: [{ text: given.text }], preference: given.preference };
  const result = (await ask<RunAnswer>("/v1/inference:run", { body, signal })).results?.[0];
  if (!result) return;
  if (result.error?.message) throw new Error(result.error.message);
  show({
    text: result.outputText ?? "",
    labels: (result.labels ?? []).map((one) => ({ name: one.name ?? "", score: Number(one.score ?? 0) })),
    decision: result.decision ?? undefined,
    cost: result.cost ?? undefined,
    quality: result.quality === undefined || result.quality === null ? undefined : Number(result.quality),
    interactionId: result.interactionId,
    tokens: { read: Number(result.usage?.inputTokens ?? 0), written: Number(result.usage?.outputTokens ?? 0) },
  });
}

async function classify(target: Target, given: Given, show: Show, signal: AbortSignal): Promise<void> {
  const answer = await ask<ClassifyAnswer>("/v1/inference:classify", { body: { model: selector(target), inputs: [{ text: given.text }] }, signal });
  const result = answer.results?.[0];
  if (result?.error?.message) throw new Error(result.error.message);
  const labels = (result?.labels ?? []).map((one) => ({ name: one.name ?? "", score: Number(one.score ?? 0) }));
  show({ text: labels[0] ? `${labels[0].name}, ${percent(labels[0].score)}` : "", labels, model: answer.model?.name });
}

async function embed(target: Target, given: Given, show: Show, signal: AbortSignal): Promise<void> {
  const answer = await ask<EmbedAnswer>("/v1/inference:embed", { body: { model: selector(target), texts: [given.text] }, signal });
  const result = answer.results?.[0];
  if (result?.error?.message) throw new Error(result.error.message);
  const vector = (result?.embedding ?? []).map(Number);
  const shown = vector.slice(0, 8).map((value) => value.toFixed(4)).join(", ");
  show({ text: `A vector of ${vector.length} numbers: [${shown}${vector.length > 8 ? ", …" : ""}]`, model: answer.model?.name });
}
