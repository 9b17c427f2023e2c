/* Keeps the page up to date; without scripts it shows the moment when it was loaded.

The server sends the elements that have changed (see stream.py); Idiomorph puts them in place, so that
focus and selection stay. A page of one run or account is loaded again every few seconds instead
(`data-refresh`). Clocks are updated here, by the server's clock. */
"use strict";

const RETRY = 1000, SILENCE = 5000, LINGER = 8000, HIDDEN = 10000;
const UNITS = [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]];
const byId = (id) => document.getElementById(id);
const { dataset } = document.body;
const state = byId("state"), button = byId("pause"), zone = byId("zone"), toasts = byId("toasts");

let stream = null, retry = 0, lastEventAt = 0, paused = false;
let loading = null;                       // what is being loaded, or sent
let ahead = -Infinity;                    // how far the server's clock is ahead of this one
let version = null, stale = null;         // what to say of data that is not live; null: it is
let asOf = 0, verdict = null;             // the verdict of before an outage

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
  for (const lanes of document.querySelectorAll("[data-origin]")) {
    const { span, origin } = lanes.dataset, shift = ((now() - span - origin) / span) * 100;
    for (const each of root.querySelectorAll(`[data-shift="${span}"]`)) each.setAttribute("x", `${-shift.toFixed(2)}%`);
    for (const each of root.querySelectorAll(`[data-shift="${span}"] [data-from]`))
      each.setAttribute("width", `${Math.max(0.35, 100 + shift - each.dataset.from).toFixed(2)}%`);
  }
  showZone(root);
}

/* The event with the least delay gives the best estimate; it decays slowly, as clocks drift. */
function setClock(seconds) {
  const estimate = seconds - Date.now() / 1000;
  ahead = estimate < ahead - 5 ? estimate : Math.max(estimate, ahead - 0.001);
}

/* -- UTC, or the viewer's own time ---------------------------------------------------------- */

/* A browser may refuse to store anything; then what is stored lasts as long as the page. */
const unstored = {};
function stored(name, value) {
  if (value !== undefined) unstored[name] = value;
  try {
    if (value !== undefined) localStorage.setItem(name, value);
    return localStorage.getItem(name);
  } catch { return unstored[name] ?? null; }
}
const isLocal = () => stored("zone") === "local";
const written = (moment, local) => (local ? new Date(moment).toLocaleString("sv-SE") : moment.slice(0, 19).replace("T", " "));

function showZone(root) {
  if (!isLocal() && !root.querySelector(".local")) return;
  for (const each of root.querySelectorAll("[data-at]")) {
    const text = written(each.getAttribute("datetime"), isLocal());
    write(each, each.dataset.at === "clock" ? text.slice(11) : text);
    each.classList.toggle("local", isLocal());
  }
  for (const each of root.querySelectorAll(".zone")) write(each, isLocal() ? "your time" : "UTC");
}

function setZone() {
  write(zone, isLocal() ? "Your time" : "UTC");
  zone.title = isLocal() ? "Show times in UTC" : "Show times in your time zone";
}

zone.hidden = false;
zone.addEventListener("click", () => {
  stored("zone", isLocal() ? "utc" : "local");
  for (const each of document.querySelectorAll("[data-at]")) each.classList.add("local");
  setZone();
  showZone(document);
});
document.addEventListener("mouseover", (event) => {
  const time = event.target.closest?.("time[datetime*=T]");
  if (time) time.title = `${written(time.dateTime, false)} UTC, ${written(time.dateTime, true)} your time`;
});

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
  const ofJob = dataset.stream.includes("job=") && !dataset.stream.includes("lanes=");
  if (verdict) byId("verdict-now")?.replaceWith(verdict);
  verdict = null;
  for (const [id, html] of Object.entries(update.html)) {
    const old = byId(id);
    if (!old) { complete = false; continue; }
    const before = old.dataset.ended;
    complete = morph(old, html) && complete;
    ended ||= ofJob && before !== byId(id)?.dataset.ended;
  }
  version = event.lastEventId;
  if (byId("verdict")) document.title = update.title;
  setIcon(update.level);
  setLive(update.now);
  if (ended) setTimeout(() => load(location.href), 1000 * Math.random());   // its history is longer now
  if (!complete) byId("jobs-list") || ofJob ? connect(null) : load(location.href);
}

function showTab(page) {
  document.title = page.title;
  setIcon(page.querySelector("link[rel=icon]").href.match(/icon-([a-z]+)/)[1]);
}

function setIcon(level) {
  const icon = document.querySelector("link[rel=icon]"), name = `icon-${level}.svg`;
  if (!icon.href.includes(name)) icon.href = icon.href.replace(/icon-[a-z]+\.svg.*/, name);
}

/* Data that is not live has an age, and nothing that was caused by an outage outlives it. */
function setLive(moment) {
  asOf = moment;
  for (const each of document.querySelectorAll("[data-ends=live]")) each.remove();
  setState("good", "●", "live", null);
  write(byId("as-of"), `as of ${new Date(asOf * 1000).toISOString().slice(0, 19).replace("T", " ")} UTC`);
  updateClocks(document);
  followToasts();
}

