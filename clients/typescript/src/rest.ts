/**
 * A transport of Connect over the gateway's REST paths, for browsers: plain fetch and JSON, paths and verbs from the protos' own
 * google.api.http, streams as one JSON document a line.
 */

import {
  create,
  createRegistry,
  fromJson,
  getOption,
  toJson,
  type DescMessage,
  type DescMethod,
  type JsonObject,
  type JsonValue,
  type MessageInitShape,
  type MessageShape,
} from "@bufbuild/protobuf";
import type { Transport } from "@connectrpc/connect";

import { codeNamed, UnderstudyError } from "./errors.js";
import { http } from "./gen/google/api/annotations_pb.js";
import type { HttpRule } from "./gen/google/api/http_pb.js";
import { file_google_rpc_error_details } from "./gen/google/rpc/error_details_pb.js";

/** Fields of a newer server are left out; the errors of items have details of these types. */
const READ = { ignoreUnknownFields: true, registry: createRegistry(file_google_rpc_error_details) };

export interface RestOptions {
  /** Address of the gateway, for example "https://understudy.example.com"; "" for the page's own. */
  baseUrl: string;
  /** Instead of the browser's own. */
  fetch?: typeof globalThis.fetch | undefined;
}

interface HttpRequest {
  verb: string;
  path: string;
  body: JsonValue | undefined;
}

/** Where a request goes: the first binding whose path its fields fill. Throws UNIMPLEMENTED for methods that stream both ways: they have none. */
export function httpRequest(method: DescMethod, message: JsonObject): HttpRequest {
  const main = getOption(method, http);
  const rules = [main, ...main.additionalBindings];
  if (typeof main.pattern.value !== "string") {
    throw new UnderstudyError({ code: "UNIMPLEMENTED", message: `${method.name} has no REST path. Call it over gRPC.` });
  }
  for (const rule of rules) {
    const found = bound(rule, message);
    if (found !== undefined) {
      return found;
    }
  }
  const fields = main.pattern.value.match(/\{[^}]*\}/g)?.join(", ") ?? "";
  throw new UnderstudyError({
    code: "INVALID_ARGUMENT",
    reason: "INVALID_ARGUMENT",
    message: `the request does not fill the path ${main.pattern.value}; expected ${fields}.`,
  });
}

function bound(rule: HttpRule, message: JsonObject): HttpRequest | undefined {
  const template = typeof rule.pattern.value === "string" ? rule.pattern.value : "";
  const rest = structuredClone(message);
  let fits = true;
  const path = template.replace(/\{([^}=]+)(?:=([^}]*))?\}/g, (_, field: string, pattern = "*") => {
    const value = takeField(rest, field.split(".").map(camel));
    const form = new RegExp(`^${String(pattern).split("*").map(escaped).join("[^/]+")}$`);
    fits &&= form.test(value);
    return value.split("/").map(encodeURIComponent).join("/");
  });
  if (!fits) {
    return undefined;
  }
  const verb = rule.pattern.case?.toUpperCase() ?? "POST";
  if (rule.body === "*") {
    return { verb, path, body: rest };
  }
  const field = camel(rule.body);
  const body = rule.body === "" ? undefined : (rest[field] ?? {});
  delete rest[field];
  const query = new URLSearchParams(flat(rest)).toString();
  return { verb, path: query === "" ? path : `${path}?${query}`, body };
}

export function createRestTransport(options: RestOptions): Transport {
  const send = options.fetch ?? globalThis.fetch.bind(globalThis);

  /** Throws what the server says of a request that it refuses, and UNAVAILABLE where there is no answer. */
  const ask = async <I extends DescMessage>(call: Call<I>, clock: Clock): Promise<Response> => {
    const input: I = call.method.input;
    const message = toJson(input, create(input, call.input)) as JsonObject;
    const { verb, path, body } = httpRequest(call.method, message);
    const headers = new Headers(call.header);
    if (call.timeoutMs !== undefined) {
      headers.set("x-timeout-ms", String(Math.ceil(call.timeoutMs)));
    }
    if (body !== undefined) {
      headers.set("content-type", "application/json");
    }
    let answer: Response;
    try {
      const text = body === undefined ? null : JSON.stringify(body);
      answer = await send(options.baseUrl.replace(/\/$/, "") + path, { method: verb, headers, body: text, signal: clock.signal });
    } catch (thrown) {
      throw clock.explain(thrown);
    }
    if (!answer.ok) {
      throw refusal(await json(answer, clock), answer);
    }
    return answer;
  };

  return {
    async unary(method, signal, timeoutMs, header, input) {
      const clock = new Clock(signal, timeoutMs);
      try {
        const answer = await ask({ method, timeoutMs, header, input }, clock);
        const message = fromJson(method.output, await json(answer, clock), READ);
        return { stream: false, service: method.parent, method, header: answer.headers, trailer: new Headers(), message };
      } finally {
        clock.stop();
      }
    },
    async stream(method, signal, timeoutMs, header, input) {
      const clock = new Clock(signal, timeoutMs);
      const inputs = input[Symbol.asyncIterator]();
      const first = await inputs.next();
      try {
        const answer = await ask({ method, timeoutMs, header, input: first.done ? undefined : first.value }, clock);
        const message = documents(method.output, answer, clock);
        return { stream: true, service: method.parent, method, header: answer.headers, trailer: new Headers(), message };
      } catch (thrown) {
        clock.stop();
        throw thrown;
      }
    },
  };
}

