"use strict";
// The whole page. Texts of models and people go into the document by textContent alone.

const $ = (id) => document.getElementById(id);
const state = {
  texts: null, language: "en", about: null, name: "", tab: "", token: "",
  item: null, turn: 0, progress: null, answer: null, key: "", current: 0,
  seen: 0, since: null, busy: false, last: null,
};
const REASONS = ["unclear", "language", "broken", "upsetting"];
const MARKS = [["1", 1, "right"], ["2", 0, "neutral"], ["3", -1, "wrong"]];
const SCROLL = 0.8; // of a panel's height

function t(name, values = {}) {
  let text = state.texts[state.language][name];
  for (const [key, value] of Object.entries(values)) text = text.replace(`{${key}}`, value);
  return text;
}

// An element; children that are strings become text, never markup.
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") node.addEventListener("click", value);
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function button(key, text, onclick, attributes = {}) {
  const shown = key ? [make("kbd", {}, key), " "] : [];
  return make("button", { type: "button", onclick, "aria-keyshortcuts": key || null, ...attributes }, ...shown, text);
}

function panel(text, label) {
  const node = make("div", { class: "text", dir: "auto", tabindex: "0", role: "region", "aria-label": label });
  node.textContent = text;
  return node;
}

function drawn() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Kept by the browser where it allows that.
function keep(where, name, value) {
  try { where().setItem(name, value); } catch { /* private windows may refuse */ }
}
function kept(where, name) {
  try { return where().getItem(name); } catch { return null; }
}
const forTab = () => sessionStorage, forAlways = () => localStorage;

// --- the server

async function call(path, body) {
  const headers = {};
  if (state.token) headers.Authorization = `Bearer ${state.token}`;
  if (body) headers["Content-Type"] = "application/json";
  let reply;
  try {
    reply = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  } catch {
    throw { error: "network" };
  }
  const said = await reply.json().catch(() => ({ error: "input", message: String(reply.status) }));
  if (!reply.ok) throw said;
  return said;
}

function tell(text) { $("status").textContent = text; }
function warn(text) { $("notice").textContent = text; $("notice").hidden = !text; }

async function failed(error) {
  if (!error.error) throw error;
  if (error.error === "behind") {
    await next();
    warn(t("error_behind"));
  } else {
    warn(t(`error_${error.error}`, { message: error.message || "" }));
  }
}

// One call at a time: a key that is held down submits once.
async function step(work) {
  if (state.busy || !state.name) return;
  state.busy = true;
  update();
  try { await work(); } catch (error) { await failed(error); } finally { state.busy = false; update(); }
}

async function next() {
  const view = await call("api/next", { annotator: state.name, tab: state.tab });
  show(view);
  warn(view.elsewhere ? t("elsewhere") : "");
}

const submit = () => step(async () => {
  if (!ready()) return;
  await send({ answer: state.answer }, "kept");
});

const skip = (reason) => step(async () => send({ reason }, "skipped"));

async function send(said, done) {
  const seconds = Math.round(seen() * 10) / 10;
  const body = { annotator: state.name, turn: state.turn, key: state.key, item: state.item.id, seconds, ...said };
  const view = await call("api/answer", body);
  warn("");
  forget();
  show(view);
  tell(t(done));
}

const undo = () => step(async () => {
  state.undoKey = state.undoKey || drawn();
  const view = await call("api/undo", { annotator: state.name, turn: state.turn, key: state.undoKey });
  warn("");
  show(view);
  tell(t("undone"));
});

// --- time: only while the page is in sight

function seen() { return (state.seen + (state.since === null ? 0 : performance.now() - state.since)) / 1000; }
document.addEventListener("visibilitychange", () => {
  if (document.hidden && state.since !== null) { state.seen += performance.now() - state.since; state.since = null; }
  else if (!document.hidden && state.since === null) state.since = performance.now();
});

// --- what is chosen and not yet submitted survives a reload

const draftName = () => `draft/${state.name}/${state.item.id}`;
function draft() { keep(forTab, draftName(), JSON.stringify(state.answer)); }
function forget() { try { sessionStorage.removeItem(draftName()); } catch { /* was never kept */ } }

function blank(item) {
  if (item.mode === "ranking" || item.mode === "steps") return item.texts.map(() => null);
  return null;
}

