/* Keeps the page up to date; without scripts it shows the moment when it was loaded.

The server sends the elements that have changed (see stream.py); Idiomorph puts them in place, so that
focus and selection stay. Clocks are updated here, by the server's clock. */
"use strict";

const RETRY = 1000, SILENCE = 5000;
const UNITS = [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]];
const byId = (id) => document.getElementById(id);
const state = byId("state"), button = byId("pause");

let stream = null, retry = 0, lastEventAt = 0, paused = false, busy = false;
let ahead = -Infinity;                    // how far the server's clock is ahead of this one
let version = null, stale = false;

/* -- clocks: the same texts as in view_models.py -------------------------------------------- */

const now = () => Date.now() / 1000 + ahead;
const whole = (seconds) => Math.max(0, Math.trunc(seconds));
const clocks = {
  for(seconds) {
    const all = whole(seconds);
    for (const [length, unit, rest, restUnit] of UNITS)
      if (all >= length) return `${Math.floor(all / length)} ${unit} ${Math.floor((all % length) / rest)} ${restUnit}`;
    return `${all} s`;
  },
  ago(seconds) {
    const all = whole(seconds);
    for (const [length, unit] of UNITS) if (all >= length) return `${Math.floor(all / length)} ${unit} ago`;
    return `${all} s ago`;
  },
  in: (seconds) => (seconds < 0 ? `in ${clocks.for(-seconds)}` : `since ${clocks.for(seconds)}`),
};

function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function updateClocks(root) {
  for (const kind of Object.keys(clocks))
    for (const each of root.querySelectorAll(`[data-${kind}]`))
      write(each, clocks[kind](now() - each.getAttribute(`data-${kind}`)));
  const lanes = byId("lanes");
  if (!lanes) return;
  const shift = ((now() - 1800 - lanes.dataset.origin) / 1800) * 100;
  for (const each of root.querySelectorAll("[data-shift]")) each.setAttribute("x", `${-shift.toFixed(2)}%`);
  for (const each of root.querySelectorAll("[data-from]"))
    each.setAttribute("width", `${Math.max(0.35, 100 + shift - each.dataset.from).toFixed(2)}%`);
}

/* The event with the least delay gives the best estimate; it decays slowly, as clocks drift. */
function setClock(seconds) {
  const estimate = seconds - Date.now() / 1000;
  ahead = estimate < ahead - 5 ? estimate : Math.max(estimate, ahead - 0.001);
}

/* -- fragments ----------------------------------------------------------------------------- */

function morph(old, html) {
  const box = document.createElement("template");
  box.innerHTML = html;
  updateClocks(box.content);
  const focus = old.contains(document.activeElement) && document.activeElement.closest("[id^=job-]")?.id;
  let complete = true;
  Idiomorph.morph(old, box.content.firstElementChild, {
    callbacks: {
      beforeNodeMorphed: (_, fresh) => !(fresh.nodeType === 1 && fresh.hasAttribute("data-same")),
      beforeNodeAdded: (fresh) => {
        const unknown = fresh.nodeType === 1 && fresh.hasAttribute("data-same");
        if (unknown) complete = false;
        return !unknown;
      },
    },
  });
  // When the focused button is removed, the next key must not press another one.
  if (focus && document.activeElement === document.body) byId(focus)?.querySelector("a").focus({ preventScroll: true });
  return complete;
}

function apply(event) {
  const update = JSON.parse(event.data);
  setClock(update.now);
  let complete = true, ended = false;
  for (const [id, html] of Object.entries(update.html)) {
    const old = byId(id);
    if (!old) { complete = false; continue; }
    const before = old.querySelector(".last time")?.dateTime;
    complete = morph(old, html) && complete;
    ended ||= document.body.dataset.stream.includes("job=") && before !== byId(id)?.querySelector(".last time")?.dateTime;
  }
  version = event.lastEventId;
  if (!document.body.dataset.stream.includes("job=")) document.title = update.title;
  updateClocks(document);
  setState("good", "●", "live");
  if (ended) setTimeout(() => load(location.href), 1000 * Math.random());   // its history is longer now
  if (!complete) byId("strip") || !document.body.dataset.stream.endsWith("/live") ? connect(null) : load(location.href);
}

function setState(tone, symbol, word) {
  state.className = `state ${tone}`;
  write(state.firstElementChild, symbol);
  write(state.lastChild.nodeType === 3 ? state.lastChild : state, ` ${word}`);
  stale = tone !== "good";
  document.body.classList.toggle("stale", stale);
}

/* -- the stream ---------------------------------------------------------------------------- */

