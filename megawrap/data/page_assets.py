"""Style and script of the page that shows samples and rows. Nothing is loaded from anywhere: both are put into the page.

The page's content security policy allows exactly these two texts, by their sha256; change them here only.
"""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --faint: #59636e; --line: #d1d9e0; --panel: #f6f8fa;
  --trained: #d3f5e4; --trained-ink: #0b5138; --trained-edge: #0a7d53; --context-ink: #1b1f24; --bar: #0a7d53; --focus: #0550ae; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --faint: #9198a1; --line: #3d444d; --panel: #151b23;
    --trained: #0b3d2c; --trained-ink: #b9f5da; --trained-edge: #3fb950; --context-ink: #c9d1d9; --bar: #3fb950; --focus: #79c0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem 1.25rem 5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .25rem; overflow-wrap: anywhere; }
h3 { font-size: .85rem; font-weight: 600; color: var(--faint); margin: 0; padding: .35rem .75rem; background: var(--panel);
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
p { margin: .25rem 0 .75rem; }
a { color: var(--focus); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; list-style: none; margin: 0; padding: 0; }
.faint { color: var(--faint); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0 1rem; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
th { overflow-wrap: normal; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; display: block; }
svg rect { fill: var(--bar); }
svg text { fill: var(--ink); font: 11px system-ui, sans-serif; }
svg text.faint { fill: var(--faint); }
.controls { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .5rem 1.25rem; align-items: center;
  padding: .6rem 0; background: var(--paper); border-bottom: 1px solid var(--line); }
.key { padding: .05rem .4rem; }
.segment { border: 1px solid var(--line); border-radius: 6px; margin: .75rem 0; overflow: hidden; }
.text { margin: 0; padding: .75rem; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
  font: .9rem/1.7 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.context, .key.context { color: var(--context-ink); }
.trained, .key.trained { color: var(--trained-ink); background: var(--trained); border-bottom: 2px solid var(--trained-edge);
  padding-bottom: 2px; }
.part { color: var(--faint); font-size: .75rem; border: 1px solid var(--line); border-radius: 4px; padding: 0 .3rem; margin-right: .3rem; }
.text i { font-style: normal; border-radius: 2px; }
.text i:focus, :focus-visible { outline: 2px solid var(--focus); outline-offset: 1px; }
.text .mark { color: var(--faint); }
.borders .text i { box-shadow: inset 1px 0 0 var(--line); }
.ids .text i::after { content: " " attr(data-i) " "; font-size: .65rem; color: var(--faint); }
#detail { position: fixed; left: 0; right: 0; bottom: 0; min-height: 2.2rem; padding: .4rem 1.25rem; background: var(--panel);
  border-top: 1px solid var(--line); font: .85rem/1.4 ui-monospace, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
"""

SCRIPT = """
"use strict";
const detail = document.getElementById("detail");
const say = (token) => {
  const trained = Number(token.dataset.w) > 0;
  detail.textContent = "position " + token.dataset.p + "   id " + token.dataset.i + "   " +
    (trained ? "trained, weight " + token.dataset.w : "context") + "   " + JSON.stringify(token.textContent);
};
for (const [box, name] of [["show-ids", "ids"], ["show-borders", "borders"]]) {
  const input = document.getElementById(box);
  const apply = () => document.body.classList.toggle(name, input.checked);
  input.addEventListener("change", apply);
  apply();
}
const tokens = Array.from(document.querySelectorAll(".text i"));
const go = (token) => {
  if (!token) return;
  token.tabIndex = -1;
  token.focus();
  say(token);  // a window that is not in front gets no focus events
};
const enter = (event) => {
  const token = event.target.closest && event.target.closest(".text i");
  if (token) say(token);
};
document.addEventListener("focusin", enter);
document.addEventListener("mouseover", enter);
document.addEventListener("click", (event) => go(event.target.closest && event.target.closest(".text i")));
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const text = event.target.closest && event.target.closest(".text");
  if (!text) return;
  const at = tokens.indexOf(event.target);
  const first = tokens.indexOf(text.querySelector("i"));
  let next = null;
  if (at < 0 && (event.key === "ArrowRight" || event.key === "ArrowDown" || event.key === "Home")) next = tokens[first];
  else if (event.key === "ArrowRight") next = tokens[at + 1];
  else if (event.key === "ArrowLeft") next = tokens[at - 1];
  else if (event.key === "Home") next = tokens[first];
  else if (event.key === "End") next = Array.from(text.querySelectorAll("i")).pop();
  else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    const step = event.key === "ArrowDown" ? 1 : -1;
    let other = at;
    while (tokens[other] && tokens[other].parentElement === tokens[at].parentElement) other += step;
    next = tokens[other];
  }
  if (next) { event.preventDefault(); go(next); }
});
document.body.dataset.ready = "yes";
"""