function show(view) {
  Object.assign(state, { item: view.item, turn: view.turn, progress: view.progress, key: drawn(), undoKey: "", current: 0, seen: 0 });
  state.since = document.hidden ? null : performance.now();
  if (state.item) {
    const before = JSON.parse(kept(forTab, draftName()) || "null");
    state.answer = before ?? view.before ?? blank(state.item);
  }
  build();
}

function ready() {
  if (!state.item || state.answer === null) return false;
  return !Array.isArray(state.answer) || state.answer.some((one) => one !== null);
}

// --- drawing: `build` makes the elements of an item once, `update` marks what is chosen

function build() {
  document.documentElement.lang = state.language === "zh" ? "zh-Hans" : "en";
  document.title = t("title");
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = t(node.dataset.text);
  for (const node of document.querySelectorAll("[data-label]:not(.step)")) node.setAttribute("aria-label", t(node.dataset.label));
  $("who").textContent = state.name;
  const mode = state.about.mode;
  $("guidelines-text").textContent = state.about.guidelines || t(`guide_${mode}`);
  buildReasons();
  buildKeys(mode);
  const work = $("work");
  work.replaceChildren();
  $("prompt-section").hidden = !state.item;
  if (!state.item) {
    $("hint").textContent = "";
    if (state.name && state.progress) work.append(make("p", { id: "done" }, t("all_done")));
    update();
    return;
  }
  $("hint").textContent = t(`hint_${mode}`);
  buildPrompt(state.item.prompt);
  ({ score: buildScore, pair: buildPair, ranking: buildRanking, steps: buildSteps })[mode](work, state.item.texts);
  linkScrolling([...work.querySelectorAll(".response .text")]);
  window.scrollTo(0, 0);
  update();
}

function buildPrompt(prompt) {
  const box = $("prompt");
  box.replaceChildren();
  box.scrollTop = 0;
  const turns = typeof prompt === "string" ? [{ role: "", content: prompt }] : prompt;
  for (const turn of turns) {
    if (turn.role) box.append(make("div", { class: "role" }, t(`role_${turn.role}`)));
    const text = make("div", { class: "text", dir: "auto" });
    text.textContent = turn.content;
    box.append(text);
  }
  box.setAttribute("tabindex", "0");
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", t("prompt"));
}

function card(text, place, ...controls) {
  const label = t("response", { n: place + 1 });
  return make("article", { class: "response", "aria-label": label, "data-place": place },
    make("header", {}, make("h2", {}, label), ...controls), panel(text, label));
}

function scoreKeys() {
  const [low, high] = state.about.range;
  const values = Array.from({ length: high - low + 1 }, (_, i) => low + i);
  return values.map((value, i) => [low >= 0 && high <= 9 ? String(value) : String((i + 1) % 10), value]);
}

function buildScore(work, texts) {
  const choices = make("div", { class: "choices", role: "radiogroup", "aria-label": t("score") });
  for (const [key, value] of scoreKeys()) {
    choices.append(button(key, String(value), () => choose(value), { role: "radio", "data-value": value, "aria-label": `${t("score")} ${value}` }));
  }
  work.append(make("div", { class: "responses" }, card(texts[0], 0)), choices);
}

function buildPair(work, texts) {
  const group = make("div", { role: "radiogroup", "aria-label": t("hint_pair") });
  const cards = texts.map((text, place) => card(text, place,
    button(String(place + 1), t("better"), () => choose(place), { role: "radio", "data-value": place, "aria-label": `${t("response", { n: place + 1 })}: ${t("better")}` })));
  const tie = button("0", t("tie"), () => choose("tie"), { role: "radio", "data-value": "tie" });
  group.append(make("div", { class: "responses" }, ...cards), make("div", { class: "choices" }, tie));
  work.append(group);
}

function buildRanking(work, texts) {
  const cards = texts.map((text, place) => {
    const label = t("response", { n: place + 1 });
    const node = card(text, place, make("span", { class: "rank", "data-rank-of": place }),
      button(String(place + 1), t("rank"), () => toggleRank(place), { "data-place": place, "aria-label": `${label}: ${t("rank")}` }));
    node.setAttribute("draggable", "true");
    node.addEventListener("dragstart", (event) => event.dataTransfer.setData("text/plain", String(place)));
    return node;
  });
  const list = make("ol", { id: "ranks", "aria-label": t("ranks") });
  work.append(make("h2", {}, t("ranks")), list, make("div", { class: "responses" }, ...cards));
}

