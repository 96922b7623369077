// Sections about participants: accuracy by client, coefficients, who owns what.

const bySeed = (a, b) => a.row - b.row || a.seed.localeCompare(b.seed, undefined, { numeric: true });
const seedOf = (one) => `${rowName(one.row)}, seed ${one.seed}`;
const rolesOf = (one) => ROLES.filter((role) => role !== "server" && Object.values(one.roles).includes(role));
const clientName = (who, roles) => (who === -1 ? "server" : `client ${who}${roles[who] ? `, ${roleName(roles[who])}` : ""}`);

// --- accuracy by client ----------------------------------------------------------------------------------------------

const LINES = 30;
const CLIENTS = 200;
const clientChoice = { seed: 0 };

function showClients(into, again) {
  const { means } = data.clients;
  const runs = [...data.clients.runs].sort(bySeed);
  const seeds = ["all seeds", ...unique(runs.map((one) => one.seed)).sort((a, b) => a.localeCompare(b, undefined, { numeric: true })).map((seed) => `seed ${seed}`)];
  into.append(el("div", { class: "controls" }, choice("Seeds", seeds, clientChoice.seed, (place) => { clientChoice.seed = place; again(); })));
  const shown = runs.filter((one) => visible(one.row) && (clientChoice.seed === 0 || `seed ${one.seed}` === seeds[clientChoice.seed]));
  if (!shown.length) {
    into.append(nothing());
    return;
  }
  const roles = unique(shown.flatMap(rolesOf));
  if (roles.length) into.append(legend(["honest", ...roles].map((role) => ({ name: roleName(role), tint: roleColour(role) }))));
  const every = unique(shown.map((one) => one.row));
  const lines = every.slice(0, LINES).map((row) => {
    const mine = shown.filter((one) => one.row === row);
    const groups = ["honest", ...roles].map((role) => ({
      colour: roleColour(role),
      values: mine.flatMap((one) => one.clients.map((who, i) => [one.accuracy[i], `${clientName(who, one.roles)}, seed ${one.seed}: ${percent(one.accuracy[i])} %`, one.roles[who] ?? "honest"])
        .filter(([, , own]) => own === role)),
    }));
    const marks = clientChoice.seed ? [] : Object.entries(means).filter(([, values]) => defined(values[row]))
      .map(([metric, values]) => [values[row], `${metric === "accuracy" ? "mean" : "mean of the worst tenth"}: ${percent(values[row])} %`]);
    return { name: rowName(row), groups, marks };
  });
  into.append(stripPlot({ title: null, label: "Accuracy of every client at the end", lines, xName: "accuracy of a client's model on its own test set, %", format: percent }));
  if (every.length > LINES) into.append(el("p", { class: "notes" }, `The first ${LINES} of ${every.length} rows; the filter chooses others.`));
  into.append(el("p", { class: "notes" }, `A dot is a client in the last evaluation.${clientChoice.seed ? "" : " The two strokes are the mean over clients and the mean of the worst tenth of them, means over seeds."}`));
  const first = shown.slice(0, 12);
  const who = unique(first.flatMap((one) => one.clients)).sort((a, b) => a - b);
  into.append(folded(`By client${first.length < shown.length ? `, in the first ${first.length} of ${shown.length} runs` : ""}`, () => table("Accuracy in % by client",
    [{ name: "client" }, { name: "role", left: true }, ...first.map((one) => ({ name: seedOf(one) }))],
    who.map((client) => [String(client), unique(first.map((one) => one.roles[client]).filter(Boolean)).map(roleName).join(", "),
      ...first.map((one) => percent(one.accuracy[one.clients.indexOf(client)]))]))));
}

// --- coefficients ----------------------------------------------------------------------------------------------------

// The first run with marked clients tells most.
const coefficientChoice = { run: -1 };

