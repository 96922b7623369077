// The section about configs and runs.

const SIDE_BY_SIDE = 8;

function showConfigs(into) {
  const { shared, keys, values, rows: own, runs } = data.configs;
  const shown = visibleRows();
  if (!shown.length) {
    into.append(nothing());
    return;
  }
  const valuesOf = (row) => new Map(own[row].map(([key, value]) => [keys[key], values[value]]));

  /** Keys as lines, rows as columns; only keys that one of the rows has. */
  function sideBySide(label, some, name, wanted) {
    const found = some.slice(0, SIDE_BY_SIDE).map(valuesOf);
    const told = keys.filter((key) => wanted(key) && found.some((one) => one.has(key)));
    return told.length ? table(label, [{ name: "key", left: true }, ...some.slice(0, SIDE_BY_SIDE).map((row) => ({ name: name(row), left: true }))],
      told.map((key) => [key, ...found.map((one) => one.get(key) ?? "")])) : null;
  }

  const ofMethod = (key) => key.startsWith("method.");
  const settingRows = unique(shown.map((row) => rows[row].setting)).map((setting) => shown.find((row) => rows[row].setting === setting));
  const differing = sideBySide("Settings that differ", settingRows, (row) => rows[row].setting || "value", (key) => !ofMethod(key));
  if (settings.length > 1 && differing) {
    into.append(el("h3", {}, "Settings that differ"), differing);
    if (settingRows.length > SIDE_BY_SIDE) into.append(el("p", { class: "notes" }, `The first ${SIDE_BY_SIDE} of ${settingRows.length} settings; the filter chooses others.`));
  }
  into.append(el("h3", {}, "What all runs share"), folded(counted(shared.length, "setting"), () => table("Settings that all runs share", [{ name: "key", left: true }, { name: "value", left: true }], shared)));
  const chosen = unique(shown.map((row) => rows[row].method)).map((method) => [method, shown.filter((row) => rows[row].method === method)]);
  const options = chosen.filter(([, some]) => [...valuesOf(some[0]).keys()].some(ofMethod));
  if (options.length) {
    into.append(el("h3", {}, "Options of the methods"), ...options.map(([method, some]) => folded(method, () =>
      sideBySide(`Options of ${method}`, some, (row) => rows[row].setting || "value", ofMethod))));
  }
  into.append(el("h3", {}, "Runs"));
  into.append(table("Runs", ["run", "method", "settings", "seed", "split", "data", "made with", "overrides"].map((name) => ({ name, left: name !== "seed" })),
    shown.flatMap((row) => rows[row].runs.map((place, i) => {
      const run = runs[place];
      return [run.name, rows[row].method, rows[row].setting, rows[row].seeds[i], run.split, run.data, run.machine, run.overrides].map((text, column) =>
        ([0, 4, 5, 6, 7].includes(column) ? { text, node: el("code", {}, text) } : text));
    }))));
  into.append(el("p", { class: "notes" }, "A run's name is the digest of all that decides its numbers; split and data are digests too. Equal digests are equal runs, splits and data."));
}
