// The parts of the report that answer to the reader: the heat maps with their switch and tips, the tokens of the
// experts, and the table of all layers. Everything comes from the JSON in #data. Names reach the page as text only.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { stacks, layers, measures } = data;
  const total = layers.stack.length;
  const DASH = "–";
  const ROWS = 200;  // of the table of all layers, at a time

  // A column of equal values holds one.
  const figure = (column, layer) => layers[column].length === 1 ? layers[column][0] : layers[column][layer];
  const sorted = values => [...values].sort((a, b) => a - b);
  const mean = values => values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;

  function nameOf(layer) {
    const stack = stacks[layers.stack[layer]], block = stack.blocks[layers.block[layer]];
    let kind = stack.kinds[layers.kind[layer]];
    for (const number of layers.numbers[layer].split(".")) kind = kind.replace("*", () => number);
    return [stack.name, block ?? "", kind].filter(part => part !== "").join(".");
  }

  const digits = value => {
    const size = Math.abs(value), places = size >= 99.95 ? 0 : size >= 9.995 ? 1 : size >= 0.9995 ? 2 : 3;
    return value !== 0 && size < 0.0005 ? value.toExponential(1) : value.toFixed(places);
  };
  const grouped = value => Math.round(value).toLocaleString("en-US");
  const write = {
    percent: value => digits(100 * value) + " %",
    number: value => digits(value),
    alpha: value => value.toFixed(2),
    count: grouped,
    seconds: value => digits(value) + " s",
  };
  const show = (unit, value) => value === null || value === undefined ? DASH : write[unit](value);

  function element(tag, text, attributes = {}) {
    const made = document.createElement(tag);
    if (text !== null && text !== undefined) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  // Colour: lightness runs evenly from the page's own brightness to its opposite, so that more always stands out more.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const printing = matchMedia("print");
  const isDark = () => dark.matches && !printing.matches;
  const lightness = part => isDark() ? 0.3 + 0.62 * part : 0.95 - 0.62 * part;
  function colour(part) {
    const hue = isDark() ? 285 - 195 * part : 95 + 190 * part;
    const chroma = isDark() ? 0.055 + 0.085 * part : 0.045 + 0.095 * part;
    return `oklch(${lightness(part).toFixed(3)} ${chroma.toFixed(3)} ${hue.toFixed(1)})`;
  }
  const inkOn = part => lightness(part) > 0.57 ? "#111" : "#fff";

  // From values to 0…1: in equal steps or in equal ratios, whichever brings the median nearer to the middle.
  function scaleOf(values) {
    const low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    const median = sorted(values)[values.length >> 1];
    const steps = value => (value - low) / (high - low), equalRatios = value => Math.log(value / low) / Math.log(high / low);
    const ratios = low > 0 && high > low && Math.abs(equalRatios(median) - 0.5) < Math.abs(steps(median) - 0.5) - 0.1;
    const at = ratios ? equalRatios : steps;
    const back = part => ratios ? low * (high / low) ** part : low + part * (high - low);
    return { part: value => high > low ? at(value) : 0.5, back, ratios, low, high };
  }

  // ---- heat maps ----

  const cells = stacks.map(stack => stack.kinds.map(() => stack.blocks.map(() => [])));
  for (let layer = 0; layer < total; layer++) cells[layers.stack[layer]][layers.kind[layer]][layers.block[layer]].push(layer);
  const gaps = new Map(data.gaps.map(([stack, block, kind, reason]) => [`${stack} ${kind} ${block}`, reason]));
  const known = (column, group) => group.map(layer => figure(column, layer)).filter(value => value !== null);

  function drawMaps(measure) {
    const values = cells.flat(2).map(group => mean(known(measure.key, group))).filter(value => value !== null);
    const scale = scaleOf(values);
    const maps = document.getElementById("maps");
    maps.replaceChildren(...stacks.flatMap((stack, index) => {
      const table = heatMap(stack, index, measure, scale), box = element("div", null, { class: "scroll" });
      box.append(table);
      return stacks.length > 1 ? [element("h3", stack.name || "outside of the blocks"), box] : [box];
    }));
    document.getElementById("meaning").textContent = measure.meaning;
    drawScale(measure, scale);
  }

  function heatMap(stack, index, measure, scale) {
    const table = element("table", null, { class: "heat", tabindex: 0, "aria-label": `${measure.label} by kind of layer and block` });
    const longest = Math.max(...stack.kinds.map(kind => kind.length));
    table.style.setProperty("--kind-width", `min(${(0.58 * longest + 1).toFixed(1)}em, 40vw)`);
    table.style.minWidth = `calc(${(0.58 * longest + 1).toFixed(1)}em * .75 + ${4 + 0.37 * stack.blocks.length}rem)`;
    table.style.maxWidth = `calc(${(0.58 * longest + 1).toFixed(1)}em + ${4.2 + 9 * stack.blocks.length}rem)`;
    const group = element("colgroup");
    group.append(element("col", null, { class: "kind" }), ...stack.blocks.map(() => element("col")), element("col", null, { class: "mean" }));
    table.append(group, above(stack, index, measure), rows(stack, index, measure, scale), below(stack));
    return table;
  }

  function above(stack, index, measure) {
    const head = element("thead"), row = element("tr", null, { class: "above" });
    const means = stack.blocks.map((_, block) => mean(stack.kinds.flatMap((_, kind) => known(measure.key, cells[index][kind][block]))));
    const highest = Math.max(...means.filter(value => value !== null), 0);
    row.append(element("th", stack.blocks.length > 1 ? "mean of the block" : "", { scope: "row" }));
    for (const value of means) {
      const cell = element("td"), bar = element("i");
      if (value !== null && highest > 0 && stack.blocks.length > 1) {
        bar.style.height = `${(2.4 * value / highest).toFixed(2)}rem`;
        cell.title = show(measure.unit, value);
        cell.append(bar);
      }
      row.append(cell);
    }
    row.append(element("th", "mean", { class: "mean", scope: "col" }));
    head.append(row);
    return head;
  }

  function rows(stack, index, measure, scale) {
    const body = element("tbody"), written = stack.blocks.length <= 14;
    stack.kinds.forEach((kind, row) => {
      const line = element("tr");
      line.append(element("th", kind || "(the block itself)", { scope: "row", title: kind }));
      stack.blocks.forEach((_, column) => {
        const group = cells[index][row][column], value = mean(known(measure.key, group));
        const cell = element("td", null, { class: "cell" });
        cell.dataset.at = `${index} ${row} ${column}`;
        if (gaps.has(cell.dataset.at)) cell.classList.add("gap");
        if (!group.length && !gaps.has(cell.dataset.at)) cell.classList.add("none");
        if (value === null) {
          if (group.length) cell.classList.add("unknown");
          if (group.length && written) cell.textContent = DASH;
        } else {
          cell.style.background = colour(scale.part(value));
          cell.style.color = inkOn(scale.part(value));
          if (written) cell.textContent = show(measure.unit, value);
        }
        if (group.some(layer => layers.fallbacks[layer].length)) cell.classList.add("fallen", ...(group.length > 1 ? ["some"] : []));
        line.append(cell);
      });
      line.append(element("td", show(measure.unit, mean(known(measure.key, cells[index][row].flat()))), { class: "mean" }));
      body.append(line);
    });
    return body;
  }

  function below(stack) {
    const foot = element("tfoot"), row = element("tr"), every = Math.ceil(stack.blocks.length / 20);
    row.append(element("th", stack.blocks[0] === null ? "" : "block", { scope: "row", style: "text-align:right;padding-right:.6rem" }));
    stack.blocks.forEach((block, column) => {
      const cell = element("td");
      if (block !== null && column % every === 0) cell.append(element("span", block, column / every % 3 ? { class: "minor" } : {}));
      row.append(cell);
    });
    row.append(element("td"));
    foot.append(row);
    return foot;
  }

  function drawScale(measure, scale) {
    const box = document.getElementById("scale"), ramp = element("div", null, { class: "ramp" });
    const stops = Array.from({ length: 17 }, (_, step) => colour(step / 16));
    ramp.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
    const ticks = element("div", null, { class: "ticks" });
    const places = scale.high > scale.low ? [0, 0.25, 0.5, 0.75, 1] : [0.5];
    ticks.append(...places.map((part, at) => element("span", show(measure.unit, scale.back(part)), at % 2 ? { class: "minor" } : {})));
    box.replaceChildren(element("span", measure.label + (scale.ratios ? ", logarithmic" : "")), ramp, ticks);
  }

  // ---- tips ----

  const tip = document.getElementById("tip");
  let current = null;

  function tipOf(at) {
    const [stack, row, column] = at.split(" ").map(Number), group = cells[stack][row][column];
    if (!group.length) {
      const reason = gaps.get(at);
      return reason === undefined ? null : [element("b", cellName(stack, row, column)), element("div", `left as it is: ${reason}`)];
    }
    const parts = group.length === 1 ? oneLayer(group[0]) : manyLayers(group);
    const fallen = new Set(group.flatMap(layer => layers.fallbacks[layer]));
    for (const name of fallen) parts.push(element("p", `fallback: ${data.fallbacks[name]}`));
    const first = group.length === 1 ? nameOf(group[0]) : `${cellName(stack, row, column)} (${group.length} layers)`;
    return [element("b", first), ...parts];
  }

  const cellName = (stack, row, column) =>
    [stacks[stack].name, stacks[stack].blocks[column] ?? "", stacks[stack].kinds[row]].filter(part => part !== "").join(".");

  function pair(label, text) {
    const line = element("div");
    line.append(element("span", label), element("span", text));
    return line;
  }

  function oneLayer(layer) {
    const get = column => figure(column, layer);
    const parts = [
      pair("true error", show("percent", get("true_error"))),
      pair("own error", show("percent", get("output_error"))),
      pair("shape", `${get("out_features")} × ${get("in_features")}`),
      pair("setting", `${get("bits")} bits, ${get("group_size") === -1 ? "one group" : "group " + get("group_size")}, ${get("sym") ? "sym" : "asym"}, ${get("method")}`),
      pair("bits per weight", show("number", get("bits_per_weight"))),
      pair("tokens", grouped(get("tokens"))),
    ];
    if (get("held_out")) parts.push(pair("held out", grouped(get("held_out"))));
    if (get("dropped")) parts.push(pair("tokens dropped", grouped(get("dropped"))));
    if (get("correction") !== null) parts.push(pair("correction α", show("alpha", get("correction"))));
    parts.push(pair("time", show("seconds", get("seconds"))));
    return parts;
  }

  function manyLayers(group) {
    const parts = [];
    for (const { key, label, unit } of measures) {
      const values = sorted(known(key, group));
      if (!values.length) continue;
      parts.push(pair(`${label}, mean`, show(unit, mean(values))), pair(`${label}, range`, `${show(unit, values[0])} … ${show(unit, values.at(-1))}`));
    }
    return parts;
  }

  function showTip(cell) {
    const parts = cell && tipOf(cell.dataset.at);
    current?.classList.remove("current");
    current = parts ? cell : null;
    tip.hidden = !parts;
    if (!parts) return;
    current.classList.add("current");
    tip.replaceChildren(...parts);
    const box = cell.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - own.width / 2), innerWidth - own.width - 8);
    const under = box.bottom + 8 + own.height < innerHeight;
    tip.style.left = `${left}px`;
    tip.style.top = `${under ? box.bottom + 8 : Math.max(8, box.top - own.height - 8)}px`;
  }

  function step(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key === "Escape") return showTip(null);
    const table = event.target.closest(".heat"), move = moves[event.key];
    if (!table || !move) return;
    event.preventDefault();
    const inside = current && table.contains(current) ? current.dataset.at.split(" ").map(Number) : null;
    const stack = Number(table.querySelector(".cell").dataset.at.split(" ")[0]);
    const [row, column] = inside ? [inside[1] + move[0], inside[2] + move[1]] : [0, 0];
    const next = table.querySelector(`[data-at="${stack} ${row} ${column}"]`);
    if (next) showTip(next);
  }

  // ---- tokens of the experts ----

  function drawExperts() {
    const place = document.getElementById("experts");
    if (!place) return;
    place.replaceChildren();
    stacks.forEach((stack, index) => {
      const kind = stack.kinds.findIndex((_, row) => cells[index][row].some(group => group.length > 1));
      if (kind >= 0) place.append(expertFigure(stack, cells[index][kind], stack.kinds[kind]));
    });
  }

  // One pixel for an expert in a block: any number of them costs one element.
  function expertFigure(stack, byBlock, kind) {
    const used = byBlock.map((group, column) => [stack.blocks[column], group]).filter(([, group]) => group.length > 1);
    const most = Math.max(...used.map(([, group]) => group.length));
    const scale = scaleOf(used.flatMap(([, group]) => known("tokens", group)).filter(tokens => tokens > 0));
    const figureBox = element("figure"), canvas = element("canvas", null, { width: most, height: used.length, role: "img" });
    canvas.style.height = `${Math.min(Math.max(used.length * 0.75, 4), 24)}rem`;
    canvas.setAttribute("aria-label", `tokens of ${kind}, one row for each block, one column for each expert`);
    const pen = canvas.getContext("2d");
    used.forEach(([, group], row) => group.forEach((layer, column) => {
      pen.fillStyle = figure("tokens", layer) ? colour(scale.part(figure("tokens", layer))) : "#e0331f";
      pen.fillRect(column, row, 1, 1);
    }));
    const caption = element("figcaption", `${kind}: a row for each block, a column for each expert; ` +
      `${grouped(scale.low)} (pale) to ${grouped(scale.high)} tokens${scale.ratios ? ", logarithmic" : ""}; red: none.`);
    if (isDark()) caption.textContent = caption.textContent.replace("pale", "dark");
    canvas.addEventListener("pointermove", event => {
      const box = canvas.getBoundingClientRect();
      const [block, group] = used[Math.min(Math.floor((event.clientY - box.top) / box.height * used.length), used.length - 1)];
      const layer = group[Math.floor((event.clientX - box.left) / box.width * most)];
      canvas.title = layer === undefined ? `block ${block}` : `${nameOf(layer)}: ${grouped(figure("tokens", layer))} tokens`;
    });
    figureBox.append(caption, canvas);
    return figureBox;
  }

  // ---- all layers ----

  const COLUMNS = [
    ["layer", nameOf, null],
    ["shape", layer => figure("out_features", layer) * figure("in_features", layer), (_, layer) => `${figure("out_features", layer)} × ${figure("in_features", layer)}`],
    ["bits", layer => figure("bits", layer), value => value],
    ["group", layer => figure("group_size", layer), value => value],
    ["bits per weight", layer => figure("bits_per_weight", layer), value => show("number", value)],
    ["tokens", layer => figure("tokens", layer), value => grouped(value)],
    ["own error", layer => figure("output_error", layer), value => show("percent", value)],
    ["true error", layer => figure("true_error", layer), value => show("percent", value)],
    ["α", layer => figure("correction", layer), value => show("alpha", value)],
    ["seconds", layer => figure("seconds", layer), value => show("number", value)],
    ["fallbacks", layer => layers.fallbacks[layer].map(name => data.fallbacks[name]).join(", "), null],
  ];
  const order = { column: 0, up: true, byName: false, shown: ROWS };

  function drawTable() {
    const wanted = document.getElementById("filter").value.trim().toLowerCase();
    let found = Array.from({ length: total }, (_, layer) => layer);
    if (wanted) found = found.filter(layer => nameOf(layer).toLowerCase().includes(wanted));
    if (order.byName) found = arranged(found);
    const table = document.getElementById("layers"), body = element("tbody");
    body.append(...found.slice(0, order.shown).map(tableRow));
    table.replaceChildren(tableHead(), body);
    document.getElementById("found").textContent = `${grouped(found.length)} of ${grouped(total)} layers`;
    const more = document.getElementById("more");
    more.hidden = found.length <= order.shown;
    more.textContent = `Show ${grouped(Math.min(ROWS, found.length - order.shown))} more`;
  }

  function arranged(found) {
    const key = COLUMNS[order.column][1], sign = order.up ? 1 : -1;
    const value = new Map(found.map(layer => [layer, key(layer)]));
    return found.sort((a, b) => {
      const [x, y] = [value.get(a), value.get(b)];
      if (x === y) return a - b;
      if (x === null || y === null) return x === null ? 1 : -1;  // unknown ones last
      return typeof x === "string" ? sign * x.localeCompare(y, "en", { numeric: true }) : sign * (x - y);
    });
  }

  function tableHead() {
    const head = element("thead"), row = element("tr");
    COLUMNS.forEach(([label, , text], column) => {
      const cell = element("th", null, text ? { class: "n" } : {}), button = element("button", label, { type: "button" });
      if (order.byName && order.column === column) cell.setAttribute("aria-sort", order.up ? "ascending" : "descending");
      button.addEventListener("click", () => {
        order.up = order.byName && order.column === column ? !order.up : column === 0;
        Object.assign(order, { column, byName: true });
        drawTable();
      });
      cell.append(button);
      row.append(cell);
    });
    head.append(row);
    return head;
  }

  function tableRow(layer) {
    const row = element("tr");
    row.append(...COLUMNS.map(([, value, text], column) =>
      element(column ? "td" : "th", text ? text(value(layer), layer) : value(layer), text ? { class: "n" } : {})));
    return row;
  }

  // ---- start ----

  let shown = measures[0];
  function draw() {
    if (shown) drawMaps(shown);
    drawExperts();
  }
  for (const measure of measures) {
    const button = element("button", measure.label, { type: "button", "aria-pressed": measure === shown });
    button.addEventListener("click", () => {
      shown = measure;
      for (const other of button.parentElement.children) other.setAttribute("aria-pressed", other === button);
      showTip(null);
      drawMaps(measure);
    });
    document.getElementById("measures").append(button);
  }
  draw();
  dark.addEventListener("change", draw);
  printing.addEventListener("change", draw);

  const maps = document.getElementById("maps");
  maps.addEventListener("pointerover", event => showTip(event.target.closest(".cell")));
  maps.addEventListener("pointerleave", () => showTip(null));
  maps.addEventListener("keydown", step);
  maps.addEventListener("focusout", () => showTip(null));
  addEventListener("scroll", () => { if (current && !current.matches(":hover")) showTip(null); }, { passive: true });

  document.getElementById("all").addEventListener("toggle", drawTable);
  document.getElementById("filter").addEventListener("input", () => { order.shown = ROWS; drawTable(); });
  document.getElementById("more").addEventListener("click", () => { order.shown += ROWS; drawTable(); });

  const copy = document.getElementById("copy");
  if (navigator.clipboard) {
    copy.hidden = false;
    copy.addEventListener("click", () => navigator.clipboard.writeText(document.getElementById("command").textContent)
      .then(() => { copy.textContent = "Copied"; }, () => { copy.textContent = "Select it by hand"; }));
  }
})();