function showCoefficients(into, again) {
  const shown = data.coefficients.filter((one) => visible(one.row)).sort(bySeed);
  if (!shown.length) {
    into.append(nothing());
    return;
  }
  if (coefficientChoice.run < 0) coefficientChoice.run = Math.max(0, shown.findIndex((one) => rolesOf(one).length));
  coefficientChoice.run = Math.min(coefficientChoice.run, shown.length - 1);
  const one = shown[coefficientChoice.run];
  into.append(el("div", { class: "controls" }, choice("Run", shown.map(seedOf), coefficientChoice.run, (place) => { coefficientChoice.run = place; again(); })));
  const roles = Object.keys(one.means).sort((a, b) => ROLES.indexOf(a) - ROLES.indexOf(b));
  const roleOf = (who) => (who === -1 ? "server" : one.roles[who] ?? "honest");
  const dots = roles.map((role) => ({ colour: roleColour(role), points: one.values.filter(([, who]) => roleOf(who) === role).map(([round, , value]) => [round, value]) }));
  const [low, high] = extent(one.values.map(([, , value]) => value));
  const spare = (high - low || 0.1) * 0.04;
  into.append(legend(roles.map((role) => ({ name: roleName(role), tint: roleColour(role) }))));
  into.append(lineChart({
    title: "Coefficient of each participant; lines: means by role", label: `Coefficients by role, ${seedOf(one)}`, wide: true, xName: "round", yName: "coefficient",
    format: plain, range: [low - spare, high + spare], dots, series: roles.map((role) => ({ name: roleName(role), colour: roleColour(role), dash: "", x: one.rounds, mean: one.means[role] })),
  }));
  const every = unique(one.values.map(([, who]) => who)).sort((a, b) => ROLES.indexOf(roleOf(a)) === ROLES.indexOf(roleOf(b)) ? a - b : rank(roleOf(a)) - rank(roleOf(b)));
  const participants = every.slice(0, CLIENTS);
  const line = new Map(participants.map((who, i) => [who, i]));
  const column = new Map(one.rounds.map((round, i) => [round, i]));
  const cells = participants.map(() => one.rounds.map(() => null));
  for (const [round, who, value] of one.values) if (line.has(who)) cells[line.get(who)][column.get(round)] = value;
  const most = Math.max(Math.abs(low), Math.abs(high)) || 1;
  const share = (value) => Math.sqrt(Math.abs(value) / most);
  into.append(heatMap({
    title: "By participant and round", label: `Coefficients by participant and round, ${seedOf(one)}`, xName: "round", columns: one.rounds, text: plain, ink: () => "",
    fill: (value) => blend(value < 0 ? "cold" : "warm", 0.06 + 0.94 * share(value)),
    lines: participants.map((who, i) => ({
      name: clientName(who, one.roles).replace("client ", ""), mark: ["honest"].includes(roleOf(who)) ? null : roleColour(roleOf(who)), cells: cells[i],
      gap: i > 0 && roleOf(who) !== roleOf(participants[i - 1]),
    })),
  }));
  into.append(legend([{ name: `positive, up to ${plain(Math.max(high, 0))}`, tint: "var(--warm)" }, { name: `negative, down to ${plain(Math.min(low, 0))}`, tint: "var(--cold)" }]));
  into.append(el("p", { class: "notes" }, `A blank is a participant without a coefficient in that round. Noisy and hostile clients stand first.${every.length > CLIENTS ? ` The first ${CLIENTS} of ${every.length} participants are shown.` : ""}`));
}

/** Those who are not honest come first. */
const rank = (role) => (role === "server" ? 0 : role === "honest" ? 2 : 1);

// --- who owns what ---------------------------------------------------------------------------------------------------

const splitChoice = { place: 0, order: 0, domains: 0 };

function showSplits(into, again) {
  const set = (key) => (value) => { splitChoice[key] = value; again(); };
  const some = data.splits.filter((one) => rows.some((row, place) => visible(place) && one.settings.includes(row.setting)));
  if (!some.length) {
    into.append(nothing());
    return;
  }
  splitChoice.place = Math.min(splitChoice.place, some.length - 1);
  const named = some.map((one) => [one.settings.filter(Boolean).join(" | "), `seed ${one.seeds.join(", ")}`, `split ${one.digest}`].filter(Boolean).join(", "));
  const one = some[splitChoice.place];
  const byDomain = one.domains.length > 1 && splitChoice.domains === 1;
  into.append(el("div", { class: "controls" }, choice("Split", named, splitChoice.place, set("place")),
    segments("Clients", ["by number", "by size"], splitChoice.order, set("order")),
    one.domains.length > 1 ? segments("Columns", ["classes", "domains"], splitChoice.domains, set("domains")) : null));
  const counts = byDomain ? one.client_domains : one.clients;
  const sizes = one.clients.map((own) => own.reduce((sum, count) => sum + count, 0));
  const order = counts.map((_, client) => client);
  if (splitChoice.order === 1) order.sort((a, b) => sizes[b] - sizes[a]);
  const servers = byDomain ? one.server_domains : one.server;
  const lines = order.map((client, i) => ({
    name: clientName(client, one.roles).replace("client ", ""), mark: one.roles[client] ? roleColour(one.roles[client]) : null, cells: counts[client], bar: sizes[client],
    gap: i === 0 && one.server_size > 0,
  }));
  if (one.server_size) lines.unshift({ name: "server", mark: roleColour("server"), cells: servers ?? counts[0].map(() => null), bar: one.server_size });
  const columns = byDomain ? one.domains : counts[0].map((_, label) => label);
  const most = Math.max(...lines.flatMap((line) => line.cells.filter(defined)), 1);
  const share = (value) => (value ? 0.1 + 0.9 * Math.sqrt(value / most) : 0);
  into.append(heatMap({
    title: `Training examples by owner and ${byDomain ? "domain" : "class"}`, label: `Who owns what, ${named[splitChoice.place]}`, xName: byDomain ? "domain" : "class", columns, bar: "examples",
    text: plain, fill: (value) => blend("heat", share(value)), ink: (value) => inked(share(value)), write: columns.length <= 20 && lines.length <= 60, lines,
  }));
  const roles = rolesOf(one);
  const remarks = [
    `${counted(one.number, "client")}${one.clients.length < one.number ? `, the first ${one.clients.length} of them shown` : ""}, ${counted(one.server_size, "example")} of the server's; ${counted(one.runs, "run")} of this report ${one.runs === 1 ? "has" : "have"} this split.`,
    "Examples for training and validation. The stronger the colour the more, by the square root.",
    one.server_size && !servers ? `The server's ${byDomain ? "domains" : "classes"} are not told: it has no labels of the clients' task, or an earlier version made the runs.` : "",
    roles.length ? `Marked: ${roles.map((role) => `${roleName(role)} (${Object.values(one.roles).filter((own) => own === role).length})`).join(", ")}. Counts are of the labels before they were spoilt.` : "",
  ];
  into.append(el("div", { class: "notes" }, ...remarks.filter(Boolean).map((text) => el("p", {}, text))));
}
