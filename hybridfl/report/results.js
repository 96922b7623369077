// Sections about methods: tables, curves, parts of scopes, streams of tasks, claims.

// --- tables ----------------------------------------------------------------------------------------------------------

const tableChoice = { view: 0, grid: settings.length > 1 && methods.length > 1 };

function showTables(into, again) {
  const sheet = data.tables[tableChoice.view];
  const shown = visibleRows();
  const several = settings.length > 1 && methods.length > 1;
  into.append(el("div", { class: "controls" },
    choice("Numbers", data.tables.map((one) => one.name), tableChoice.view, (place) => { tableChoice.view = place; again(); }),
    several ? segments("Layout", ["method × settings", "one row each"], tableChoice.grid ? 0 : 1, (place) => { tableChoice.grid = place === 0; again(); }) : null));
  into.append(shown.length ? (several && tableChoice.grid ? gridOf(sheet, shown) : listOf(sheet, shown)) : nothing());
  into.append(el("div", { class: "notes" }, ...sheet.caption.map((line) => el("p", {}, line))));
}

/** The common range of intervals, with the line they are read against. */
function rangeOf(intervals, at) {
  const [low, high] = extent([at, ...intervals.flat().filter(defined)]);
  const spare = (high - low || 1) * 0.04;
  return [low - spare, high + spare];
}

function tintOf([mean, low, high], at = 0) {
  if (!defined(low)) return "var(--faint)";
  return low > at ? "var(--good)" : high < at ? "var(--bad)" : mean === at ? "var(--faint)" : "var(--unsure)";
}

function listOf(sheet, shown) {
  const bold = new Set(sheet.bold.map(([row, column]) => `${row},${column}`));
  const place = sheet.header.findIndex((name, i) => i >= sheet.left && name.startsWith("− "));
  const range = rangeOf(shown.map((row) => sheet.differences[row]).filter(Boolean), 0);
  const columns = sheet.header.map((name, i) => ({ name, left: i < sheet.left }));
  const body = shown.map((row) => sheet.body[row].map((text, i) => ({ text, bold: bold.has(`${row},${i}`) })));
  if (place >= 0) {
    columns.splice(place + 1, 0, { name: "interval" });
    body.forEach((cells, i) => {
      const one = sheet.differences[shown[i]];
      const text = sheet.body[shown[i]][place];
      cells.splice(place + 1, 0, one
        ? { node: intervalPlot(one, range, 0, lowIsGood(sheet) ? tintOf(one.map((v) => (defined(v) ? -v : v)).map((v, k, all) => [all[0], all[2], all[1]][k])) : tintOf(one), text), sort: one[0], text }
        : { text: "", sort: NaN });
    });
  }
  return table(sheet.name, columns, body, sheet.left);
}

const lowIsGood = (sheet) => /^(loss|forgetting|spread)/.test(sheet.name);

function gridOf(sheet, shown) {
  const across = unique(shown.map((row) => rows[row].setting));
  const bold = new Set(sheet.bold.map(([row]) => row));
  const best = sheet.left + 1;
  const difference = sheet.header.findIndex((name, i) => i >= sheet.left && name.startsWith("− "));
  const body = unique(shown.map((row) => rows[row].method)).map((method) => [method, ...across.map((setting) => {
    const row = shown.find((one) => rows[one].method === method && rows[one].setting === setting);
    if (row === undefined) return "";
    const mean = sheet.body[row][best];
    const gap = difference < 0 ? "" : sheet.body[row][difference];
    const gaps = sheet.differences[row];
    return {
      text: mean, bold: bold.has(row) && across.length === 1,
      node: el("span", { class: "stacked" }, el("span", {}, mean),
        gap ? el("small", { style: { color: lowIsGood(sheet) ? "inherit" : tintOf(gaps) } }, gap) : null),
    };
  })]);
  const note = difference < 0 ? null : el("p", { class: "notes" }, `Below each mean: the paired difference to ${sheet.reference} with its interval.`);
  return el("div", {}, table(sheet.name, [{ name: "method", left: true }, ...across.map((name) => ({ name }))], body), note);
}

// --- curves ----------------------------------------------------------------------------------------------------------

const FACETS = 12;
const curveChoice = { series: 0, axis: 0, late: false, bands: true };

