import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { describe, it } from "node:test";

import { connect } from "../src/web.js";
import { apiKey, gateway } from "./environment.js";
import { failure, sharedTests } from "./shared.js";

if (gateway) {
  sharedTests("REST", connect({ baseUrl: gateway, apiKey }));
} else {
  it("REST", { skip: "UNDERSTUDY_GATEWAY is not set: there is no gateway" }, () => undefined);
}

interface Sent {
  url: string;
  init: RequestInit;
}

/** A client whose requests are kept, and answered by `answer`. */
function kept(answer: () => Response): [ReturnType<typeof connect>, Sent[]] {
  const sent: Sent[] = [];
  const fetch = (url: string | URL | Request, init: RequestInit = {}): Promise<Response> => {
    sent.push({ url: String(url), init });
    return Promise.resolve(answer());
  };
  return [connect({ baseUrl: "http://gateway/", apiKey: "und_a_b", fetch }), sent];
}

it("needs nothing of Node.js", () => {
  const seen = new Set<string>();
  const read = (file: URL): void => {
    if (!seen.has(file.href)) {
      seen.add(file.href);
      for (const [, name = ""] of readFileSync(file, "utf8").matchAll(/^(?:import|export) .*?from "([^"]+)"/gms)) {
        assert.doesNotMatch(name, /^node:|connect-node/, file.href);
        if (name.startsWith(".")) {
          read(new URL(name, file));
        }
      }
    }
  };
  read(new URL("../src/web.js", import.meta.url));
  assert.ok(seen.size > 10);
});

describe("requests over REST", () => {
  it("go where the protos say", async () => {
    const [client, sent] = kept(() => Response.json({}));
    await client.models.loadModel({ name: "models/a" });
    await client.models.loadModel({ name: "models/a/versions/2" });
    await client.models.listModels({ pageSize: 5, loadedOnly: true });
    await client.training.setSchedule({ schedule: { name: "skills/reply/schedule" } });
    await client.feedbackService.createFeedback({ feedback: { interactionId: "i" }, requestId: "r" });
    assert.deepEqual(
      sent.map(({ url, init }) => `${init.method} ${url.replace("http://gateway", "")} ${String(init.body)}`),
      [
        "POST /v1/models/a:load {}",
        "POST /v1/models/a/versions/2:load {}",
        "GET /v1/models?pageSize=5&loadedOnly=true null",
        'PUT /v1/skills/reply/schedule {}',
        'POST /v1/feedback?requestId=r {"interactionId":"i"}',
      ],
    );
    const headers = new Headers(sent[0]?.init.headers);
    assert.equal(headers.get("authorization"), "Bearer und_a_b");
    assert.ok(Number(headers.get("x-timeout-ms")) > 59_000);
  });

  it("that fill no path, or have none, are not sent", async () => {
    const [client, sent] = kept(() => Response.json({}));
    assert.equal((await failure(() => client.models.getModel({ name: "../../etc" }))).code, "INVALID_ARGUMENT");
    const many = client.inference.runMany((async function* () {})());
    assert.equal((await failure(async () => { for await (const _ of many); })).code, "UNIMPLEMENTED");
    assert.equal(sent.length, 0);
  });

  it("fail with the server's words, or say what answered instead", async () => {
    const error = { code: 503, status: "UNAVAILABLE", reason: "PROVIDER_UNAVAILABLE", message: "m", metadata: { a: "b" }, request_id: "q" };
    const [client] = kept(() => Response.json({ error }, { status: 503, headers: { "retry-after": "1", "retry-after-ms": "250" } }));
    const failed = await failure(() => client.embed(["x"]));
    assert.deepEqual(
      [failed.code, failed.reason, failed.message, failed.metadata, failed.requestId, failed.retryAfterMs],
      ["UNAVAILABLE", "PROVIDER_UNAVAILABLE", "m", { a: "b" }, "q", 250],
    );
    const [proxied] = kept(() => new Response("<html>", { status: 502 }));
    assert.match((await failure(() => proxied.embed(["x"]))).message, /HTTP 502/);
    const [down] = kept(() => { throw new TypeError("fetch failed"); });
    assert.equal((await failure(() => down.embed(["x"]))).code, "UNAVAILABLE");
  });

  it("stream over lines that are cut anywhere, to an error at the end", async () => {
    const lines = '{"result":{"deltas":[{"text":"a\u00e9"}]}}\n{"result":{"deltas":[{"text":"b"}]}}\n{"error":{"status":"INTERNAL","reason":"INTERNAL"}}\n';
    const bytes = new TextEncoder().encode(lines);
    const body = (): ReadableStream<Uint8Array> =>
      new ReadableStream({
        start(controller) {
          bytes.forEach((_, i) => controller.enqueue(bytes.slice(i, i + 1)));
          controller.close();
        },
      });
    const [client] = kept(() => new Response(body()));
    let text = "";
    const failed = await failure(async () => {
      for await (const response of client.generate({ input: { case: "prompt", value: "x" } })) {
        text += response.deltas[0]?.text;
      }
    });
    assert.deepEqual([text, failed.code], ["a\u00e9b", "INTERNAL"]);
  });
});
