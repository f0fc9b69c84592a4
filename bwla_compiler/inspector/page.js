"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const reduced = matchMedia("(prefers-reduced-motion: reduce)").matches;

  // One linear: its card, wherever it is chosen.
  const held = document.getElementById("cards");
  const cards = held ? JSON.parse(held.textContent) : {};
  const select = document.getElementById("choose-linear");
  const show = (name, scroll) => {
    if (!(name in cards)) return;
    document.getElementById("card").innerHTML = cards[name];
    if (select) select.value = name;
    all("[data-linear]").forEach((e) => e.classList.toggle("chosen", e.dataset.linear === name));
    if (scroll) select.closest("section").scrollIntoView({ behavior: reduced ? "auto" : "smooth" });
  };
  if (select) {
    select.addEventListener("change", () => show(select.value, false));
    show(select.value, false);
  }
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-linear]");
    if (!link || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    show(link.dataset.linear, true);
  });

  // Chains: a button lights up all that lives in one basis, and lists who writes and reads it.
  const light = (section, chain) => {
    const flow = section.querySelector(".flow");
    flow.classList.toggle("lighting", chain !== "");
    all("[data-chain]", flow).forEach((e) =>
      e.classList.toggle("lit", chain !== "" && e.dataset.chain.split(" ").includes(chain)));
    all("[data-light]", section).forEach((b) =>
      b.setAttribute("aria-pressed", String(chain !== "" && b.dataset.light === chain)));
  };
  all("[data-light]").forEach((button) => button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") === "true";
    light(button.closest("section"), on ? "" : button.dataset.light);
  }));
  all(".flow [data-chain]").forEach((e) => {
    if (e.closest("a")) return;
    e.addEventListener("click", () => light(e.closest("section"), e.dataset.chain.split(" ")[0]));
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") all("section").filter((s) => s.querySelector(".lighting")).forEach((s) => light(s, ""));
  });

  // The picture: zoom and pan by moving its viewBox.
  all(".canvas").forEach((canvas) => {
    const flow = canvas.querySelector("svg");
    const whole = flow.getAttribute("viewBox").split(" ").map(Number);
    let box = [...whole];
    const draw = () => {
      flow.setAttribute("viewBox", box.map((n) => n.toFixed(1)).join(" "));
      canvas.classList.toggle("zoomed", box[2] < whole[2] - 1);
    };
    const clamp = () => {
      for (const i of [0, 1]) box[i] = Math.min(Math.max(box[i], whole[i]), whole[i] + whole[i + 2] - box[i + 2]);
    };
    const zoom = (factor, x = 0.5, y = 0.5) => {
      const width = Math.min(whole[2], Math.max(whole[2] / 8, box[2] * factor));
      const height = width * whole[3] / whole[2];
      box = [box[0] + (box[2] - width) * x, box[1] + (box[3] - height) * y, width, height];
      clamp();
      draw();
    };
    const move = (dx, dy) => { box[0] += dx * box[2]; box[1] += dy * box[3]; clamp(); draw(); };
    const actions = { in: () => zoom(0.7), out: () => zoom(1 / 0.7), fit: () => { box = [...whole]; draw(); } };
    all("[data-zoom]", canvas).forEach((b) => b.addEventListener("click", () => actions[b.dataset.zoom]()));
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !canvas.classList.contains("zoomed")) return;  // else the page scrolls
      event.preventDefault();
      const r = flow.getBoundingClientRect();
      zoom(event.deltaY < 0 ? 0.85 : 1 / 0.85, (event.clientX - r.left) / r.width, (event.clientY - r.top) / r.height);
    }, { passive: false });
    const keys = { "+": actions.in, "=": actions.in, "-": actions.out, "0": actions.fit, ArrowLeft: () => move(-0.1, 0),
      ArrowRight: () => move(0.1, 0), ArrowUp: () => move(0, -0.1), ArrowDown: () => move(0, 0.1) };
    canvas.addEventListener("keydown", (event) => {
      const arrow = event.key.startsWith("Arrow");
      if (event.target !== canvas || !keys[event.key] || event.ctrlKey || (arrow && !canvas.classList.contains("zoomed"))) return;
      event.preventDefault();
      keys[event.key]();
    });
    let from = null;
    flow.addEventListener("pointerdown", (event) => {
      if (canvas.classList.contains("zoomed")) from = { x: event.clientX, y: event.clientY, box: [...box], moved: false };
    });
    addEventListener("pointermove", (event) => {
      if (!from) return;
      const r = flow.getBoundingClientRect();
      const [dx, dy] = [event.clientX - from.x, event.clientY - from.y];
      from.moved = from.moved || Math.hypot(dx, dy) > 4;
      box = [from.box[0] - dx * box[2] / r.width, from.box[1] - dy * box[3] / r.height, box[2], box[3]];
      clamp();
      draw();
    });
    addEventListener("pointerup", () => { setTimeout(() => { from = null; }, 0); });
    flow.addEventListener("click", (event) => {
      if (from && from.moved) { event.preventDefault(); event.stopPropagation(); }
    }, true);
  });

  // The map: one tab stop, arrows move between cells.
  all("table.map").forEach((map) => {
    const cells = all("tbody tr", map).map((tr) => all("td", tr).map((td) => td.querySelector("a")));
    const first = cells.flat().find(Boolean);
    if (first) first.tabIndex = 0;
    map.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      const y = cells.findIndex((line) => line.includes(document.activeElement));
      if (!step || y < 0) return;
      event.preventDefault();
      const next = (cells[y + step[0]] || [])[cells[y].indexOf(document.activeElement) + step[1]];
      if (!next) return;
      document.activeElement.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  });

  // Costs: one device at a time.
  const device = document.getElementById("choose-device");
  if (device) device.addEventListener("change", () =>
    all(".panel").forEach((panel) => { panel.hidden = panel.dataset.device !== device.value; }));
})();
