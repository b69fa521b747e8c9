// Every model tried by hand: its task decides the form.

import { $, api, button, element, enc, events, fill, guarded, models, percent, word } from "./page.js";

const select = $("#playground-model");
const FORMS = {
  TASK_TEXT_CLASSIFICATION: "classify", TASK_ZERO_SHOT_CLASSIFICATION: "classify",
  TASK_EMBEDDING: "compare", TASK_RERANK: "compare",
  TASK_TABULAR_REGRESSION: "tabular", TASK_TABULAR_CLASSIFICATION: "tabular",
  TASK_GENERATION: "chat", TASK_TENSOR: "tensor",
};
let known = [];

export async function load() {
  known = await models();
  const groups = new Map();
  for (const m of known) groups.set(m.task, [...(groups.get(m.task) ?? []), m.name]);
  const before = select.value;
  select.replaceChildren(...[...groups].map(([task, names]) => element("optgroup", "", { label: word(task, "TASK_") },
    ...names.map((name) => element("option", name, { value: name })))));
  if (known.some((m) => m.name === before)) select.value = before;
  $("#playground-empty").hidden = known.length > 0;
  await choose();
}

async function choose() {
  const model = known.find((m) => m.name === select.value);
  for (const form of document.querySelectorAll("[data-play]")) form.hidden = form.dataset.play !== FORMS[model?.task];
  $("#playground-about").textContent = model?.description ?? "";
  $("#labels").hidden = model?.task !== "TASK_ZERO_SHOT_CLASSIFICATION";
  if (FORMS[model?.task] === "tabular") await loadFeatures();
  if (FORMS[model?.task] === "tensor") await loadTensors();
}
select.addEventListener("change", guarded(choose));

/** Labels or texts with their scores as bars. */
function scores(into, pairs, show) {
  const most = Math.max(...pairs.map(([, score]) => score), 1e-9);
  into.replaceChildren(element("ul", "", { class: "scores" }, ...pairs.map(([text, score]) => element("li", "", {},
    element("span", text, { dir: "auto" }),
    element("meter", "", { min: 0, max: Math.max(1, most), value: Math.max(0, score), "aria-hidden": "true" }),
    element("span", show(score), { class: "number" })))));
}

$("#classify-form").addEventListener("submit", guarded(async () => {
  const form = $("#classify-form");
  const zero = !$("#labels").hidden;
  const answer = await api("POST", "/api/v1/classification:classify", {
    model: select.value, texts: [form.text.value],
    ...(zero && { candidate_labels: form.labels.value.split(",").map((l) => l.trim()).filter(Boolean) }),
  });
  scores($("#classify-out"), answer.results[0].labels.map((l) => [l.label, l.score]), percent);
}));

$("#rerank-form").addEventListener("submit", guarded(async () => {
  const form = $("#rerank-form");
  const documents = form.documents.value.split("\n").filter((line) => line.trim());
  const answer = await api("POST", "/api/v1/rerank", { model: select.value, query: form.query.value, documents });
  scores($("#rerank-out"), answer.results.map((r) => [documents[r.index], r.score]), (s) => s.toFixed(4));
}));

// Rows.

let features = [], target = null;
async function loadFeatures() {
  // Those of the model before must not be sent to this one; nor may a late answer replace a newer one.
  const name = select.value;
  $("#tabular-form").hidden = true;
  $("#tabular-out").replaceChildren();
  const found = await api("GET", `/api/v1/tabular/${enc(name)}/signature`);
  if (select.value !== name) return;
  ({ features, target } = found);
  $("#tabular-form").hidden = false;
  $("#features").replaceChildren(element("legend", "Features"), ...features.map((f) => {
    const range = f.min !== undefined && f.max !== undefined ? ` (${Number(f.min.toPrecision(4))} to ${Number(f.max.toPrecision(4))})` : "";
    let input;
    if (f.categories?.length) {
      input = element("select", "", {}, ...(f.nullable ? [element("option", "missing", { value: "" })] : []),
        ...f.categories.map((c) => element("option", c, { value: c })));
      input.selectedIndex = f.nullable ? 1 : 0;
    } else {
      input = element("input", "", { type: "number", step: "any", required: !f.nullable, placeholder: f.nullable ? "missing" : null });
      if (range) input.value = Number(((f.min + f.max) / 2).toPrecision(4));
    }
    input.name = `feature:${f.name}`;
    const unit = f.unit ? `, ${f.unit}` : "";
    return element("label", `${f.name.replaceAll("_", " ")}${unit}${range}`, { title: f.description || null }, input);
  }));
}

