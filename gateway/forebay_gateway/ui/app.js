// The page talks to the gateway's REST paths alone. Text from the server is put into the page as
// text, never as HTML.

const $ = (selector) => document.querySelector(selector);
const notice = $("#notice");
const key = $("#key");
key.value = sessionStorage.getItem("forebay-key") ?? "";
$("#key-form").addEventListener("submit", (event) => event.preventDefault());
key.addEventListener("change", () => { sessionStorage.setItem("forebay-key", key.value); show(); });

function headers(extra = {}) {
  return key.value ? { authorization: `Bearer ${key.value}`, ...extra } : extra;
}

async function api(method, path, body) {
  const json = body === undefined ? {} : { "content-type": "application/json" };
  const response = await fetch(path, {
    method, headers: headers(json), body: body === undefined ? undefined : JSON.stringify(body),
  });
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error?.message ?? `HTTP ${response.status}`);
  return answer;
}

function element(tag, text = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function row(...cells) {
  const made = document.createElement("tr");
  for (const cell of cells) {
    const td = document.createElement("td");
    td.append(cell instanceof Node ? cell : document.createTextNode(cell ?? ""));
    made.append(td);
  }
  return made;
}

/** Run a handler; what goes wrong is said in the page's status line. */
function guarded(run) {
  return async (event) => {
    event?.preventDefault?.();
    notice.textContent = "";
    const button = event?.submitter;
    if (button) button.disabled = true;
    try { await run(event); } catch (error) { notice.textContent = error.message; }
    if (button) button.disabled = false;
  };
}

const enc = encodeURIComponent;

// Sections.

const loaders = {
  ask: loadBases, documents: loadDocuments, search: loadCollections, playground: loadModels,
  models: loadModels, usage: loadUsage,
};

function show() {
  const name = location.hash.slice(1) in loaders ? location.hash.slice(1) : "ask";
  for (const s of document.querySelectorAll("section")) s.classList.toggle("shown", s.id === name);
  for (const a of document.querySelectorAll("nav a")) {
    if (a.hash === `#${name}`) a.setAttribute("aria-current", "page");
    else a.removeAttribute("aria-current");
  }
  guarded(loaders[name])();
}
addEventListener("hashchange", () => { show(); $("#main").focus(); });

function fill(select, names) {
  const before = select.value;
  select.replaceChildren(...names.map((n) => element("option", n)));
  if (names.includes(before)) select.value = before;
}

async function loadBases() {
  const { knowledge_bases } = await api("GET", "/api/v1/knowledge");
  const names = knowledge_bases.map((b) => b.name);
  for (const select of document.querySelectorAll("select[name=base]")) fill(select, names);
  if (!names.length) notice.textContent = "There is no knowledge base yet: make one under Documents.";
}

// Ask.

let history = [];
$("#new-conversation").addEventListener("click", () => {
  history = [];
  $("#conversation").replaceChildren();
  $("#sources").replaceChildren();
});

$("#ask-form").addEventListener("submit", guarded(async () => {
  const form = $("#ask-form");
  const base = form.base.value;
  const question = form.question.value;
  const turn = element("div", "", { class: "turn" });
  const answer = element("p");
  const note = element("p", "Searching…", { class: "note" });
  turn.append(element("p", question, { class: "question" }), answer, note);
  $("#conversation").append(turn);
  let text = "";
  const citations = new Map();
  const began = performance.now();
  let first = 0;
  const draw = () => drawAnswer(answer, text, citations, base);
  for await (const event of events(`/api/v1/knowledge/${enc(base)}:askStream`, { question, history })) {
    if (event.sources) drawSources(event.sources.chunks, base);
    if (event.token) { first ||= performance.now() - began; text += event.token.text; draw(); }
    if (event.citation) { citations.set(event.citation.number, event.citation); draw(); }
    if (event.done) {
      const how = {
        ANSWER_METHOD_EXTRACTED: "Extracted: sentences of the documents, word by word",
        ANSWER_METHOD_WRITTEN: "Written by a language model",
        ANSWER_METHOD_NOT_FOUND: "Not in the documents",
      }[event.done.method];
      note.textContent = `${how} · first words after ${Math.round(first)} ms`;
    }
  }
  history.push({ role: "TURN_ROLE_USER", text: question }, { role: "TURN_ROLE_ASSISTANT", text });
  form.question.value = "";
  form.question.focus();
}));

/** Server-sent events of a POST. */
async function* events(path, body) {
  const response = await fetch(path, {
    method: "POST", headers: headers({ "content-type": "application/json" }), body: JSON.stringify(body),
  });
  if (!response.ok) throw new Error((await response.json()).error?.message ?? `HTTP ${response.status}`);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const frames = (rest + value).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      const data = frame.split("\n").find((line) => line.startsWith("data: "));
      if (!data) continue;
      const event = JSON.parse(data.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function drawAnswer(into, text, citations, base) {
  into.replaceChildren();
  for (const part of text.split(/(\[\d+\])/)) {
    const marker = /^\[(\d+)\]$/.exec(part);
    const citation = marker && citations.get(Number(marker[1]));
    if (!citation) { into.append(part); continue; }
    const link = element("button", part, {
      type: "button", class: citation.verified ? "cite" : "cite unverified",
      "aria-label": `Source ${marker[1]}: ${citation.name}, page ${citation.page}`,
    });
    link.addEventListener("click", guarded(() => open(base, citation)));
    into.append(link);
  }
}

function drawSources(chunks, base) {
  $("#sources").replaceChildren(...chunks.map((chunk) => {
    const item = document.createElement("li");
    const where = [chunk.name, chunk.page ? `page ${chunk.page}` : "", ...chunk.headings].filter(Boolean);
    const link = element("button", where.join(" · "), { type: "button", class: "cite" });
    link.addEventListener("click", guarded(() => open(base, chunk)));
    item.append(link, element("p", chunk.text.length > 300 ? `${chunk.text.slice(0, 300)}…` : chunk.text));
    return item;
  }));
}

/** Show a document's page with a span marked. Offsets count code points, as Python's do. */
async function open(base, span) {
  const path = `/api/v1/knowledge/${enc(base)}/documents/${enc(span.document)}?with_text=true`;
  const { document: facts, pages } = await api("GET", path);
  const page = pages.findLast((p) => p.start <= span.start) ?? pages[0];
  const letters = Array.from(page.text);
  const [from, to] = [span.start - page.start, span.end - page.start];
  $("#viewer-title").textContent = pages.length > 1 ? `${facts.name}, page ${page.number}` : facts.name;
  const mark = element("mark", letters.slice(from, to).join(""));
  $("#viewer-text").replaceChildren(letters.slice(0, from).join(""), mark, letters.slice(to).join(""));
  $("#viewer").showModal();
  mark.scrollIntoView({ block: "center" });
}

// Documents.

const busy = ["DOCUMENT_STATUS_QUEUED", "DOCUMENT_STATUS_PARSING", "DOCUMENT_STATUS_EMBEDDING"];

async function loadDocuments() {
  await loadBases();
  const base = $("#upload-form").base.value;
  if (!base) return;
  const { documents } = await api("GET", `/api/v1/knowledge/${enc(base)}/documents`);
  $("#document-rows").replaceChildren(...documents.map((d) => {
    const status = element("span", d.status.replace("DOCUMENT_STATUS_", "").toLowerCase());
    if (busy.includes(d.status)) status.textContent += ` ${Math.round(100 * d.progress)} %`;
    if (d.reason) { status.textContent += `: ${d.message}`; status.className = "failed"; }
    const remove = element("button", "Delete", { type: "button", class: "plain", "aria-label": `Delete ${d.name}` });
    remove.addEventListener("click", guarded(async () => {
      await api("DELETE", `/api/v1/knowledge/${enc(base)}/documents/${enc(d.id)}`);
      await loadDocuments();
    }));
    return row(d.name, status, d.pages || "", d.chunks, `${Math.ceil(d.size_bytes / 1024)} KiB`, remove);
  }));
  if (documents.some((d) => busy.includes(d.status)) && location.hash === "#documents") {
    clearTimeout(loadDocuments.timer);
    loadDocuments.timer = setTimeout(guarded(loadDocuments), 700);
  }
}
$("#upload-form").base.addEventListener("change", guarded(loadDocuments));

$("#base-form").addEventListener("submit", guarded(async () => {
  const form = $("#base-form");
  await api("POST", "/api/v1/knowledge", {
    knowledge_base: form.name.value, config: { language: form.language.value },
  });
  await loadBases();
  $("#upload-form").base.value = form.name.value;
  form.reset();
  await loadDocuments();
}));

$("#upload-form").addEventListener("submit", guarded(async () => {
  const form = $("#upload-form");
  const body = new FormData();
  body.append("knowledge_base", form.base.value);
  if (form.password.value) body.append("password", form.password.value);
  for (const file of form.files.files) body.append("files", file, file.name);
  const bar = $("#upload-progress");
  bar.hidden = false;
  await new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch() tells nothing of an upload's progress
    request.open("POST", "/api/v1/knowledge:upload");
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = (e) => { bar.value = e.total ? e.loaded / e.total : 0; };
    request.onload = () => {
      if (request.status < 300) { resolve(); return; }
      let text = `HTTP ${request.status}`;
      try { text = JSON.parse(request.responseText).error.message; } catch { /* no JSON */ }
      reject(new Error(text));
    };
    request.onerror = () => reject(new Error("The upload was cut off."));
    request.send(body);
  }).finally(() => { bar.hidden = true; });
  form.files.value = "";
  form.password.value = "";
  await loadDocuments();
}));

// Search.

async function loadCollections() {
  const { collections } = await api("GET", "/api/v1/collections");
  fill($("#search-form").collection, collections.map((c) => c.name));
  if (!collections.length) notice.textContent = "There is no collection yet.";
}

$("#search-form").addEventListener("submit", guarded(async () => {
  const form = $("#search-form");
  const { hits } = await api("POST", `/api/v1/collections/${enc(form.collection.value)}:search`, {
    text: form.text.value, mode: form.mode.value,
  });
  $("#hits").replaceChildren(...hits.map((hit) => {
    const item = element("li", `${hit.id} · ${hit.score.toFixed(4)}`);
    item.append(element("p", JSON.stringify(hit.payload ?? {}).slice(0, 400)));
    return item;
  }));
  if (!hits.length) notice.textContent = "Nothing was found.";
}));

// Models and the playground.

async function loadModels() {
  const { models } = await api("GET", "/api/v1/models");
  $("#model-rows").replaceChildren(...models.map((m) => row(
    m.name, m.task.replace("TASK_", "").toLowerCase().replaceAll("_", " "),
    m.versions.map((v) => `${v.version} (${v.state.replace("MODEL_STATE_", "").toLowerCase()})`).join(", "),
    m.description,
  )));
  for (const select of document.querySelectorAll("select[data-task]")) {
    const tasks = select.dataset.task.split(" ");
    fill(select, models.filter((m) => tasks.includes(m.task)).map((m) => m.name));
  }
  if ($("#tabular-form").model.value) await loadFeatures();
}

const percent = (x) => `${(100 * x).toFixed(1)} %`;

$("#classify-form").addEventListener("submit", guarded(async () => {
  const form = $("#classify-form");
  const answer = await api("POST", "/api/v1/classification:classify", {
    model: form.model.value, texts: [form.text.value],
  });
  $("#classify-out").textContent = answer.results[0].labels.map((l) => `${l.label}: ${percent(l.score)}`).join("\n");
}));

$("#rerank-form").addEventListener("submit", guarded(async () => {
  const form = $("#rerank-form");
  const documents = form.documents.value.split("\n").filter((line) => line.trim());
  const answer = await api("POST", "/api/v1/rerank", { model: form.model.value, query: form.query.value, documents });
  $("#rerank-out").textContent = answer.results.map((r) => `${r.score.toFixed(4)}  ${documents[r.index]}`).join("\n");
}));

let features = [];
async function loadFeatures() {
  const model = $("#tabular-form").model.value;
  ({ features } = await api("GET", `/api/v1/tabular/${enc(model)}/signature`));
  const box = $("#features");
  box.replaceChildren(element("legend", "Features"), ...features.map((f) => {
    const label = element("label", f.name);
    let input;
    if (f.categories?.length) {
      input = document.createElement("select");
      input.append(...f.categories.map((c) => element("option", c)));
    } else {
      input = element("input", "", { type: "number", step: "any", size: 8 });
      if (f.min !== undefined && f.max !== undefined) input.value = ((f.min + f.max) / 2).toPrecision(4);
      input.required = !f.nullable;
    }
    input.name = `feature:${f.name}`;
    label.append(input);
    return label;
  }));
}
$("#tabular-form").model.addEventListener("change", guarded(loadFeatures));

$("#tabular-form").addEventListener("submit", guarded(async () => {
  const form = $("#tabular-form");
  const values = {};
  for (const f of features) {
    const given = form.elements[`feature:${f.name}`].value;
    values[f.name] = given === "" ? null : f.categories?.length ? given : Number(given);
  }
  const answer = await api("POST", "/api/v1/tabular:predict", { model: form.model.value, rows: [values] });
  const one = answer.predictions[0];
  const lines = one.label ? one.probabilities.map((p) => `${p.label}: ${percent(p.score)}`) : [String(one.value)];
  $("#tabular-out").textContent = [...lines, ...one.warnings].join("\n");
}));

// Usage and metrics.

async function loadUsage() {
  const problems = [];
  const part = async (work) => { try { await work(); } catch (error) { problems.push(error.message); } };
  await part(async () => {
    const { rows: entries } = await api("GET", "/api/v1/usage:list");
    $("#usage-rows").replaceChildren(...entries.map((r) => row(
      r.day, r.model ? `${r.model}@${r.version}` : "", r.key_id, r.counters.calls, r.counters.items, r.counters.tokens,
    )));
  });
  await part(async () => {
    const text = await (await fetch("/metrics", { headers: headers() })).text();
    const count = new Map();
    const pattern = /^forebay_rpc_server_duration_seconds_(count|sum)\{code="(\w+)",method="([^"]+)"\} (\S+)$/gm;
    for (const [, what, code, method, value] of text.matchAll(pattern)) {
      const entry = count.get(`${method} ${code}`) ?? { method, code };
      entry[what] = Number(value);
      count.set(`${method} ${code}`, entry);
    }
    $("#metric-rows").replaceChildren(...[...count.values()].map((m) => row(
      m.method.slice(1), m.code, m.count, (1000 * m.sum / Math.max(1, m.count)).toFixed(1),
    )));
  });
  await part(async () => {
    const { keys } = await api("GET", "/api/v1/keys");
    $("#key-rows").replaceChildren(...keys.map((k) => row(
      k.id, k.name, k.scopes.map((s) => s.replace("KEY_SCOPE_", "").toLowerCase()).join(", "),
    )));
  });
  if (problems.length) notice.textContent = problems[0];
  clearTimeout(loadUsage.timer);
  if (location.hash === "#usage") loadUsage.timer = setTimeout(guarded(loadUsage), 3000);
}

show();