function connect(since) {
  disconnect();
  if (!document.body.dataset.stream || paused) return;
  const address = new URL(document.body.dataset.stream, location.href);
  if (since) address.searchParams.set("since", since);
  else address.searchParams.delete("since");
  stream = new EventSource(address);
  lastEventAt = Date.now();
  stream.addEventListener("status", (event) => { lastEventAt = Date.now(); apply(event); });
  stream.addEventListener("unavailable", (event) => {
    lastEventAt = Date.now();
    setState("bad", "✕", "database unavailable, waiting for it");
    state.title = JSON.parse(event.data).detail;
  });
  stream.addEventListener("error", reconnect);
}

function disconnect() {
  stream?.close();
  stream = null;
  clearTimeout(retry);
}

async function reconnect() {
  const refused = stream?.readyState === EventSource.CLOSED;
  disconnect();
  if (paused) return;
  setState("warn", "↻", "reconnecting …");
  if (refused && await loggedOut()) return;
  retry = setTimeout(() => connect(version), RETRY * (1 + Math.random()));
}

/* A refused stream is not tried again by its browser, and does not say why it is refused. */
async function loggedOut() {
  const answer = await fetch(document.body.dataset.stream, { method: "HEAD", signal: AbortSignal.timeout(SILENCE) }).catch(() => null);
  if (answer?.status !== 401 || stream) return false;
  const link = byId("login");
  const root = link.pathname.length - "/login".length;
  link.search = new URLSearchParams({ next: (location.pathname + location.search).slice(root) });
  link.hidden = false;
  button.hidden = true;
  document.querySelector(".who")?.remove();
  setState("bad", "✕", `logged out at ${new Date(now() * 1000).toISOString().slice(11, 19)} UTC`);
  return true;
}

button.hidden = !document.body.dataset.stream;
button.addEventListener("click", () => {
  paused = !paused;
  button.textContent = paused ? "Resume" : "Pause";
  if (paused) {
    disconnect();
    setState("rest", "‖", `paused at ${new Date(now() * 1000).toISOString().slice(11, 19)} UTC`);
  } else connect(version);
});

setInterval(() => {
  if (stream && Date.now() - lastEventAt > SILENCE) reconnect();
  if (!stale) updateClocks(document);
}, 1000);

/* -- forms and links within the page ------------------------------------------------------- */

async function load(address, options) {
  if (busy) return;
  busy = true;
  try {
    const answer = await fetch(address, { ...options, headers: { Accept: "text/html" } });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const main = page.getElementById("main");
    if (!main || answer.redirected && /\/login$/.test(new URL(answer.url).pathname)) { location.assign(answer.url); return; }
    Idiomorph.morph(byId("main"), main, { ignoreActiveValue: options === undefined });
    document.body.dataset.stream = page.body.dataset.stream;
    document.title = page.title;
    if (page.body.dataset.now) setClock(+page.body.dataset.now);
    if (!page.body.dataset.stream) write(state.lastChild, page.getElementById("state").lastChild.textContent);
    if (options && answer.redirected) history.replaceState(null, "", new URL(answer.url).pathname);
    connect(new URL(page.body.dataset.stream, location.href).searchParams.get("since"));
  } catch {
    const next = options?.body.has("key") ? "send the form again, as it is: it takes effect once" : "check before you repeat it";
    if (options) byId("message").innerHTML = `<p class="message bad">Nobody answers. It is not known whether it was done: ${next}.</p>`;
  } finally {
    busy = false;
  }
}

async function openConfirmation(address) {
  const page = new DOMParser().parseFromString(await (await fetch(address, { headers: { Accept: "text/html" } })).text(), "text/html");
  const question = page.getElementById("question"), dialog = byId("confirm");
  if (!question) { location.assign(address); return; }
  question.querySelector("h1").id = "confirm-title";
  dialog.setAttribute("aria-labelledby", "confirm-title");
  dialog.replaceChildren(question);
  dialog.showModal();
}

document.addEventListener("submit", (event) => {
  const by = event.submitter, form = event.target;
  const address = new URL(by?.hasAttribute("formaction") ? by.formAction : form.action);
  const method = (by?.getAttribute("formmethod") || form.method).toLowerCase();
  if (method === "get") {
    if (/\/(cancel|forget)$/.test(address.pathname)) { event.preventDefault(); openConfirmation(address); }
    return;
  }
  if (/\/(forget|login|logout|users)$/.test(address.pathname)) return;  // they lead to another page
  event.preventDefault();
  const fields = new URLSearchParams(new FormData(form, by));
  const name = localStorage.getItem("by"), given = form.elements.by?.value;
  if (name && (by?.name === "by" || given === "page")) fields.set("by", name);
  else if (given) localStorage.setItem("by", given);
  byId("confirm").close();
  load(address, { method: "POST", body: fields });
});

document.addEventListener("click", (event) => {
  if (event.target.closest("#confirm [data-close]")) { event.preventDefault(); byId("confirm").close(); }
});

setClock(+document.body.dataset.now || Date.now() / 1000);
if (document.body.dataset.stream) connect(new URL(document.body.dataset.stream, location.href).searchParams.get("since"));