$("#tabular-form").addEventListener("submit", guarded(async () => {
  const form = $("#tabular-form");
  const values = {};
  for (const f of features) {
    const given = form.elements[`feature:${f.name}`].value;
    values[f.name] = given === "" ? null : f.categories?.length ? given : Number(given);
  }
  const answer = await api("POST", "/api/v1/tabular:predict", { model: select.value, rows: [values] });
  const one = answer.predictions[0];
  const out = $("#tabular-out");
  if (one.label) scores(out, one.probabilities.map((p) => [p.label, p.score]), percent);
  else out.replaceChildren(element("p", [target?.name?.replaceAll("_", " "), target?.unit].filter(Boolean).join(", "), { class: "note" }), element("p", one.value.toLocaleString("en", { maximumFractionDigits: 4 }), { class: "figure" }));
  out.append(...one.warnings.map((w) => element("p", w, { class: "note" })));
}));

// Tensors, as the Open Inference Protocol has them.

async function loadTensors() {
  const name = select.value;
  $("#tensor-form").hidden = true;
  const facts = await api("GET", `/v2/models/${enc(name)}`);
  if (select.value !== name) return;
  $("#tensor-form").hidden = false;
  const inputs = facts.inputs.map((i) => {
    const shape = i.shape.map((n) => (n < 1 ? 1 : n));
    const count = shape.reduce((a, b) => a * b, 1);
    return { name: i.name, datatype: i.datatype, shape, data: new Array(Math.min(count, 4096)).fill(0) };
  });
  $("#tensor-form").inputs.value = JSON.stringify(inputs, null, 1);
}

$("#tensor-form").addEventListener("submit", guarded(async () => {
  const inputs = JSON.parse($("#tensor-form").inputs.value);
  const answer = await api("POST", `/v2/models/${enc(select.value)}/infer`, { inputs });
  $("#tensor-out").replaceChildren(element("pre", JSON.stringify(answer.outputs, null, 1)));
}));

// Chats.

let messages = [];
let running = null;
const ROLES = { user: "CHAT_ROLE_USER", assistant: "CHAT_ROLE_ASSISTANT", system: "CHAT_ROLE_SYSTEM" };
$("#chat-new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  $("#chat-turns").replaceChildren();
});
$("#chat-stop").addEventListener("click", () => running?.abort());

$("#chat-form").addEventListener("submit", guarded(async () => {
  const form = $("#chat-form");
  const text = form.message.value;
  const answer = element("p", "", { class: "answer", dir: "auto" });
  const note = element("p", "…", { class: "note" });
  const turn = element("article", "", { class: "turn", "aria-busy": "true" }, element("p", text, { class: "question", dir: "auto" }), answer, note);
  $("#chat-turns").append(turn);
  const asked = [...messages, ["user", text]];
  const system = form.system.value.trim() ? [["system", form.system.value]] : [];
  const sampling = { temperature: Number(form.temperature.value), max_tokens: Number(form.length.value) };
  const request = {
    model: select.value, sampling,
    messages: [...system, ...asked].map(([role, said]) => ({ role: ROLES[role], content: [{ text: said }] })),
  };
  running = new AbortController();
  $("#chat-stop").hidden = false;
  const began = performance.now();
  let [said, first, tokens] = ["", 0, 0];
  form.message.value = "";
  try {
    for await (const event of events("/api/v1/generation:chatStream", { request }, running.signal)) {
      if (event.text) { first ||= performance.now() - began; said += event.text.text; answer.textContent = said; }
      if (event.usage) tokens = event.usage.completion_tokens;
    }
    messages = [...asked, ["assistant", said]];
    const speed = tokens / Math.max(0.001, (performance.now() - began) / 1000);
    note.textContent = `${tokens} tokens · first after ${Math.round(first)} ms · ${speed.toFixed(1)} tokens/s`;
  } catch (error) {
    note.textContent = error.name === "AbortError" ? "Stopped" : "Failed";
    form.message.value ||= text;
    throw error;
  } finally {
    running = null;
    $("#chat-stop").hidden = true;
    turn.removeAttribute("aria-busy");
    form.message.focus();
  }
}));
for (const form of [$("#ask-form"), $("#chat-form")]) {
  const field = form.question ?? form.message;
  field.addEventListener("keydown", (event) => { // Enter sends, Shift+Enter begins a line
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
  });
}
