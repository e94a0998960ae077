"use strict";
// Corpus text reaches the page only as text nodes and attribute values, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("viewer-data").textContent);
  const find = (name) => document.getElementById(`viewer-${name}`);
  const [text, panel, picker, runs] = ["text", "panel", "documents", "runs"].map(find);
  const wide = window.matchMedia("(min-width: 60rem)");
  const state = { document: 0, run: 0, position: 0, open: false };

  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children);
    return element;
  }

  function passage(words) {
    const parts = words.split("\n");
    return parts.flatMap((part, i) => (i ? [make("span", { class: "sign" }, "↵"), "\n", part] : [part]));
  }

  const token = (words) => words.replaceAll("\n", "↵").replaceAll(" ", "␣");
  const known = (value) => value !== null && value !== undefined;
  const figure = (value, digits = 3) => (known(value) ? value.toFixed(digits).replace("-", "−") : "–");
  const signed = (value) => (known(value) && value > 0 ? "+" : "") + figure(value);
  const percent = (chance) => (chance >= 0.0005 ? `${(100 * chance).toFixed(1)} %` : "< 0.1 %");
  const direction = (value) => (known(value) && value !== 0 ? (value > 0 ? "up" : "down") : "");
  const arrow = (value) => ({ up: "▲", down: "▼" })[direction(value)] ?? "■";

  const chosen = () => data.documents[state.document];
  const version = () => chosen().versions[state.run];
  const position = () => version().positions[state.position];
  const buttons = () => [...text.querySelectorAll("[role=button]")];

  function meaning(one) {
    if (!known(one.gain)) return "gain not measured";
    return `gain ${signed(one.gain)} nats, thoughts ${one.gain > 0 ? "help" : "hurt"}`;
  }

  function renderToken(words, one, number) {
    if (!one) return make("span", {}, ...passage(words));
    const mark = make("span", {
      class: `measured ${direction(one.gain)}`, role: "button", tabindex: "-1",
      "aria-expanded": "false", "aria-controls": "viewer-panel",
      "aria-label": `${token(words)}, ${meaning(one)}, position ${number + 1} of ${version().positions.length}`,
      title: known(one.gain) ? `gain ${signed(one.gain)} nats` : "gain not measured",
    }, ...passage(words));
    mark.style.setProperty("--strength", known(one.gain) ? Math.min(1, Math.abs(one.gain) / data.limit).toFixed(3) : "0");
    mark.addEventListener("click", () => choose(number, !(state.open && state.position === number), true));
    return mark;
  }

  function renderText() {
    const { tokens, positions, spaced } = version();
    const numbers = new Map(positions.map((one, number) => [one.at, number]));
    const nodes = tokens.map((words, at) => renderToken(words, positions[numbers.get(at)], numbers.get(at)));
    text.replaceChildren(...(spaced ? nodes.flatMap((node) => [node, " "]) : nodes));
    text.tabIndex = positions.length ? -1 : 0;
    text.setAttribute("aria-label", `${chosen().title}: ${positions.length} measured positions in ${tokens.length} tokens`);
  }

  function bar(words, chance, before, hit) {
    const track = make("span", { class: "track", "aria-hidden": "true" }, make("span", { class: "fill" }));
    track.firstChild.style.width = `${100 * chance}%`;
    if (known(before)) {
      track.append(make("span", { class: "before" }));
      track.lastChild.style.left = `${100 * before}%`;
    }
    const name = hit ? make("mark", { title: "the true next token" }, token(words)) : token(words);
    return make("li", { class: hit ? "hit" : null }, make("span", { class: "name" }, name), track,
      make("span", { class: "chance" }, percent(chance)));
  }

  function bars(top, target, logp, before) {
    const rows = top.some(([words]) => words === target) || !known(logp) ? top : [...top, [target, Math.exp(logp)]];
    return make("ol", { class: "bars" },
      ...rows.map(([words, chance]) => bar(words, chance, before?.get(words), words === target)));
  }

  function renderThought(thought, one, strongest, first) {
    const before = new Map(one.top);
    if (known(one.nothink)) before.set(one.target, Math.exp(one.nothink));
    const figures = [
      make("strong", {}, `${arrow(thought.advantage)} advantage ${signed(thought.advantage)}`),
      make("span", {}, `reward ${signed(thought.reward)}`),
      make("span", {}, `log p ${figure(thought.evidence)}`),
      make("span", {}, `${thought.length ?? "?"} tokens`),
      make("span", {}, thought.closed ? "closed" : "✂ truncated"),
    ];
    const item = make("li", { class: `thought ${direction(thought.advantage)}` },
      make("p", { class: "figures" }, ...figures),
      make("p", { class: "passage", dir: "auto" }, ...passage(thought.text)));
    if (thought.top.length) {
      item.append(make("details", { open: first }, make("summary", {}, "Prediction after this thought (line: without)"),
        bars(thought.top, one.target, thought.evidence, before)));
    }
    item.style.setProperty("--strength", strongest ? Math.abs(thought.advantage ?? 0) / strongest : 0);
    return item;
  }

  function button(label, sign, action, disabled) {
    const element = make("button", { type: "button", "aria-label": label, title: label, disabled }, sign);
    element.addEventListener("click", action);
    return element;
  }

  function renderPanel() {
    panel.hidden = !state.open;
    if (!state.open) return;
    const one = position();
    const last = version().positions.length - 1;
    const count = one.thoughts.length;
    const strongest = Math.max(0, ...one.thoughts.map((thought) => Math.abs(thought.advantage ?? 0)));
    const after = known(one.gain) ? `${figure(one.nothink + one.gain)}` : "–";
    panel.replaceChildren(
      make("div", { class: "panel-head" },
        make("h3", { "aria-live": "polite" }, make("mark", { title: "the true next token" }, token(one.target)),
          make("span", { class: direction(one.gain) === "down" ? "worse" : "better" }, ` ${arrow(one.gain)} ${signed(one.gain)} nats`)),
        button("Previous position", "←", () => step(-1), state.position === 0),
        button("Next position", "→", () => step(1), state.position === last),
        button("Close", "✕", close, false)),
      make("p", { class: "soft" }, `${last ? `Position ${state.position + 1} of ${last + 1}. ` : ""}Its log p is ` +
        `${figure(one.nothink)} without a thought and ${after} after one, on average; the difference is the gain.`),
      ...(one.top.length
        ? [make("h4", {}, "Prediction without a thought"), bars(one.top, one.target, one.nothink)]
        : []),
      make("h4", {}, count ? `${count} thought${count > 1 ? "s, best reward first" : ""}` : "No thoughts here"),
      make("ol", { class: "thoughts" },
        ...one.thoughts.map((thought, i) => renderThought(thought, one, strongest, i === 0))));
    panel.scrollTop = 0;
  }

  function highlight() {
    buttons().forEach((element, number) => {
      const here = number === state.position;
      element.tabIndex = here ? 0 : -1;
      element.classList.toggle("chosen", here && state.open);
      element.setAttribute("aria-expanded", String(here && state.open));
    });
  }

  function remember() {
    const parts = [state.document, state.run, version().positions.length ? position().at : 0];
    history.replaceState(history.state, "", `#viewer/${parts.join("/")}${state.open ? "/open" : ""}`);
  }

  function choose(number, open, focus) {
    state.position = number;
    state.open = open && version().positions.length > 0;
    highlight();
    renderPanel();
    if (focus) {
      const element = buttons()[number] ?? text;
      element.focus({ preventScroll: true });
      element.scrollIntoView({ block: "nearest" });
    }
    remember();
  }

  // The position at a token, or the measured one nearest to it.
  function nearest(at) {
    const distances = version().positions.map((one) => Math.abs(one.at - at));
    return Math.max(0, distances.indexOf(Math.min(...distances)));
  }

  function strongestPosition() {
    const sizes = version().positions.map((one) => Math.abs(one.gain ?? 0));
    return Math.max(0, sizes.indexOf(Math.max(...sizes)));
  }

  function show(number, run, at) {
    state.document = Math.max(0, Math.min(number, data.documents.length - 1));
    const having = Object.keys(chosen().versions).map(Number);
    state.run = having.includes(run) ? run : having[0];
    picker.value = String(state.document);
    find("previous").disabled = state.document === 0;
    find("next").disabled = state.document === data.documents.length - 1;
    for (const input of runs.querySelectorAll("input")) {
      input.disabled = !having.includes(Number(input.value));
      input.checked = Number(input.value) === state.run;
    }
    const model = data.runs[state.run].model;
    const logged = data.runs.some((one) => one.model) ? "Positions logged during training." : "";
    find("model").textContent = model ? `Measured with the model ${model}.` : logged;
    renderText();
    state.position = known(at) ? nearest(at) : strongestPosition();
  }

  function turn(by) {
    const number = state.document + by;
    if (number < 0 || number >= data.documents.length) return false;
    show(number, state.run);
    return true;
  }

  function step(by) {
    const number = Math.max(0, Math.min(state.position + by, version().positions.length - 1));
    const inside = panel.contains(document.activeElement);
    const label = inside ? document.activeElement.getAttribute("aria-label") : null;
    choose(number, state.open, !inside);
    if (inside) {
      const again = [...panel.querySelectorAll("button")].find((one) => one.getAttribute("aria-label") === label);
      (again && !again.disabled ? again : panel).focus({ preventScroll: true });
      buttons()[number].scrollIntoView({ block: "nearest" });
    }
  }

  function close() {
    choose(state.position, false, true);
  }

  const last = () => version().positions.length - 1;
  const keys = {
    ArrowLeft: () => step(-1),
    ArrowRight: () => step(1),
    ArrowUp: () => turn(-1) && choose(state.position, state.open, true),
    ArrowDown: () => turn(1) && choose(state.position, state.open, true),
    Home: () => choose(0, state.open, true),
    End: () => choose(last(), state.open, true),
    Enter: () => choose(state.position, !state.open, true),
    " ": () => choose(state.position, !state.open, true),
    Escape: close,
  };

  text.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || !keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  panel.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
  });

  function fillPicker() {
    const groups = new Map();
    data.documents.forEach((one, number) => {
      const group = groups.get(one.domain) ?? groups.set(one.domain, []).get(one.domain);
      group.push(make("option", { value: number }, one.title));
    });
    for (const [domain, options] of groups) {
      picker.append(...(known(domain) && groups.size > 1 ? [make("optgroup", { label: domain }, ...options)] : options));
    }
    picker.addEventListener("change", () => {
      show(Number(picker.value), state.run);
      choose(state.position, state.open, false);
    });
    find("previous").addEventListener("click", () => turn(-1) && choose(state.position, state.open, false));
    find("next").addEventListener("click", () => turn(1) && choose(state.position, state.open, false));
  }

  function fillRuns() {
    runs.hidden = data.runs.length < 2;
    data.runs.forEach((run, number) => {
      const input = make("input", { type: "radio", name: "viewer-run", value: number });
      input.addEventListener("change", () => {
        show(state.document, number, version().positions.length ? position().at : undefined);
        choose(state.position, state.open, false);
      });
      runs.append(make("label", {}, input, run.name));
    });
  }

  function fromAddress() {
    const match = /^#viewer\/(\d+)\/(\d+)\/(\d+)(\/open)?$/.exec(window.location.hash);
    if (!match) return false;
    show(Number(match[1]), Number(match[2]), Number(match[3]));
    find("title").scrollIntoView();
    choose(state.position, Boolean(match[4]), true);
    return true;
  }

  find("low").textContent = `≤ −${data.limit} nats`;
  find("high").textContent = `≥ +${data.limit} nats`;
  fillPicker();
  fillRuns();
  for (const element of document.querySelectorAll("#viewer, #viewer-link")) element.hidden = false;
  for (const element of document.querySelectorAll("details.step")) element.open = false;
  window.addEventListener("hashchange", fromAddress);
  if (!fromAddress()) {
    show(0, 0);
    state.open = wide.matches && version().positions.length > 0;
    highlight();
    renderPanel();
  }
})();