function buildSteps(work, texts) {
  const list = make("ol", { id: "steps", "aria-label": t("steps") });
  texts.forEach((text, number) => {
    const label = t("step", { n: number + 1 });
    const marks = MARKS.map(([key, value, name]) => button(key, t(name), () => { state.current = number; mark(state.answer[number] === value ? null : value, false); },
      { role: "radio", "data-value": value, "aria-label": `${label}: ${t(name)}` }));
    const step = make("li", { class: "step", "data-step": number, tabindex: "-1", "aria-label": label },
      panel(text, label), make("span", { role: "radiogroup", "aria-label": label }, ...marks));
    step.addEventListener("click", () => { state.current = number; update(); });
    list.append(step);
  });
  work.append(list);
}

function buildReasons() {
  $("reasons").replaceChildren(...REASONS.map((reason, i) =>
    button(String(i + 1), t(`reason_${reason}`), () => skipFor(reason), { "data-reason": reason })));
}

function buildKeys(mode) {
  const digits = { score: scoreKeys().map(([key]) => key).join(" "), pair: "1 2", ranking: "1–9", steps: "1 2 3" }[mode];
  const use = { score: "key_choose", pair: "key_choose", ranking: "key_rank", steps: "key_mark" }[mode];
  const rows = [[digits, t(use)]];
  if (mode === "pair") rows.push(["0", t("key_tie")]);
  if (mode === "steps") rows.push(["0", t("key_unmark")], ["↑ ↓", t("key_move")]);
  else rows.push(["PgUp PgDn", t("key_scroll")]);
  rows.push(["[ ]", t("key_prompt")], ["Enter", t("submit")], ["S", t("skip")], ["Ctrl+Z", t("undo")],
    ["G", t("guidelines")], ["L", t("language")], ["N", t("change_name")], ["?", t("keys")]);
  $("keys-list").replaceChildren(...rows.flatMap(([key, what]) => [make("dt", {}, make("kbd", {}, key)), make("dd", {}, what)]));
}

function update() {
  const { item, answer, progress } = state;
  $("submit").disabled = state.busy || !ready();
  $("skip").disabled = state.busy || !item;
  $("undo").disabled = state.busy || !progress || progress.answered + progress.skipped === 0;
  if (progress) {
    const { answered, skipped, left, seconds_left: seconds } = progress;
    const time = seconds === null || !left ? "" : `, ${t("time_left", { time: duration(seconds) })}`;
    $("counts").textContent = t("counts", { done: answered, skipped, left }) + time;
    $("progress").max = Math.max(1, answered + skipped + left);
    $("progress").value = answered + skipped;
  }
  if (!item) return;
  if (item.mode === "ranking") { updateRanks(); return; }
  if (item.mode === "steps") { updateSteps(); return; }
  for (const node of $("work").querySelectorAll("[role=radio]")) {
    node.setAttribute("aria-checked", String(node.dataset.value === String(answer)));
  }
  for (const node of $("work").querySelectorAll(".response")) {
    node.classList.toggle("chosen", item.mode === "pair" && node.dataset.place === String(answer));
  }
}

function updateRanks() {
  const order = ranked();
  for (const node of $("work").querySelectorAll("[data-rank-of]")) {
    const rank = state.answer[Number(node.dataset.rankOf)];
    node.textContent = rank === null ? t("no_rank") : t("rank_n", { n: rank });
  }
  for (const node of $("work").querySelectorAll("button[data-place]")) {
    node.setAttribute("aria-pressed", String(state.answer[Number(node.dataset.place)] !== null));
  }
  const slots = state.item.texts.map((_, index) => {
    const place = order[index];
    const slot = make("li", { class: place === undefined ? "" : "taken", "data-slot": index }, t("rank_n", { n: index + 1 }), " ");
    if (place !== undefined) {
      const label = t("response", { n: place + 1 });
      slot.append(make("strong", {}, label), " ",
        button("", "↑", () => moveRank(place, index - 1), { "aria-label": `${label}: ${t("earlier")}` }),
        button("", "↓", () => moveRank(place, index + 1), { "aria-label": `${label}: ${t("later")}` }),
        button("", "×", () => toggleRank(place), { "aria-label": `${label}: ${t("remove")}` }));
      slot.setAttribute("draggable", "true");
      slot.addEventListener("dragstart", (event) => event.dataTransfer.setData("text/plain", String(place)));
    }
    slot.addEventListener("dragover", (event) => { event.preventDefault(); slot.classList.add("over"); });
    slot.addEventListener("dragleave", () => slot.classList.remove("over"));
    slot.addEventListener("drop", (event) => {
      event.preventDefault();
      const dropped = Number(event.dataTransfer.getData("text/plain"));
      if (Number.isInteger(dropped) && dropped in state.item.texts) moveRank(dropped, index);
    });
    return slot;
  });
  $("ranks").replaceChildren(...slots);
}

