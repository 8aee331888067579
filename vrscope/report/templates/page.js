"use strict";
(() => {
  const payload = JSON.parse(document.getElementById("payload").textContent);
  const FIRST_ROWS = 100;
  const MORE_ROWS = 400;
  const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
  const superscript = (text) => [...text].map((c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[+c])).join("");

  function say(x, whole) {
    if (x === null) return "–";
    if (x === 0) return "0";
    const size = Math.abs(x);
    let text;
    if (whole && size < 1e15) text = x.toLocaleString("en-US");
    else if (size < 1e-3 || size >= 1e6) {
      const [mantissa, exponent] = x.toExponential(2).split("e");
      text = `${mantissa}×10${superscript(String(Number(exponent)))}`;
    } else {
      const places = Math.max(0, 3 - Math.floor(Math.log10(size)));
      text = x.toLocaleString("en-US", { minimumFractionDigits: places, maximumFractionDigits: places });
    }
    return text.replaceAll("-", "−");
  }

  function explore(root) {
    const { columns, count, search } = payload[root.dataset.key];
    const table = root.querySelector("table");
    const body = table.tBodies[0];
    const headers = [...table.tHead.rows[0].cells];
    const more = root.querySelector(".more");
    const status = root.querySelector(".count");
    const words = Array.from({ length: count }, (_, row) =>
      search.map((k) => columns[k].text[columns[k].rows[row]]).join("\n").toLowerCase());
    let order = Array.from({ length: count }, (_, row) => row);
    let query = "";
    let limit = FIRST_ROWS;
    let matching = order;

    function ranks(column) {
      // Texts sort by their place among the distinct texts, so that each is compared once.
      if (!column.text) return column.rows;
      if (!column.ranks) {
        const places = column.text.map((_, k) => k).sort((a, b) => collator.compare(column.text[a], column.text[b]));
        const rank = [];
        places.forEach((k, place) => { rank[k] = place; });
        column.ranks = column.rows.map((k) => rank[k]);
      }
      return column.ranks;
    }

    function cell(column, row) {
      const element = document.createElement(column.name ? "th" : "td");
      const value = column.rows[row];
      element.textContent = column.text ? column.text[value] || "–" : say(value, column.whole);
      if (column.name) {
        element.scope = "row";
        element.replaceChildren(...column.text[value].split(/(?<=\.)/).flatMap((part) => [part, document.createElement("wbr")]));
      }
      const looks = [column.text ? (column.name ? "name" : "") : "num", column.extra ? "extra" : "",
        column.warn && value > 0 ? "bad" : "", element.textContent.length > 24 ? "long" : ""];
      element.className = looks.filter(Boolean).join(" ");
      return element;
    }

    function fill(from) {
      const rows = document.createDocumentFragment();
      for (const row of matching.slice(from, limit)) {
        const line = document.createElement("tr");
        for (const column of columns) line.append(cell(column, row));
        rows.append(line);
      }
      if (from === 0) body.replaceChildren(rows);
      else body.append(rows);
      const shown = Math.min(limit, matching.length);
      const all = query ? `${say(matching.length, true)} matching, ${say(count, true)} in all` : say(count, true);
      status.textContent = `Showing ${say(shown, true)} of ${all}`;
      more.hidden = shown >= matching.length;
    }

    function refresh() {
      matching = query ? order.filter((row) => words[row].includes(query)) : order;
      limit = FIRST_ROWS;
      fill(0);
    }

    function sort(k) {
      const column = columns[k];
      const before = headers[k].getAttribute("aria-sort");
      const up = before ? before === "descending" : Boolean(column.text);
      const keys = ranks(column);
      order = order.slice().sort((a, b) => {
        const x = keys[a];
        const y = keys[b];
        if (x === null || y === null) return (x === null) - (y === null);
        return up ? x - y : y - x;
      });
      headers.forEach((header) => header.removeAttribute("aria-sort"));
      headers[k].setAttribute("aria-sort", up ? "ascending" : "descending");
      refresh();
    }

    headers.forEach((header, k) => header.querySelector("button").addEventListener("click", () => sort(k)));
    root.querySelector("input[type=search]").addEventListener("input", (event) => {
      query = event.target.value.trim().toLowerCase();
      refresh();
    });
    root.querySelector("input[type=checkbox]").addEventListener("change", (event) => {
      table.classList.toggle("brief", !event.target.checked);
    });
    more.querySelector("button").addEventListener("click", () => {
      const from = limit;
      limit += MORE_ROWS;
      fill(from);
    });
    refresh();
  }

  function point(figure) {
    const { title, box, rows, columns, values } = payload.maps[figure.dataset.map];
    const drawing = figure.querySelector("svg");
    const tip = document.getElementById("tip");
    const [left, top, width, height] = box;
    drawing.addEventListener("pointermove", (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.getScreenCTM().inverse());
      const column = Math.floor(((at.x - left) / width) * columns.length);
      const row = Math.floor(((at.y - top) / height) * rows.length);
      const value = values[row]?.[column];
      tip.hidden = value === undefined || value === null;
      if (tip.hidden) return;
      tip.textContent = `Layer ${columns[column]}, ${rows[row]}\n${title}: ${say(value, false)}`;
      const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
      tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, room))}px`;
      tip.style.top = `${event.clientY + 18}px`;
    });
    drawing.addEventListener("pointerleave", () => { tip.hidden = true; });
  }

  document.querySelectorAll(".explorer").forEach(explore);
  document.querySelectorAll("[data-map]").forEach(point);
})();
