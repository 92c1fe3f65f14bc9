/** What stands around every call of both kinds of connection: headers, the deadline, sending again, one kind of error. */

import type { Transport } from "@connectrpc/connect";

import { fromThrown } from "./errors.js";

export interface Policy {
  /** Sent with every call as a bearer token. */
  apiKey?: string | undefined;
  /** Sent with every call. */
  metadata?: Readonly<Record<string, string>> | undefined;
  /** Bounds a call with all its attempts; 60,000 by default. Other streams than Generate have no such bound. */
  timeoutMs?: number | undefined;
  /** How often a call is sent at most, the first time included; 4 by default, 1 never sends again. Streams are sent once. */
  attempts?: number | undefined;
}

const TIMEOUT_MS = 60_000;
const ATTEMPTS = 4;

export function withPolicy(inner: Transport, policy: Policy): Transport {
  const headers = (given: HeadersInit | undefined): Headers => {
    const all = new Headers(policy.metadata);
    if (policy.apiKey) {
      all.set("authorization", `Bearer ${policy.apiKey}`);
    }
    new Headers(given).forEach((value, name) => all.set(name, value));
    return all;
  };
  const limit = policy.timeoutMs ?? TIMEOUT_MS;
  const attempts = policy.attempts ?? ATTEMPTS;

  return {
    async unary(method, signal, timeoutMs, header, input, contextValues) {
      const end = performance.now() + (timeoutMs ?? limit);
      for (let attempt = 1; ; attempt++) {
        const left = end - performance.now();
        try {
          return await inner.unary(method, signal, Math.max(1, Math.ceil(left)), headers(header), input, contextValues);
        } catch (thrown) {
          const error = fromThrown(thrown);
          // Spread, so that those that were refused together do not come back together.
          const wait = (error.retryAfterMs ?? 0) * (1 + Math.random() / 4);
          if (!error.retryable || attempt >= attempts || wait >= end - performance.now()) {
            throw error;
          }
          await pause(wait, signal);
        }
      }
    },
    async stream(method, signal, timeoutMs, header, input, contextValues) {
      try {
        // Logs that are followed, and bulk runs, last as long as they last.
        const bound = timeoutMs ?? (method.name === "Generate" ? limit : undefined);
        const answer = await inner.stream(method, signal, bound, headers(header), input, contextValues);
        return { ...answer, message: renamed(answer.message) };
      } catch (thrown) {
        throw fromThrown(thrown);
      }
    },
  };
}

async function* renamed<T>(messages: AsyncIterable<T>): AsyncGenerator<T> {
  try {
    yield* messages;
  } catch (thrown) {
    throw fromThrown(thrown);
  }
}

function pause(milliseconds: number, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve, reject) => {
    const stop = (): void => {
      clearTimeout(timer);
      reject(fromThrown(new DOMException("The call was ended by its signal.", "AbortError")));
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    signal?.addEventListener("abort", stop, { once: true });
    if (signal?.aborted) {
      stop();
    }
  });
}