function updateSteps() {
  for (const node of $("work").querySelectorAll(".step")) {
    const number = Number(node.dataset.step), label = state.answer[number];
    if (label === null) delete node.dataset.label; else node.dataset.label = String(label);
    node.classList.toggle("current", number === state.current);
    if (number === state.current) node.setAttribute("aria-current", "step"); else node.removeAttribute("aria-current");
    for (const radio of node.querySelectorAll("[role=radio]")) {
      radio.setAttribute("aria-checked", String(label !== null && radio.dataset.value === String(label)));
    }
  }
}

function duration(seconds) {
  if (seconds < 90) return t("seconds", { n: Math.ceil(seconds) });
  if (seconds < 5400) return t("minutes", { n: Math.ceil(seconds / 60) });
  return t("hours", { n: (seconds / 3600).toFixed(1) });
}

// Panels of unequal length reach their ends together.
function linkScrolling(panels) {
  for (const one of panels) {
    one.addEventListener("scroll", () => {
      const room = one.scrollHeight - one.clientHeight;
      if (room <= 0 || one.dataset.led === String(one.scrollTop)) return;
      for (const other of panels) {
        if (other === one) continue;
        other.scrollTop = (one.scrollTop / room) * (other.scrollHeight - other.clientHeight);
        other.dataset.led = String(other.scrollTop);
      }
    }, { passive: true });
  }
}

function scrollPanels(direction) {
  const panels = [...$("work").querySelectorAll(".response .text")];
  const room = (one) => one.scrollHeight - one.clientHeight;
  const longest = panels.reduce((best, one) => (room(one) > room(best) ? one : best), panels[0]);
  if (longest) longest.scrollTop += direction * SCROLL * longest.clientHeight;
}

// --- choosing

function choose(value) {
  state.answer = value;
  const what = value === "tie" ? t("tie") : state.item.mode === "pair" ? t("response", { n: value + 1 }) : String(value);
  tell(t("chosen", { what }));
  draft();
  update();
}

// Places in the order of their ranks.
function ranked() {
  return state.answer.map((rank, place) => [rank, place]).filter(([rank]) => rank !== null)
    .sort(([one], [other]) => one - other).map(([, place]) => place);
}

function setRanks(order) {
  state.answer = state.item.texts.map((_, place) => (order.includes(place) ? order.indexOf(place) + 1 : null));
  tell(order.map((place, index) => `${t("rank_n", { n: index + 1 })}: ${t("response", { n: place + 1 })}`).join("; "));
  draft();
  update();
}

function toggleRank(place) {
  const order = ranked();
  setRanks(order.includes(place) ? order.filter((one) => one !== place) : [...order, place]);
}

function moveRank(place, index) {
  const order = ranked().filter((one) => one !== place);
  order.splice(Math.max(0, Math.min(index, order.length)), 0, place);
  setRanks(order);
}

function mark(value, goOn) {
  state.answer[state.current] = value;
  const name = MARKS.find(([, one]) => one === value);
  tell(`${t("step", { n: state.current + 1 })}: ${name ? t(name[2]) : t("not_marked")}`);
  draft();
  if (goOn) move(1); else update();
}

function move(by) {
  state.current = Math.max(0, Math.min(state.current + by, state.item.texts.length - 1));
  update();
  const node = $("work").querySelector(".step.current");
  node.scrollIntoView({ block: "nearest" });
  node.focus({ preventScroll: true });
}

// --- dialogs

function askName() {
  $("name-input").value = state.name;
  $("name-dialog").showModal();
}

$("name-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("name-input").value.trim();
  if (!name) return;
  state.name = name;
  keep(forAlways, "name", name);
  $("name-dialog").close();
  step(next);
});
$("name-dialog").addEventListener("cancel", (event) => { if (!state.name) event.preventDefault(); });