interface Call<I extends DescMessage> {
  method: DescMethod & { input: I };
  timeoutMs: number | undefined;
  header: HeadersInit | undefined;
  input: MessageInitShape<I> | undefined;
}

/** The deadline of a call and the caller's own signal, as one. */
class Clock {
  readonly signal: AbortSignal;
  readonly #ending = new AbortController();
  readonly #given: AbortSignal | undefined;
  readonly #timer: ReturnType<typeof setTimeout> | undefined;
  #late = false;

  constructor(given: AbortSignal | undefined, timeoutMs: number | undefined) {
    this.#given = given;
    this.signal = given === undefined ? this.#ending.signal : AbortSignal.any([given, this.#ending.signal]);
    if (timeoutMs !== undefined) {
      this.#timer = setTimeout(() => {
        this.#late = true;
        this.#ending.abort();
      }, timeoutMs);
    }
  }

  /** Ends the timer; with `leave` the request too. */
  stop(leave = false): void {
    clearTimeout(this.#timer);
    if (leave) {
      this.#ending.abort();
    }
  }

  /** What a failed fetch, or a failed read, means. */
  explain(thrown: unknown): UnderstudyError {
    if (thrown instanceof UnderstudyError) {
      return thrown;
    }
    if (this.#late) {
      return new UnderstudyError({ code: "DEADLINE_EXCEEDED", message: "the deadline passed before the answer came.", cause: thrown });
    }
    if (this.#given?.aborted) {
      return new UnderstudyError({ code: "CANCELLED", message: "the call was ended by its signal.", cause: thrown });
    }
    return new UnderstudyError({ code: "UNAVAILABLE", message: `the gateway does not answer: ${String(thrown)}`, cause: thrown });
  }
}

async function json(answer: Response, clock: Clock): Promise<JsonValue> {
  try {
    return JSON.parse(await answer.text()) as JsonValue;
  } catch (thrown) {
    throw thrown instanceof SyntaxError
      ? new UnderstudyError({ code: "UNKNOWN", message: `HTTP ${answer.status}, and no JSON: this is not the gateway.`, cause: thrown })
      : clock.explain(thrown);
  }
}

/** The messages of a stream: `{"result": ...}` a line, or `{"error": ...}` on the last. Leaving the loop ends the request. */
async function* documents<O extends DescMessage>(output: O, answer: Response, clock: Clock): AsyncGenerator<MessageShape<O>> {
  const reader = answer.body?.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (reader !== undefined) {
      const { done, value } = await reader.read();
      const lines = (rest + (value ?? "")).split("\n");
      rest = done ? "" : (lines.pop() ?? "");
      for (const line of lines.filter((one) => one.trim() !== "")) {
        const document = JSON.parse(line) as JsonObject;
        if (document["error"] !== undefined) {
          throw refusal(document, answer);
        }
        yield fromJson(output, document["result"] ?? {}, READ);
      }
      if (done) {
        return;
      }
    }
  } catch (thrown) {
    throw clock.explain(thrown);
  } finally {
    clock.stop(true);
  }
}

/** The gateway's error form: {"error": {"status", "reason", "message", "metadata", "request_id"}}. */
function refusal(document: JsonValue, answer: Response): UnderstudyError {
  const error = (document as { error?: Record<string, JsonValue> } | null)?.error ?? {};
  const text = (name: string): string => (typeof error[name] === "string" ? error[name] : "");
  const milliseconds = answer.headers.get("retry-after-ms");
  const seconds = answer.headers.get("retry-after");
  return new UnderstudyError({
    code: codeNamed(text("status")),
    message: text("message") || `HTTP ${answer.status}`,
    reason: text("reason"),
    metadata: (error["metadata"] ?? {}) as Record<string, string>,
    requestId: text("request_id") || (answer.headers.get("x-request-id") ?? ""),
    retryAfterMs: milliseconds !== null ? Number(milliseconds) : seconds !== null ? Number(seconds) * 1000 : undefined,
  });
}

function takeField(message: JsonObject, path: string[]): string {
  const [first = "", ...more] = path;
  const value = message[first];
  if (more.length > 0) {
    return typeof value === "object" && value !== null && !Array.isArray(value) ? takeField(value, more) : "";
  }
  delete message[first];
  return value === undefined || value === null ? "" : String(value);
}

function flat(message: JsonObject, prefix = ""): [string, string][] {
  return Object.entries(message).flatMap(([name, value]): [string, string][] => {
    if (Array.isArray(value)) {
      return value.map((one) => [prefix + name, String(one)]);
    }
    return typeof value === "object" && value !== null ? flat(value, `${prefix}${name}.`) : [[prefix + name, String(value)]];
  });
}

function escaped(text: string): string {
  return text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
}

function camel(name: string): string {
  return name.replace(/_(.)/g, (_, letter: string) => letter.toUpperCase());
}
