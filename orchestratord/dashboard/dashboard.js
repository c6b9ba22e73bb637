// The dashboard: polls the queue and the workers, follows the fleet feed, and runs a prompt as any client would.
import { events } from "/dashboard/sse.js";

const byId = (id) => document.getElementById(id);
const POLL_MS = 2000;
const MAX_LINES = 200;

let running = null; // the prompt that runs, or ran last

byId("key").value = sessionStorage.getItem("llorch-key") ?? "";
byId("key").addEventListener("change", () => {
  sessionStorage.setItem("llorch-key", byId("key").value);
  feedAbort.abort();
  refresh();
});

function headers(more = {}) {
  const key = byId("key").value;
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function call(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers(options.headers) });
  if (response.status === 401) {
    throw new Error(byId("key").value ? "The server doesn't know this key." : "This server needs a key: type it above.");
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(body?.error?.message ?? `${path}: ${response.status}`);
  }
  return response;
}

function problem(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = !text;
}

function fill(id, rows) {
  byId(id).replaceChildren(...rows.map((cells) => {
    const row = document.createElement("tr");
    for (const cell of cells) {
      const field = document.createElement("td");
      field.textContent = cell;
      row.append(field);
    }
    return row;
  }));
  byId(`no-${id}`).hidden = rows.length > 0;
}

async function refresh() {
  try {
    const health = await (await fetch("/ready")).json();
    byId("state").textContent = health.ready ? "ready" : health.reason || "not ready";
    byId("state").className = "badge " + (health.ready ? "good" : "bad");
    const [queue, models] = await Promise.all([
      call("/v2/queue").then((r) => r.json()),
      call("/v1/models").then((r) => r.json()),
    ]);
    showModels(models.data);
    byId("depth").textContent = queue.depth;
    fill("queue", queue.queues.map((q) =>
      [q.model, q.priority, q.tenant, q.depth, `${(q.oldest_age_ms / 1000).toFixed(1)} s`]));
    await showWorkers();
  } catch (error) {
    problem(error instanceof TypeError ? "The server doesn't answer." : error.message);
  }
}

async function showWorkers() {
  const response = await fetch("/v2/workers", { headers: headers() });
  if (response.status === 403) {
    problem("Workers and events are shown to operators: use a key of tenant admin.");
    return;
  }
  if (!response.ok) throw new Error(`/v2/workers: ${response.status}`);
  const { workers } = await response.json();
  const ready = workers.filter((w) => w.state === "ready" || w.state === "draining");
  byId("rate").textContent = ready.reduce((sum, w) => sum + w.tokens_per_second, 0).toFixed(0);
  byId("slots").textContent =
    `${ready.reduce((sum, w) => sum + w.slots_used, 0)}/${ready.reduce((sum, w) => sum + w.slots_total, 0)}`;
  fill("workers", workers.map((w) =>
    [w.worker_id, w.model, w.pool, w.state, `${w.slots_used}/${w.slots_total}`, w.tokens_per_second.toFixed(0)]));
  const lost = workers.filter((w) => w.state === "lost" || w.state === "failed").map((w) => w.worker_id);
  problem(lost.length ? `Not serving: ${lost.join(", ")}` : workers.length ? "" : "No worker has registered yet.");
}

function showModels(models) {
  const select = byId("model");
  const names = models.map((model) => model.id);
  if (names.join("\n") === [...select.options].map((option) => option.value).join("\n")) return;
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
  byId("run").disabled = names.length === 0 || (running !== null && !running.over);
}

let feedAbort = new AbortController();

async function followFleet() {
  let last = "0-0"; // the oldest event that is kept
  for (;;) {
    feedAbort = new AbortController();
    try {
      const response = await call("/v2/fleet/events", {
        headers: { "Last-Event-ID": last },
        signal: feedAbort.signal,
      });
      for await (const { data, id } of events(response)) {
        last = id ?? last;
        addEvent(JSON.parse(data));
      }
    } catch { /* shown by refresh(), which asks the same server */ }
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

function addEvent({ at_ms, kind, subject, text }) {
  const line = document.createElement("li");
  const when = document.createElement("time");
  when.textContent = new Date(at_ms).toLocaleTimeString();
  const [what, ...happened] = kind.split("_"); // worker_lost, replica_joined, tasks_migrated
  const words = what === "tasks" ? `tasks ${happened.join(" ")}, ${subject}` : `${what} ${subject} ${happened.join(" ")}`;
  line.append(when, text ? `${words}: ${text}` : words);
  if (/lost|failed/.test(kind)) line.className = "bad";
  const list = byId("events");
  list.prepend(line);
  while (list.children.length > MAX_LINES) list.lastChild.remove();
}

async function run() {
  const seed = byId("seed").value.trim();
  const body = {
    model: byId("model").value,
    prompt: byId("prompt").value,
    max_tokens: Number(byId("max_tokens").value),
    temperature: Number(byId("temperature").value),
  };
  // A seed has 64 bits, more than a number holds here: it goes in as it was typed.
  const json = JSON.stringify(body).replace(/}$/, seed === "" ? "}" : `,"seed":${seed}}`);
  running = { taskId: null, last: null, ended: false, over: false, began: performance.now() };
  byId("output").textContent = "";
  byId("run").disabled = true;
  byId("stop").disabled = false;
  try {
    await read(await call("/v2/tasks", {
      method: "POST",
      headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
      body: json,
    }));
    for (let tries = 0; !running.ended && running.taskId && tries < 60; tries++) {
      byId("progress").textContent = "connection lost; going on where it stopped…";
      await new Promise((resolve) => setTimeout(resolve, 500));
      await read(await call(`/v2/tasks/${running.taskId}/events`, {
        headers: running.last ? { "Last-Event-ID": running.last } : {},
      })).catch(() => {});
    }
  } catch (error) {
    byId("progress").textContent = error.message;
  } finally {
    running.over = true;
    byId("run").disabled = byId("model").options.length === 0;
    byId("stop").disabled = true;
  }
}

async function read(response) {
  for await (const { event, data, id } of events(response)) {
    running.last = id ?? running.last;
    show(event, JSON.parse(data), data);
  }
}

function show(event, data, raw) {
  const progress = byId("progress");
  if (event === "queued") {
    running.taskId = data.task_id;
    progress.textContent = `waiting, position ${data.queue_position}`;
  } else if (event === "started") {
    const seed = raw.match(/"seed":\s*(-?\d+)/)?.[1] ?? data.seed; // all of its digits
    progress.textContent = `running on ${data.worker_id}, seed ${seed}`;
  } else if (event === "migrated") {
    progress.textContent = `goes on at ${data.worker_id}: ${data.reason}`;
  } else if (event === "token") {
    byId("output").append(data.t);
  } else if (event === "end") {
    running.ended = true;
    const seconds = (performance.now() - running.began) / 1000;
    progress.textContent =
      `${data.stop_reason}: ${data.tokens_out} tokens in ${seconds.toFixed(1)} s (${data.tokens_in} in the prompt)`;
  } else if (event === "error") {
    running.ended = true;
    progress.textContent = `${data.code}: ${data.message}`;
  }
}

byId("run").addEventListener("click", () => {
  const invalid = ["max_tokens", "temperature", "seed"].find((id) => !byId(id).reportValidity());
  if (!invalid) run();
});
byId("stop").addEventListener("click", () => {
  if (running?.taskId) call(`/v2/tasks/${running.taskId}/cancel`, { method: "POST" }).catch((e) => problem(e.message));
});

refresh();
setInterval(refresh, POLL_MS);
followFleet();
