// The gateway's REST API: one way to ask, one way to say what went wrong.

const KEY = "understudy.key";
let key = sessionStorage.getItem(KEY) ?? "";

/** Whether a key is kept for this tab. */
export const hasKey = (): boolean => key !== "";

/** Keeps a key until the tab is closed; empty forgets it. */
export function setKey(value: string): void {
  key = value.trim();
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** What the gateway answers instead of a result. */
export class ApiError extends Error {
  constructor(
    readonly http: number,
    readonly status: string,
    readonly reason: string,
    message: string,
    readonly help = "",
    readonly requestId = "",
  ) {
    super(message);
    this.name = "ApiError";
  }

  /** True where the server is older than this page, and does not know what was asked. */
  get tooOld(): boolean {
    return this.status === "UNIMPLEMENTED" || (this.http === 404 && (this.reason === "" || this.reason === "ROUTE_NOT_FOUND"));
  }
}

/** Query parameters; unset and empty ones are left out, lists are repeated. */
export type Query = Record<string, string | number | boolean | readonly string[] | undefined>;

interface Options {
  query?: Query;
  body?: unknown;
  method?: string;
  signal?: AbortSignal;
}

/** Asks and reads one JSON document. Throws ApiError. */
export async function ask<T>(path: string, options: Options = {}): Promise<T> {
  const answer = await send(path, options);
  return (await answer.json()) as T;
}

/** Asks, and gives each document of a newline-delimited stream as it comes. Throws ApiError, also in the middle. */
export async function* stream<T>(path: string, options: Options = {}): AsyncGenerator<T> {
  const answer = await send(path, options);
  const reader = answer.body?.pipeThrough(new TextDecoderStream()).getReader();
  if (!reader) return;
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      const lines = (rest + (value ?? "")).split("\n");
      rest = done ? "" : (lines.pop() ?? "");
      for (const line of lines) if (line.trim()) yield unwrap<T>(JSON.parse(line));
      if (done) return;
    }
  } finally {
    await reader.cancel().catch(() => undefined); // what is left of the stream is not wanted
  }
}

// grpc-gateway wraps what it streams: {"result": ...}, and {"error": ...} where the stream breaks.
function unwrap<T>(document: Record<string, unknown>): T {
  if (document.error !== undefined && document.error !== null) throw failure(0, document);
  return (document.result ?? document) as T;
}

async function send(path: string, { query = {}, body, method, signal }: Options): Promise<Response> {
  const url = new URL(path, location.origin);
  for (const [name, value] of Object.entries(query)) {
    if (Array.isArray(value)) for (const one of value as readonly string[]) url.searchParams.append(name, one);
    else if (value !== undefined && value !== "" && value !== false) url.searchParams.set(name, String(value));
  }
  const headers: Record<string, string> = { accept: "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let answer: Response;
  try {
    answer = await fetch(url, {
      method: method ?? (body === undefined ? "GET" : "POST"),
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new ApiError(0, "UNREACHABLE", "UNREACHABLE", "The gateway does not answer. Is it running? The page tries again by itself.");
  }
  if (!answer.ok) throw failure(answer.status, await answer.json().catch(() => ({})));
  return answer;
}

interface WireError {
  code?: number | string;
  status?: string;
  reason?: string;
  message?: string;
  help?: string;
  request_id?: string;
}

function failure(http: number, document: unknown): ApiError {
  const found = (document as { error?: WireError } | null)?.error ?? {};
  const message = found.message || (http ? `The gateway answered with HTTP ${http}.` : "The stream broke off.");
  return new ApiError(http || Number(found.code) || 0, found.status ?? "", found.reason ?? "", message, found.help ?? "", found.request_id ?? "");
}

/** Encodes each part of a resource name for a path: "skills/a b" -> "skills/a%20b". */
export const resource = (name: string): string => name.split("/").map(encodeURIComponent).join("/");
