"use strict";
// Curves say their values: at the pointer, and by the arrow keys at a chart that has the focus.

// Pages have scripts of their own, with names of their own: this is all that they share.
const keepCharts = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const known = new WeakMap();
  const chosen = new Map(); // by a chart's title, the x that its readout shows

  // Lines of a chart: name, x, y, labels, and the colour's class.
  function chartOf(svg) {
    let chart = known.get(svg);
    if (!chart) {
      const lines = [...svg.querySelectorAll("path[data-values]")].map((path) => {
        const [x, y, labels] = JSON.parse(path.dataset.values);
        return { name: path.dataset.name, x, y, labels, colour: path.classList[1] };
      });
      const all = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
      chart = { lines, all, area: JSON.parse(svg.dataset.area), ends: JSON.parse(svg.dataset.ends) };
      known.set(svg, chart);
    }
    return chart;
  }

  // The place of the value nearest to x.
  function nearest(values, x) {
    let found = 0;
    for (let i = 1; i < values.length; i++) if (Math.abs(values[i] - x) < Math.abs(values[found] - x)) found = i;
    return found;
  }

  function text(value) {
    if (Number.isInteger(value)) return value.toLocaleString("en");
    return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6 ? String(Number(value.toPrecision(5))) : value.toPrecision(4);
  }

  function element(name, attributes) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  function hide(svg) {
    chosen.delete(svg.closest("figure").dataset.title);
    svg.querySelector("g.readings")?.remove();
    svg.closest("figure").querySelector(".readout").hidden = true;
  }

  function show(svg, x) {
    const { lines, area: [left, right, bottom, top], ends: [[x0, x1], [y0, y1]] } = chartOf(svg);
    const figure = svg.closest("figure");
    const across = (value) => left + (value - x0) / (x1 - x0) * (right - left);
    const up = (value) => bottom + ((svg.dataset.log === undefined ? value : Math.log10(value)) - y0) / (y1 - y0) * (top - bottom);
    const marks = element("g", { class: "readings" });
    marks.append(element("path", { class: "cursor", d: `M${across(x)},${top} V${bottom}` }));
    const said = [];
    for (const line of lines) {
      const at = nearest(line.x, x);
      marks.append(element("circle", { class: line.colour, cx: across(line.x[at]), cy: up(line.y[at]), r: 3.5 }));
      const notes = [line.labels[at], line.x[at] === x ? "" : `at ${text(line.x[at])}`].filter(Boolean);
      said.push(`${line.name} ${text(line.y[at])}${notes.length ? ` (${notes.join(", ")})` : ""}`);
    }
    svg.querySelector("g.readings")?.remove();
    svg.append(marks);
    const readout = figure.querySelector(".readout");
    readout.textContent = `${svg.dataset.x || "at"} ${text(x)}: ${said.join("; ")}`;
    readout.hidden = false;
    svg.setAttribute("aria-valuetext", readout.textContent);
    svg.setAttribute("aria-valuenow", chartOf(svg).all.indexOf(x));
    chosen.set(figure.dataset.title, x);
  }

  // Charts can have the focus only where this file runs; elsewhere there is the table below each.
  function prepare(container) {
    for (const svg of container.querySelectorAll("svg[data-ends]")) {
      svg.setAttribute("tabindex", "0");
      svg.setAttribute("role", "slider");
      svg.setAttribute("aria-valuemin", "0");
      svg.setAttribute("aria-valuemax", String(chartOf(svg).all.length - 1));
      svg.setAttribute("aria-valuenow", "0");
    }
  }

  // Replaces a part of the page; its charts keep the focus, their readouts and their opened tables.
  function keep(container, replace) {
    const title = (node) => node.closest("figure.lines")?.dataset.title;
    const opened = new Set([...container.querySelectorAll("figure.lines details[open]")].map(title));
    const active = container.contains(document.activeElement) ? document.activeElement : null;
    const focused = active && title(active);
    const tag = active?.tagName;
    const shown = [...chosen];
    replace();
    for (const [name, x] of shown) chosen.set(name, x);
    prepare(container);
    for (const figure of container.querySelectorAll("figure.lines")) {
      const svg = figure.querySelector("svg[data-ends]");
      if (!svg) continue;
      const name = figure.dataset.title;
      const details = figure.querySelector("details");
      if (opened.has(name)) details.open = true;
      if (chosen.has(name)) {
        const { all } = chartOf(svg);
        show(svg, all[nearest(all, chosen.get(name))]);
      }
      if (name === focused) figure.querySelector(tag.toLowerCase() === "summary" ? "summary" : "svg").focus({ preventScroll: true });
    }
  }

  document.addEventListener("pointermove", (event) => {
    const svg = event.target.closest?.("svg[data-ends]");
    for (const other of document.querySelectorAll("svg:has(g.readings)")) {
      if (other !== svg && other !== document.activeElement) hide(other);
    }
    if (!svg) return;
    const { all, area: [left, right], ends: [[x0, x1]] } = chartOf(svg);
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    show(svg, all[nearest(all, x0 + (at - left) / (right - left) * (x1 - x0))]);
  });

  document.addEventListener("focusin", (event) => {
    const svg = event.target.closest?.("svg[data-ends]");
    if (svg && !svg.querySelector("g.readings")) show(svg, chartOf(svg).all.at(-1));
  });

  document.addEventListener("focusout", (event) => {
    const svg = event.target.closest?.("svg[data-ends]");
    if (svg && svg.isConnected) hide(svg);
  });

  // Before the page's own arrow keys, which go to another page.
  document.addEventListener("keydown", (event) => {
    const svg = event.target.closest?.("svg[data-ends]");
    if (!svg || event.ctrlKey || event.metaKey || event.altKey) return;
    const { all } = chartOf(svg);
    const now = nearest(all, chosen.get(svg.closest("figure").dataset.title) ?? all.at(-1));
    const far = Math.max(1, Math.round(all.length / 20));
    const to = {
      ArrowLeft: now - 1, ArrowRight: now + 1, PageDown: now - far, PageUp: now + far, Home: 0, End: all.length - 1,
    }[event.key];
    if (event.key === "Escape") hide(svg);
    else if (to === undefined) return;
    else show(svg, all[Math.min(all.length - 1, Math.max(0, to))]);
    event.preventDefault();
    event.stopPropagation();
  }, true);

  prepare(document);
  return keep;
})();
