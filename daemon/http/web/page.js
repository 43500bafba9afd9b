// Draws what the daemon tells at /events. Text from outside goes into text nodes only, never into markup.

const PHASES = ["plan", "stage", "queue", "write", "fsync", "commit"];
const LAYERS = ["queue", "plan", "stage", "fsync", "write", "commit"];
const STATES = ["free", "staging", "sealed", "persisting"];
const STATE_COLOURS = { free: "--empty", staging: "--stage", sealed: "--commit", persisting: "--write" };
const ENDED = new Set(["committed", "failed"]);
const MOST_RANKS = 32; // more are drawn as shares
const MOST_PAST = 12;
const SILENT_S = 10; // five heartbeats
const POLL_MS = 3000; // where no stream can be had
const SLOW_MS = 5000; // without news for so long the link is lost

// --- building the tree ---------------------------------------------------------------------------------------------

function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name === "style") Object.assign(element.style, value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

// Makes `old` look like `fresh` and keeps what need not change: selections, open details, running transitions.
function patch(old, fresh) {
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName || old.id !== fresh.id) {
    old.replaceWith(fresh);
    return;
  }
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const { name } of [...old.attributes]) {
    if (name !== "open" && name !== "style" && !fresh.hasAttribute(name)) old.removeAttribute(name);
  }
  for (const { name, value } of [...fresh.attributes]) {
    if (name !== "style" && old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  if (old.style.cssText !== fresh.style.cssText) old.style.cssText = fresh.style.cssText;
  const before = [...old.childNodes];
  const after = [...fresh.childNodes];
  after.forEach((child, index) => (index < before.length ? patch(before[index], child) : old.append(child)));
  before.slice(after.length).forEach((child) => child.remove());
}

// --- words and numbers ---------------------------------------------------------------------------------------------

function bytes(count) {
  for (const [unit, size] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (count >= size) return `${Number((count / size).toPrecision(3))} ${unit}`;
  }
  return `${count} B`;
}

function seconds(value) {
  if (value < 0.01) return `${(value * 1000).toFixed(1)} ms`;
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 60) return `${Number(value.toPrecision(value < 10 ? 2 : 3))} s`;
  return span(value);
}

// Whole seconds, for what goes on.
function span(value) {
  const whole = Math.round(value);
  if (whole < 60) return `${whole} s`;
  if (whole < 600) return two(whole, 60, "min", 1, "s");
  if (whole < 3600) return `${Math.round(whole / 60)} min`;
  if (whole < 86400) return two(whole, 3600, "h", 60, "min");
  return two(whole, 86400, "d", 3600, "h");
}

function two(value, large, largeUnit, small, smallUnit) {
  const rest = Math.floor((value % large) / small);
  return `${Math.floor(value / large)} ${largeUnit}${rest ? ` ${rest} ${smallUnit}` : ""}`;
}

const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
const ago = (status, unix_s) => (unix_s === null ? "never" : `${span(Math.max(0, status.now_unix_s - unix_s))} ago`);
const lastPart = (path) => path.replace(/\/+$/, "").split("/").pop() || path || "a save";
const running = (job) => job.generations.filter((save) => !ENDED.has(save.state));
const share = (save) => (save.bytes_total ? Math.min(1, save.bytes_done / save.bytes_total) : 0);
const seen = (slot) => (slot.state === "retained" ? "free" : slot.state); // free, and good for a quick load
const isSkipped = (save) => save.error_code === "save_skipped"; // the trainer's own choice when no slot is free
const hasFailed = (save) => save.state === "failed" && !isSkipped(save);
const percent = (save) => `${Math.floor(100 * share(save))} %`;

// --- the parts of the page -----------------------------------------------------------------------------------------

