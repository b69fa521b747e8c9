// Questions to a knowledge base: the answer as it comes, its citations, what is not supported.

import { $, bases, button, element, enc, events, fill, guarded, models, say } from "./page.js";
import { openDocument } from "./viewer.js";

const form = $("#ask-form");
let history = [];
let running = null;

export async function load() {
  const [found, all] = await Promise.all([bases(), models()]);
  const writers = all.filter((m) => m.task === "TASK_GENERATION").map((m) => m.name);
  fill(form.writer, [["", "as the server is set"], ["*extract", "none: extract sentences"], ...writers]);
  $("#ask-empty").hidden = found.length > 0;
  form.hidden = !found.length;
}

$("#new-conversation").addEventListener("click", () => {
  running?.abort();
  history = [];
  $("#conversation").replaceChildren();
  $("#sources").replaceChildren();
  $("#sources-box").hidden = true;
  form.question.focus();
});
$("#stop").addEventListener("click", () => running?.abort());

const HOW = {
  ANSWER_METHOD_EXTRACTED: "Extracted: sentences of the documents, word by word",
  ANSWER_METHOD_WRITTEN: "Written by a language model",
  ANSWER_METHOD_NOT_FOUND: "Not in the documents",
  ANSWER_METHOD_REFUSED: "Refused by the language model",
};
const WHY = {
  UNSUPPORTED_REASON_NO_SUCH_SOURCE: "names a source that was not given",
  UNSUPPORTED_REASON_QUOTE_NOT_FOUND: "this quote stands in no source",
  UNSUPPORTED_REASON_NO_CITATION: "cites no source",
  UNSUPPORTED_REASON_NOT_IN_SOURCE: "the source that it cites does not say this",
};
const STAGE = {
  rewrite: "Understanding the question…", expand: "Finding other wordings…", hyde: "Imagining an answer…",
  search: "Searching…", rerank: "Ordering…", mmr: "Choosing…", answer: "Reading…",
};

form.addEventListener("submit", guarded(async () => {
  const base = form.base.value;
  const question = form.question.value;
  const answer = element("p", "", { class: "answer", dir: "auto" });
  const note = element("p", "Searching…", { class: "note" });
  const turn = element("article", "", { class: "turn", "aria-busy": "true" },
    element("p", question, { class: "question", dir: "auto" }), answer, note);
  $("#conversation").append(turn);
  turn.scrollIntoView({ block: "nearest" });
  const said = { text: "", citations: new Map(), unsupported: [], base };
  const began = performance.now();
  let first = 0;
  const retrieval = { mode: form.mode.value, ...(form.rerank.checked && { rerank: {} }) };
  const extract = form.writer.value === "*extract";
  const body = { question, history, retrieval, extract, model: extract ? "" : form.writer.value };
  running = new AbortController();
  $("#stop").hidden = false;
  form.question.value = "";
  try {
    for await (const event of events(`/api/v1/knowledge/${enc(base)}:askStream`, body, running.signal)) {
      if (event.stage) note.textContent = STAGE[event.stage.name] ?? event.stage.name;
      if (event.sources) drawSources(event.sources.chunks, base);
      if (event.token) { first ||= performance.now() - began; said.text += event.token.text; }
      if (event.citation) {
        const cited = said.citations.get(event.citation.number) ?? [];
        said.citations.set(event.citation.number, [...cited, event.citation]);
      }
      if (event.unsupported) said.unsupported.push(event.unsupported);
      if (event.token || event.citation || event.unsupported) drawAnswer(answer, said);
      if (event.done) {
        const by = event.done.written_by ? `: ${event.done.written_by.model}` : "";
        const doubt = said.unsupported.length ? " · underlined words are not supported by the sources" : "";
        note.textContent = `${HOW[event.done.method]}${by} · first words after ${Math.round(first)} ms${doubt}`;
        const absent = ["ANSWER_METHOD_NOT_FOUND", "ANSWER_METHOD_REFUSED"];
        if (absent.includes(event.done.method)) turn.classList.add("absent");
      }
    }
    history.push({ role: "TURN_ROLE_USER", text: question }, { role: "TURN_ROLE_ASSISTANT", text: said.text });
  } catch (error) {
    note.textContent = error.name === "AbortError" ? "Stopped" : "Failed";
    form.question.value ||= question;
    throw error;
  } finally {
    running = null;
    $("#stop").hidden = true;
    turn.removeAttribute("aria-busy");
    form.question.focus();
  }
}));

/** The answer with its markers as buttons and its unsupported pieces underlined. */
function drawAnswer(into, said) {
  const letters = Array.from(said.text);
  const doubt = new Array(letters.length).fill("");
  for (const u of said.unsupported) doubt.fill(u.reason, u.start, u.end);
  into.replaceChildren();
  let at = 0;
  for (const part of said.text.split(/(\[\d+\])/)) {
    const length = Array.from(part).length;
    const number = Number(/^\[(\d+)\]$/.exec(part)?.[1]);
    const citations = said.citations.get(number);
    if (citations) into.append(marker(part, number, citations, said.base));
    else appendText(into, letters, doubt, at, at + length);
    at += length;
  }
}

function appendText(into, letters, doubt, from, to) {
  for (let start = from; start < to;) {
    let end = start;
    while (end < to && doubt[end] === doubt[start]) end += 1;
    const text = letters.slice(start, end).join("");
    const why = WHY[doubt[start]];
    if (why) {
      into.append(element("span", text, { class: "doubt", title: `Not supported: ${why}` },
        element("span", ` (not supported: ${why})`, { class: "unseen" })));
    } else into.append(text);
    start = end;
  }
}

function marker(text, number, citations, base) {
  const citation = citations[0];
  const page = citation.page ? `, page ${citation.page}` : "";
  return button(text, () => openDocument(base, citation.document, citation), {
    class: citation.verified ? "cite" : "cite unverified",
    title: citation.quote,
    "aria-label": `Source ${number}: ${citation.name}${page}${citation.verified ? "" : ", not verified"}`,
  });
}

function drawSources(chunks, base) {
  $("#sources-box").hidden = !chunks.length;
  $("#sources").replaceChildren(...chunks.map((chunk) => {
    const where = [chunk.name, chunk.page ? `page ${chunk.page}` : "", ...chunk.headings].filter(Boolean);
    const text = chunk.text.length > 240 ? `${chunk.text.slice(0, 240)}…` : chunk.text;
    return element("li", "", {},
      button(where.join(" · "), () => openDocument(base, chunk.document, chunk), { class: "cite" }),
      element("p", text, { dir: "auto" }));
  }));
  if (!chunks.length) say("Nothing was found for this question.", "hint");
}