function setState(tone, symbol, word, old = word) {
  state.className = `state ${tone}`;
  write(state.firstElementChild, symbol);
  stale = old;
  if (stale) {
    setIcon("none");
    if (byId("verdict")) document.title = `… ${word} · balance_app`;
  }
  write(state.childNodes[1], ` ${word}`);
  setAge();
  document.body.classList.toggle("stale", old !== null);
}

function setAge() {
  write(byId("age"), stale && asOf ? `; data is ${clocks.for(now() - asOf)} old` : "");
}

/* -- the stream ---------------------------------------------------------------------------- */

/* A browser has six connections to a server, for all its tabs: one that nobody sees keeps none, and takes
an event now and then, for its title and icon. */
function heard() {
  lastEventAt = Date.now();
  if (document.hidden) disconnect();
}

function connect(since) {
  disconnect();
  if (!dataset.stream || paused) return;
  const address = new URL(dataset.stream, location.href);
  if (since) address.searchParams.set("since", since);
  else address.searchParams.delete("since");
  stream = new EventSource(address);
  lastEventAt = Date.now();
  stream.addEventListener("status", (event) => { heard(); apply(event); });
  stream.addEventListener("unavailable", (event) => {
    heard();
    setState("bad", "✕", "database unavailable, retrying");
    state.title = JSON.parse(event.data).detail;
    setIcon("red");
    if (!byId("verdict-now")) return;
    document.title = "✕ Database unavailable · balance_app";
    if (verdict) return;
    verdict = byId("verdict-now").cloneNode(true);
    byId("verdict-now").className = "verdict red";
    byId("verdict-now").innerHTML = "<p><strong>✕ Database unavailable.</strong></p>";
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
  setState("warn", "↻", "reconnecting");
  if (refused && await loggedOut(dataset.stream)) return;
  retry = setTimeout(() => connect(version), RETRY * (1 + Math.random()));
}

/* A refused stream is not tried again by its browser, and does not say why it is refused. */
async function loggedOut(address) {
  const answer = await fetch(address, { method: "HEAD", signal: AbortSignal.timeout(SILENCE) }).catch(() => null);
  if (answer?.status !== 401 || stream) return false;
  showLogin();
  return true;
}

function showLogin() {
  const link = byId("login");
  const root = link.pathname.length - "/login".length;
  link.search = new URLSearchParams({ next: (location.pathname + location.search).slice(root) });
  link.hidden = false;
  button.hidden = true;
  dataset.refresh = "";
  document.querySelector(".who")?.remove();
  setState("bad", "✕", `logged out at ${new Date(now() * 1000).toISOString().slice(11, 19)} UTC`);
}

const showPause = () => { button.hidden = !(dataset.stream || dataset.refresh); };
const showPaused = () => setState("rest", "‖", "paused");
button.addEventListener("click", () => {
  paused = !paused;
  button.textContent = paused ? "Resume" : "Pause";
  if (paused) {
    disconnect();
    showPaused();
  } else resume();
});

function resume() {
  if (dataset.stream) connect(version);
  else refresh();
}

// What is on a page that was hidden may be old until it is heard of again.
document.addEventListener("visibilitychange", () => {
  if (document.hidden || paused || button.hidden) return;
  if (now() - asOf > SILENCE / 1000) setState("warn", "↻", "reconnecting");
  if (!stream) resume();
});

setInterval(() => {
  if (document.hidden && !stream && !button.hidden && Date.now() - lastEventAt > HIDDEN) connect(version);
  if (stream && Date.now() - lastEventAt > SILENCE) reconnect();
  if (stale) setAge();
  else updateClocks(document);
  if (dataset.refresh && !paused && !document.hidden && Date.now() - lastEventAt >= 1000 * dataset.refresh) refresh();
}, 1000);
// A page that comes back from the browser's memory has no stream any more.
addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });

/* -- forms and links within the page ------------------------------------------------------- */

const fetchPage = async (address, options) => {
  const answer = await fetch(address, { ...options, headers: { Accept: "text/html" } });
  return [answer, new DOMParser().parseFromString(await answer.text(), "text/html")];
};

const typed = (each) => each.matches("input:not([type=hidden])") && each.value !== each.defaultValue;

/* What somebody types, and the key of a form that may be sent again, are left as they are. */
function renew(page) {
  const held = document.activeElement?.closest("td form");
  Idiomorph.morph(byId("main"), page.getElementById("main"), {
    callbacks: {
      beforeNodeMorphed: (old) => !(old.nodeType === 1 && (old === held || typed(old) || old.matches(".forms, #message, [id^=said-], .fields"))),
    },
  });
}