function showCurves(into, again) {
  const { series, axes } = data.curves;
  const clocks = Object.keys(axes);
  const asked = series[curveChoice.series];
  const axis = clocks[curveChoice.axis];
  const set = (key) => (value) => { curveChoice[key] = value; again(); };
  into.append(el("div", { class: "controls" },
    choice("Curve", series.map((one) => `${one.metric}, ${one.scope}`), curveChoice.series, set("series")),
    segments("Against", clocks.map((name) => axes[name]), curveChoice.axis, set("axis")),
    tick("± sd over seeds", curveChoice.bands, set("bands")),
    tick("only the range of the later half", curveChoice.late, set("late"))));
  const having = visibleRows().filter((row) => data.curves.rows[row].y[curveChoice.series] && data.curves.rows[row].x[axis]);
  if (!having.length) {
    into.append(el("p", { class: "empty" }, "None of the rows that match the filter has this curve."));
    return;
  }
  into.append(legend(unique(having.map((row) => rows[row].method)).map((method) => ({
    name: method, tint: colour(method), on: !state.hidden.has(method),
    toggle: () => { if (!state.hidden.delete(method)) state.hidden.add(method); again(); },
  }))));
  const shown = having.filter((row) => !state.hidden.has(rows[row].method));
  const lines = shown.map((row) => {
    const { x, y } = data.curves.rows[row];
    const line = y[curveChoice.series];
    const { method } = rows[row];
    return { row, name: method, colour: colour(method), dash: dash(method), x: x[axis], mean: line.mean, sd: line.sd, runs: line.runs, of: rows[row].runs.length };
  });
  const counting = lines.flatMap((one) => {
    const from = curveChoice.late ? Math.floor(one.mean.length / 2) : 0;
    return one.mean.slice(from).flatMap((mean, i) => {
      const sd = curveChoice.bands && one.sd ? one.sd[from + i] ?? 0 : 0;
      return defined(mean) ? [mean - sd, mean + sd] : [];
    });
  });
  if (!counting.length) return;
  const format = asked.metric === "loss" ? plain : percent;
  const [low, high] = extent(counting);
  const spare = (high - low || 0.01) * 0.03;
  const range = [low - spare, high + spare];
  const facets = unique(shown.map((row) => rows[row].setting));
  const name = `${asked.metric}${asked.metric === "loss" ? "" : " %"}, ${asked.scope}`;
  into.append(el("div", { class: facets.length > 1 ? "facets" : "" }, ...facets.slice(0, FACETS).map((setting) => lineChart({
    title: setting || null, label: `${name} against ${axes[axis]}${setting ? `, ${setting}` : ""}`, xName: axes[axis], yName: name, format, range,
    wide: facets.length === 1, bands: curveChoice.bands, series: lines.filter((one) => rows[one.row].setting === setting),
  }))));
  if (facets.length > FACETS) into.append(el("p", { class: "notes" }, `The first ${FACETS} of ${facets.length} settings; the filter chooses others.`));
  into.append(folded("The last points as a table", () => table(`Last points of ${name}`,
    [{ name: "method", left: true }, { name: "settings", left: true }, { name: "seeds" }, { name: axes[axis] }, { name }, { name: "sd" }],
    lines.map((one) => {
      const last = one.mean.findLastIndex(defined);
      return [one.name, rows[one.row].setting, String(rows[one.row].seeds.length), plain(one.x[last]), format(one.mean[last]), one.sd ? format(one.sd[last]) : "–"];
    }), 2)));
  into.append(el("p", { class: "notes" }, "Means over seeds at the same round; a band is one standard deviation to each side. Horizontal: means over seeds, too."));
}

// --- parts of a scope, such as domains ---------------------------------------------------------------------------------

const partChoice = { place: 0 };
const several = { domain: "domains", width: "widths" };

function showParts(into, again) {
  const name = (one) => `${one.scope}, by ${one.kind}`;
  const part = data.parts[partChoice.place];
  const shown = visibleRows().filter((row) => part.cells[row].some(([mean]) => defined(mean)));
  into.append(el("div", { class: "controls" }, choice("Accuracy of", data.parts.map(name), partChoice.place, (place) => { partChoice.place = place; again(); })));
  if (!shown.length) {
    into.append(nothing());
    return;
  }
  const [low, high] = extent(shown.flatMap((row) => part.cells[row].map(([mean]) => mean).filter(defined)));
  into.append(table(`Accuracy in % of ${name(part)}`,
    [{ name: "method", left: true }, ...(settings.length > 1 ? [{ name: "settings", left: true }] : []), ...part.names.map((text) => ({ name: text }))],
    shown.map((row) => [rows[row].method, ...(settings.length > 1 ? [rows[row].setting] : []), ...part.cells[row].map(([mean, text]) => ({
      text, sort: defined(mean) ? mean : NaN, node: el("span", { class: "heat", style: heat(mean, low, high) }, text),
    }))]), settings.length > 1 ? 2 : 1));
  into.append(el("p", { class: "notes" }, `Accuracy in % of scope ${part.scope} in each of its ${several[part.kind] ?? part.kind}, at the point of the run that the first table reads; mean ± sd over seeds.`));
}

const inked = (share) => (share > 0.55 ? "var(--ink-on-heat)" : "var(--ink)");
function heat(value, low, high) {
  if (!defined(value)) return {};
  const share = 0.06 + 0.84 * ((value - low) / (high - low || 1));
  return { background: blend("heat", share), color: inked(share) };
}

