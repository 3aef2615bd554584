// Tables of class "sortable": a click on a heading, or Enter, sorts by its column; the next one turns the order around.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const cell = row.cells[column];
    return "value" in cell.dataset ? Number(cell.dataset.value || -Infinity) : cell.textContent;
  };
  const compare = (a, b) => typeof a === "number" ? a - b || 0 : a.localeCompare(b, "en", { numeric: true });
  headings.forEach((heading, column) => {
    const sort = () => {
      const rows = [...table.tBodies[0].rows];
      const numbers = typeof value(rows[0], column) === "number";
      const before = heading.getAttribute("aria-sort");
      // Figures start with the largest, text with A.
      const down = before ? before === "ascending" : numbers;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      rows.sort((a, b) => compare(value(a, column), value(b, column)) * (down ? -1 : 1));
      table.tBodies[0].append(...rows);
    };
    heading.tabIndex = 0;
    heading.addEventListener("click", sort);
    heading.addEventListener("keydown", (event) => event.key === "Enter" && sort());
  });
}
