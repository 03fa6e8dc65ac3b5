"use strict";

// ------------------------------------------------------------------------------------------------------------ theme

const root = document.documentElement;
const palette = JSON.parse(document.getElementById("palette").textContent);
const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
const paper = matchMedia("print");

const theme = () => root.dataset.theme ?? (systemIsDark.matches ? "dark" : "light");

function prepareToggle() {
  const button = document.getElementById("theme");
  const name = () => {
    const other = theme() === "dark" ? "light" : "dark";
    button.textContent = other === "dark" ? "Dark" : "Light";
    button.setAttribute("aria-label", `Use the ${other} theme`);
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    try {
      localStorage.setItem("temper-theme", root.dataset.theme);
    } catch {
      // Not remembered.
    }
    name();
    drawPlots();
  });
  systemIsDark.addEventListener("change", () => {
    name();
    drawPlots();
  });
  name();
}

// ----------------------------------------------------------------------------------------------------------- tables

function prepareTables() {
  for (const table of document.querySelectorAll("table.sortable")) {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      button.addEventListener("click", () => sortTable(table, headings, column));
      heading.append(button);
    });
  }
}

function sortTable(table, headings, column) {
  const down = headings[column].getAttribute("aria-sort") === "ascending";
  for (const heading of headings) heading.removeAttribute("aria-sort");
  headings[column].setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent;
  const compare = (a, b) => {
    const [left, right] = [Number(key(a)), Number(key(b))];
    const order = left === right ? 0 : left - right;
    return Number.isNaN(order) ? key(a).localeCompare(key(b), "en", { numeric: true }) : order;
  };
  const rows = [...table.tBodies[0].rows].sort(compare);
  table.tBodies[0].append(...(down ? rows.reverse() : rows));
}

// A field above each long table: rows are shown that have all of its words.
function prepareFilters() {
  for (const place of document.querySelectorAll(".long")) {
    const rows = [...place.querySelector("tbody").rows];
    const [label, field, shown] = ["label", "input", "span"].map((name) => document.createElement(name));
    label.className = "filter";
    field.type = "search";
    field.placeholder = "Filter";
    field.setAttribute("aria-label", "Filter the rows of the table");
    shown.setAttribute("role", "status");
    label.append(field, shown);
    place.before(label);
    const filter = () => {
      const words = field.value.toLowerCase().split(/\s+/);
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
      }
      const left = rows.filter((row) => !row.hidden).length;
      shown.textContent = `${left.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows`;
    };
    field.addEventListener("input", filter);
    filter();
  }
}

// ------------------------------------------------------------------------------------------------------ lines to copy

function prepareCopying() {
  for (const lines of document.querySelectorAll("pre.copy")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      const text = lines.querySelector("code");
      try {
        await navigator.clipboard.writeText(text.textContent);
        button.textContent = "Copied";
        setTimeout(() => (button.textContent = "Copy"), 1500);
      } catch {
        getSelection().selectAllChildren(text); // the clipboard is not for pages in a frame
      }
    });
    lines.append(button);
  }
}

// ------------------------------------------------------------------------------------------------------------- plots

const plots = [...document.querySelectorAll(".plot")].map((place) => ({
  place,
  figure: JSON.parse(place.nextElementSibling.textContent),
}));

