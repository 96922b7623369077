// Charts as SVG: lines with bands, heat maps, intervals, dots.

/** Round numbers that cover low to high in about `count` steps. */
function ticks(low, high, count = 5) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

const scale = ([low, high], [from, to]) => (value) => from + ((value - low) / (high - low || 1)) * (to - from);

/** A value at a tick, without decimals that say nothing. */
const brief = (format, value) => (format === percent ? plain(Number((100 * value).toPrecision(6))) : format(value));

/** A name that has to fit beside a drawing. */
const clipped = (text, most = 44) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

function path(points) {
  let text = "";
  let pen = "M";
  for (const point of points) {
    if (point === null) pen = "M";
    else {
      text += `${pen}${point[0].toFixed(1)} ${point[1].toFixed(1)}`;
      pen = "L";
    }
  }
  return text;
}

/** A figure with a note that follows the pointer; `show(content, x, y)` in the figure's pixels, `hide()`. */
function figure(title, drawing, ...more) {
  const note = el("div", { class: "tip", role: "status", hidden: true });
  const frame = el("div", { class: "frame" }, drawing, note);
  const node = el("figure", {}, title ? el("figcaption", {}, title) : null, frame, ...more);
  const show = (content, x, y) => {
    note.replaceChildren(...content);
    note.hidden = false;
    const right = x + note.offsetWidth + 24 > frame.clientWidth;
    note.style.left = `${Math.max(0, right ? x - note.offsetWidth - 12 : x + 12)}px`;
    note.style.top = `${Math.max(0, Math.min(y - 10, frame.clientHeight - note.offsetHeight))}px`;
  };
  return { node, frame, show, hide: () => { note.hidden = true; } };
}

/**
 * Lines with bands over one axis.
 * series: [{name, colour, dash, x, mean, sd, runs, of}]; format: of the values; range: of the vertical axis; dots: [{colour, points}].
 */
function lineChart({ title, label, series, xName, yName, format, range, wide = false, bands = true, dots = [] }) {
  const [width, height] = wide ? [1180, 440] : [560, 330];
  const box = { left: 52, right: width - 12, top: 12, bottom: height - 42 };
  const across = extent([...series.flatMap((one) => one.x), ...dots.flatMap((one) => one.points.map((p) => p[0]))].filter(defined));
  const x = scale(across, [box.left, box.right]);
  const y = scale(range, [box.bottom, box.top]);
  const clip = `clip${(controls += 1)}`;
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, tabindex: 0, class: "chart" },
    svg("clipPath", { id: clip }, svg("rect", { x: box.left - 4, y: box.top - 4, width: box.right - box.left + 8, height: box.bottom - box.top + 8 })));
  for (const value of ticks(...range, 7)) {
    drawing.append(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y(value), y2: y(value) }),
      svg("text", { x: box.left - 8, y: y(value) + 4, "text-anchor": "end" }, brief(format, value)));
  }
  for (const value of ticks(...across, wide ? 10 : 6)) {
    drawing.append(svg("line", { class: "mark", x1: x(value), x2: x(value), y1: box.bottom, y2: box.bottom + 4 }),
      svg("text", { x: x(value), y: box.bottom + 18, "text-anchor": "middle" }, plain(value)));
  }
  drawing.append(svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
    svg("text", { class: "name", x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, xName),
    svg("text", { class: "name", x: 13, y: (box.top + box.bottom) / 2, "text-anchor": "middle", transform: `rotate(-90 13 ${(box.top + box.bottom) / 2})` }, yName));
  if (range[0] < 0 && range[1] > 0) drawing.append(svg("line", { class: "zero", x1: box.left, x2: box.right, y1: y(0), y2: y(0) }));
  const inside = svg("g", { "clip-path": `url(#${clip})` });
  drawing.append(inside);
  for (const one of dots) {
    inside.append(svg("path", { d: one.points.map(([a, b]) => `M${x(a).toFixed(1)} ${y(b).toFixed(1)}h0`).join(""), stroke: one.colour, class: "dots" }));
  }
  for (const one of bands ? series : []) {
    if (!one.sd) continue;
    const places = one.mean.map((_, i) => i).filter((i) => defined(one.mean[i]) && defined(one.x[i]));
    const edge = (sign) => places.map((i) => [x(one.x[i]), y(one.mean[i] + sign * (one.sd[i] ?? 0))]);
    inside.append(svg("path", { class: "band", d: `${path([...edge(1), ...edge(-1).reverse()])}Z`, fill: one.colour }));
  }
  for (const one of series) {
    const points = one.mean.map((mean, i) => (defined(mean) && defined(one.x[i]) ? [x(one.x[i]), y(mean)] : null));
    const alone = points.filter(Boolean).length === 1;
    inside.append(svg("path", { class: alone ? "dots" : "line", d: alone ? `${path(points)}h0` : path(points), stroke: one.colour, "stroke-dasharray": one.dash || null }));
  }
  const cursor = svg("line", { class: "cursor", y1: box.top, y2: box.bottom, visibility: "hidden" });
  drawing.append(cursor);
  const held = figure(title, drawing);
  const stops = unique(series.flatMap((one) => one.x).filter(defined)).sort((a, b) => a - b);
  let at = -1;

  function nearest(one, value) {
    let best = -1;
    one.x.forEach((here, i) => {
      if (defined(here) && defined(one.mean[i]) && (best < 0 || Math.abs(here - value) < Math.abs(one.x[best] - value))) best = i;
    });
    return best;
  }
  function point(value, top) {
    const lines = series.map((one) => ({ one, i: nearest(one, value) })).filter(({ i }) => i >= 0)
      .sort((a, b) => b.one.mean[b.i] - a.one.mean[a.i]).slice(0, 14);
    cursor.setAttribute("x1", x(value));
    cursor.setAttribute("x2", x(value));
    cursor.setAttribute("visibility", "visible");
    const ratio = drawing.clientWidth / width;
    held.show([el("b", {}, `${xName} ${plain(value)}`), ...lines.map(({ one, i }) => el("div", {},
      el("i", { class: "swatch", style: { background: one.colour } }), `${one.name} `, el("b", {}, format(one.mean[i])),
      one.sd && defined(one.sd[i]) ? ` ± ${format(one.sd[i])}` : "", one.runs && one.runs[i] < one.of ? ` (${one.runs[i]} of ${one.of} seeds)` : ""))],
    x(value) * ratio, top);
  }
  function leave() {
    at = -1;
    cursor.setAttribute("visibility", "hidden");
    held.hide();
  }
  drawing.addEventListener("pointermove", (event) => {
    const frame = drawing.getBoundingClientRect();
    const here = ((event.clientX - frame.left) / frame.width) * width;
    if (!stops.length || here < box.left - 6 || here > box.right + 6) return leave();
    const value = across[0] + ((here - box.left) / (box.right - box.left)) * (across[1] - across[0]);
    at = stops.reduce((best, stop, i) => (Math.abs(stop - value) < Math.abs(stops[best] - value) ? i : best), 0);
    return point(stops[at], event.clientY - frame.top);
  });
  drawing.addEventListener("pointerleave", leave);
  drawing.addEventListener("blur", leave);
  drawing.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") leave();
    if (!step || !stops.length) return;
    event.preventDefault();
    at = at < 0 ? (step > 0 ? 0 : stops.length - 1) : Math.max(0, Math.min(stops.length - 1, at + step));
    point(stops[at], 0.5 * drawing.clientHeight);
  });
  return held.node;
}

