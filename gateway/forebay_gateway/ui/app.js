// Which section is shown; each has a module of its own.

import { $, guarded, onKey } from "./page.js";
import * as ask from "./ask.js";
import * as documents from "./documents.js";
import * as search from "./search.js";
import * as playground from "./playground.js";
import * as models from "./models.js";
import * as usage from "./usage.js";

const sections = { ask, documents, search, playground, models, usage };

function show() {
  const name = Object.hasOwn(sections, location.hash.slice(1)) ? location.hash.slice(1) : "ask";
  for (const s of document.querySelectorAll("main > section")) s.classList.toggle("shown", s.id === name);
  for (const a of document.querySelectorAll("nav a")) {
    if (a.hash === `#${name}`) { a.setAttribute("aria-current", "page"); a.scrollIntoView({ inline: "nearest", block: "nearest" }); }
    else a.removeAttribute("aria-current");
  }
  document.title = `${$(`#${name} h2`).textContent} · Forebay`;
  guarded(sections[name].load)();
}
addEventListener("hashchange", () => { show(); $("#main").focus({ preventScroll: true }); });
onKey(show);
show();