// --- streams of tasks ------------------------------------------------------------------------------------------------

const streamChoice = { place: 0 };

function showStreams(into, again) {
  const stream = data.streams[streamChoice.place];
  const shown = stream.rows.filter((one) => visible(one.row));
  into.append(el("div", { class: "controls" }, choice("Model", data.streams.map((one) => one.scope), streamChoice.place, (place) => { streamChoice.place = place; again(); })));
  if (!shown.length) {
    into.append(nothing());
    return;
  }
  into.append(el("div", { class: "facets" }, ...shown.map((one) => {
    const tasks = one.mean.at(-1).map((_, task) => task);
    return el("figure", {}, el("figcaption", {}, rowName(one.row)),
      el("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": `Accuracies of ${rowName(one.row)}` }, el("table", { class: "matrix" },
        el("caption", { class: "unseen" }, `Accuracy in % after each task on each task, ${rowName(one.row)}`),
        el("thead", {}, el("tr", {}, el("th", { scope: "col", class: "left" }, "after"), ...tasks.map((task) => el("th", { scope: "col" }, `on task ${task}`)))),
        el("tbody", {}, ...one.mean.map((line, after) => el("tr", {}, el("th", { scope: "row", class: "left" }, `task ${after}`),
          ...tasks.map((task) => (task <= after
            ? el("td", { style: heat(line[task], 0, 1), title: defined(one.sd[after][task]) ? `± ${percent(one.sd[after][task])}` : "" }, percent(line[task]))
            : el("td", { class: "later" })))))))),
      el("p", { class: "notes" }, stream.metrics.map((metric, i) => `${metric} ${one.forgetting[i]}`).join(", ")));
  })));
  into.append(el("p", { class: "notes" }, "Accuracy in %, means over seeds. forgetting: best earlier accuracy on a task minus the last; forgetting_learned: that just after learning it minus the last; means over all tasks but the last."));
}

// --- claims ----------------------------------------------------------------------------------------------------------

const SIGNS = { held: "✓", failed: "✗", undecided: "?", missing: "…" };
const tally = (claims) => Object.keys(SIGNS).map((verdict) => [verdict, claims.filter((one) => one.verdict === verdict).length]).filter(([, count]) => count);
const badge = (verdict, text = verdict) => el("span", { class: `badge ${verdict}` }, `${SIGNS[verdict]} ${text}`);

function showClaims(into) {
  for (const preset of data.claims) {
    into.append(el("h3", {}, preset.preset), el("p", { class: "tally" }, ...tally(preset.claims).map(([verdict, count]) => badge(verdict, `${count} ${verdict}`))));
    into.append(...preset.claims.map((claim) => claimCard(claim)), ...preset.caption.map((line) => el("p", { class: "notes" }, line)));
  }
}

function claimCard(claim) {
  const drawn = claim.found.filter((one) => defined(one.mean) && one.verdict !== "missing");
  const ratio = claim.kind === "ratio_at_most";
  const margin = claim.found.length ? claim.found[0].margin : 0;
  const range = rangeOf(drawn.map((one) => [one.mean, one.low, one.high]), margin);
  const cells = claim.found.map((one) => {
    const where = Object.entries(one.where).map(([key, value]) => `${key}=${value}`).join(" ");
    const tint = { held: "var(--good)", failed: "var(--bad)" }[one.verdict] ?? "var(--unsure)";
    return el("tr", {}, el("td", { class: "left" }, claim.cells === "mean" ? "mean over its cells" : where || "–"),
      el("td", {}, drawn.includes(one) ? intervalPlot([one.mean, one.low, one.high], range, margin, tint, one.text) : ""),
      el("td", { class: "left" }, one.text, one.reason && one.verdict === "undecided" ? el("small", {}, ` ${one.reason}`) : null),
      el("td", {}, one.verdict === "missing" ? "" : String(one.seeds)), el("td", { class: "left" }, badge(one.verdict)));
  });
  return el("article", { class: `claim ${claim.verdict}` }, el("header", {}, badge(claim.verdict), el("strong", {}, claim.text), el("code", {}, claim.id)),
    el("p", { class: "notes" }, `${claim.compared}, asked: ${claim.asked}${ratio ? "" : "; to the right of the line is good"}`),
    el("div", { class: "scroll" }, el("table", {}, el("caption", { class: "unseen" }, claim.text),
      el("thead", {}, el("tr", {}, ...["where", "interval", "found", "seeds", "verdict"].map((name, i) => el("th", { scope: "col", class: i === 1 || i === 3 ? null : "left" }, name)))),
      el("tbody", {}, ...cells))),
    claim.commands.length ? folded("The lines that make what is missing", () => el("pre", {}, claim.commands.join("\n"))) : null);
}
