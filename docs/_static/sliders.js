/* Sliders for a temperature and for logits, and bars for their softmax: a `div.sliders` whose data-logits and
   data-temperature say where to begin. What stands in it is for readers without JavaScript. The address of the page
   keeps the state, as in sliders.html#T=0.5&x=1,2,3. */

"use strict";

/* The stable softmax: the maximum is subtracted before the division. At T = 0 that gives the limit, since what lies below
   the maximum becomes exp(-Infinity); only the maxima themselves, which would be 0 / 0, are told apart. */
function softmax(logits, temperature) {
  const top = Math.max(...logits);
  const terms = logits.map((x) => (x === top ? 1 : Math.exp((x - top) / temperature)));
  const total = terms.reduce((a, b) => a + b, 0);
  return terms.map((term) => term / total);
}

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function slider(name, label, min, max, step, value) {
  const input = element("input", { type: "range", "aria-label": label, min, max, step, value });
  const shown = element("output", { class: "value" });
  return { input, shown, row: element("div", { class: "row" }, element("span", {}, name), input, shown) };
}

function finiteNumbers(text) {
  return text.split(/[\s,]+/).map(Number).filter(Number.isFinite);
}

function begin(place) {
  const asked = new URLSearchParams(location.hash.slice(1));
  const given = finiteNumbers(asked.get("x") ?? place.dataset.logits);
  const first = finiteNumbers(asked.get("T") ?? place.dataset.temperature ?? "1")[0] ?? 1;

  const temperature = slider("T", "temperature", 0, 5, 0.05, first);
  const logits = given.map((x, i) => slider(`x${i + 1}`, `logit ${i + 1}`, -5, 5, 0.1, x));
  for (const { row } of logits) {
    const bar = element("div", { class: "bar" }, element("div"));
    row.append(bar, element("output", { class: "probability" }));
  }

  function show() {
    const values = logits.map(({ input }) => Number(input.value));
    const T = Number(temperature.input.value);
    temperature.shown.textContent = T.toFixed(2);
    softmax(values, T).forEach((p, i) => {
      const { row, shown } = logits[i];
      shown.textContent = values[i].toFixed(1);
      row.querySelector(".bar > div").style.width = `${100 * p}%`;
      row.querySelector(".probability").textContent = p.toFixed(4);
    });
    return `#T=${T}&x=${values}`;
  }

  place.replaceChildren(temperature.row, ...logits.map(({ row }) => row));
  place.addEventListener("input", () => history.replaceState(null, "", show()));
  show();
}

document.querySelectorAll("div.sliders").forEach(begin);
