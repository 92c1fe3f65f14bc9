// The gateway through OpenAI's own client for Node.js, unchanged. Arguments: base URL, the local model's whole answer, its part before a tool
// call. Ends with 0 where all holds.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, said, before] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Where is my order?" }];
const schema = {
  type: "object",
  properties: { city: { enum: ["Oslo", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", parameters: schema } }];

async function chat() {
  const { data, response } = await client.chat.completions.create({ model: "scripted", messages, temperature: 0 }).withResponse();
  assert.equal(data.choices[0].message.content, said);
  assert.equal(response.headers.get("x-understudy-route"), "local:scripted@1");
}

async function stream() {
  for (const [model, wanted] of [["scripted", said], ["writer", "echo Where is my order?"]]) {
    const chunks = [];
    const options = { include_usage: true };
    for await (const chunk of await client.chat.completions.create({ model, messages, temperature: 0, stream: true, stream_options: options })) {
      chunks.push(chunk);
    }
    assert.equal(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), wanted);
    assert.ok(chunks.at(-1).usage.total_tokens > 0);
    assert.ok(chunks.at(-1).understudy.route);
  }
}

async function callTools() {
  const answer = await client.chat.completions.create({ model: "scripted", messages, temperature: 0, tools });
  const [call] = answer.choices[0].message.tool_calls;
  assert.deepEqual(JSON.parse(call.function.arguments), { city: "Oslo" });
  const result = { role: "tool", tool_call_id: call.id, content: '{"celsius": 3}' };
  const again = await client.chat.completions.create({
    model: "scripted", messages: [...messages, answer.choices[0].message, result], temperature: 0, tools,
  });
  assert.equal(again.choices[0].message.content, before);
  const runner = client.chat.completions.stream({ model: "scripted", messages, temperature: 0, tools });
  const final = await runner.finalChatCompletion();
  assert.equal(final.choices[0].message.tool_calls[0].function.name, "weather");
}

async function structured() {
  const answer = await client.chat.completions.parse({
    model: "scripted", messages, temperature: 2, seed: 1, max_tokens: 300,
    response_format: { type: "json_schema", json_schema: { name: "trip", strict: true, schema } },
  });
  assert.ok(["Oslo", "Rome"].includes(JSON.parse(answer.choices[0].message.content).city));
}

async function embeddings() {
  const packed = await client.embeddings.create({ model: "embedder", input: ["a card", "money"] });
  const plain = await client.embeddings.create({ model: "embedder", input: ["a card", "money"], encoding_format: "float" });
  assert.equal(packed.data.length, 2);
  assert.deepEqual([...packed.data[1].embedding], plain.data[1].embedding.map(Math.fround));
}

async function models() {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert.ok(ids.includes("writer") && ids.includes("scripted") && ids.includes("vendor/m-1"));
  assert.equal((await client.models.retrieve("vendor/m-1")).owned_by, "vendor");
}

async function errors() {
  await assert.rejects(client.chat.completions.create({ model: "nope", messages }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, "model_not_found");
    return true;
  });
  const failing = await client.chat.completions.create({ model: "writer", messages: [{ role: "user", content: "break" }], stream: true });
  await assert.rejects(async () => {
    for await (const chunk of failing) assert.ok(chunk);
  }, OpenAI.APIError);
}

for (const part of [chat, stream, callTools, structured, embeddings, models, errors]) {
  await part();
  console.log(`${part.name}: good`);
}
