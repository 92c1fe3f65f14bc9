/** What both kinds of connection must do: gRPC in Node, and REST. */

import assert from "node:assert/strict";
import { after, describe, it } from "node:test";

import { Thumb, type UnderstudyClient } from "../src/client.js";
import { UnderstudyError } from "../src/errors.js";
import { expected } from "./environment.js";

export function near(got: ArrayLike<number>, wanted: readonly number[]): void {
  assert.equal(got.length, wanted.length);
  wanted.forEach((value, i) => assert.ok(Math.abs((got[i] ?? NaN) - value) < 1e-6, `${got[i]} at ${i}, expected ${value}`));
}

export async function failure(work: () => Promise<unknown>): Promise<UnderstudyError> {
  try {
    await work();
  } catch (error) {
    assert.ok(error instanceof UnderstudyError, String(error));
    return error;
  }
  return assert.fail("it did not fail");
}

const ENDLESS = { input: { case: "prompt" as const, value: "tell" }, sampling: { temperature: 0, ignoreEos: true } };

async function drain(messages: AsyncIterable<unknown>): Promise<void> {
  for await (const _ of messages);
}

export function sharedTests(name: string, client: UnderstudyClient): void {
  describe(name, () => {
    after(() => client.close());

    it("embeds as Python does", async () => {
      const vectors = await client.embed(expected.texts);
      assert.equal(vectors.length, expected.embeddings.length);
      vectors.forEach((vector, i) => near(vector, expected.embeddings[i] ?? []));
    });

    it("classifies as Python does", async () => {
      const found = await client.classify(expected.texts);
      found.forEach((labels, i) => {
        const wanted = expected.labels[i] ?? [];
        assert.deepEqual(labels.map((one) => one.name), wanted.map(([label]) => label));
        near(labels.map((one) => one.score), wanted.map(([, score]) => score));
      });
    });

    it("runs a skill, and takes feedback on its answer", async () => {
      const results = await client.run(expected.skill, expected.texts);
      assert.deepEqual(results.map((one) => one.outputText), expected.answers);
      assert.ok(results.every((one) => one.decision?.local));
      const kept = await client.feedback(results[0]?.interactionId ?? "", { thumb: Thumb.UP, comment: "from TypeScript" });
      assert.notEqual(kept.feedbackId, "");
      assert.equal(kept.comment, "from TypeScript");
    });

    it("streams the whole text of the same seed", async () => {
      const { temperature, seed, max_tokens: maxTokens } = expected.sampling;
      const sampling = { temperature, maxTokens, seed: BigInt(seed) };
      const input = { case: "prompt" as const, value: expected.prompt };
      let text = "";
      let tokens = 0n;
      for await (const response of client.generate({ input, sampling, model: { name: expected.model } })) {
        text += response.deltas.map((delta) => delta.text).join("");
        tokens = response.usage?.outputTokens ?? tokens;
      }
      assert.equal(text, expected.text);
      assert.equal(tokens, BigInt(maxTokens));
    });

    it("gives an unknown model its reason", async () => {
      const model = { name: "nobody" };
      const error = await failure(() => client.embed(["x"], { model }));
      assert.equal(error.code, "NOT_FOUND");
      assert.equal(error.reason, "MODEL_NOT_FOUND");
      assert.equal(error.metadata["model"], "nobody");
      assert.notEqual(error.requestId, "");
      const streamed = await failure(() => drain(client.generate({ input: { case: "prompt", value: "x" }, model })));
      assert.equal(streamed.reason, "MODEL_NOT_FOUND");
      const item = await failure(() => client.embed(["fine", ""]));
      assert.deepEqual([item.code, item.reason], ["INVALID_ARGUMENT", "INVALID_ARGUMENT"]);
    });

    it("says where a deadline passed", async () => {
      const error = await failure(() => drain(client.generate(ENDLESS, { timeoutMs: 100 })));
      assert.deepEqual([error.code, error.reason], ["DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"]);
      assert.notEqual(error.metadata["stage"] ?? "", "");
    });

    it("ends a stream that is left", async () => {
      // More than run at once: places that were not freed would keep the later ones from starting for 2,000 tokens of each before them.
      for (let i = 0; i < 12; i++) {
        for await (const response of client.generate(ENDLESS)) {
          if (response.deltas.length > 0) {
            break;
          }
        }
      }
      const leaving = new AbortController();
      const error = await failure(async () => {
        for await (const _ of client.generate(ENDLESS, { signal: leaving.signal })) {
          leaving.abort();
        }
      });
      assert.deepEqual([error.code, error.reason], ["CANCELLED", "CANCELLED"]);
    });

    it("reaches the other services", async () => {
      const { models } = await client.models.listModels({ loadedOnly: true });
      assert.ok(models.some((one) => one.name.startsWith(`models/${expected.model}/`)));
      const { model } = await client.models.getModel({ name: "models/embedder/versions/1" });
      assert.equal(model?.name, "models/embedder/versions/1");
    });
  });
}
