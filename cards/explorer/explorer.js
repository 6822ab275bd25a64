/* Loads the rows that cards/explore.py prepared, and shows those that the search and the filters leave,
   sorted, a page at a time. Data is never markup: it becomes textContent and properties only. */
const $ = (id) => document.getElementById(id);
const PAGE = 50, CUT = 600; // rows on a page, characters of a text in it
const NAMES = { __proto__: null, org_caption: "original", re_caption: "recaption" };
const EMPTY = { q: "", status: "", sort: "", desc: "", page: "1", row: "" };
const FIELDS = ["q", "sort", "desc"]; // of the query: elements of these names
const columns = Object.create(null), kinds = Object.create(null), highest = Object.create(null), texts = [];
const query = { ...EMPTY };
let meta, loaded = 0, shown = [], page = 1, opened = -1, took = 0;

// --- data ---

async function fetched(path, options) {
  const response = await fetch(path, options);
  if (!response.ok) throw new Error(`${path.split("?")[0]}: ${response.status} ${response.statusText}`);
  return response;
}

async function chunk(index) {
  const name = `rows/${String(index).padStart(5, "0")}.json.gz`;
  const body = new Uint8Array(await (await fetched(`${name}?${meta.id}`)).arrayBuffer());
  if (body[0] !== 0x1f) return JSON.parse(new TextDecoder().decode(body)); // the server has unpacked it
  return new Response(new Blob([body]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

function take(data) {
  for (const { name, role } of meta.columns) {
    const values = Object.hasOwn(data.columns, name) ? data.columns[name] : null;
    for (let i = 0; i < data.rows; i++) columns[name].push(values && values[i]);
    if (role !== "score" || !values) continue;
    for (const value of values) highest[name] = Math.max(highest[name] ?? 0, value ?? 0);
  }
  const words = meta.columns.filter(({ kind }) => kind === "text" || kind === "date");
  for (let i = loaded; i < loaded + data.rows; i++) {
    texts.push(words.map(({ name }) => columns[name][i] ?? "").join("\n").toLowerCase());
  }
  loaded += data.rows;
}

// --- search, filters, order ---

const contains = (text, part) => text.toLowerCase().includes(part.toLowerCase());
const IF_ANY = { "is empty": () => false, "is not empty": () => true };
const IN_ORDER = {
  "=": (a, b) => a === b, "≠": (a, b) => a !== b, "<": (a, b) => a < b, "≤": (a, b) => a <= b,
  ">": (a, b) => a > b, "≥": (a, b) => a >= b, ...IF_ANY,
};
/* By kind of column: what can be asked of a value that is there. */
const OPERATORS = {
  text: { contains, "does not contain": (a, b) => !contains(a, b), is: (a, b) => a === b, ...IF_ANY },
  number: IN_ORDER, date: IN_ORDER,
  bool: { "is true": (value) => value, "is false": (value) => !value, ...IF_ANY },
};
const READ = { text: String, number: Number, date: (text) => text.slice(0, 10), bool: (value) => value };
const takesValue = (operator) => !operator.startsWith("is ");
const isEmpty = (value) => value === null || value === "";

/* A function of a row's number. Of a row without a value only "is empty" holds. */
function passes([name, operator, given]) {
  const values = columns[name], read = READ[kinds[name]];
  const holds = OPERATORS[kinds[name]][operator], wanted = read(given);
  return (i) => isEmpty(values[i]) ? operator === "is empty" : holds(read(values[i]), wanted);
}

function matching() {
  const found = [...query.q.toLowerCase().matchAll(/"([^"]+)"|(\S+)/g)];
  const words = found.map(([, phrase, word]) => phrase ?? word), tests = filters().map(passes), rows = [];
  for (let i = 0; i < loaded; i++) {
    if (query.status && columns.status[i] !== query.status) continue;
    if (words.every((word) => texts[i].includes(word)) && tests.every((test) => test(i))) rows.push(i);
  }
  return rows;
}

/* Rows without a value come last, up or down, as in DuckDB. */
function ordered(rows) {
  if (!query.sort) return rows;
  const values = columns[query.sort], sign = query.desc ? -1 : 1;
  const order = (a, b) => values[a] < values[b] ? -sign : values[a] > values[b] ? sign : a - b;
  const without = rows.filter((i) => values[i] === null);
  return rows.filter((i) => values[i] !== null).sort(order).concat(without);
}

function run() {
  const start = performance.now();
  shown = ordered(matching());
  const pages = Math.max(1, Math.ceil(shown.length / PAGE));
  page = Math.min(Math.max(1, parseInt(query.page, 10) || 1), pages);
  if (loaded === meta.rows) query.page = String(page);
  render(pages);
  took = performance.now() - start;
  say();
  writeAddress();
}

// --- the address ---

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(EMPTY)) query[name] = given.get(name) ?? EMPTY[name];
  for (const name of FIELDS) {
    $(name).value = query[name];
    query[name] = $(name).value; // only what the field can hold
  }
  $("filters").replaceChildren();
  const operators = given.getAll("is"), values = given.getAll("value");
  given.getAll("column").forEach((name, k) => name in columns && addFilter(name, operators[k], values[k]));
}

function writeAddress() {
  const kept = Object.entries(query).filter(([name, value]) => value !== EMPTY[name]);
  for (const [name, is, value] of filters()) kept.push(["column", name], ["is", is], ["value", value]);
  const hash = kept.length ? `#${new URLSearchParams(kept)}` : "";
  if (hash !== location.hash) history.replaceState(null, "", hash || location.pathname + location.search);
}

// --- showing ---

const count = (n) => n.toLocaleString("en");
const inAll = () => Object.values(meta.status).reduce((a, b) => a + b, 0);

function say() {
  const first = (page - 1) * PAGE, last = Math.min(first + PAGE, shown.length);
  const range = `Rows ${count(first + 1)}–${count(last)} of ${count(shown.length)} that match`;
  const sample = meta.rows < inAll() ? `, a sample of ${count(inAll())} in the data set` : " in all";
  const still = loaded < meta.rows ? `; loading, ${count(loaded)} are here` : "";
  const found = shown.length ? range : "No row matches";
  $("summary").textContent = `${found}; ${count(meta.rows)}${sample}${still}; ${took.toFixed(1)} ms`;
  Object.assign($("summary").dataset, { matching: shown.length, loaded });
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const copyOf = (template) => $(template).content.firstElementChild.cloneNode(true);

/* A text of the data, cut where it is longer than `limit`; controls are made visible. */
function data(value, limit = Infinity) {
  const text = String(value).replace(/[\0-\x08\x0b-\x1f\x7f-\x9f]/g, "\ufffd");
  const cut = text.length > limit ? text.slice(0, limit).replace(/[\ud800-\udbff]$/, "") + "…" : text;
  return element("span", { className: "data", dir: "auto", textContent: cut });
}

function address(text) {
  return /^https?:/i.test(text) && URL.canParse(text) ? new URL(text).href : null;
}

function link(value, limit) {
  const href = address(value), text = data(value, limit);
  const safely = { target: "_blank", rel: "noopener noreferrer nofollow", referrerPolicy: "no-referrer" };
  return href ? element("a", { href, ...safely }, text) : text;
}

function imageOf(i) {
  const key = columns.key[i];
  if (columns.status[i] !== "ok") return null;
  if (!meta.thumbs || !key) return address(columns.url[i]);
  return `thumbs/${encodeURIComponent(key.slice(0, 5))}/${encodeURIComponent(key)}.jpg`;
}

function picture(i, loading) {
  const missing = (textContent) => element("span", { className: "missing", textContent }), src = imageOf(i);
  if (!src) return missing("no image");
  const alt = "the image of this row", referrerPolicy = "no-referrer";
  const image = element("img", { alt, loading, decoding: "async", referrerPolicy, src });
  const lost = meta.thumbs ? "the image is not here" : "the image could not be loaded: its link may be dead";
  image.addEventListener("error", () => image.replaceWith(missing(lost)));
  return image;
}

/* A name breaks after its underscores. */
function label(name) {
  const parts = name.split(/(?<=_)/).flatMap((part) => [part, element("wbr")]);
  return element("span", { className: "label" }, ...parts);
}

function fact(name, textContent, className = "") {
  return element("div", { className: "fact" }, label(name), element("span", { className, textContent }));
}

function score(name, i) {
  const value = columns[name][i], bar = element("span", { className: "bar" });
  const share = Math.max(0, Math.min(100, 100 * value / (highest[name] || 1)));
  bar.style.setProperty("--share", `${share}%`);
  return element("div", {}, fact(name, Number.isInteger(value) ? String(value) : value.toFixed(3)), bar);
}

/* The names of a role's columns in which a row has a value. */
const having = (i, role) => meta.columns.filter((column) => column.role === role)
  .map(({ name }) => name).filter((name) => columns[name][i] !== null);

function textsOf(i) {
  const told = having(i, "caption").map((name) => [NAMES[name] ?? name, data(columns[name][i], CUT)]);
  const { status, url, error } = columns;
  if (status[i] !== "ok" && url[i] !== null) told.push(["url", link(url[i], CUT)]);
  if (error[i] !== null) told.push(["error", data(error[i], CUT)]);
  return told.map(([name, text]) => element("div", {}, label(name), text));
}

function row(i, position) {
  const item = copyOf("row"), into = (name, ...parts) => item.querySelector(name).append(...parts);
  into(".picture", picture(i, "lazy"));
  into(".texts", ...textsOf(i));
  into(".scores", ...having(i, "score").map((name) => score(name, i)));
  into(".status", fact("status", columns.status[i], columns.status[i] === "ok" ? "" : "failed"));
  Object.assign(item.dataset, { position, uid: columns.uid[i] ?? "" });
  return item;
}

function render(pages) {
  const first = (page - 1) * PAGE;
  $("rows-list").replaceChildren(...shown.slice(first, first + PAGE).map((i, k) => row(i, first + k)));
  if ($("rows-list").firstChild) $("rows-list").firstChild.tabIndex = 0;
  $("page-of").textContent = `Page ${count(page)} of ${count(pages)}`;
  $("previous").disabled = page === 1;
  $("next").disabled = page === pages;
  for (const button of $("statuses").children) {
    button.setAttribute("aria-pressed", String(button.dataset.status === query.status));
  }
}

function show(position) {
  const i = shown[position];
  if (i === undefined) return;
  opened = position;
  const list = element("dl");
  for (const { name, what } of meta.columns.filter((column) => columns[column.name][i] !== null)) {
    const value = columns[name][i];
    const text = name === "url" ? link(value) : data(value);
    list.append(element("dt", {}, name, label(what)), element("dd", {}, text));
  }
  $("dialog-title").textContent = `Row ${count(position + 1)} of ${count(shown.length)}`;
  $("detail").replaceChildren(element("div", { className: "picture" }, picture(i, "eager")), list);
  if (!$("dialog").open) $("dialog").showModal();
  $("dialog").scrollTop = 0;
  query.row = columns.uid[i] ?? "";
  writeAddress();
}

// --- hands ---

function change(values = {}, wait = 0) {
  Object.assign(query, { page: "1" }, values);
  clearTimeout(change.timer);
  change.timer = setTimeout(run, wait);
}

const option = (value) => element("option", { value, textContent: value });
const fieldsOf = (filter) => [...filter.querySelectorAll("select, input")];

/* [column, operator, value] of the filters that can be applied already. Their fields hold them. */
function filters() {
  const all = [...$("filters").children].map((filter) => fieldsOf(filter).map((field) => field.value));
  return all.filter(([, is, value]) => value || !takesValue(is));
}

function addFilter(name = meta.columns[0].name, is = "", given = "") {
  const filter = copyOf("filter"), [column, operator, value] = fieldsOf(filter);
  column.append(...meta.columns.map((each) => option(each.name)));
  column.value = name;
  operator.append(option(is));
  value.value = given;
  offer(filter);
  $("filters").append(filter);
  return column;
}

/* The operators and the kind of value that go with a filter's column. */
function offer(filter) {
  const [column, operator, value] = fieldsOf(filter), kind = kinds[column.value], before = operator.value;
  const names = Object.keys(OPERATORS[kind]);
  operator.replaceChildren(...names.map(option));
  operator.value = names.includes(before) ? before : names[0];
  value.type = kind === "number" || kind === "date" ? kind : "text";
  value.parentNode.hidden = !takesValue(operator.value);
  if (value.parentNode.hidden) value.value = "";
}

function removeFilter(button) {
  button.closest(".line").remove();
  $("add").focus();
  change();
}

function turn(by) {
  query.page = String(page + by);
  run();
  focusRow(0);
  window.scrollTo(0, Math.max(0, $("summary").offsetTop - 60));
}

const positionOf = (inRow) => Number(inRow.closest(".row").dataset.position);

function focusRow(index) {
  const items = $("rows-list").children, item = items[Math.max(0, Math.min(index, items.length - 1))];
  if (!item) return;
  for (const other of items) other.tabIndex = -1;
  item.tabIndex = 0;
  item.focus();
}

/* What keys do, by name: with a row opened, in a field, elsewhere. */
function keysFor(target) {
  const item = target.closest(".row"), at = item ? [...item.parentNode.children].indexOf(item) : -1;
  const clearSearch = () => change({ q: target.value = "" }), leave = () => focusRow(0);
  const search = () => { $("q").focus(); $("q").select(); };
  if ($("dialog").open) return { ArrowLeft: () => show(opened - 1), ArrowRight: () => show(opened + 1) };
  if (target === $("q")) return { ArrowDown: leave, Escape: target.value ? clearSearch : leave };
  if (target.matches("input, select")) return { Escape: leave };
  const found = { "/": search, ArrowLeft: () => turn(-1), ArrowRight: () => turn(1) };
  if (item === target) found.Enter = () => show(positionOf(item));
  if (!item && target.matches("button")) return found;
  return { ...found, ArrowDown: () => focusRow(at + 1), ArrowUp: () => focusRow(at - 1) };
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const act = keysFor(event.target)[event.key];
  if (!act) return;
  act();
  event.preventDefault();
}

function statusButton([status, number]) {
  const button = element("button", { type: "button", textContent: `${status || "all"} ${count(number)}` });
  button.dataset.status = status;
  button.addEventListener("click", () => change({ status }));
  return button;
}

function defectRow({ caption, defect, column, first, kept, failed }) {
  const shows = element("button", { type: "button", textContent: count(kept), title: "Show these rows" });
  shows.addEventListener("click", () => { addFilter(column, "contains", defect); change({}); });
  const cells = [caption, defect, count(first), kept && column in columns ? shows : count(kept), count(failed)];
  return element("tr", {}, ...cells.map((cell) => element("td", {}, cell)));
}

function wire() {
  const on = (id, event, act) => $(id).addEventListener(event, act);
  $("sort").append(...meta.columns.map(({ name }) => option(name)));
  $("statuses").append(...[["", inAll()], ...Object.entries(meta.status)].map(statusButton));
  $("defects").hidden = !meta.defects?.length;
  $("defects").querySelector("tbody").append(...(meta.defects ?? []).map(defectRow));
  for (const name of FIELDS) on(name, "input", (event) => change({ [name]: event.target.value }, 120));
  on("add", "click", () => addFilter().focus());
  on("filters", "input", (event) => { offer(event.target.closest(".line")); change({}, 120); });
  on("filters", "click", ({ target }) => target.matches("button") && removeFilter(target));
  on("rows-list", "click", ({ target }) => target.matches(".open") && show(positionOf(target)));
  on("clear", "click", clear);
  on("tools", "submit", (event) => event.preventDefault());
  on("previous", "click", () => turn(-1));
  on("next", "click", () => turn(1));
  on("close", "click", () => $("dialog").close());
  on("dialog", "close", () => { query.row = ""; writeAddress(); focusRow(opened - (page - 1) * PAGE); });
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", follow);
}

function follow() {
  readAddress();
  run();
  openNamed();
}

function clear() {
  history.replaceState(null, "", location.pathname + location.search);
  follow();
}

function openNamed() {
  if (!query.row) return $("dialog").close();
  const position = shown.findIndex((i) => columns.uid[i] === query.row);
  if (position >= 0) show(position);
}

async function start() {
  const began = performance.now();
  $("summary").textContent = "Loading";
  meta = await (await fetched("data.json", { cache: "no-cache" })).json();
  for (const { name, kind } of meta.columns) { columns[name] = []; kinds[name] = kind; }
  $("title").textContent = document.title = meta.title;
  $("about").textContent = meta.version;
  $("license").textContent = `Captions and metadata: ${meta.license}. The images belong to their owners.`;
  wire();
  readAddress();
  for (let index = 0; index < meta.chunks; index++) {
    take(await chunk(index));
    if (index === 0) run();
    else say();
  }
  if (meta.chunks !== 1) run();
  openNamed();
  document.body.dataset.ready = (performance.now() - began).toFixed(0);
}

start().catch((error) => {
  $("summary").textContent = `The rows could not be loaded: ${error.message}`;
});
