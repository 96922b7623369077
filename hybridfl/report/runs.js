// The section about configs and runs.

const SIDE_BY_SIDE = 8;

function showConfigs(into) {
  const { shared, keys, values, rows: own, runs } = data.configs;
  const shown = visibleRows();
  const first = shown.slice(0, SIDE_BY_SIDE);
  const values_of = first.map((row) => new Map(own[row].map(([key, value]) => [key, values[value]])));
  const told = keys.map((key, place) => [key, place]).filter(([, place]) => values_of.some((found) => found.has(place)));
  into.append(el("h3", {}, "What differs"));
  if (!shown.length) into.append(nothing());
  else if (!told.length) into.append(el("p", { class: "empty" }, "Nothing but the seed."));
  else {
    into.append(table("Settings that differ", [{ name: "key", left: true }, ...first.map((row) => ({ name: rowName(row), left: true }))],
      told.map(([key, place]) => [key, ...values_of.map((found) => found.get(place) ?? "")])));
    if (first.length < shown.length) into.append(el("p", { class: "notes" }, `The first ${first.length} of ${shown.length} rows; the filter chooses others.`));
  }
  into.append(el("h3", {}, "What all runs share"), folded(counted(shared.length, "setting"), () => table("Settings that all runs share", [{ name: "key", left: true }, { name: "value", left: true }], shared)));
  into.append(el("h3", {}, "Runs"));
  into.append(table("Runs", ["run", "method", "settings", "seed", "split", "data", "made with", "overrides"].map((name) => ({ name, left: name !== "seed" })),
    shown.flatMap((row) => rows[row].runs.map((place, i) => {
      const run = runs[place];
      return [run.name, rows[row].method, rows[row].setting, rows[row].seeds[i], run.split, run.data, run.machine, run.overrides].map((text, column) =>
        ([0, 4, 5, 7].includes(column) ? { text, node: el("code", {}, text) } : text));
    }))));
  into.append(el("p", { class: "notes" }, "A run's name is the digest of all that decides its numbers; split and data are digests too. Equal digests are equal runs, splits and data."));
}
