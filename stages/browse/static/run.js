"use strict";
// The live part of a run's page: asked for every two seconds, every ten once the run has ended (it may be resumed).
// Only sections that changed are replaced, so that focus, selection and opened details stay.

const live = document.getElementById("live");
const lost = document.getElementById("lost");
const seen = new Map();

function localTimes(element) {
  for (const time of element.querySelectorAll("time[data-unix]")) {
    time.textContent = new Date(Number(time.dataset.unix) * 1000).toLocaleString();
  }
}

function remember() {
  for (const section of live.children) seen.set(section.id, section.outerHTML);
}

function show(text) {
  const found = new DOMParser().parseFromString(text, "text/html");
  const sections = [...found.body.children];
  const ids = new Set(sections.map((section) => section.id));
  for (const old of [...live.children]) if (!ids.has(old.id)) old.remove();
  let before = null;
  for (const section of sections) {
    const html = section.outerHTML;
    let now = document.getElementById(section.id);
    if (!now || seen.get(section.id) !== html) {
      seen.set(section.id, html);
      const fresh = document.importNode(section, true);
      localTimes(fresh);
      if (now) {
        for (const open of now.querySelectorAll("details[open]")) {
          const same = open.id && fresh.querySelector(`#${CSS.escape(open.id)}`);
          if (same) same.open = true;
        }
        const focused = now.contains(document.activeElement) ? document.activeElement : null;
        const place = focused ? [...now.querySelectorAll("a, summary")].indexOf(focused) : -1;
        keepCharts(live, () => now.replaceWith(fresh));
        if (place >= 0) [...fresh.querySelectorAll("a, summary")][place]?.focus({ preventScroll: true });
      } else {
        live.insertBefore(fresh, before ? before.nextSibling : live.firstChild);
      }
      now = fresh;
    }
    before = now;
  }
}

async function look() {
  try {
    const answer = await fetch(live.dataset.live);
    if (!answer.ok) throw new Error(answer.status);
    show(await answer.text());
    lost.hidden = true;
  } catch {
    lost.hidden = false;
  }
  const state = document.getElementById("state");
  setTimeout(look, document.hidden ? 10000 : state && state.dataset.running === "yes" ? 2000 : 10000);
}

if (live) {
  remember();
  localTimes(live);
  setTimeout(look, 2000);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) localTimes(live); });
}
