// A page over /openapi.json: operations by their tags, fields as a tree that opens where it is asked to, and a form that sends a request.
"use strict";

const VERBS = ["get", "post", "put", "patch", "delete"];
const MAX_SHOWN = 200000; // characters of an answer
const $ = (id) => document.getElementById(id);
let api;

/** Makes an element: attributes by their names, "on..." as listeners, the rest as children. Texts are never read as HTML. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== undefined && child !== ""));
  return element;
}

/** A comment's text: `code` between backticks, and lists of lines that begin with "- ". */
function prose(text) {
  const inline = (line) => line.split(/`([^`]+)`/).map((part, at) => (at % 2 ? make("code", {}, part) : part));
  const box = document.createDocumentFragment();
  for (const block of text.split("\n\n")) {
    const lines = block.split("\n");
    if (lines.every((line) => line.startsWith("- "))) box.append(make("ul", {}, ...lines.map((line) => make("li", {}, ...inline(line.slice(2))))));
    else box.append(make("p", {}, ...inline(block)));
  }
  return box;
}

const named = (reference) => reference.split("/").pop();

/** The thing itself where there is a reference to it. */
function resolve(thing) {
  if (!thing || !thing.$ref) return thing || {};
  return thing.$ref.slice(2).split("/").reduce((at, step) => at[step], api);
}

/** A schema without its references and without "or null". */
function bare(schema) {
  if (schema.anyOf) return bare({ ...schema.anyOf[0], description: schema.description });
  if (schema.$ref) return { ...resolve(schema), description: schema.description || resolve(schema).description, title: named(schema.$ref) };
  return schema;
}

function typeOf(schema) {
  const plain = bare(schema);
  if (plain.enum) return plain.title || "one of " + plain.enum.join(", ");
  if (plain.type === "array") return "list of " + typeOf(plain.items || {});
  if (plain.type === "object" && plain.additionalProperties && typeof plain.additionalProperties === "object")
    return "map to " + typeOf(plain.additionalProperties);
  const type = Array.isArray(plain.type) ? plain.type.filter((one) => one !== "null").join(" or ") : plain.type || "any";
  return plain.title || (plain.format ? `${type} (${plain.format})` : type);
}

/** The fields of a schema; those of inner messages are made when they are opened. */
function fields(schema) {
  const plain = bare(schema);
  if (plain.type === "array") return fields(plain.items || {});
  if (plain.enum) return make("div", {}, prose(plain.description || plain.enum.join(", ")));
  if (!plain.properties) return make("p", { class: "dim" }, typeOf(schema));
  const list = make("ul", { class: "fields" });
  for (const [name, field] of Object.entries(plain.properties)) {
    const inner = bare(bare(field).type === "array" ? bare(field).items || {} : field);
    const notes = [typeOf(field), (plain.required || []).includes(name) ? "required" : "", field.readOnly ? "read-only" : ""].filter(Boolean).join(", ");
    const head = [make("code", {}, name), " ", make("span", { class: "dim" }, notes)];
    const about = prose(field.description || "");
    if (!inner.properties && !(inner.enum && inner.title)) {
      list.append(make("li", {}, ...head, about));
      continue;
    }
    const more = make("details", { ontoggle: () => more.open && more.childElementCount === 1 && more.append(fields(field)) }, make("summary", {}, ...head));
    list.append(make("li", {}, more, about));
  }
  return list;
}

const pretty = (value) => JSON.stringify(value, null, 2);

function parameterTable(parameters) {
  const rows = parameters.map((one) =>
    make("tr", {}, make("td", {}, make("code", {}, one.name)), make("td", {}, `${one.in}, ${typeOf(one.schema)}${one.required ? ", required" : ""}`), make("td", {}, prose(one.description || ""))),
  );
  const head = make("tr", {}, ...["Name", "Where and what", "Meaning"].map((text) => make("th", { scope: "col" }, text)));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
}

function responses(operation) {
  const rows = Object.entries(operation.responses).map(([status, response]) => {
    const plain = resolve(response);
    const content = Object.entries(plain.content || {});
    const detail = make("details", {}, make("summary", {}, content.map(([type]) => type).join(" or ") || "no body"));
    detail.addEventListener("toggle", () => {
      if (!detail.open || detail.childElementCount > 1) return;
      for (const [, media] of content) {
        if (media.example !== undefined) detail.append(make("pre", { tabindex: "0" }, pretty(media.example)));
        detail.append(fields(media["x-item-schema"] || media.schema));
      }
    });
    return make("tr", {}, make("td", {}, make("code", {}, status)), make("td", {}, prose(plain.description), detail));
  });
  return make("table", {}, make("tbody", {}, ...rows));
}

/** What the form says, as the parts of a request. */
function request(path, verb, form, body) {
  const values = new FormData(form);
  let url = path;
  const query = new URLSearchParams();
  for (const [name, value] of values) {
    const [place, key] = [name.slice(0, 1), name.slice(2)];
    if (place === "p") url = url.replace(`{${key}}`, encodeURIComponent(value));
    else if (value !== "") for (const one of String(value).split("\n")) query.append(key, one);
  }
  const text = query.toString();
  const headers = { accept: "application/json" };
  if ($("key").value) headers.authorization = "Bearer " + $("key").value;
  if (body) headers["content-type"] = "application/json";
  return { url: url + (text ? "?" + text : ""), options: { method: verb.toUpperCase(), headers, body: body ? body.value : undefined } };
}

function curl({ url, options }) {
  const quote = (text) => "'" + text.replaceAll("'", "'\\''") + "'";
  const parts = ["curl", "-X", options.method, quote(location.origin + url)];
  if (options.headers.authorization) parts.push("-H", '"authorization: Bearer $UNDERSTUDY_KEY"');
  if (options.body !== undefined) parts.push("-H", quote("content-type: application/json"), "-d", quote(options.body.replace(/\s*\n\s*/g, " ")));
  return parts.join(" ");
}

/** Reads an answer as it comes, so that streams show at once. */
async function show(response, out, state, began) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    text += decoder.decode(value, { stream: true });
    if (text.length <= MAX_SHOWN) out.textContent = text;
  }
  state.textContent = `${response.status} ${response.statusText} in ${Math.round(performance.now() - began)} ms`;
  if ((response.headers.get("content-type") || "").startsWith("application/json")) {
    try {
      text = pretty(JSON.parse(text));
    } catch {
      state.textContent += ", which is no valid JSON";
    }
  }
  out.textContent = text.slice(0, MAX_SHOWN) + (text.length > MAX_SHOWN ? "\n… and more" : "");
}

function tryIt(path, verb, operation) {
  const form = make("form", {});
  for (const one of operation.parameters || []) {
    const input = make("input", { name: (one.in === "path" ? "p:" : "q:") + one.name, value: one.example ?? "", required: one.required });
    form.append(make("label", {}, one.name, input));
  }
  const media = operation.requestBody && operation.requestBody.content["application/json"];
  const examples = Object.entries((media && media.examples) || {});
  let body;
  const box = make("div", {});
  if (media) {
    body = make("textarea", { spellcheck: "false" });
    body.value = examples.length ? pretty(examples[0][1].value) : "{}";
    const choose = make("select", { onchange: () => (body.value = pretty(examples[choose.selectedIndex][1].value)) }, ...examples.map(([name]) => make("option", {}, name)));
    if (examples.length > 1) form.append(make("label", {}, "Example", choose));
    box.append(make("label", {}, "Body", body));
  }
  const state = make("p", { role: "status", class: "dim" });
  const out = make("pre", { hidden: true, tabindex: "0", "aria-label": "Answer" });
  const line = make("pre", { hidden: true, tabindex: "0", "aria-label": "The same with curl" });
  const send = async () => {
    const asked = request(path, verb, form, body);
    out.hidden = line.hidden = false;
    out.textContent = "";
    line.textContent = curl(asked);
    state.textContent = "Waiting…";
    try {
      const began = performance.now();
      await show(await fetch(asked.url, asked.options), out, state, began);
    } catch (error) {
      state.textContent = "The request failed: " + error.message;
    }
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  box.append(make("p", {}, make("button", { type: "button", onclick: () => form.reportValidity() && send() }, "Send")), state, line, out);
  return make("div", {}, form, box);
}

function details(path, verb, operation) {
  const box = make("div", {}, prose(operation.description || ""));
  const role = operation["x-required-role"];
  const rpc = operation["x-grpc-method"];
  box.append(make("p", { class: "dim" }, role ? `Role: ${role} or more. ` : "No key needed. ", rpc ? "gRPC: " : "", rpc ? make("code", {}, rpc) : ""));
  if (operation.parameters) box.append(make("h3", {}, "Parameters"), parameterTable(operation.parameters));
  if (operation.requestBody) box.append(make("h3", {}, "Body"), fields(operation.requestBody.content["application/json"].schema));
  box.append(make("h3", {}, "Answers"), responses(operation), make("h3", {}, "Try it"), tryIt(path, verb, operation));
  return box;
}

function entry(path, verb, operation) {
  const head = make("summary", {}, make("span", { class: "verb " + verb }, verb), make("span", { class: "path" }, path), make("span", { class: "dim" }, operation.summary));
  const box = make("details", { class: "operation", id: operation.operationId }, head);
  box.addEventListener("toggle", () => {
    if (!box.open) return;
    if (box.childElementCount === 1) box.append(details(path, verb, operation));
    history.replaceState(null, "", "#" + operation.operationId);
  });
  box.dataset.words = [verb, path, operation.operationId, operation.summary, operation["x-grpc-method"]].join(" ").toLowerCase();
  return box;
}

function openNamed() {
  const wanted = location.hash && $(decodeURIComponent(location.hash.slice(1)));
  if (wanted && wanted.matches("details")) {
    wanted.open = true;
    wanted.scrollIntoView();
  }
}

function filter() {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const box of document.querySelectorAll("details.operation")) box.hidden = !words.every((word) => box.dataset.words.includes(word));
  for (const section of document.querySelectorAll("main section")) section.hidden = !section.querySelector("details.operation:not([hidden])");
}

async function start() {
  const response = await fetch("/openapi.json");
  if (!response.ok) throw new Error(`openapi.json answered ${response.status}`);
  api = await response.json();
  $("about").textContent = api.info.description;
  for (const tag of api.tags) {
    const section = make("section", { id: "tag-" + tag.name.replaceAll(" ", "-") }, make("h2", {}, tag.name), prose(tag.description || ""));
    for (const [path, item] of Object.entries(api.paths))
      for (const verb of VERBS) if (item[verb] && item[verb].tags[0] === tag.name) section.append(entry(path, verb, item[verb]));
    $("operations").append(section);
    $("tags").append(make("a", { href: "#" + section.id }, tag.name));
  }
  $("state").remove();
  $("filter").addEventListener("input", filter);
  $("tools").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", openNamed);
  openNamed();
}

start().catch((error) => {
  $("state").textContent = "The document could not be loaded: " + error.message;
});
