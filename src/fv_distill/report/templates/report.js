"use strict";
// Charts: the nearest value under the pointer, or under the arrow keys. All charts of the page show the same step.
(() => {
  const format = (value) => Number(value).toPrecision(4).replace(/(\.\d*?)0+(e|$)/, "$1$2").replace(/\.(e|$)/, "$1");
  const charts = [...document.querySelectorAll("[data-chart]")].map((area) => {
    const { steps, points } = JSON.parse(area.dataset.chart);
    const cursor = area.querySelector(".cursor");
    const tip = area.querySelector(".tip");
    let index = points.length - 1;

    const place = () => (100 * (points[index][0] - steps[0])) / (steps[1] - steps[0]);
    const nearest = (step) => {
      let low = 0;
      let high = points.length - 1;
      while (high - low > 1) {
        const middle = (low + high) >> 1;
        if (points[middle][0] < step) low = middle;
        else high = middle;
      }
      return Math.abs(points[low][0] - step) <= Math.abs(points[high][0] - step) ? low : high;
    };
    const show = () => {
      const [step, average, least, greatest] = points[index];
      const value = least === greatest ? format(least) : `${format(least)} to ${format(greatest)}`;
      tip.textContent = least === average ? `step ${step}: ${value}` : `step ${step}: ${value}\naverage ${format(average)}`;
      cursor.hidden = tip.hidden = false;
      cursor.style.left = `${place()}%`;
      tip.style.left = place() < 50 ? "auto" : "0.25rem";
      tip.style.right = place() < 50 ? "0.25rem" : "auto";
      for (const other of charts) if (other.area !== area) other.point(step);
    };
    const clear = () => {
      for (const other of charts) other.hide();
    };
    area.addEventListener("pointermove", (event) => {
      const box = area.getBoundingClientRect();
      index = nearest(steps[0] + ((event.clientX - box.left) / box.width) * (steps[1] - steps[0]));
      show();
    });
    area.addEventListener("pointerleave", clear);
    area.addEventListener("blur", clear);
    area.addEventListener("focus", () => area.matches(":focus-visible") && show());
    area.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -points.length, End: points.length };
      if (!(event.key in moves)) return;
      index = Math.min(points.length - 1, Math.max(0, index + moves[event.key]));
      event.preventDefault();
      show();
    });
    return {
      area,
      point: (step) => {
        index = nearest(step);
        cursor.hidden = step < steps[0] || step > steps[1];
        tip.hidden = true;
        cursor.style.left = `${place()}%`;
      },
      hide: () => {
        cursor.hidden = tip.hidden = true;
      },
    };
  });
})();

// Maps of loss by noise level: the cell under the pointer, or under the arrow keys.
for (const area of document.querySelectorAll("[data-map]")) {
  const { bins, columns, loss, count } = JSON.parse(area.dataset.map);
  const cell = area.querySelector(".cell");
  const tip = area.querySelector(".tip");
  let x = columns.length - 1;
  let y = bins - 1;
  const show = () => {
    const value = loss[x][y] === null ? "no sample" : `loss ${loss[x][y]}`;
    tip.textContent = `steps ${columns[x].join(" to ")}, sigma ${(y / bins).toFixed(1)} to ${((y + 1) / bins).toFixed(1)}\n` +
      `${value}, ${count[x][y]} samples`;
    cell.hidden = tip.hidden = false;
    cell.style.left = `${(100 * x) / columns.length}%`;
    cell.style.top = `${(100 * (bins - 1 - y)) / bins}%`;
    cell.style.width = `${100 / columns.length}%`;
    cell.style.height = `${100 / bins}%`;
    tip.style.left = x < columns.length / 2 ? "auto" : "0.25rem";
    tip.style.right = x < columns.length / 2 ? "0.25rem" : "auto";
  };
  const hide = () => {
    cell.hidden = tip.hidden = true;
  };
  const within = (value, length) => Math.min(length - 1, Math.max(0, value));
  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    x = within(Math.floor(((event.clientX - box.left) / box.width) * columns.length), columns.length);
    y = within(bins - 1 - Math.floor(((event.clientY - box.top) / box.height) * bins), bins);
    show();
  });
  area.addEventListener("pointerleave", hide);
  area.addEventListener("blur", hide);
  area.addEventListener("focus", () => area.matches(":focus-visible") && show());
  area.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    if (!(event.key in moves)) return;
    x = within(x + moves[event.key][0], columns.length);
    y = within(y + moves[event.key][1], bins);
    event.preventDefault();
    show();
  });
}

// Validation: one step at a time, the newest first; all of them where scripts don't run.
for (const gallery of document.querySelectorAll(".gallery")) {
  const steps = [...gallery.querySelectorAll(".validation")];
  const slider = gallery.querySelector("input");
  const [earlier, later] = gallery.querySelectorAll("button");
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const show = () => {
    steps.forEach((step, index) => {
      step.hidden = index !== Number(slider.value);
      for (const video of step.querySelectorAll("video")) {
        // A browser may refuse to play by itself; the controls are there.
        if (step.hidden || still) video.pause();
        else video.play().catch(() => {});
      }
    });
    gallery.querySelector("output").textContent = `step ${steps[slider.value].dataset.step}`;
    earlier.disabled = Number(slider.value) === 0;
    later.disabled = Number(slider.value) === steps.length - 1;
  };
  const move = (by) => {
    slider.value = Number(slider.value) + by;
    show();
  };
  slider.addEventListener("input", show);
  earlier.addEventListener("click", () => move(-1));
  later.addEventListener("click", () => move(1));
  gallery.querySelector(".slider").hidden = steps.length < 2;
  gallery.querySelectorAll("h4").forEach((heading) => {
    heading.hidden = steps.length > 1;
  });
  show();
}
