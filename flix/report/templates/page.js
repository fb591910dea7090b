"use strict";
(() => {
  const data = (id) => JSON.parse(document.getElementById(id).textContent);
  const make = (name, text, more) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    return Object.assign(made, more || {});
  };

  // The cosines of a layer: one signed byte a square, in hundredths; -128 where an update is 0.
  for (const choice of document.querySelectorAll("select[data-cosines]")) {
    const layers = data(choice.dataset.cosines);
    const tables = document.querySelectorAll(`table[data-of="${choice.dataset.cosines}"]`);
    const show = () => tables.forEach((table, number) => {
      const bytes = atob(layers[number].values[Number(choice.value)]);
      const { own, most } = layers[number];
      const across = table.rows[0].cells.length - 1;
      table.querySelectorAll("tbody td").forEach((square, place) => {
        const itself = own && place % (across + 1) === 0;
        const code = bytes.charCodeAt(place);
        const value = code > 127 ? code - 256 : code;
        const known = value !== -128;
        const heat = Math.max(-100, Math.min(100, Math.round(100 * value / most)));
        square.textContent = known ? String(value).replace("-", "−") : "–";
        square.style.setProperty("--v", known && !itself ? heat : 0);
      });
    });
    choice.addEventListener("change", show);
  }

  for (const form of document.querySelectorAll("form[data-examples]")) {
    const { cells, examples } = data(form.dataset.examples);
    const list = form.parentElement.querySelector("ol.examples");
    const count = form.parentElement.querySelector(".count");
    const more = form.parentElement.querySelector("button.more");
    let limit = 20;
    const matches = () => {
      const wanted = form.elements.words.value.toLocaleLowerCase();
      const [row, column, answer] = [form.elements.row, form.elements.column, form.elements.answer]
        .map((field) => (field ? field.value : ""));
      return examples.filter(([cell, source, target, output, right]) =>
        (!row || cells[cell][1] === row) && (!column || cells[cell][2] === column) &&
        (!answer || String(right) === answer) &&
        (!wanted || `${source}\n${target}\n${output}`.toLocaleLowerCase().includes(wanted)));
    };
    const entry = ([cell, source, target, output, right]) => {
      const item = make("li");
      const [word, style] = [["wrong", "bad"], ["right", "good"], ["not judged", "soft"]][right];
      const head = make("div");
      head.append(make("bdi", cells[cell][0]), " ", make("span", word, { className: style }));
      const parts = make("dl");
      for (const [name, text] of [["source", source], ["expected", target], ["answer", output]]) {
        parts.append(make("dt", name), make("dd", text || "(nothing)", { dir: "auto" }));
      }
      item.append(head, parts);
      return item;
    };
    const show = () => {
      const found = matches();
      list.replaceChildren(...found.slice(0, limit).map(entry));
      count.textContent = `${Math.min(limit, found.length)} of ${found.length} examples`;
      more.hidden = found.length <= limit;
    };
    form.addEventListener("input", () => { limit = 20; show(); });
    form.addEventListener("submit", (event) => event.preventDefault());
    more.addEventListener("click", () => { limit += 50; show(); });
    show();
  }

  // What is folded would be missing on paper.
  addEventListener("beforeprint", () => {
    for (const fold of document.querySelectorAll("details:not([open]):not(.long)")) {
      fold.open = true;
      addEventListener("afterprint", () => { fold.open = false; }, { once: true });
    }
  });
})();
