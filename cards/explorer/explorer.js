/* Loads the rows that cards/explore.py prepared, and shows those that a query leaves, a page at a time.
   Data is never markup: it goes into the document through textContent and properties only. */
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const PAGE = 50, CUT = 600, CUT_WHOLE = 5000;
  const NAMES = { __proto__: null, org_caption: "original", re_caption: "recaption" };
  let meta, columns = Object.create(null), kinds = Object.create(null), texts = [], loaded = 0;
  let query = {}, shown = [], page = 1, highest = Object.create(null), opened = -1, took = 0;

  // --- data -----------------------------------------------------------------------------------------------------------

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
    for (const { name, kind, role } of meta.columns) {
      const values = data.columns[name] ?? null, into = columns[name];
      for (let i = 0; i < data.rows; i++) into.push(values && values[i]);
      if (role === "score" && values) for (const value of values) highest[name] = Math.max(highest[name] ?? 0, value ?? 0);
    }
    const words = meta.columns.filter((c) => c.kind === "text").map((c) => columns[c.name]);
    for (let i = loaded; i < loaded + data.rows; i++) {
      let all = "";
      for (const column of words) if (column[i]) all += column[i] + "\n";
      texts.push(all.toLowerCase());
    }
    loaded += data.rows;
  }

  // --- the language: a condition of SQL, compiled to functions of a row's number -----------------------------------------

  const TOKEN = /\s*(?:(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)|'((?:[^']|'')*)'|"((?:[^"]|"")+)"|([\p{L}_][\p{L}\p{N}_]*)|(<=|>=|<>|!=|\|\||[-+*/%=<>(),]))/iuy;
  const lower = (value) => value === null ? null : value.toLowerCase();
  const FUNCTIONS = {
    length: ["number", ["text"], (s) => [...s].length], lower: ["text", ["text"], lower], upper: ["text", ["text"], (s) => s.toUpperCase()],
    abs: ["number", ["number"], Math.abs], contains: ["bool", ["text", "text"], (s, t) => s.includes(t)],
    starts_with: ["bool", ["text", "text"], (s, t) => s.startsWith(t)], ends_with: ["bool", ["text", "text"], (s, t) => s.endsWith(t)],
  };
  const COMPARE = {
    __proto__: null,
    "=": (a, b) => a === b, "<>": (a, b) => a !== b, "!=": (a, b) => a !== b,
    "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b,
  };
  const COMPUTE = { "+": (a, b) => a + b, "-": (a, b) => a - b, "*": (a, b) => a * b, "/": (a, b) => a / b, "%": (a, b) => b === 0 ? null : a % b };

  function compile(source) {
    const tokens = [];
    const text = source.trimEnd();
    for (TOKEN.lastIndex = 0; TOKEN.lastIndex < text.length;) {
      const at = TOKEN.lastIndex, found = TOKEN.exec(text);
      if (!found) throw new Error(`not understood: ${text.slice(at).trim().slice(0, 30)}`);
      const [, number, string, quoted, word, sign] = found;
      tokens.push(number !== undefined ? { number: +number } : string !== undefined ? { string: string.replaceAll("''", "'") }
        : quoted !== undefined ? { column: quoted.replaceAll('""', '"') } : word !== undefined ? { word, low: word.toLowerCase() } : { low: sign });
    }
    let next = 0;
    const is = (...lows) => lows.every((low, k) => tokens[next + k]?.low === low);
    const eat = (...lows) => is(...lows) && Boolean(next += lows.length);
    const said = () => { const t = tokens[next]; return t ? String(t.word ?? t.low ?? t.column ?? t.number ?? `'${t.string}'`).slice(0, 30) : "the end"; };
    const need = (low) => { if (!eat(low)) throw new Error(`'${low}' is missing before ${said()}`); };
    const node = (type, at) => ({ type, at });
    const as = (type, x, what) => {
      if (x.type !== type && x.type !== null) throw new Error(`${what} takes ${type}, not ${x.type}${type === "text" ? ": quotes make text of it" : ""}`);
      return x.at;
    };
    const same = (a, b, what) => { if (a.type !== null) as(a.type, b, what); };
    const of = (type, f, ...parts) => node(type, (i) => {
      const values = parts.map((part) => part(i));
      return values.includes(null) ? null : f(...values);
    });
    const two = (type, f, a, b) => node(type, (i) => { const x = a(i); if (x === null) return null; const y = b(i); return y === null ? null : f(x, y); });
    const not = (x) => node("bool", (i) => { const v = x(i); return v === null ? null : !v; });

    function either() {
      let a = both();
      while (eat("or")) {
        const x = as("bool", a, "or"), y = as("bool", both(), "or");
        a = node("bool", (i) => { const v = x(i); if (v) return true; const w = y(i); return w ? true : v === null || w === null ? null : false; });
      }
      return a;
    }
    function both() {
      let a = negated();
      while (eat("and")) {
        const x = as("bool", a, "and"), y = as("bool", negated(), "and");
        a = node("bool", (i) => { const v = x(i); if (v === false) return false; const w = y(i); return w === false ? false : v === null || w === null ? null : true; });
      }
      return a;
    }
    function negated() { return eat("not") ? not(as("bool", negated(), "not")) : compared(); }
    function compared() {
      let a = sum();
      for (;;) {
        const sign = tokens[next]?.low;
        if (COMPARE[sign]) {
          next++;
          const b = sum();
          same(a, b, sign);
          a = two("bool", COMPARE[sign], a.at, b.at);
        } else if (eat("is")) {
          const wanted = !eat("not"), { at } = a;
          need("null");
          a = node("bool", (i) => (at(i) === null) === wanted);
        } else {
          const turned = is("not") && ["in", "between", "like", "ilike"].includes(tokens[next + 1]?.low) && eat("not");
          let b;
          if (eat("in")) {
            need("(");
            const values = [];
            do { const v = sum(); same(a, v, "in"); values.push(v.at); } while (eat(","));
            need(")");
            const { at } = a;
            b = node("bool", (i) => {
              const x = at(i);
              if (x === null) return null;
              let unknown = false;
              for (const value of values) { const v = value(i); if (v === x) return true; unknown ||= v === null; }
              return unknown ? null : false;
            });
          } else if (eat("between")) {
            const low = sum();
            need("and");
            const high = sum();
            same(a, low, "between");
            same(a, high, "between");
            const x = two("bool", COMPARE[">="], a.at, low.at).at, y = two("bool", COMPARE["<="], a.at, high.at).at;
            b = node("bool", (i) => { const v = x(i), w = y(i); return v === false || w === false ? false : v === null || w === null ? null : true; });
          } else if (is("like") || is("ilike")) {
            const folded = tokens[next++].low === "ilike", pattern = tokens[next++]?.string;
            if (pattern === undefined) throw new Error("like takes a quoted pattern");
            const matches = like(folded ? pattern.toLowerCase() : pattern);
            b = of("bool", folded ? (s) => matches(s.toLowerCase()) : matches, as("text", a, "like"));
          } else return a;
          a = turned ? not(b.at) : b;
        }
      }
    }
    function sum() {
      let a = product();
      while (is("+") || is("-") || is("||")) {
        const sign = tokens[next++].low, type = sign === "||" ? "text" : "number";
        a = two(type, COMPUTE[sign === "||" ? "+" : sign], as(type, a, sign), as(type, product(), sign));
      }
      return a;
    }
    function product() {
      let a = single();
      while (is("*") || is("/") || is("%")) {
        const sign = tokens[next++].low;
        a = two("number", COMPUTE[sign], as("number", a, sign), as("number", single(), sign));
      }
      return a;
    }
    function single() {
      if (eat("-")) return of("number", (v) => -v, as("number", single(), "-"));
      if (eat("(")) { const a = either(); need(")"); return a; }
      const token = tokens[next++];
      if (token?.number !== undefined) return node("number", () => token.number);
      if (token?.string !== undefined) return node("text", () => token.string);
      if (token?.word && is("(")) return called(token.low);
      if (token?.low === "true" || token?.low === "false") return node("bool", () => token.low === "true");
      if (token?.low === "null") return node(null, () => null);
      const wanted = token?.word ?? token?.column;
      if (wanted === undefined) { next--; throw new Error(`something is missing before ${said()}`); }
      const found = meta.columns.find((c) => c.name.toLowerCase() === wanted.toLowerCase());
      if (!found) throw new Error(`there is no column ${wanted}; there are ${meta.columns.map((c) => c.name).join(", ")}`);
      const values = columns[found.name];
      return node(found.kind, (i) => values[i]);
    }
    function called(name) {
      need("(");
      const given = [];
      if (!is(")")) do given.push(either()); while (eat(","));
      need(")");
      if (name === "coalesce" && given.length) {
        const first = given.find((x) => x.type !== null) ?? given[0];
        for (const x of given) same(first, x, name);
        return node(first.type, (i) => { for (const { at } of given) { const v = at(i); if (v !== null) return v; } return null; });
      }
      if (!Object.hasOwn(FUNCTIONS, name)) throw new Error(`there is no function ${name}; there are ${Object.keys(FUNCTIONS).join(", ")}, coalesce`);
      const [type, types, f] = FUNCTIONS[name];
      if (given.length !== types.length) throw new Error(`${name} takes ${types.length} value${types.length > 1 ? "s" : ""}`);
      return of(type, f, ...given.map((x, k) => as(types[k], x, name)));
    }

    eat("where");
    const keep = !tokens.length || is("order", "by") ? null : as("bool", either(), "a condition");
    const orders = [];
    if (eat("order", "by")) {
      do { const x = either(); orders.push({ ...x, down: eat("desc") || (eat("asc"), false) }); } while (eat(","));
    }
    if (next < tokens.length) throw new Error(`not understood: ${said()}`);
    return { keep, orders };
  }

  function like(pattern) {
    if (!pattern.includes("_")) { // the usual case: parts one after the other
      const parts = pattern.split("%"), first = parts.shift(), last = parts.pop();
      if (last === undefined) return (s) => s === first;
      return (s) => {
        if (!s.startsWith(first)) return false;
        let from = first.length;
        for (const part of parts) {
          from = s.indexOf(part, from);
          if (from < 0) return false;
          from += part.length;
        }
        return s.length - last.length >= from && s.endsWith(last);
      };
    }
    const wanted = [...pattern];
    return (s) => { // back to the last % only, so that no pattern takes long
      const has = [...s];
      let i = 0, k = 0, star = -1, mark = 0;
      while (i < has.length) {
        if (wanted[k] === "%") { star = k++; mark = i; }
        else if (wanted[k] === "_" || (k < wanted.length && wanted[k] === has[i])) { i++; k++; }
        else if (star >= 0) { k = star + 1; i = ++mark; }
        else return false;
      }
      while (wanted[k] === "%") k++;
      return k === wanted.length;
    };
  }

  // --- the query ----------------------------------------------------------------------------------------------------------

  const EMPTY = { q: "", where: "", status: "", sort: "", desc: "", page: "1", row: "" };

  function readAddress() {
    const given = new URLSearchParams(location.hash.slice(1));
    query = { ...EMPTY };
    for (const name of Object.keys(EMPTY)) if (given.has(name)) query[name] = given.get(name);
    if (!Object.hasOwn(columns, query.sort)) query.sort = "";
    $("search").value = query.q;
    $("where").value = query.where;
    $("sort").value = query.sort;
    if (query.where) $("more").open = true;
  }

  function writeAddress() {
    const kept = Object.entries(query).filter(([name, value]) => value !== EMPTY[name]);
    const hash = kept.length ? "#" + new URLSearchParams(kept) : "";
    if (hash !== location.hash) history.replaceState(null, "", hash || location.pathname + location.search);
  }

  function run() {
    const start = performance.now();
    let condition = { keep: null, orders: [] }, problem = "";
    try { condition = compile(query.where); } catch (error) { problem = error.message; }
    $("where-error").textContent = problem;
    $("where").setAttribute("aria-invalid", String(Boolean(problem)));
    const words = [...query.q.toLowerCase().matchAll(/"([^"]+)"|(\S+)/g)].map((found) => found[1] ?? found[2]);
    const { keep } = condition, status = columns.status, matching = [];
    for (let i = 0; i < loaded && !problem; i++) {
      if (query.status && status[i] !== query.status) continue;
      let is = true;
      for (const word of words) if (!texts[i].includes(word)) { is = false; break; }
      if (is && (!keep || keep(i) === true)) matching.push(i);
    }
    const orders = [...condition.orders];
    if (!orders.length && query.sort) orders.push({ type: kinds[query.sort], at: (i) => columns[query.sort][i], down: Boolean(query.desc) });
    shown = ordered(matching, orders);
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    page = Math.min(Math.max(1, parseInt(query.page, 10) || 1), pages);
    if (loaded === meta.rows) query.page = String(page);
    render(pages);
    took = performance.now() - start;
    say();
    writeAddress();
  }

  function ordered(rows, orders) {
    if (!orders.length) return rows;
    const keys = orders.map(({ type, at, down }) => {
      const values = type === "text" ? new Array(loaded).fill(null) : new Float64Array(loaded);
      for (const i of rows) { const v = at(i); values[i] = type === "text" ? v : v === null ? NaN : Number(v); }
      return { text: type === "text", values, sign: down ? -1 : 1 };
    });
    return rows.sort((a, b) => {
      for (const { text, values, sign } of keys) {
        const x = values[a], y = values[b];
        const noX = text ? x === null : x !== x, noY = text ? y === null : y !== y;
        if (noX || noY) { if (noX !== noY) return noX ? 1 : -1; continue; } // nothing comes last, up or down, as in DuckDB
        if (x !== y) return x < y ? -sign : sign;
      }
      return a - b;
    });
  }

  const count = (n) => n.toLocaleString("en");

  function say() {
    const total = Object.values(meta.status).reduce((a, b) => a + b, 0), first = (page - 1) * PAGE;
    const range = shown.length ? `Rows ${count(first + 1)}–${count(Math.min(first + PAGE, shown.length))} of ${count(shown.length)} that match` : "No row matches";
    const sample = meta.rows < total ? `, a sample of ${count(total)} in the data set` : " in all";
    const still = loaded < meta.rows ? `; loading, ${count(loaded)} are here` : "";
    const summary = $("summary");
    summary.textContent = `${range}; ${count(meta.rows)}${sample}${still}; ${took.toFixed(1)} ms`;
    Object.assign(summary.dataset, { matching: shown.length, loaded, took: took.toFixed(1) });
  }

  // --- showing --------------------------------------------------------------------------------------------------------------

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  /* A text of the data, cut where it is long; controls are made visible. */
  function data(value, limit, className = "") {
    const text = String(value).replace(/[\0-\x08\x0b-\x1f\x7f-\x9f]/g, "\ufffd");
    const span = element("span", { className: `data ${className}`, dir: "auto" });
    if (text.length <= limit) { span.textContent = text; return span; }
    span.textContent = text.slice(0, limit).replace(/[\ud800-\udbff]$/, "") + "…";
    const button = element("button", { type: "button", className: "cut", textContent: `Whole text (${count(text.length)} characters)` });
    button.addEventListener("click", () => { span.textContent = text; button.remove(); });
    const both = document.createDocumentFragment();
    both.append(span, button);
    return both;
  }

  function address(text) {
    try { const url = new URL(text); return /^https?:$/.test(url.protocol) ? url.href : null; } catch { return null; }
  }

  function picture(i, eager) {
    const box = element("div", { className: "picture" });
    const missing = (why) => box.replaceChildren(element("span", { className: "missing", textContent: why }));
    const key = columns.key[i], source = columns.status[i] !== "ok" ? null
      : meta.thumbs && key ? `thumbs/${encodeURIComponent(key.slice(0, 5))}/${encodeURIComponent(key)}.jpg` : address(columns.url[i]);
    if (!source) { missing("no image"); return box; }
    const image = element("img", { alt: "the image of this row", loading: eager ? "eager" : "lazy", decoding: "async", referrerPolicy: "no-referrer" });
    image.addEventListener("error", () => missing(meta.thumbs ? "the image is not here" : "the image could not be loaded: its link may be dead"));
    image.src = source;
    box.append(image);
    return box;
  }

  function link(value, limit) {
    const href = address(value);
    if (!href) return data(value, limit);
    const a = element("a", { href, target: "_blank", rel: "noopener noreferrer nofollow", referrerPolicy: "no-referrer" });
    a.append(data(value.length > limit ? value.slice(0, limit) + "…" : value, Infinity));
    return a;
  }

  function row(i, position) {
    const item = element("li", { className: "row", tabIndex: -1 });
    Object.assign(item.dataset, { position, uid: columns.uid[i] ?? "" });
    const words = element("div", { className: "texts" }), numbers = element("div", { className: "numbers" }), scores = element("div", { className: "scores" });
    const ok = columns.status[i] === "ok";
    const tell = (name, shownText) => words.append(element("div", {}, element("span", { className: "label", textContent: name }), shownText));
    for (const { name } of meta.columns.filter((c) => c.role === "caption")) {
      if (columns[name][i] === null) continue;
      tell(NAMES[name] ?? name, data(columns[name][i], CUT));
    }
    if (!ok && columns.url[i] !== null) tell("url", link(columns.url[i], CUT));
    if (columns.error[i] !== null) tell("error", data(columns.error[i], CUT));
    for (const { name } of meta.columns.filter((c) => c.role === "score")) {
      const value = columns[name][i];
      if (value === null) continue;
      const bar = element("span", { className: "bar" });
      bar.style.setProperty("--share", `${Math.max(0, Math.min(100, 100 * value / (highest[name] || 1)))}%`);
      scores.append(element("div", {}, fact(name, shortly(value)), bar));
    }
    const open = element("button", { type: "button", className: "open", textContent: "Whole row" });
    open.addEventListener("click", () => show(position));
    numbers.append(scores, fact("status", columns.status[i], ok ? "" : "failed"), open);
    item.append(picture(i, false), words, numbers);
    return item;
  }

  function fact(name, value, className = "") {
    const label = element("span", { className: "label" }, ...name.split(/(?<=_)/).flatMap((part) => [part, element("wbr")]));
    return element("div", { className: "fact" }, label, element("span", { className, textContent: value }));
  }

  const shortly = (value) => Number.isInteger(value) ? String(value) : value.toFixed(3);

  function render(pages) {
    const first = (page - 1) * PAGE;
    $("rows-list").replaceChildren(...shown.slice(first, first + PAGE).map((i, k) => row(i, first + k)));
    if ($("rows-list").firstChild) $("rows-list").firstChild.tabIndex = 0;
    $("page-of").textContent = `Page ${count(page)} of ${count(pages)}`;
    $("previous").disabled = page === 1;
    $("next").disabled = page === pages;
    $("direction").disabled = !query.sort;
    $("direction").textContent = query.desc ? "descending" : "ascending";
    $("direction").setAttribute("aria-pressed", String(Boolean(query.desc)));
    for (const button of $("statuses").children) button.setAttribute("aria-pressed", String(button.dataset.status === query.status));
  }

  function show(position) {
    const i = shown[position];
    if (i === undefined) return;
    opened = position;
    const list = element("dl");
    for (const { name, what } of meta.columns) {
      const value = columns[name][i];
      if (value === null) continue;
      const holder = element("dd");
      holder.append(name === "url" ? link(value, CUT_WHOLE) : data(value, CUT_WHOLE, "whole"));
      list.append(element("dt", {}, name, element("span", { className: "label", textContent: what })), holder);
    }
    $("dialog-title").textContent = `Row ${count(position + 1)} of ${count(shown.length)}`;
    $("detail").replaceChildren(picture(i, true), list);
    if (!$("dialog").open) $("dialog").showModal();
    $("dialog").scrollTop = 0;
    query.row = columns.uid[i] ?? "";
    writeAddress();
  }

  // --- hands ----------------------------------------------------------------------------------------------------------------

  function change(values, wait = 0) {
    clearTimeout(change.timer);
    change.timer = setTimeout(() => { Object.assign(query, { page: "1" }, values); run(); }, wait);
  }

  function turn(by) {
    if ((by < 0 ? $("previous") : $("next")).disabled) return;
    query.page = String(page + by);
    run();
    focusRow(0);
    window.scrollTo(0, Math.max(0, $("summary").offsetTop - 60));
  }

  function focusRow(index) {
    const items = $("rows-list").children, item = items[Math.max(0, Math.min(index, items.length - 1))];
    if (!item) return;
    for (const other of items) other.tabIndex = -1;
    item.tabIndex = 0;
    item.focus();
  }

  function keys(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const { key, target } = event, item = target.closest(".row"), typing = target.matches("input, textarea, select");
    if ($("dialog").open) {
      if (key === "ArrowLeft" || key === "ArrowRight") show(opened + (key === "ArrowLeft" ? -1 : 1));
      else return;
    } else if (typing) {
      if (key === "Escape") { if (target === $("search") && target.value) { target.value = ""; change({ q: "" }); } else focusRow(0); }
      else if (key === "ArrowDown" && target === $("search")) focusRow(0);
      else if (key === "Enter" && target === $("value")) $("add").click();
      else if (key === "Enter" && !event.shiftKey && target === $("where")) change({ where: target.value });
      else return;
    } else if (key === "/") { $("search").focus(); $("search").select(); }
    else if (key === "ArrowDown" || key === "ArrowUp") {
      if (target.matches("summary, button") && !item) return;
      const at = item ? [...item.parentNode.children].indexOf(item) : -1;
      focusRow(item ? at + (key === "ArrowDown" ? 1 : -1) : 0);
    } else if (key === "ArrowLeft" || key === "ArrowRight") turn(key === "ArrowLeft" ? -1 : 1);
    else if (key === "Enter" && item === target) show(+item.dataset.position);
    else return;
    event.preventDefault();
  }

  const OPERATORS = {
    text: ["contains", "=", "<>", "like", "is null", "is not null"], number: [">", ">=", "<", "<=", "=", "<>", "is null", "is not null"],
    bool: ["is true", "is false", "is null", "is not null"],
  };

  function offerOperators() {
    $("operator").replaceChildren(...OPERATORS[kinds[$("column").value]].map((name) => element("option", { value: name, textContent: name })));
  }

  function add() {
    const name = $("column").value, operator = $("operator").value, value = $("value").value, kind = kinds[name];
    const column = /^[\p{L}_][\p{L}\p{N}_]*$/u.test(name) ? name : `"${name.replaceAll('"', '""')}"`;
    const literal = kind === "number" ? value.trim() || "0" : `'${value.replaceAll("'", "''")}'`;
    const condition = operator.startsWith("is ") ? (kind === "bool" && !operator.endsWith("null") ? `${column} = ${operator.slice(3)}` : `${column} ${operator}`)
      : operator === "contains" ? `contains(lower(${column}), ${literal.toLowerCase()})` : `${column} ${operator} ${literal}`;
    const [, before, order] = /^(.*?)(\border\s+by\b.*)?$/is.exec($("where").value.trim());
    $("where").value = [before.trim() && /\bor\b/i.test(before) ? `(${before.trim()})` : before.trim(), condition].filter(Boolean).join(" and ") + (order ? ` ${order}` : "");
    $("value").value = "";
    change({ where: $("where").value });
  }

  function wire() {
    const options = () => meta.columns.map(({ name }) => element("option", { value: name, textContent: name }));
    $("sort").replaceChildren(element("option", { value: "", textContent: "as published" }), ...options());
    $("column").replaceChildren(...options());
    offerOperators();
    const total = Object.values(meta.status).reduce((a, b) => a + b, 0);
    $("statuses").replaceChildren(...[["", total], ...Object.entries(meta.status)].map(([status, number]) => {
      const button = element("button", { type: "button", textContent: `${status || "all"} ${count(number)}` });
      button.dataset.status = status;
      button.addEventListener("click", () => change({ status }));
      return button;
    }));
    $("search").addEventListener("input", (event) => change({ q: event.target.value }, 120));
    $("where").addEventListener("input", (event) => change({ where: event.target.value }, 400));
    $("sort").addEventListener("change", (event) => change({ sort: event.target.value }));
    $("direction").addEventListener("click", () => change({ desc: query.desc ? "" : "1" }));
    $("column").addEventListener("change", offerOperators);
    $("add").addEventListener("click", add);
    $("clear").addEventListener("click", () => { $("where").value = $("search").value = ""; $("sort").value = ""; change({ ...EMPTY }); });
    $("tools").addEventListener("submit", (event) => event.preventDefault());
    $("previous").addEventListener("click", () => turn(-1));
    $("next").addEventListener("click", () => turn(1));
    $("close").addEventListener("click", () => $("dialog").close());
    $("dialog").addEventListener("close", () => { query.row = ""; writeAddress(); focusRow(opened - (page - 1) * PAGE); });
    document.addEventListener("keydown", keys);
    window.addEventListener("hashchange", () => { readAddress(); run(); openNamed(); });
  }

  function openNamed() {
    if (!query.row) { if ($("dialog").open) $("dialog").close(); return; }
    const position = shown.findIndex((i) => columns.uid[i] === query.row);
    if (position >= 0) show(position);
  }

  async function start() {
    const began = performance.now();
    meta = await (await fetched("data.json", { cache: "no-cache" })).json();
    for (const { name, kind } of meta.columns) { columns[name] = []; kinds[name] = kind; }
    $("title").textContent = document.title = meta.title;
    $("about").textContent = meta.version;
    $("license").textContent = `Captions and metadata: ${meta.license}. The images belong to their owners.`;
    wire();
    readAddress();
    let coming = meta.chunks ? chunk(0) : null;
    for (let index = 0; index < meta.chunks; index++) {
      const rows = await coming;
      coming = index + 1 < meta.chunks ? chunk(index + 1) : null;
      take(rows);
      if (index === 0) run(); else say();
    }
    if (meta.chunks !== 1) run();
    openNamed();
    document.body.dataset.ready = (performance.now() - began).toFixed(0);
  }

  start().catch((error) => {
    $("summary").textContent = location.protocol === "file:"
      ? "A browser does not load data for a page that was opened as a file. In this folder: python -m http.server, then open http://127.0.0.1:8000"
      : `The rows could not be loaded: ${error.message}`;
  });
})();
