// Knowledge bases and their documents: made, uploaded, watched, removed.

import { $, again, api, badge, bases, button, element, enc, guarded, headers, row, rows, say } from "./page.js";
import { openDocument } from "./viewer.js";

const form = $("#upload-form");
const BUSY = ["DOCUMENT_STATUS_QUEUED", "DOCUMENT_STATUS_PARSING", "DOCUMENT_STATUS_EMBEDDING"];

export async function load() {
  const found = await bases();
  form.hidden = !found.length;
  $("#document-table").hidden = !found.length;
  if (!load.before) $("#base-box").open = !found.length; // afterwards as the person left it
  load.before = true;
  if (!found.length) { $("#base-facts").textContent = ""; return; }
  await refresh();
}

async function refresh() {
  const base = form.base.value;
  const [{ documents }, { knowledge_base: facts }] = await Promise.all([
    api("GET", `/api/v1/knowledge/${enc(base)}/documents`), api("GET", `/api/v1/knowledge/${enc(base)}`),
  ]);
  $("#base-facts").textContent = `${facts.documents} documents, ${facts.chunks} chunks, embedded by ${facts.config.embedding_model}`;
  rows($("#document-rows"), documents.map((d) => drawn(base, d)), "No document yet. Upload one above.");
  if (documents.some((d) => BUSY.includes(d.status))) again("documents", refresh, 700);
}

function drawn(base, d) {
  const path = `/api/v1/knowledge/${enc(base)}/documents/${enc(d.id)}`;
  const act = (text, run) => button(text, async () => { await run(); await load(); }, { "aria-label": `${text} ${d.name}` });
  const actions = element("span", "", { class: "actions" });
  if (!BUSY.includes(d.status)) actions.append(act("Read again", () => again_(path, d)));
  actions.append(act("Delete", async () => {
    if (confirm(`Delete ${d.name} with everything that was made of it?`)) await api("DELETE", path);
  }));
  const ready = d.status === "DOCUMENT_STATUS_READY";
  const name = ready ? button(d.name, () => openDocument(base, d.id), { class: "cite", "aria-label": `Open ${d.name}` }) : d.name;
  return row(name, status(d), d.pages || "", ready ? d.chunks : "", size(d.size_bytes), actions);
}

async function again_(path, d) {
  const locked = d.reason === "ENCRYPTED" || d.reason === "WRONG_PASSWORD";
  const password = locked ? prompt(`Password of ${d.name}`) : "";
  if (password === null) return;
  await api("POST", `${path}:reingest`, { password });
}

function status(d) {
  const text = d.status.replace("DOCUMENT_STATUS_", "").toLowerCase();
  const box = element("span", "", { class: "status" });
  if (BUSY.includes(d.status)) {
    box.append(badge(text), element("progress", "", { max: 1, value: d.progress, "aria-label": `${d.name}: ${text}` }));
  } else if (d.status === "DOCUMENT_STATUS_FAILED") box.append(badge("failed", "bad"), element("span", d.message, { class: "failed" }));
  else box.append(badge(text, "good"));
  return box;
}

function size(bytes) {
  return bytes < 1 << 20 ? `${Math.ceil(bytes / 1024)}\u00a0KiB` : `${(bytes / (1 << 20)).toFixed(1)}\u00a0MiB`;
}

form.base.addEventListener("change", guarded(refresh));

$("#base-form").addEventListener("submit", guarded(async () => {
  const made = $("#base-form");
  const name = made.name.value;
  await api("POST", "/api/v1/knowledge", {
    knowledge_base: name,
    config: { language: made.language.value, chunks: { method: made.chunks.value } },
  });
  made.reset();
  $("#base-box").open = false;
  await bases();
  form.base.value = name;
  await load();
}));

$("#delete-base").addEventListener("click", guarded(async () => {
  const base = form.base.value;
  if (!confirm(`Delete the knowledge base ${base} with all its documents?`)) return;
  await api("DELETE", `/api/v1/knowledge/${enc(base)}`);
  await load();
}));

const drop = $("#drop");
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.toggle("over", over); });
}
drop.addEventListener("drop", (event) => {
  form.files.files = event.dataTransfer.files;
  form.requestSubmit();
});

form.addEventListener("submit", guarded(async () => {
  const body = new FormData();
  body.append("knowledge_base", form.base.value);
  if (form.password.value) body.append("password", form.password.value);
  for (const file of form.files.files) body.append("files", file, file.name);
  const bar = $("#upload-progress");
  bar.hidden = false;
  const answer = await new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch() tells nothing of an upload's progress
    request.open("POST", "/api/v1/knowledge:upload");
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = (e) => { bar.value = e.total ? e.loaded / e.total : 0; };
    request.onload = () => {
      let found = {};
      try { found = JSON.parse(request.responseText); } catch { /* no JSON */ }
      if (request.status < 300) resolve(found);
      else reject(new Error(found.error?.message ?? `HTTP ${request.status}`));
    };
    request.onerror = () => reject(new Error("The upload was cut off."));
    request.send(body);
  }).finally(() => { bar.hidden = true; });
  const known = answer.documents.filter((d) => d.duplicate).map((d) => d.document.name);
  form.files.value = "";
  form.password.value = "";
  await load();
  if (known.length) say(`Already there: ${known.join(", ")}`, "hint");
}));
