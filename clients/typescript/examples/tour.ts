/** Every kind of call: `node dist/examples/tour.js`, with UNDERSTUDY_ADDRESS and UNDERSTUDY_API_KEY where they are not the defaults. */

import { connect, fromStatus, Thumb, UnderstudyError } from "../src/node.js";

const client = connect(process.env["UNDERSTUDY_ADDRESS"] ?? "127.0.0.1:50051", { apiKey: process.env["UNDERSTUDY_API_KEY"] });
try {
  const vectors = await client.embed(["where is my card ?", "how do i reset my password ?", "money transfer late"]);
  console.log(`${vectors.length} vectors of ${vectors[0]?.length}`);

  const request = { input: { case: "prompt" as const, value: "tell" }, sampling: { temperature: 0, maxTokens: 12 } };
  for await (const response of client.generate(request)) {
    process.stdout.write(response.deltas.map((delta) => delta.text).join(""));
  }
  console.log();

  const [answer] = await client.run("text-classification", ["where is my card ?"]);
  if (answer === undefined || answer.error) {
    throw answer?.error ? fromStatus(answer.error) : new Error("no answer");
  }
  console.log(`${answer.outputText}, by ${answer.decision?.candidate}`);
  console.log("feedback", (await client.feedback(answer.interactionId, { thumb: Thumb.UP })).feedbackId);

  try {
    await client.embed(["x"], { model: { name: "nobody" } });
  } catch (error) {
    if (error instanceof UnderstudyError && error.code === "NOT_FOUND") {
      console.log(error.reason, error.metadata["model"]); // MODEL_NOT_FOUND nobody
    }
  }

  try {
    const long = { input: { case: "prompt" as const, value: "tell" }, sampling: { ignoreEos: true } };
    await client.inference.generateText(long, { timeoutMs: 50 });
  } catch (error) {
    if (error instanceof UnderstudyError && error.code === "DEADLINE_EXCEEDED") {
      console.log(error.reason, "in the stage", error.metadata["stage"]);
    }
  }
} finally {
  client.close();
}
