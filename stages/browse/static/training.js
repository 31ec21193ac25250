"use strict";
// Curves of a training that runs, and the slider of its grids.

const area = document.querySelector("[data-live]");
const grids = document.getElementById("grids");
const slider = document.getElementById("grid-step");
let steps = [];

function stepsOf(element) {
  const found = element.querySelector("[data-steps]");
  return found ? JSON.parse(found.dataset.steps) : [];
}

function showGrid() {
  const step = steps[Number(slider.value)];
  if (step === undefined) return;
  const label = document.getElementById("grid-label");
  const image = document.getElementById("grid");
  const address = `${grids.dataset.address}${step}.png`;
  label.textContent = step.toLocaleString("en");
  slider.setAttribute("aria-valuetext", `step ${step}`);
  document.getElementById("grid-error").textContent = "";
  if (image.getAttribute("src") !== address) image.src = address;
}

// The slider follows new grids while it stands at the newest.
function takeSteps(found) {
  const atEnd = Number(slider.value) === Number(slider.max);
  if (found.length === steps.length && found.every((step, i) => step === steps[i])) return;
  const shown = steps[Number(slider.value)];
  steps = found;
  slider.max = String(Math.max(0, steps.length - 1));
  slider.value = String(atEnd || !steps.includes(shown) ? steps.length - 1 : steps.indexOf(shown));
  grids.hidden = steps.length === 0;
  showGrid();
}

if (grids) {
  const image = document.getElementById("grid");
  const say = async () => {
    const error = document.getElementById("grid-error");
    error.textContent = await fetch(image.src).then((answer) => (answer.ok ? "" : answer.text()), () => "");
  };
  image.addEventListener("error", say);
  steps = stepsOf(area);
  slider.addEventListener("input", showGrid);
}

async function refresh() {
  if (document.hidden) return;
  const ended = document.getElementById("ended");
  try {
    const answer = await fetch(area.dataset.live);
    const text = await answer.text();
    if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
    ended.textContent = "";
    if (text === area.dataset.shown) return;
    area.dataset.shown = text;
    keepCharts(area, () => { area.innerHTML = text; });
    if (grids) takeSteps(stepsOf(area));
  } catch (error) {
    ended.textContent = error instanceof TypeError ? "the server has ended" : error.message;
  }
}

async function live() {
  await refresh();
  setTimeout(live, 2000);
}

if (area) setTimeout(live, 2000);
