import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { after, describe, it } from "node:test";

import { connect } from "../src/node.js";
import { apiKey, setting } from "./environment.js";
import { failure, sharedTests } from "./shared.js";

sharedTests("gRPC", connect(setting("UNDERSTUDY_ADDRESS"), { apiKey }));

describe("what goes with a call", () => {
  it("has the key, metadata and a deadline", async () => {
    const client = connect(setting("UNDERSTUDY_SCRIPTED"), { apiKey: "und_a_b", metadata: { "x-request-id": "ts-1" } });
    const { model, usage } = await client.inference.embed({ texts: ["ok:ts"] });
    client.close();
    assert.deepEqual([model?.name, model?.version], ["Bearer und_a_b", "ts-1"]);
    const left = Number(usage?.inputTokens);
    assert.ok(left > 30_000 && left <= 60_000, `${left} ms of 60 s were left`);
  });

  it("is encrypted where asked, to a server that the authorities vouch for", async () => {
    const address = setting("UNDERSTUDY_SCRIPTED_TLS");
    const client = connect(address, { tls: { ca: readFileSync(setting("UNDERSTUDY_CA")) } });
    assert.equal((await client.embed(["ok:ts-tls"])).length, 1);
    client.close();
    const stranger = connect(address, { tls: true });
    assert.equal((await failure(() => stranger.embed(["ok:ts-tls"]))).code, "UNAVAILABLE");
    stranger.close();
  });
});

describe("a call without a key", { skip: apiKey ? false : "the server asks for none" }, () => {
  it("is refused", async () => {
    const client = connect(setting("UNDERSTUDY_ADDRESS"));
    const error = await failure(() => client.embed(["x"]));
    client.close();
    assert.deepEqual([error.code, error.reason], ["UNAUTHENTICATED", "UNAUTHENTICATED"]);
  });
});

describe("what is sent again", () => {
  const client = connect(setting("UNDERSTUDY_SCRIPTED"));
  after(() => client.close());
  const calls = async (name: string): Promise<number> => ((await client.embed([`ok:${name}`]))[0]?.[0] ?? NaN) - 1;

  for (const [what, times] of [["again", 3], ["full", 2]] as const) {
    it(`${what}: ${times} times, then answered`, async () => {
      assert.equal((await client.embed([`${what}:ts-${what}-${process.pid}`]))[0]?.[0], times);
    });
  }
  for (const what of ["plain", "paid", "later"]) {
    it(`${what}: once`, async () => {
      const error = await failure(() => client.embed([`${what}:ts-${what}-${process.pid}`]));
      assert.deepEqual([error.code, error.metadata["model"]], ["UNAVAILABLE", "scripted"]);
      assert.equal(await calls(`ts-${what}-${process.pid}`), 1);
    });
  }
  it("feedback, with an id by which it is kept once", async () => {
    assert.notEqual((await client.feedback("one", { rating: 5 })).feedbackId, "");
  });
});
