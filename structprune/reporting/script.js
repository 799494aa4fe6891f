"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const svg = document.getElementById("graph");
  const panel = document.getElementById("panel");
  const nodes = [...svg.querySelectorAll(".node")];
  const paths = [...svg.querySelectorAll(".edges path")];
  const legend = [...document.querySelectorAll(".legend button")];
  const overview = [...panel.childNodes];
  let chosen = null; // {node: n} or {group: g}, kept by Enter or a click

  // -- what is shown of a node or a group

  function make(tag, text, className) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }
  const change = ([before, after]) => {
    const write = (value) => value.toLocaleString("en");
    return before === after ? write(before) : `${write(before)} → ${write(after)} (${((100 * after) / before).toFixed(0)}%)`;
  };
  function list(pairs) {
    const made = make("dl");
    for (const [name, pair] of pairs) if (pair && pair[0]) made.append(make("dt", name), make("dd", change(pair)));
    return made;
  }
  function group(number) {
    const it = data.groups[number];
    const made = make("li");
    const swatch = make("i", it.number, "swatch");
    swatch.style.setProperty("--h", it.hue);
    made.append(swatch, make("code", it.name), `, ${it.axis}: ${change(it.channels)}`);
    made.append(make("div", `in ${it.layers.length} layers: ${it.layers.join(", ")}`, "names"));
    return made;
  }
  function section(title, items) {
    const made = make("ul");
    made.append(...items);
    return items.length ? [make("h4", title), made] : [];
  }
  function showNode(number) {
    const it = data.nodes[number];
    const pins = it.pins.map(([place, reason]) => {
      const made = make("li");
      made.append(make("code", place), `: ${reason}`);
      return made;
    });
    panel.replaceChildren(
      make("h3", it.kind === "join" ? it.title : it.label),
      make("p", [it.kind, ...(it.merged.length ? [`with ${it.merged.join(", ")}`] : [])].join(", "), "muted"),
      list([["channels", it.channels], ["MACs", it.macs], ["parameters", it.params]]),
      ...section("Coupled groups", it.groups.map(group)),
      ...section("Pinned axes", pins),
    );
  }
  function showGroup(number) {
    const made = make("ul");
    made.append(group(number));
    panel.replaceChildren(make("h3", "Coupled group"), made);
  }

  // -- marking

  function light(groups, own) {
    const wanted = new Set(groups);
    svg.classList.toggle("picked", wanted.size > 0 || own !== null);
    nodes.forEach((node, number) => {
      const mine = data.nodes[number].groups.some((g) => wanted.has(g));
      node.classList.toggle("lit", mine || number === own);
    });
    for (const path of paths) {
      const beside = own !== null && (+path.dataset.from === own || +path.dataset.to === own);
      const inside = path.dataset.group !== undefined && wanted.has(+path.dataset.group);
      path.classList.toggle("lit", beside || inside);
    }
  }
  function mark(what) {
    if (!what) {
      light([], null);
      panel.replaceChildren(...overview);
    } else if (what.node !== undefined) {
      const it = data.nodes[what.node];
      light(it.group === null ? it.groups : [it.group], what.node);
      showNode(what.node);
    } else {
      light([what.group], null);
      showGroup(what.group);
    }
  }
  function keep(what) {
    const same = chosen && what && chosen.node === what.node && chosen.group === what.group;
    chosen = same ? null : what;
    nodes.forEach((node, n) => node.setAttribute("aria-pressed", String(chosen !== null && chosen.node === n)));
    legend.forEach((button, g) => button.setAttribute("aria-pressed", String(chosen !== null && chosen.group === g)));
    mark(chosen);
  }

  // -- moving and zooming

  const whole = svg.viewBox.baseVal;
  const full = { x: whole.x, y: whole.y, width: whole.width, height: whole.height };
  let view = { ...full };
  function look(next) {
    const width = Math.min(Math.max(next.width, 240), full.width * 1.5);
    const scale = width / next.width;
    const height = next.height * scale;
    const inside = (at, size, most) => Math.min(Math.max(at, -size / 2), most - size / 2);
    view = { width, height, x: inside(next.x, width, full.width), y: inside(next.y, height, full.height) };
    svg.setAttribute("viewBox", `${view.x} ${view.y} ${view.width} ${view.height}`);
  }
  function zoom(factor, at) {
    const centre = at || { x: view.x + view.width / 2, y: view.y + view.height / 2 };
    const bound = Math.min(Math.max(view.width * factor, 240), full.width * 1.5) / view.width;
    look({
      x: centre.x - (centre.x - view.x) * bound, y: centre.y - (centre.y - view.y) * bound,
      width: view.width * bound, height: view.height * bound,
    });
  }
  const zooms = { in: () => zoom(0.75), out: () => zoom(4 / 3), fit: () => look({ ...full }) };
  function point(event) {
    return new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  }
  function reveal(number) {
    const box = nodes[number].getBoundingClientRect();
    const frame = svg.getBoundingClientRect();
    const hidden = box.left < frame.left || box.right > frame.right || box.top < frame.top || box.bottom > frame.bottom;
    const [x, y] = data.centres[number];
    if (hidden) look({ ...view, x: x - view.width / 2, y: y - view.height / 2 });
  }
  document.querySelectorAll("[data-zoom]").forEach((b) => b.addEventListener("click", () => zooms[b.dataset.zoom]()));
  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(Math.exp(event.deltaY / 300), point(event));
  }, { passive: false });
  let drag = null;
  svg.addEventListener("pointerdown", (event) => {
    if (event.button === 0) drag = { at: [event.clientX, event.clientY], from: point(event), moved: false };
  });
  svg.addEventListener("pointermove", (event) => {
    if (!drag) return;
    if (!drag.moved && Math.hypot(event.clientX - drag.at[0], event.clientY - drag.at[1]) < 4) return;
    if (!drag.moved) svg.setPointerCapture(event.pointerId);
    drag.moved = true;
    svg.classList.add("moving");
    const now = point(event);
    look({ ...view, x: view.x + drag.from.x - now.x, y: view.y + drag.from.y - now.y });
  });
  for (const end of ["pointerup", "pointercancel"]) {
    svg.addEventListener(end, () => { svg.classList.remove("moving"); setTimeout(() => { drag = null; }); });
  }

  // -- nodes, by pointer and by keyboard

  function go(number) {
    nodes.forEach((node, n) => node.setAttribute("tabindex", n === number ? "0" : "-1"));
    nodes[number].focus({ preventScroll: true });
    reveal(number);
  }
  function nearest(from, among) {
    const far = (n) => Math.hypot(data.centres[n][0] - data.centres[from][0], data.centres[n][1] - data.centres[from][1]);
    return among.length ? among.reduce((best, n) => (far(n) < far(best) ? n : best)) : undefined;
  }
  const steps = {
    ArrowDown: (n) => nearest(n, data.edges.filter(([a]) => a === n).map(([, b]) => b)),
    ArrowUp: (n) => nearest(n, data.edges.filter(([, b]) => b === n).map(([a]) => a)),
    ArrowRight: (n) => beside(n, 1),
    ArrowLeft: (n) => beside(n, -1),
    Home: () => 0,
    End: () => nodes.length - 1,
  };
  function beside(number, way) {
    const [x, y] = data.centres[number];
    const there = data.centres.map((_, n) => n).filter((n) => way * (data.centres[n][0] - x) > 20);
    const level = there.filter((n) => Math.abs(data.centres[n][1] - y) < 40);
    return nearest(number, level.length ? level : there);
  }
  nodes.forEach((node, number) => {
    node.addEventListener("pointerenter", () => { if (!drag && !chosen) mark({ node: number }); });
    node.addEventListener("pointerleave", () => { if (!chosen) mark(null); });
    node.addEventListener("focus", () => { if (!chosen) mark({ node: number }); });
    node.addEventListener("blur", () => { if (!chosen) mark(null); });
    node.addEventListener("click", () => { if (!drag || !drag.moved) { go(number); keep({ node: number }); } });
    node.addEventListener("keydown", (event) => {
      const step = steps[event.key];
      if (event.key === "Enter" || event.key === " ") keep({ node: number });
      else if (step) {
        const next = step(number);
        if (next !== undefined) {
          const held = chosen !== null && chosen.node !== undefined;
          go(next);
          if (held && chosen.node !== next) keep({ node: next });
        }
      } else return;
      event.preventDefault();
    });
  });
  svg.addEventListener("keydown", (event) => {
    const found = { "+": "in", "=": "in", "-": "out", "0": "fit" }[event.key];
    if (!found || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    zooms[found]();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && chosen) keep(null); });
  legend.forEach((button, number) => {
    button.addEventListener("click", () => keep({ group: number }));
    button.addEventListener("pointerenter", () => { if (!chosen) mark({ group: number }); });
    button.addEventListener("pointerleave", () => { if (!chosen) mark(null); });
  });

  // -- tables that sort

  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const given = [...body.rows];
    table.querySelectorAll("thead th").forEach((heading, column) => {
      heading.querySelector("button").addEventListener("click", () => {
        const order = { none: "descending", descending: "ascending", ascending: "none" };
        const next = order[heading.getAttribute("aria-sort") || "none"];
        table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
        if (next !== "none") heading.setAttribute("aria-sort", next);
        const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
        const compare = (a, b) => {
          const [x, y] = [value(a), value(b)];
          return isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        };
        const rows = [...given];
        if (next !== "none") rows.sort((a, b) => (next === "ascending" ? 1 : -1) * compare(a, b));
        body.replaceChildren(...rows);
      });
    });
  }
})();