// The text is compressed, as the library is by far the largest part of the page.
async function loadPlotly() {
  const packed = atob(document.getElementById("plotly").textContent);
  const bytes = Uint8Array.from(packed, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

// A copy of a figure in which the names of colours are the colours of this theme.
function coloured(values, name) {
  if (typeof values === "string") return palette[values]?.[name === "dark" ? 1 : 0] ?? values;
  if (Array.isArray(values)) return values.map((value) => coloured(value, name));
  if (values === null || typeof values !== "object") return values;
  return Object.fromEntries(Object.entries(values).map(([key, value]) => [key, coloured(value, name)]));
}

function merged(base, values) {
  const result = { ...base };
  for (const [key, value] of Object.entries(values)) {
    const both = [base[key], value].every((each) => each !== null && typeof each === "object" && !Array.isArray(each));
    result[key] = both ? merged(base[key], value) : value;
  }
  return result;
}

const AXIS = {
  automargin: true,
  gridcolor: "--line",
  linecolor: "--line",
  tickcolor: "--line",
  tickfont: { color: "--quiet", size: 11 },
  title: { font: { size: 12 }, standoff: 8 },
  zeroline: false,
  spikecolor: "--quiet",
  spikethickness: 1,
};
const LAYOUT = {
  autosize: true,
  colorway: Array.from({ length: 8 }, (_, index) => `--series-${index + 1}`),
  font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "--ink" },
  hoverlabel: { bgcolor: "--panel", bordercolor: "--line", font: { color: "--ink", size: 12 } },
  legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom", font: { size: 11 } },
  margin: { t: 40, r: 16, b: 44, l: 56 },
  modebar: { bgcolor: "rgba(0,0,0,0)", color: "--quiet", activecolor: "--accent" },
  paper_bgcolor: "rgba(0,0,0,0)",
  plot_bgcolor: "rgba(0,0,0,0)",
};

function dressed(figure, name) {
  const axes = ["xaxis", "yaxis", ...Object.keys(figure.layout).filter((key) => /^[xy]axis/.test(key))];
  const base = { ...LAYOUT, ...Object.fromEntries(axes.map((axis) => [axis, AXIS])) };
  return coloured({ data: figure.data, layout: merged(base, figure.layout) }, name);
}

// Names of bands, each in the middle of its shape, as far as there is room for them.
function fitting({ annotations = [], shapes = [], xaxis }, width) {
  const edges = xaxis?.range ?? shapes.flatMap(({ x0, x1 }) => [x0, x1]);
  const letters = width / 8 / (Math.max(...edges) - Math.min(...edges));
  const band = ({ x }) => shapes.find(({ type, x0, x1 }) => type === "rect" && (x0 + x1) / 2 === x);
  const fits = (note) => !band(note) || (band(note).x1 - band(note).x0) * letters > note.text.length;
  return annotations.filter(fits);
}

function drawPlots(name = theme(), width = undefined) {
  if (typeof Plotly === "undefined") return;
  for (const { place, figure } of plots) {
    const { data, layout } = dressed(figure, name);
    layout.annotations = fitting(layout, (width ?? place.clientWidth) - 80);
    const config = {
      displaylogo: false,
      modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
      responsive: true,
      showSendToCloud: false, // nothing of a run is anybody else's
      plotlyServerURL: "",
      toImageButtonOptions: { format: "svg", filename: place.dataset.name },
    };
    Plotly.react(place, data, width ? { ...layout, width, autosize: false } : layout, config);
  }
}

async function preparePlots() {
  if (plots.length === 0) return;
  try {
    await loadPlotly();
    for (const { place } of plots) place.replaceChildren();
    drawPlots();
  } catch (error) {
    for (const { place } of plots) place.textContent = `Not drawn: ${error}. It is in ${place.dataset.name}.png, too.`;
  }
  root.dataset.ready = "true";
}

// A sheet of paper is white and not as wide as a window.
const PAPER_WIDTH = 680;

// Shrinks tables that are wider than the sheet, which the browser would do to the whole page.
function fitTables() {
  for (const table of document.querySelectorAll("table.sortable")) {
    table.style.minWidth = "0";
    table.style.zoom = Math.min(1, PAPER_WIDTH / table.offsetWidth);
    table.style.minWidth = "";
  }
}

addEventListener("beforeprint", () => {
  fitTables();
  drawPlots("light", PAPER_WIDTH);
});
addEventListener("afterprint", () => {
  for (const table of document.querySelectorAll("table.sortable")) table.style.zoom = "";
  drawPlots();
});

// ---------------------------------------------------------------------------------------------------------- contents

// Marks where the reader is.
function followReading() {
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const headings = [...document.querySelectorAll("h2[id]")];
  const mark = () => {
    const passed = headings.filter((heading) => heading.getBoundingClientRect().top < innerHeight / 3);
    for (const link of links.values()) link.removeAttribute("aria-current");
    links.get(passed.at(-1)?.id)?.setAttribute("aria-current", "true");
  };
  addEventListener("scroll", mark, { passive: true });
  mark();
}

prepareToggle();
prepareTables();
prepareFilters();
prepareCopying();
followReading();
preparePlots();
