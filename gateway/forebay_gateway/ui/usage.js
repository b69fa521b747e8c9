// What runs now, what keys used, and the keys themselves.

import { $, again, api, button, element, enc, guarded, headers, percent, row, rows, say } from "./page.js";

const EVERY_MS = 2000, KEPT = 60;
let before = null;
let speeds = [];

export async function load() {
  const problems = [];
  for (const part of [metrics, usage, keys]) {
    try { await part(); } catch (error) { problems.push(error.message); }
  }
  if (problems.length) say(problems[0]);
  again("usage", load, EVERY_MS);
}

/** Histograms of calls by method: counts by code, and buckets over all codes. */
function parse(text) {
  const methods = new Map();
  const pattern = /^forebay_rpc_server_duration_seconds_(bucket|count|sum)\{([^}]*)\} (\S+)$/gm;
  for (const [, what, labels, number] of text.matchAll(pattern)) {
    const { method, code, le } = Object.fromEntries([...labels.matchAll(/(\w+)="([^"]*)"/g)].map(([, k, v]) => [k, v]));
    if (!method) continue;
    const entry = methods.get(method) ?? { method, calls: 0, failed: 0, sum: 0, buckets: new Map() };
    if (what === "count") { entry.calls += Number(number); if (code !== "OK") entry.failed += Number(number); }
    if (what === "sum") entry.sum += Number(number);
    if (what === "bucket") entry.buckets.set(Number(le.replace("+Inf", "Infinity")), (entry.buckets.get(Number(le.replace("+Inf", "Infinity"))) ?? 0) + Number(number));
    methods.set(method, entry);
  }
  return [...methods.values()];
}

/** A quantile in milliseconds, read between the buckets' bounds. */
function quantile(entry, q) {
  const bounds = [...entry.buckets].sort(([a], [b]) => a - b);
  const wanted = q * (bounds.at(-1)?.[1] ?? 0);
  let [low, under] = [0, 0];
  for (const [bound, count] of bounds) {
    if (count >= wanted && count > under) {
      if (bound === Infinity) return 1000 * low;
      return 1000 * (low + (bound - low) * (wanted - under) / (count - under));
    }
    [low, under] = [bound, count];
  }
  return 0;
}

async function metrics() {
  const response = await fetch("/metrics", { headers: headers() });
  if (!response.ok) throw new Error(`Metrics: HTTP ${response.status}`);
  const found = parse(await response.text());
  const now = performance.now();
  const calls = found.reduce((sum, m) => sum + m.calls, 0);
  const failed = found.reduce((sum, m) => sum + m.failed, 0);
  const whole = { method: "", buckets: new Map() };
  for (const m of found) for (const [bound, count] of m.buckets) whole.buckets.set(bound, (whole.buckets.get(bound) ?? 0) + count);
  if (before) speeds = [...speeds, (calls - before.calls) / ((now - before.now) / 1000)].slice(-KEPT);
  before = { calls, now };
  const rate = speeds.at(-1) ?? 0;
  const tile = (title, value) => element("div", "", { class: "tile" }, element("dt", title), element("dd", value));
  $("#tiles").replaceChildren(
    tile("Calls a second", rate.toFixed(1)), tile("Calls since the start", calls.toLocaleString("en")),
    tile("Not OK", calls ? percent(failed / calls) : "0 %"), tile("Median", `${quantile(whole, 0.5).toFixed(1)} ms`),
    tile("99th percentile", `${quantile(whole, 0.99).toFixed(0)} ms`));
  drawSpeeds();
  found.sort((a, b) => b.calls - a.calls);
  rows($("#metric-rows"), found.filter((m) => m.calls).map((m) => row(
    m.method.replace(/^\/?forebay\.v1\./, ""), m.calls.toLocaleString("en"), m.failed || "",
    quantile(m, 0.5).toFixed(1), quantile(m, 0.99).toFixed(1),
  )), "No call yet.");
}

function drawSpeeds() {
  const most = Math.max(1, ...speeds);
  const at = (v, i) => `${(300 * (i + KEPT - speeds.length)) / (KEPT - 1)},${58 - (54 * v) / most}`;
  $("#speed-line").setAttribute("points", speeds.map(at).join(" "));
  $("#speed-most").textContent = `${most.toFixed(1)}/s`;
}

async function usage() {
  const { rows: found } = await api("GET", "/api/v1/usage:list");
  const number = (n) => Number(n).toLocaleString("en");
  rows($("#usage-rows"), found.map(({ day, model, version, key_id: id, counters: c }) => row(
    day, model ? `${model}@${version}` : "", id, number(c.calls), number(c.items), number(c.tokens),
    c.errors || "", c.cost ? c.cost.toFixed(4) : "",
  )), "Nothing was used yet.");
}

async function keys() {
  const { keys: found } = await api("GET", "/api/v1/keys");
  rows($("#key-rows"), found.map((k) => row(
    k.id, k.name, k.scopes.map((s) => s.replace("KEY_SCOPE_", "").toLowerCase()).join(", "),
    k.expires_at ? new Date(k.expires_at).toLocaleString() : "no end",
    button("Revoke", async () => {
      if (!confirm(`Revoke the key ${k.name}? Calls with it fail from then on.`)) return;
      await api("POST", `/api/v1/keys/${enc(k.id)}:revoke`, {});
      await keys();
    }, { "aria-label": `Revoke ${k.name}` }),
  )), "No key yet. On this machine none is needed.");
}

$("#make-key-form").addEventListener("submit", guarded(async () => {
  const form = $("#make-key-form");
  const scopes = [...form.querySelectorAll("input[type=checkbox]:checked")].map((box) => box.value);
  const { secret } = await api("POST", "/api/v1/keys", { name: form.name.value, scopes });
  form.reset();
  $("#new-key").replaceChildren("Shown once, keep it now: ", element("code", secret));
  await keys();
}));
