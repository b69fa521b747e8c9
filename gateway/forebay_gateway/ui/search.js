// Search in collections.

import { $, api, element, enc, fill, guarded, say } from "./page.js";

const form = $("#search-form");
let known = [];

export async function load() {
  ({ collections: known } = await api("GET", "/api/v1/collections"));
  fill(form.collection, known.map((c) => c.name));
  $("#search-empty").hidden = known.length > 0;
  form.hidden = !known.length;
  facts();
}

function facts() {
  const c = known.find((one) => one.name === form.collection.value);
  if (!c) { $("#collection-facts").textContent = ""; return; }
  const words = (c.config.text_fields ?? []).map((f) => f.path).join(", ");
  const parts = [`${c.points} points`, c.config.embedding_model && `embedded by ${c.config.embedding_model}`, words && `words of ${words}`];
  $("#collection-facts").textContent = parts.filter(Boolean).join(" · ");
}
form.collection.addEventListener("change", facts);

form.addEventListener("submit", guarded(async () => {
  const began = performance.now();
  const { hits } = await api("POST", `/api/v1/collections/${enc(form.collection.value)}:search`, {
    text: form.text.value, mode: form.mode.value, limit: Number(form.limit.value),
  });
  const best = Math.max(...hits.map((h) => h.score), 1e-9);
  $("#hits").replaceChildren(...hits.map((hit) => {
    const bar = element("meter", "", { min: 0, max: 1, value: Math.max(0, hit.score / best), "aria-label": "Score against the best" });
    return element("li", "", {},
      element("p", "", { class: "hit" }, element("strong", hit.id), bar, element("span", hit.score.toFixed(4), { class: "note" })),
      payload(hit.payload ?? {}));
  }));
  say(hits.length ? `${hits.length} hits in ${Math.round(performance.now() - began)} ms` : "Nothing was found.", "hint");
}));

function payload(values) {
  const list = element("dl");
  for (const [name, value] of Object.entries(values)) {
    const text = typeof value === "string" ? value : JSON.stringify(value);
    list.append(element("dt", name), element("dd", text.length > 400 ? `${text.slice(0, 400)}…` : text, { dir: "auto" }));
  }
  return list;
}