const blend = (name, share) => `color-mix(in oklab, var(--${name}) ${Math.round(100 * Math.min(1, share))}%, var(--cell))`;

/**
 * Coloured cells. lines: [{name, mark, cells, bar}], where a cell is a number or null; fill(value) is a colour and ink(value) that of
 * what is written in it; text(value) stands in the note and, in small maps, in the cell. A line with `gap` keeps its distance.
 */
function heatMap({ title, label, lines, columns, xName, fill, ink, text, write = false, bar = null }) {
  const names = Math.max(...lines.map((line) => line.name.length));
  const left = 20 + 6.8 * names;
  const wide = Math.max(6, Math.min(44, (bar ? 900 : 1060) / columns.length));
  const high = lines.length <= 60 ? 19 : lines.length <= 120 ? 12 : 7;
  const right = left + wide * columns.length;
  const top = 8;
  let y = top;
  const tops = lines.map((line) => {
    y += line.gap ? 6 : 0;
    y += high;
    return y - high;
  });
  const width = right + (bar ? 130 : 10);
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${y + 42}`, role: "img", "aria-label": label, class: "map",
    style: { "max-width": `${Math.round(1.15 * width)}px` } });
  const every = Math.ceil(columns.length / Math.floor((wide * columns.length) / 44));
  const most = bar ? Math.max(...lines.map((line) => line.bar)) : 0;
  lines.forEach((line, r) => {
    if (high >= 12 || r % 10 === 0) {
      drawing.append(svg("text", { x: left - 8, y: tops[r] + high / 2 + 4, "text-anchor": "end", class: line.mark ? "marked" : null, style: line.mark ? { fill: line.mark } : {} }, line.name));
    }
    line.cells.forEach((value, c) => {
      if (!defined(value)) return;
      drawing.append(svg("rect", { x: left + c * wide, y: tops[r], width: wide - (wide > 9 ? 1 : 0), height: high - (high > 9 ? 1 : 0), fill: fill(value), "data-at": `${r},${c}` }));
      if (write && value !== 0) {
        drawing.append(svg("text", { class: "in", x: left + (c + 0.5) * wide - 0.5, y: tops[r] + high / 2 + 3.5, "text-anchor": "middle", style: { fill: ink(value) } }, text(value)));
      }
    });
    if (bar) {
      drawing.append(svg("rect", { x: right + 8, y: tops[r] + 2, width: Math.max(1, (70 * line.bar) / most), height: Math.max(2, high - 5), fill: line.mark ?? "var(--faint)" }));
      if (high >= 12) drawing.append(svg("text", { x: right + 13 + (70 * line.bar) / most, y: tops[r] + high / 2 + 4 }, plain(line.bar)));
    }
  });
  columns.forEach((name, c) => {
    if (c % every === 0) drawing.append(svg("text", { x: left + (c + 0.5) * wide, y: y + 15, "text-anchor": "middle" }, String(name)));
  });
  drawing.append(svg("text", { class: "name", x: (left + right) / 2, y: y + 34, "text-anchor": "middle" }, xName));
  if (bar) drawing.append(svg("text", { class: "name", x: right + 8, y: y + 15 }, bar));
  const numbers = () => table(label, [{ name: "", left: true }, ...columns.map((name) => ({ name: String(name) }))],
    lines.map((line) => [line.name, ...line.cells.map((value) => (defined(value) ? text(value) : ""))]));
  const held = figure(title, drawing, folded("The numbers as a table", numbers));
  drawing.addEventListener("pointermove", (event) => {
    const place = event.target.dataset?.at;
    if (!place) return held.hide();
    const [r, c] = place.split(",").map(Number);
    const frame = held.frame.getBoundingClientRect();
    return held.show([el("b", {}, text(lines[r].cells[c])), ` ${lines[r].name}, ${xName} ${columns[c]}`], event.clientX - frame.left, event.clientY - frame.top);
  });
  drawing.addEventListener("pointerleave", held.hide);
  return held.node;
}

/** One interval [mean, low, high] on an axis shared with others; `at` is the line it is read against. */
function intervalPlot([mean, low, high], range, at, tint, text) {
  const x = scale(range, [6, 144]);
  const drawing = svg("svg", { viewBox: "0 0 150 18", class: "interval", role: "img", "aria-label": text },
    svg("line", { class: "zero", x1: x(at), x2: x(at), y1: 0, y2: 18 }));
  if (defined(low)) drawing.append(svg("line", { class: "whisker", x1: x(low), x2: x(high), y1: 9, y2: 9, stroke: tint }));
  drawing.append(svg("circle", { cx: x(mean), cy: 9, r: 4, fill: tint }));
  return drawing;
}

/** Above so many, dots are drawn as one path and have no notes. */
const MANY_DOTS = 5000;

/** Dots of many values on one line each: lines [{name, groups: [{colour, values: [[value, note]]}], marks: [[value, name]]}]. */
function stripPlot({ title, label, lines, xName, format }) {
  const left = 16 + 6.4 * Math.max(...lines.map((line) => clipped(line.name).length));
  const [width, high] = [1180, 40];
  const values = lines.flatMap((line) => line.groups.flatMap((group) => group.values.map(([value]) => value)));
  const [low, top] = extent(values);
  const spare = (top - low || 0.1) * 0.03;
  const across = [low - spare, top + spare];
  const x = scale(across, [left, width - 16]);
  const bottom = 10 + high * lines.length;
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${bottom + 42}`, role: "img", "aria-label": label, class: "chart" });
  for (const value of ticks(...across, 8)) {
    drawing.append(svg("line", { class: "grid", x1: x(value), x2: x(value), y1: 6, y2: bottom }),
      svg("text", { x: x(value), y: bottom + 16, "text-anchor": "middle" }, brief(format, value)));
  }
  drawing.append(svg("text", { class: "name", x: (left + width) / 2, y: bottom + 36, "text-anchor": "middle" }, xName));
  lines.forEach((line, r) => {
    const middle = 10 + high * (r + 0.5);
    drawing.append(svg("text", { x: left - 10, y: middle + 4, "text-anchor": "end" }, clipped(line.name), svg("title", {}, line.name)),
      svg("line", { class: "grid", x1: left, x2: width - 16, y1: middle, y2: middle }));
    let placed = 0;
    for (const group of line.groups) {
      const dots = group.values.map(([value, note]) => {
        // The golden ratio spreads dots evenly, and the same way each time.
        const shift = (((placed += 1) * 0.618034) % 1) - 0.5;
        return [x(value), middle + shift * (high - 14), note];
      });
      if (values.length > MANY_DOTS) drawing.append(svg("path", { d: dots.map(([a, b]) => `M${a.toFixed(1)} ${b.toFixed(1)}h0`).join(""), stroke: group.colour, class: "dots" }));
      else drawing.append(...dots.map(([a, b, note]) => svg("circle", { cx: a, cy: b, r: 3, fill: group.colour, class: "dot" }, svg("title", {}, note))));
    }
    for (const [value, name] of line.marks) {
      drawing.append(svg("path", { class: "median", d: `M${x(value)} ${middle - high / 2 + 3}V${middle + high / 2 - 3}` }, svg("title", {}, name)));
    }
  });
  return figure(title, drawing).node;
}

function legend(entries) {
  return el("ul", { class: "legend" }, ...entries.map(({ name, tint, toggle, on }) => el("li", {}, toggle
    ? el("button", { type: "button", "aria-pressed": String(on), onclick: toggle }, el("i", { class: "swatch", style: { background: tint } }), name)
    : el("span", {}, el("i", { class: "swatch", style: { background: tint } }), name))));
}
