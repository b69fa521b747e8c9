// Models and their versions: what serves, what failed and why; load and unload.

import { $, again, api, badge, button, element, enc, models, row, rows, word } from "./page.js";

export async function load() {
  const found = await models();
  rows($("#model-rows"), found.flatMap(drawn), "No model yet: put one into the models folder.");
  again("models", load, 5000);
}

function drawn(m) {
  return m.versions.map((v, i) => {
    const state = word(v.state, "MODEL_STATE_");
    const kind = { ready: "good", failed: "bad" }[state] ?? "";
    const status = element("span", "", { class: "status" }, badge(state, kind));
    if (v.reason) status.append(element("span", v.reason, { class: "failed" }));
    const facts = [v.precision, v.dimensions && `${v.dimensions} dimensions`, v.max_tokens && `${v.max_tokens} tokens`,
      v.labels?.length && v.labels.slice(0, 6).join(", "),
      ...Object.entries(v.metrics ?? {}).filter(([name]) => !/^(split|held)_/.test(name)).slice(0, 3).map(([name, value]) => `${name} ${Number(value.toPrecision(3))}`)];
    const names = Object.entries(m.aliases ?? {}).filter(([, number]) => Number(number) === Number(v.version)).map(([name]) => name);
    const share = m.traffic?.find((t) => Number(t.version) === Number(v.version));
    const version = element("span", "", { class: "status" }, element("span", String(v.version)),
      ...names.map((name) => badge(name)), ...(share ? [badge(`weight ${share.weight ?? share.share ?? ""}`)] : []));
    const verb = state === "ready" ? "unload" : "load";
    const act = button(verb === "load" ? "Load" : "Unload", async () => {
      await api("POST", `/api/v1/models/${enc(m.name)}:${verb}`, { version: v.version });
      await load();
    }, { "aria-label": `${verb} ${m.name} version ${v.version}` });
    const name = element("span", "", {}, element("strong", i ? "" : m.name), element("span", i ? "" : m.description, { class: "about" }));
    const memory = Number(v.memory_bytes) ? `${Math.max(1, Math.round(v.memory_bytes / (1 << 20)))} MiB` : "";
    return row(name, i ? "" : word(m.task, "TASK_"), version, status, memory, facts.filter(Boolean).join(" · "), act);
  });
}
