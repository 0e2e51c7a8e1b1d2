"use strict";
const made = (name, properties) => Object.assign(document.createElement(name), properties);
const caption = (table) => table.caption.textContent.trim();

function sortable(table) {
  const body = table.tBodies[0];
  const key = (row, column) => {
    const cell = row.cells[column];
    return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
  };
  const compare = (a, b) => {
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return typeof a === "number" ? (a === b ? 0 : a - b) : a.localeCompare(b, "en", { numeric: true });
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = made("button", { type: "button" });
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sorted = [...body.rows].sort((a, b) => (down ? -1 : 1) * compare(key(a, column), key(b, column)));
      body.append(...sorted);
    });
  });
}

function filter(table) {
  const rows = [...table.tBodies[0].rows];
  const input = made("input", { type: "search", placeholder: "filter rows" });
  const count = made("span", { textContent: `${rows.length} rows` });
  input.setAttribute("aria-label", `Filter the rows of: ${caption(table)}`);
  count.setAttribute("role", "status");
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  });
  return [input, count];
}

/* As reporting/tables.py writes it: numbers as they were measured, and no text that a spreadsheet takes for a formula. */
function csv(table) {
  const field = (cell) => {
    if ("value" in cell.dataset) return cell.dataset.value;
    const text = cell.textContent.trim();
    const safe = /^[=+\-@]/.test(text) ? `'${text}` : text;
    return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  return [...table.rows].filter((row) => !row.hidden).map((row) => [...row.cells].map(field).join(",") + "\r\n").join("");
}

function download(table) {
  const button = made("button", { type: "button", textContent: "CSV" });
  button.setAttribute("aria-label", `Download as CSV: ${caption(table)}`);
  button.addEventListener("click", () => {
    const href = URL.createObjectURL(new Blob([csv(table)], { type: "text/csv;charset=utf-8" }));
    const name = caption(table).toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 60);
    made("a", { href, download: `${name || "table"}.csv` }).click();
    setTimeout(() => URL.revokeObjectURL(href), 60000);
  });
  return button;
}

for (const table of document.querySelectorAll("table")) {
  const tools = made("div", { className: "tools" });
  if ("sortable" in table.dataset) sortable(table);
  if ("long" in table.dataset) tools.append(...filter(table));
  tools.append(download(table));
  table.closest(".wide").before(tools);
}
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
