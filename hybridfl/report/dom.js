"use strict";

// What was stored, and how it becomes elements. Text is only ever set as text: no name can become markup.

const data = JSON.parse(document.getElementById("data").textContent);
const rows = data.rows;
const unique = (values) => [...new Set(values)];
const methods = unique(rows.map((row) => row.method));
const settings = unique(rows.map((row) => row.setting));

function made(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, text] of Object.entries(value)) node.style.setProperty(key, text);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (name, attributes = {}, ...children) => made(document.createElement(name), attributes, children);
const svg = (name, attributes = {}, ...children) =>
  made(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

// --- numbers ---------------------------------------------------------------------------------------------------------

const defined = (value) => value !== null && value !== undefined;
const minus = (text) => text.replace("-", "−");
const percent = (value) => (defined(value) ? minus((100 * value).toFixed(1)) : "–");
const plain = (value) => (defined(value) ? minus(String(Number(value.toPrecision(4)))) : "–");
const counted = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;
const extent = (values) => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
/** The first number in a cell's text; NaN sorts last. */
const leading = (text) => parseFloat(text.replace("−", "-").replace("≤", ""));

// --- which rows are shown --------------------------------------------------------------------------------------------

const state = { words: [], hidden: new Set() };
const told = rows.map((row) => `${row.method} ${row.setting}`.toLowerCase());

/** Whether the filter lets a row through: it has all words, and none of those after a minus. */
function visible(row) {
  return state.words.every((word) =>
    word.length > 1 && word[0] === "-" ? !told[row].includes(word.slice(1)) : told[row].includes(word));
}
const visibleRows = () => rows.map((_, place) => place).filter(visible);
const rowName = (row) => [rows[row].method, rows[row].setting].filter(Boolean).join(", ");

const COLOURS = 8;
const DASHES = ["", "7 3", "2 3", "8 3 2 3"];
const colour = (method) => `var(--s${methods.indexOf(method) % COLOURS})`;
const dash = (method) => DASHES[Math.floor(methods.indexOf(method) / COLOURS) % DASHES.length];

const ROLES = ["server", "honest", "held_out", "noisy_labels", "flipped_labels", "noisy_inputs", "random_updates"];
const roleName = (role) => role.replace(/_/g, " ");
const roleColour = (role) => ({ server: "var(--s2)", honest: "var(--s0)", held_out: "var(--s6)" })[role] ??
  ["var(--s1)", "var(--s3)", "var(--s4)", "var(--s5)"][Math.max(0, ROLES.indexOf(role) - 3) % 4];

// --- controls --------------------------------------------------------------------------------------------------------

let controls = 0;

function choice(name, options, chosen, change) {
  const id = `choice${(controls += 1)}`;
  const select = el("select", { id, onchange: () => change(Number(select.value)) },
    ...options.map((text, place) => el("option", { value: place, selected: place === chosen }, text)));
  return el("span", { class: "control" }, el("label", { for: id }, name), select);
}

function segments(name, options, chosen, change) {
  const group = `segments${(controls += 1)}`;
  return el("fieldset", { class: "control segments" }, el("legend", {}, name),
    ...options.map((text, place) => el("label", {},
      el("input", { type: "radio", name: group, checked: place === chosen, onchange: () => change(place) }),
      el("span", {}, text))));
}

function tick(name, on, change) {
  const box = el("input", { type: "checkbox", checked: on, onchange: () => change(box.checked) });
  return el("label", { class: "control" }, box, ` ${name}`);
}

/** What is rarely asked for is made when it is opened. */
function folded(title, content) {
  const details = el("details", {}, el("summary", {}, title));
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(content());
  });
  return details;
}

// --- tables ----------------------------------------------------------------------------------------------------------

/** A table whose columns sort at a click: columns {name, left}, body of lists of text or {text, node, bold, sort}. */
function table(label, columns, body, rowHeaders = 1) {
  const order = { column: -1, down: false };
  const lines = body.map((cells) => cells.map((cell) => (typeof cell === "object" && cell !== null ? cell : { text: cell ?? "" })));
  const heads = columns.map((column, place) => el("th", { scope: "col", class: column.left ? "left" : null },
    el("button", { type: "button", onclick: () => sort(place) }, column.name.replaceAll(" %", "\u00a0%"))));
  const inside = el("tbody");
  const keyOf = (cell, column) => (cell.sort !== undefined ? cell.sort : column.left ? cell.text : leading(cell.text));

  function fill() {
    const sorted = [...lines];
    if (order.column >= 0) {
      const column = columns[order.column];
      const sign = order.down ? -1 : 1;
      sorted.sort((a, b) => {
        const [one, other] = [keyOf(a[order.column], column), keyOf(b[order.column], column)];
        if (typeof one === "string") return sign * one.localeCompare(other, undefined, { numeric: true });
        if (Number.isNaN(one) || Number.isNaN(other)) return Number.isNaN(one) - Number.isNaN(other);
        return sign * (one - other);
      });
    }
    inside.replaceChildren(...sorted.map((cells) => el("tr", {}, ...cells.map((cell, place) => {
      const content = cell.node ? cell.node : cell.text;
      const shape = `${columns[place].left ? "left" : ""} ${cell.bold ? "bold" : ""}`.trim() || null;
      return place < rowHeaders ? el("th", { scope: "row", class: shape }, content) : el("td", { class: shape }, content);
    }))));
  }

  function sort(place) {
    const again = order.column === place;
    // Numbers begin with the highest, names with the first.
    order.down = again ? !order.down : !columns[place].left;
    order.column = place;
    heads.forEach((head, at) => {
      if (at === place) head.setAttribute("aria-sort", order.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    fill();
  }

  fill();
  return el("div", { class: "scroll", role: "region", "aria-label": label, tabindex: 0 },
    el("table", {}, el("caption", { class: "unseen" }, label), el("thead", {}, el("tr", {}, ...heads)), inside));
}

const nothing = () => el("p", { class: "empty" }, "No row matches the filter.");