function askReason() {
  if (!state.item || state.busy) return;
  $("reason-input").value = "";
  $("skip-dialog").showModal();
  $("reasons").firstElementChild.focus();
}

function skipFor(reason) {
  $("skip-dialog").close();
  skip(reason);
}

$("skip-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const reason = $("reason-input").value.trim();
  if (reason) skipFor(reason); else $("reason-input").focus();
});

function toggleGuidelines() {
  const hidden = !$("guidelines").hidden;
  $("guidelines").hidden = hidden;
  $("guidelines-button").setAttribute("aria-expanded", String(!hidden));
  keep(forAlways, "guidelines", hidden ? "hidden" : "shown");
}

function toggleLanguage() {
  state.language = state.language === "en" ? "zh" : "en";
  keep(forAlways, "language", state.language);
  tell("");
  build();
}

for (const [id, act] of Object.entries({
  submit, undo, skip: askReason, "guidelines-button": toggleGuidelines, "language-button": toggleLanguage,
  "name-button": askName, "keys-button": () => $("keys-dialog").showModal(),
  "keys-close": () => $("keys-dialog").close(), "skip-cancel": () => $("skip-dialog").close(),
})) $(id).addEventListener("click", () => act());

// --- keys

const ACTIONS = {
  Enter: submit, s: askReason, u: undo, g: toggleGuidelines, l: toggleLanguage, n: askName,
  "?": () => $("keys-dialog").showModal(),
  PageDown: () => scrollPanels(1), PageUp: () => scrollPanels(-1),
  "]": () => { $("prompt").scrollTop += SCROLL * $("prompt").clientHeight; },
  "[": () => { $("prompt").scrollTop -= SCROLL * $("prompt").clientHeight; },
};
// Keys of each mode; the digit, the arrow. True where the key was used.
const MODE_KEYS = {
  score(key) {
    const found = scoreKeys().find(([one]) => one === key);
    if (found) choose(found[1]);
    return Boolean(found);
  },
  pair(key) {
    if (!["0", "1", "2"].includes(key)) return false;
    choose(key === "0" ? "tie" : Number(key) - 1);
    return true;
  },
  ranking(key) {
    const place = /^[1-9]$/.test(key) ? Number(key) - 1 : -1;
    if (!(place in state.item.texts)) return false;
    toggleRank(place);
    return true;
  },
  steps(key) {
    const found = MARKS.find(([one]) => one === key);
    if (found) mark(found[1], true);
    else if (key === "0") mark(null, false);
    else if (key === "ArrowDown") move(1);
    else if (key === "ArrowUp") move(-1);
    else return false;
    return true;
  },
};

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, textarea");
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z" && !event.shiftKey && !typing) {
    event.preventDefault();
    undo();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if ($("skip-dialog").open && !typing) {
    const reason = REASONS[Number(event.key) - 1];
    if (reason) { event.preventDefault(); skipFor(reason); }
    if (event.key === "0") { event.preventDefault(); $("reason-input").focus(); }
  }
  if (typing || document.querySelector("dialog[open]")) return;
  // A focused button is pressed by Enter itself; it submits only from elsewhere or from a choice.
  const pressed = event.key === "Enter" && event.target.matches("button:not([role=radio]):not([data-place])");
  if (pressed) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const used = state.item && !state.busy && MODE_KEYS[state.item.mode](key);
  if (!used && !ACTIONS[key]) return;
  event.preventDefault();
  if (!used && !(event.repeat && key === "Enter")) ACTIONS[key]();
});

// --- the start

async function start() {
  state.texts = await (await fetch("texts.json")).json();
  const language = kept(forAlways, "language") || (navigator.language || "").slice(0, 2);
  state.language = language in state.texts ? language : "en";
  state.token = new URLSearchParams(location.hash.slice(1)).get("token") || "";
  state.tab = kept(forTab, "tab") || drawn();
  keep(forTab, "tab", state.tab);
  $("guidelines").hidden = kept(forAlways, "guidelines") === "hidden";
  $("guidelines-button").setAttribute("aria-expanded", String(!$("guidelines").hidden));
  try {
    state.about = await call("api/about");
  } catch (error) {
    await failed(error);
    return;
  }
  state.name = kept(forAlways, "name") || "";
  build();
  if (state.name) step(next); else askName();
}

start();
