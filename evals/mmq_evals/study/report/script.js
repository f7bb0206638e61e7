"use strict";
document.querySelectorAll("table[data-sortable]").forEach((table) => {
  const heads = table.tHead.rows[0].cells;
  Array.from(heads).forEach((head, column) => {
    head.dataset.sort = "";
    head.tabIndex = 0;
    const sort = () => {
      const down = head.dataset.sort !== "down";
      Array.from(heads).forEach((other) => { other.dataset.sort = ""; other.removeAttribute("aria-sort"); });
      head.dataset.sort = down ? "down" : "up";
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].textContent.replace(/\u2212/g, "-").replace(/,/g, "");
      const body = table.tBodies[0];
      const rows = Array.from(body.rows).map((row) => [key(row), row]);
      rows.sort(([a], [b]) => {
        const x = parseFloat(a), y = parseFloat(b);
        const order = isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) || a.localeCompare(b) : x - y;
        return down ? -order : order;
      });
      rows.forEach(([, row]) => body.appendChild(row));
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
});
const button = document.getElementById("theme");
button.hidden = false;
button.addEventListener("click", () => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = root.dataset.theme || (dark ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
});