async function refresh() {
  if (loading) return;
  const mine = loading = new AbortController(), late = setTimeout(() => mine.abort(), SILENCE);
  lastEventAt = Date.now();
  try {
    const [answer, page] = await fetchPage(location.href, { signal: mine.signal });
    if (loading !== mine || paused) return;
    if (answer.status === 401 || /\/login$/.test(new URL(answer.url).pathname)) { showLogin(); return; }
    if (!answer.ok || !page.body.dataset.now) throw new Error(answer.status);
    renew(page);
    dataset.refresh = page.body.dataset.refresh;
    showTab(page);
    setClock(+page.body.dataset.now);
    setLive(+page.body.dataset.now);
    if (!dataset.refresh) location.reload();
  } catch {
    if (loading === mine && !paused) setState("warn", "↻", "reconnecting");
  } finally {
    clearTimeout(late);
    if (loading === mine) loading = null;
  }
}

/* A form that is sent goes before what is only being loaded; it is sent once. */
async function load(address, options) {
  if (loading && (!options || loading.sends)) return;
  loading?.abort();
  const mine = loading = new AbortController();
  mine.sends = Boolean(options);
  try {
    const [answer, page] = await fetchPage(address, options ?? { signal: mine.signal });
    if (loading !== mine) return;
    const main = page.getElementById("main");
    if (answer.redirected && (!main || /\/login$/.test(new URL(answer.url).pathname))) { location.assign(answer.url); return; }
    // An error page does not know whether a form was done; what is only loaded gives way to none.
    const failed = options ? answer.status > 499 && !("now" in page.body.dataset) : !answer.ok;
    if (!main || failed) throw new Error(answer.status);
    if (options) Idiomorph.morph(byId("main"), main);
    else renew(page);
    for (const name of ["stream", "refresh"]) dataset[name] = page.body.dataset[name] ?? "";
    verdict = null;
    showTab(page);
    if (page.body.dataset.now) { setClock(+page.body.dataset.now); asOf = +page.body.dataset.now; }
    lastEventAt = Date.now();
    if (!dataset.stream && !dataset.refresh) setState("rest", "■", page.getElementById("state")?.childNodes[1].textContent.trim() ?? "no data", null);
    else if (paused) showPaused();
    else if (dataset.refresh) setLive(asOf);
    if (options && answer.redirected) {
      const shown = new URL(answer.url);
      for (const name of ["did", "job", "entry", "hold", "again"]) shown.searchParams.delete(name);
      history.replaceState(null, "", shown.pathname + shown.search);
    }
    if (options) toast();
    updateClocks(document);
    showPause();
    label(document);
    connect(new URL(dataset.stream, location.href).searchParams.get("since"));
  } catch {
    if (!options) return;
    const next = options.body.has("key") ? "Send the form again as it is: it can't be applied twice." : "Check before you repeat it.";
    toasts.innerHTML = `<div class="message bad" data-toast=":">No answer from the server, so we don't know whether it was done. ${next}<button type="button" class="close" aria-label="Close">×</button></div>`;
  } finally {
    if (loading === mine) loading = null;
  }
}

/* A confirmation is shown where one looks, until its row shows the same; one may undo it until then. */
function toast() {
  const message = byId("message")?.querySelector("[data-toast]");
  if (!message) return;
  toasts.replaceChildren(message);
  if (message.classList.contains("bad")) return;
  message.dataset.until = Date.now() + (message.querySelector("form") ? LINGER : LINGER / 2);
  followToasts();
}

function followToasts() {
  for (const each of toasts.querySelectorAll("[data-toast].good")) {
    const [job, expected] = each.dataset.toast.split(":"), row = byId(`job-${job}`);
    const followed = !row || !expected || row.dataset.is.split(" ").includes(expected);
    if (followed ? Date.now() > each.dataset.until : each.dataset.followed) each.remove();
    else if (followed) each.dataset.followed = 1;
  }
}

/* A button says what it will do: "Withdraw 58". */
function label(root) {
  for (const each of root.querySelectorAll("[data-says]")) {
    const fields = each.form.elements;
    const text = each.dataset.says.replace(/\{(\w+)\}/g, (_, name) => fields[name]?.value.trim() ?? "");
    write(each, each.form.elements.amount?.value.trim() ? text : each.dataset.name);
  }
}
document.addEventListener("input", (event) => { if (event.target.form) label(event.target.form); });

async function openConfirmation(address) {
  const [, page] = await fetchPage(address);
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
  const name = stored("by"), given = form.elements.by?.value;
  if (name && (by?.name === "by" || given === "page")) fields.set("by", name);
  else if (given) stored("by", given);
  byId("confirm").close();
  load(address, { method: "POST", body: fields });
});

document.addEventListener("click", (event) => {
  if (event.target.closest("#confirm [data-close]")) { event.preventDefault(); byId("confirm").close(); }
  if (event.target.closest("#toasts .close")) toasts.replaceChildren();
});
document.addEventListener("keydown", (event) => {
  const search = document.querySelector("[type=search]");
  if (event.key === "/" && search && !event.target.closest("input, textarea, select")) { event.preventDefault(); search.focus(); }
});

setClock(+dataset.now || Date.now() / 1000);
asOf = +dataset.now;
showPause();
setZone();
updateClocks(document);
label(document);
if (dataset.refresh) setLive(asOf);
if (dataset.stream) connect(new URL(dataset.stream, location.href).searchParams.get("since"));
