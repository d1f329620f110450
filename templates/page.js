// What the page does without this file, it does by a form; here it does so while one types, and copies.
"use strict";

function showButtons() {
  for (const button of document.querySelectorAll("button.copy")) button.hidden = false;
}

async function write(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Only pages by https, or of this very host, have a clipboard.
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

async function copy(button) {
  await write(document.getElementById(button.dataset.copy).textContent + "\n");
  const label = button.textContent;
  if (label === button.dataset.done) return;
  button.textContent = button.dataset.done;
  setTimeout(() => (button.textContent = label), 1500);
}

// The server makes the commands: the same page for another image, of which the parts that may differ are taken over.
async function update(url, signal) {
  const response = await fetch(url, { signal });
  if (!response.ok) return;
  const page = new DOMParser().parseFromString(await response.text(), "text/html");
  for (const part of document.querySelectorAll("[data-live]")) {
    const fresh = page.getElementById(part.id);
    if (fresh) part.replaceChildren(...fresh.childNodes);
  }
  showButtons();
  history.replaceState(null, "", url);
}

function follow(form) {
  let running = new AbortController();
  let timer;
  const start = () => {
    clearTimeout(timer);
    running.abort();
    running = new AbortController();
    const url = "./?" + new URLSearchParams(new FormData(form));
    update(url, running.signal).catch(() => {});  // the button still does it
  };
  form.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(start, 250);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    start();
  });
}

// The status page: status.json holds all texts, percentages and paths, which are put where data-put says.
const SECONDS = 2;

function put(part, values) {
  for (const pair of part.dataset.put.split(" ")) {
    const [name, key] = pair.split("=");
    const value = values[key];
    if (name === "text") {
      if (part.textContent !== value) part.textContent = value;
    } else if (value == null) part.removeAttribute(name);
    else if (part.getAttribute(name) !== String(value)) part.setAttribute(name, value);
  }
}

function fill(whole, values) {
  const list = whole.closest("[data-rows]");
  for (const part of whole.querySelectorAll("[data-put]")) if (part.closest("[data-rows]") === list) put(part, values);
}

function fillRows(list, rows) {
  const [pattern, ...shown] = list.children;
  rows.forEach((values, at) => {
    const row = shown[at] ?? list.appendChild(pattern.cloneNode(true));
    row.hidden = false;
    fill(row, values);
  });
  for (const row of shown.slice(rows.length)) row.remove();
}

async function refresh(page) {
  const response = await fetch("status.json" + location.search, { cache: "no-store", signal: AbortSignal.timeout(10000) });
  if (!response.ok) throw new Error(response.status);
  const { shown } = await response.json();
  fill(page, shown);
  for (const list of page.querySelectorAll("[data-rows]")) fillRows(list, shown[list.dataset.rows]);
}

async function watch(page) {
  const silent = document.getElementById("silent");
  for (;;) {
    await new Promise((done) => setTimeout(done, SECONDS * 1000));
    if (document.hidden) await new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));
    const text = await refresh(page).then(() => "", () => silent.dataset.text);
    if (silent.textContent !== text) silent.textContent = text;
  }
}

showButtons();
document.addEventListener("click", (event) => {
  const button = event.target.closest("button.copy");
  if (button) copy(button);
});
const form = document.getElementById("image-form");
if (form) follow(form);
const page = document.getElementById("status");
if (page) watch(page);