function headline(status) {
  const saves = status.jobs.flatMap(running);
  if (saves.length > 1) return ["work", `Saving ${saves.length} checkpoints`, sentence(saves[0])];
  if (saves.length === 1) return ["work", `Saving ${lastPart(saves[0].checkpoint_id)}`, sentence(saves[0])];
  const ended = status.jobs.flatMap((job) => job.generations);
  const last = ended.reduce((a, b) => (a && a.started_unix_s > b.started_unix_s ? a : b), null);
  if (last && isSkipped(last)) return ["good", "The last save was skipped", last.error];
  if (last && last.state === "failed") return ["bad", "The last save failed", last.error ?? ""];
  if (status.last_commit_unix_s !== null) {
    return ["good", "Everything is saved", `The last commit was ${ago(status, status.last_commit_unix_s)}.`];
  }
  if (!status.jobs.length) return ["good", "Ready", "No trainer has connected yet."];
  return ["good", "Ready", "Nothing has been saved yet."];
}

function sentence(save) {
  if (save.state === "committing") return "All bytes are durable. Publishing.";
  if (save.state === "staged") return "Every rank has handed over its part. From here on trainers may end at any time.";
  return save.waiting_for ? "Ranks are handing over their parts." : "";
}

function slotsOf(status) {
  const found = Object.fromEntries(STATES.map((state) => [state, 0]));
  for (const job of status.jobs) {
    for (const session of job.sessions) for (const slot of session.slots) found[seen(slot)] += 1;
  }
  return found;
}

function facts(status) {
  const slots = slotsOf(status);
  const all = Object.values(slots).reduce((a, b) => a + b, 0);
  const trainers = status.jobs.reduce((sum, job) => sum + job.sessions.length, 0);
  const failed = status.jobs.flatMap((job) => job.generations).filter(hasFailed).length;
  const disk = status.volumes?.checkpoints;
  const full = disk && disk.free_bytes < 0.1 * disk.size_bytes;
  return h("dl", { class: "facts" },
    fact("Last commit", ago(status, status.last_commit_unix_s)),
    fact("Slots free", all ? `${slots.free} of ${all}` : "none made", all && !slots.free ? "bad" : null),
    fact("Trainers", String(trainers), null, count(status.workers.length, "worker")),
    fact("Failed lately", String(failed), failed ? "bad" : null),
    disk ? fact("Room on disk", bytes(disk.free_bytes), full ? "bad" : null, `of ${bytes(disk.size_bytes)}`) : null);
}

function fact(name, value, tone, note) {
  return h("div", {}, h("dt", {}, name), h("dd", { "data-tone": tone }, value, note ? h("small", {}, note) : null));
}

function job(status, it) {
  const attached = `${it.sessions.length} of ${count(it.world_size, "rank")} attached`;
  const rhythm = it.interval_s ? `, a commit every ${seconds(it.interval_s)}` : "";
  return h("section", { class: "job", "data-job": it.job },
    h("h2", {}, it.job),
    h("p", { class: "meta" }, `${attached}, incarnation ${it.incarnation}${rhythm}`),
    running(it).map((save) => current(save)),
    it.sessions.length ? [h("h3", {}, "Ranks and slots"), ranks(it)] : null,
    past(status, it));
}

function current(save) {
  const rate = save.bytes_per_s;
  const left = rate && save.state === "staged" ? (save.bytes_total - save.bytes_done) / rate : null;
  const where = { scheduled: "staging", staged: "writing", committing: "publishing" }[save.state] ?? save.state;
  const below = [
    save.state === "scheduled" ? `${save.ranks_sealed} of ${count(save.world_size, "rank")} handed over` : null,
    `${bytes(save.bytes_done)} of ${bytes(save.bytes_total)}`,
    rate ? `${bytes(rate)}/s` : null,
    left === null ? null : `${span(left)} left`,
    `${where} for ${span(save.seconds)}`,
    save.slowest_rank ? `rank ${save.slowest_rank.rank} sealed last, ${seconds(save.slowest_rank.lag_s)} after the first` : null,
    save.waiting_for?.replace(/^save of .* waits for /s, "waits for "),
  ];
  return h("article", { class: "save", "data-save": save.save_id, "data-state": save.state },
    h("div", { class: "top" },
      h("span", { class: "name", title: save.checkpoint_id }, lastPart(save.checkpoint_id)),
      h("span", { class: "figure" }, percent(save))),
    h("div", { class: "bar", role: "progressbar", "aria-label": "bytes written", "aria-valuemin": 0,
      "aria-valuemax": 100, "aria-valuenow": Math.floor(100 * share(save)) },
      h("i", { class: "handed", style: { width: `${(100 * save.ranks_sealed) / save.world_size}%` } }),
      h("i", { style: { width: `${100 * share(save)}%` } })),
    h("div", { class: "below" }, below.filter(Boolean).map((text) => h("span", {}, text))));
}

