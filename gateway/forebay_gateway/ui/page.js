// What every section needs. The page talks to the gateway's REST paths alone. Text from the server is
// put into the page as text, never as HTML.

export const $ = (selector) => document.querySelector(selector);
export const enc = encodeURIComponent;
export const percent = (x) => `${(100 * x).toFixed(1)} %`;
/** The last word of one of the contract's enums: TASK_TEXT_CLASSIFICATION -> text classification. */
export const word = (value, prefix) => (value ?? "").replace(prefix, "").toLowerCase().replaceAll("_", " ");

const key = $("#key");
key.value = sessionStorage.getItem("forebay-key") ?? "";
$("#key-form").addEventListener("submit", (event) => event.preventDefault());

/** Call `run` when the person gives another API key. */
export function onKey(run) {
  key.addEventListener("change", () => { sessionStorage.setItem("forebay-key", key.value); run(); });
}

export function headers(extra = {}) {
  return key.value ? { authorization: `Bearer ${key.value}`, ...extra } : extra;
}

async function failure(response) {
  const answer = await response.json().catch(() => ({}));
  return new Error(answer.error?.message ?? `HTTP ${response.status}`);
}

export async function api(method, path, body) {
  const json = body === undefined ? {} : { "content-type": "application/json" };
  const response = await fetch(path, {
    method, headers: headers(json), body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (!response.ok) throw await failure(response);
  return response.json();
}

/** Server-sent events of a POST, as objects. */
export async function* events(path, body, signal) {
  const response = await fetch(path, {
    method: "POST", headers: headers({ "content-type": "application/json" }), body: JSON.stringify(body), signal,
  });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const frames = (rest + value).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      const data = frame.split("\n").find((line) => line.startsWith("data: "));
      if (!data || data === "data: [DONE]") continue;
      const event = JSON.parse(data.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

/** An element. Attributes that are null or false are left out. */
export function element(tag, text = "", attributes = {}, ...children) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

export function button(text, run, attributes = {}) {
  const made = element("button", text, { type: "button", class: "plain", ...attributes });
  made.addEventListener("click", guarded(run));
  return made;
}

export function row(...cells) {
  const made = document.createElement("tr");
  for (const cell of cells) {
    const td = document.createElement("td");
    td.append(cell instanceof Node ? cell : document.createTextNode(cell ?? ""));
    made.append(td);
  }
  return made;
}

/** Fill a table's body; where there are no rows, one that says so. */
export function rows(body, made, empty) {
  const columns = body.closest("table").querySelectorAll("th").length;
  body.replaceChildren(...(made.length ? made : [
    element("tr", "", {}, element("td", empty, { colspan: columns, class: "empty" })),
  ]));
}

export function badge(text, kind = "") {
  return element("span", text, { class: `badge ${kind}` });
}

const notice = $("#notice");
export function say(text, kind = "bad") {
  notice.textContent = text;
  notice.dataset.kind = kind;
}

/** A handler: what goes wrong is said in the page's status line. The pressed button waits meanwhile; it
 * is not disabled, which would take the keyboard's focus from it. */
export function guarded(run) {
  return async (event) => {
    event?.preventDefault?.();
    say("");
    const pressed = event?.submitter ?? (event?.currentTarget instanceof HTMLButtonElement ? event.currentTarget : null);
    if (pressed?.ariaBusy) return;
    if (pressed) pressed.ariaBusy = "true";
    try { await run(event); } catch (error) {
      if (error.name !== "AbortError") say(error.message);
    } finally { if (pressed) pressed.ariaBusy = null; }
  };
}

/** Run a section's `refresh` again after a while, as long as the section is shown. */
export function again(section, refresh, milliseconds) {
  clearTimeout(again.timers[section]);
  again.timers[section] = setTimeout(() => {
    if ($(`#${section}`).classList.contains("shown")) guarded(refresh)();
  }, milliseconds);
}
again.timers = {};

/** Fill a select with [value, label] or strings; what was chosen stays chosen. */
export function fill(select, options) {
  const before = select.value;
  const pairs = options.map((o) => (Array.isArray(o) ? o : [o, o]));
  select.replaceChildren(...pairs.map(([value, label]) => element("option", label, { value })));
  if (pairs.some(([value]) => value === before)) select.value = before;
}

export async function models() {
  return (await api("GET", "/api/v1/models")).models;
}

/** Names of the knowledge bases, in every select that asks for one. */
export async function bases() {
  const { knowledge_bases: found } = await api("GET", "/api/v1/knowledge");
  for (const select of document.querySelectorAll("select[name=base]")) fill(select, found.map((b) => b.name));
  return found;
}
