// Tabs, filter, colours and printing.

const SECTIONS = [
  ["tables", "Results", showTables],
  ["curves", "Curves", showCurves],
  ["claims", "Claims", showClaims],
  ["parts", "Parts", showParts],
  ["streams", "Forgetting", showStreams],
  ["clients", "Clients", showClients],
  ["coefficients", "Coefficients", showCoefficients],
  ["splits", "Split", showSplits],
  ["configs", "Configs and runs", showConfigs],
].filter(([name]) => data[name] !== undefined);

if (data.parts !== undefined) {
  const kinds = unique(data.parts.map((one) => one.kind));
  SECTIONS.find(([name]) => name === "parts")[1] = kinds.map((kind) => `By ${kind}`).join(", ");
}

const tabs = SECTIONS.map(([name, title]) => el("button", {
  type: "button", role: "tab", id: `tab-${name}`, "aria-controls": `section-${name}`, onclick: () => open(name),
}, title));
const panels = SECTIONS.map(([name, title]) => el("section", { id: `section-${name}`, role: "tabpanel", "aria-labelledby": `tab-${name}`, tabindex: 0, hidden: true },
  el("h2", {}, title), el("div", { class: "content" })));
const stale = new Set(SECTIONS.map(([name]) => name));
let current = "";

/** Draws a section anew; what had the focus has it afterwards, as a control often redraws what it is part of. */
function draw(name) {
  const place = SECTIONS.findIndex(([own]) => own === name);
  const into = panels[place].querySelector(".content");
  const asked = "select, input, .legend button";
  const focused = [...into.querySelectorAll(asked)].indexOf(document.activeElement);
  const opened = [...into.querySelectorAll("details")].map((details) => details.open);
  into.replaceChildren();
  SECTIONS[place][2](into, () => draw(name));
  stale.delete(name);
  if (focused >= 0) into.querySelectorAll(asked)[focused]?.focus();
  into.querySelectorAll("details").forEach((details, i) => { details.open = opened[i] ?? false; });
}

function open(name) {
  current = name;
  SECTIONS.forEach(([own], place) => {
    const chosen = own === name;
    tabs[place].setAttribute("aria-selected", String(chosen));
    tabs[place].tabIndex = chosen ? 0 : -1;
    panels[place].hidden = !chosen;
  });
  if (stale.has(name)) draw(name);
  if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
}

const bar = document.getElementById("tabs");
bar.append(...tabs);
bar.addEventListener("keydown", (event) => {
  const now = SECTIONS.findIndex(([name]) => name === current);
  const next = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: SECTIONS.length - 1 }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  const place = (next + SECTIONS.length) % SECTIONS.length;
  open(SECTIONS[place][0]);
  tabs[place].focus();
});

const filter = document.getElementById("filter");
const matches = document.getElementById("matches");
function filtered() {
  state.words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const count = visibleRows().length;
  matches.textContent = state.words.length ? `${count} of ${counted(rows.length, "row")} match the filter.` : "";
  SECTIONS.forEach(([name]) => stale.add(name));
  draw(current);
}
let waiting = 0;
filter.addEventListener("input", () => {
  clearTimeout(waiting);
  if (rows.length > 100) waiting = setTimeout(filtered, 150);
  else filtered();
});

const THEMES = [["", "◐", "as the system has them"], ["light", "☀", "light"], ["dark", "☾", "dark"]];
let theme = 0;
document.getElementById("theme").addEventListener("click", ({ currentTarget }) => {
  theme = (theme + 1) % THEMES.length;
  const [name, sign, words] = THEMES[theme];
  document.documentElement.dataset.theme = name;
  currentTarget.textContent = sign;
  currentTarget.setAttribute("aria-label", `Colours: ${words}`);
});

addEventListener("beforeprint", () => [...stale].forEach(draw));
addEventListener("hashchange", () => {
  const name = location.hash.slice(1);
  if (name !== current && SECTIONS.some(([own]) => own === name)) open(name);
});

const runCount = rows.reduce((sum, row) => sum + row.runs.length, 0);
document.getElementById("about").append(...[
  counted(runCount, "run"), counted(methods.length, "method"), settings.length > 1 ? counted(settings.length, "setting") : "",
  counted(unique(rows.flatMap((row) => row.seeds)).length, "seed"),
].filter(Boolean).map((text) => el("span", { class: "fact" }, text)));
if (data.claims) {
  document.getElementById("about").append(...tally(data.claims.flatMap((preset) => preset.claims)).map(([verdict, count]) => badge(verdict, `${count} ${verdict}`)));
}
const main = document.getElementById("sections");
main.replaceChildren();
if (data.notes.length) main.append(el("aside", { class: "remarks", "aria-label": "Remarks" }, ...data.notes.map((text) => el("p", {}, text))));
main.append(...panels);
document.getElementById("made").textContent = `hybridfl ${data.version}, ${data.made}. Everything is in this file.`;
const asked = location.hash.slice(1);
open(SECTIONS.some(([name]) => name === asked) ? asked : SECTIONS[0][0]);