function ranks(it) {
  const present = new Map(it.sessions.map((session) => [session.rank, session]));
  if (it.world_size > MOST_RANKS) return manyRanks(it, present);
  const rows = Array.from({ length: it.world_size }, (_, rank) => rankRow(rank, present.get(rank)));
  return h("div", {}, h("ul", { class: "ranks" }, rows), stateLegend());
}

function rankRow(rank, session) {
  const name = h("b", {}, `rank ${rank}`);
  if (!session) return h("li", {}, h("span", { class: "who" }, name, " ", h("span", { class: "absent" }, "not attached")));
  const silent = session.silent_s > SILENT_S ? h("span", { class: "silent" }, ` silent for ${span(session.silent_s)}`) : null;
  return h("li", {}, h("span", { class: "who" }, name, ` pid ${session.pid}`, silent), slotSquares(session));
}

function slotSquares(session) {
  return h("span", { class: "slots" }, session.slots.map((slot) => {
    const words = slot.state === "free" ? slot.state : `${slot.state}, save ${slot.sequence}`;
    return h("span", { class: "slot", "data-state": seen(slot), title: words, role: "img", "aria-label": words });
  }));
}

function manyRanks(it, present) {
  const slots = slotsOf({ jobs: [it] });
  const bars = STATES.filter((state) => slots[state]).map((state) =>
    h("i", { "data-state": state, style: { flexGrow: String(slots[state]), flexBasis: "0" } }));
  const silent = it.sessions.filter((session) => session.silent_s > SILENT_S).map((session) => session.rank);
  const absent = Array.from({ length: it.world_size }, (_, rank) => rank).filter((rank) => !present.has(rank));
  return h("div", {},
    h("div", { class: "shares" }, bars),
    legend(STATES.map((state) => [STATE_COLOURS[state], `${slots[state].toLocaleString("en")} ${state}`])),
    absent.length ? h("p", { class: "meta" }, `Not attached: ${listed(absent)}`) : null,
    silent.length ? h("p", { class: "meta" }, `Silent: ${listed(silent)}`) : null,
    h("details", {}, h("summary", {}, `every slot of ${count(it.sessions.length, "rank")}`),
      h("div", { class: "field" }, it.sessions.flatMap((session) => session.slots.map((slot) =>
        h("span", { class: "slot", "data-state": seen(slot), title: `rank ${session.rank}: ${slot.state}` }))))));
}

function listed(ranks) {
  const shown = ranks.slice(0, 16).join(", ");
  return ranks.length > 16 ? `rank ${shown} and ${ranks.length - 16} more` : `rank ${shown}`;
}

const stateLegend = () => h("div", { style: { marginTop: "0.9rem" } },
  legend(STATES.map((state) => [STATE_COLOURS[state], state])));

function legend(entries) {
  return h("p", { class: "legend" }, entries.map(([colour, text]) =>
    h("span", {}, h("i", { style: { background: `var(${colour})` } }), text)));
}

