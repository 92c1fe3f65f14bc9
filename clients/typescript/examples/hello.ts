import { connect } from "understudy";

const client = connect("127.0.0.1:50051");

const vectors = await client.embed(["Where is my card?", "I lost my wallet"]);
console.log(`${vectors.length} vectors of ${vectors[0]?.length}`);

const request = { input: { case: "prompt" as const, value: "Once upon a time" }, sampling: { maxTokens: 20 } };
for await (const response of client.generate(request)) {
  process.stdout.write(response.deltas.map((delta) => delta.text).join(""));
}
client.close();
