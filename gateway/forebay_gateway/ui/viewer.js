// A document's page with a span marked.

import { $, api, element, enc } from "./page.js";

/** Offsets count code points, as the server's do. */
export async function openDocument(base, document, span) {
  const path = `/api/v1/knowledge/${enc(base)}/documents/${enc(document)}?with_text=true`;
  const { document: facts, pages } = await api("GET", path);
  const at = span?.start ?? 0;
  let number = Math.max(0, pages.findLastIndex((p) => p.start <= at));
  const show = () => {
    const page = pages[number];
    const letters = Array.from(page?.text ?? "");
    const cut = (from, to) => letters.slice(Math.max(0, from - page.start), Math.max(0, to - page.start)).join("");
    const end = page ? page.start + letters.length : 0;
    $("#viewer-title").textContent = pages.length > 1 ? `${facts.name}, page ${page.number} of ${pages.length}` : facts.name;
    $("#viewer-text").replaceChildren();
    if (!page) { $("#viewer-text").append("This document has no text."); return; }
    if (!span || span.end <= page.start || span.start >= end) {
      $("#viewer-text").append(letters.join(""));
    } else {
      const mark = element("mark", cut(span.start, span.end));
      $("#viewer-text").append(cut(page.start, span.start), mark, cut(span.end, end));
      requestAnimationFrame(() => mark.scrollIntoView({ block: "center" }));
    }
    $("#viewer-back").disabled = number === 0;
    $("#viewer-on").disabled = number >= pages.length - 1;
    $("#viewer-pages").hidden = pages.length < 2;
  };
  $("#viewer-back").onclick = () => { number -= 1; show(); };
  $("#viewer-on").onclick = () => { number += 1; show(); };
  show();
  $("#viewer").showModal();
}