function past(status, it) {
  const saves = it.generations.filter((save) => ENDED.has(save.state)).slice(-MOST_PAST).reverse();
  if (!saves.length) return null;
  const longest = Math.max(...saves.map(extent), 1e-3);
  return [h("h3", {}, "Last saves"),
    legend(PHASES.map((phase) => [`--${phase}`, phase])),
    h("ol", { class: "past", style: { marginTop: "0.9rem" } }, saves.map((save) => pastRow(status, save, longest)))];
}

const extent = (save) =>
  Math.max(save.state === "failed" ? save.seconds : 0, ...save.phases.map((phase) => phase.begin_s + phase.seconds));

function pastRow(status, save, longest) {
  // Ranks overlap, so phases do, too. What is drawn last lies on top: a wait or an fsync beside a write is no loss.
  const bars = [...save.phases]
    .sort((a, b) => LAYERS.indexOf(a.phase) - LAYERS.indexOf(b.phase))
    .map((phase) => bar(phase.phase, phase.begin_s, phase.seconds, longest));
  const reached = Math.max(0, ...save.phases.map((phase) => phase.begin_s + phase.seconds));
  if (save.state === "failed") bars.push(bar("failed", reached, Math.max(0, save.seconds - reached), longest));
  const id = `save-${save.save_id}`;
  return h("li", { id, class: location.hash === `#${id}` ? "target" : null, "data-state": save.state },
    h("div", { class: "what" },
      h("b", { title: save.checkpoint_id }, lastPart(save.checkpoint_id)),
      h("span", {}, `save ${save.sequence}, ${ago(status, save.started_unix_s)}`)),
    h("div", { class: "span" }, bars),
    h("div", { class: "took" }, h("b", {}, seconds(save.seconds)), isSkipped(save) ? " skipped" : hasFailed(save) ? " failed" : ` ${bytes(save.bytes_total)}`),
    save.error && hasFailed(save) ? h("p", { class: "cause" }, save.error) : null);
}

function bar(phase, begin_s, length_s, longest_s) {
  const style = { left: `${(100 * begin_s) / longest_s}%`, width: `${(100 * length_s) / longest_s}%` };
  return h("i", { "data-phase": phase, title: `${phase}: ${seconds(length_s)}`, style });
}

// --- the whole, and the link to the daemon -------------------------------------------------------------------------

function draw(status) {
  const [tone, title, words] = headline(status);
  const main = h("main", { id: "main" },
    h("h1", { "data-tone": tone }, title),
    h("p", { class: "lead" }, words || "\u00a0"),
    facts(status),
    [...status.jobs].reverse().map((it) => job(status, it)));
  patch(document.getElementById("main"), main);
  document.getElementById("about").textContent =
    `ckptd ${status.version}, pid ${status.pid}, ${status.mode} mode, up ${span(status.uptime_s)}`;
  const saving = status.jobs.flatMap(running);
  document.title = saving.length ? `${percent(saving[0])} ckptd` : "ckptd";
}

let heard_ms = performance.now();
let scrolled = false;

function take(text) {
  heard_ms = performance.now();
  show("live", "live");
  draw(JSON.parse(text));
  if (!scrolled && location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView({ block: "center" });
  scrolled = true;
}

function show(state, words) {
  const link = document.getElementById("link");
  link.dataset.state = state;
  if (link.textContent !== words) link.textContent = words;
}

async function poll() {
  try {
    const answer = await fetch("/status");
    if (answer.ok) take(await answer.text());
  } catch {
    // the daemon is away; watch() says so
  }
}

function watch() {
  const silent_ms = performance.now() - heard_ms;
  if (silent_ms > SLOW_MS) show("lost", `no news for ${span(silent_ms / 1000)}`);
}

// The page comes with the state of its moment, so that it never begins empty.
const first = JSON.parse(document.getElementById("first").textContent);
if (first) draw(first);

const events = new EventSource("/events");
events.onmessage = (event) => take(event.data);
events.onerror = () => {
  // A broken stream is opened again by the browser; one that was refused is not.
  if (events.readyState === EventSource.CLOSED) setInterval(poll, POLL_MS);
};
setInterval(watch, 1000);
