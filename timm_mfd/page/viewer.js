"use strict";
// The viewer: a state of three choices, and one function that draws it.
{
  const data = JSON.parse(document.getElementById("data").textContent);
  const FIRST = 64;
  // Of each panel: "first", "group N" or "like CHANNEL".
  const state = { image: 0, stage: 0, choice: data.models.map(() => "first") };

  const correlations = new Map(); // decoded when first needed
  function correlation(stage, a, b) {
    if (!correlations.has(stage)) {
      const bytes = Uint8Array.from(atob(stage.r), (letter) => letter.charCodeAt(0));
      correlations.set(stage, new DataView(bytes.buffer));
    }
    const index = stage.channels.indexOf(a) * stage.channels.length + stage.channels.indexOf(b);
    return correlations.get(stage).getInt16(2 * index, true) / 1000;
  }

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function letterOf(group) {
    return (group >= 26 ? letterOf(Math.floor(group / 26) - 1) : "") + "abcdefghijklmnopqrstuvwxyz"[group % 26];
  }

  function choose(change) {
    Object.assign(state, change);
    draw();
  }

  // The channels in view, in order, and what is said about them.
  function selection(stage, choice) {
    const [kind, number] = [choice.split(" ")[0], Number(choice.split(" ")[1])];
    if (kind === "group") {
      const group = stage.groups[number];
      const members = group.filter((channel) => stage.channels.includes(channel)).slice(0, FIRST);
      const few = members.length < group.length ? `, ${members.length} of them shown` : "";
      return { channels: members, says: `${group.length} channels, every pair with |r| > ${stage.tau}${few}` };
    }
    if (kind === "like") {
      const distance = (channel) => (channel === number ? -1 : 1 - Math.abs(correlation(stage, number, channel)));
      const channels = [...stage.channels].sort((a, b) => distance(a) - distance(b)).slice(0, FIRST);
      const all = stage.channels.length < stage.total ? ` of ${stage.channels.length} channels in this page` : "";
      return { channels, says: `r with channel ${number} below each map, the most similar first${all}` };
    }
    return { channels: stage.channels.slice(0, FIRST), says: "Click a map to see what resembles it." };
  }

  function drawMatrix(canvas, stage, channels) {
    canvas.width = canvas.height = channels.length;
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(channels.length, channels.length);
    channels.forEach((a, row) =>
      channels.forEach((b, column) => {
        const r = Math.abs(correlation(stage, a, b));
        pixels.data.set([255 - 247 * r, 255 - 207 * r, 255 - 148 * r, 255], 4 * (row * channels.length + column));
      }),
    );
    context.putImageData(pixels, 0, 0);
  }

  function drawMap(panel, stage, channel, choice, inView) {
    const like = choice.startsWith("like ") ? Number(choice.slice(5)) : null;
    const group = stage.groups.findIndex((members) => members.includes(channel));
    const dead = stage.dead.includes(channel);
    const place = stage.channels.indexOf(channel);
    const rows = Math.ceil(stage.channels.length / data.columns);
    const percent = (index, count) => (count > 1 ? (100 * index) / (count - 1) : 0);
    const picture = element("span", { class: "picture" });
    picture.style.backgroundImage = `url(${stage.sprites[state.image]})`;
    picture.style.backgroundSize = `${100 * data.columns}% ${100 * rows}%`;
    picture.style.backgroundPosition =
      `${percent(place % data.columns, data.columns)}% ${percent(Math.floor(place / data.columns), rows)}%`;
    picture.style.aspectRatio = stage.shape;
    const map = element("button", { class: "map", type: "button", "data-channel": channel }, picture);
    let says = `channel ${channel}${dead ? ", dead" : ""}`;
    // A frame says "like another one in view".
    if (group >= 0 && stage.groups[group].some((other) => other !== channel && inView.has(other))) {
      const [colour, ink] = data.colours[group % data.colours.length];
      map.classList.add("grouped");
      map.style.setProperty("--frame", colour);
      map.style.setProperty("--on-frame", ink);
      picture.dataset.letter = letterOf(group);
      says += `, group ${letterOf(group)}`;
    }
    map.classList.toggle("dead", dead);
    map.classList.toggle("chosen", channel === like);
    map.append(String(channel));
    if (like !== null && channel !== like)
      map.append(element("br"), element("b", {}, correlation(stage, like, channel).toFixed(3)));
    map.title = says;
    map.setAttribute("aria-label", says);
    map.addEventListener("click", () => {
      state.choice[panel] = channel === like ? "first" : `like ${channel}`;
      draw();
    });
    return map;
  }

  function drawPanel(model, panel) {
    const stage = model.stages[state.stage];
    const choice = state.choice[panel];
    const { channels, says } = selection(stage, choice);
    const select = element("select", { "aria-label": `Channels of ${model.name}` });
    const options = [["first", stage.total > FIRST ? `first ${FIRST} of ${stage.total}` : `all ${stage.total}`]];
    stage.groups.forEach((group, number) => {
      // Large stages have more groups than maps in this page.
      if (group.filter((channel) => stage.channels.includes(channel)).length > 1)
        options.push([`group ${number}`, `group ${letterOf(number)}: ${group.length} near-duplicates`]);
    });
    const left = stage.groups.length - (options.length - 1);
    if (choice.startsWith("like ")) options.push([choice, `similar to channel ${choice.slice(5)}`]);
    for (const [value, text] of options) select.append(element("option", { value }, text));
    if (left) select.append(element("option", { disabled: "" }, `${left} smaller groups are not in this page`));
    select.value = choice;
    select.addEventListener("change", () => {
      state.choice[panel] = select.value;
      draw();
    });
    const canvas = element("canvas", { role: "img", "aria-label": "matrix of |r| of the maps in view" });
    drawMatrix(canvas, stage, channels);
    const inView = new Set(channels);
    return element(
      "section",
      { class: "panel", "data-model": model.name },
      element("h3", {}, element("span", { class: "letter" }, "AB"[panel]), ` ${model.name}`),
      element("p", { class: "facts" }, stage.title, element("br"), stage.facts),
      element(
        "div",
        { class: "choose" },
        element("label", {}, "Channels", select, element("span", { class: "status" }, says)),
        canvas,
      ),
      element("div", { class: "maps" }, ...channels.map((channel) => drawMap(panel, stage, channel, choice, inView))),
    );
  }

  function pick(kind, index, ...content) {
    const button = element("button", { type: "button", "aria-pressed": state[kind] === index }, ...content);
    button.addEventListener("click", () => {
      // Another stage has other channels.
      choose(kind === "stage" ? { stage: index, choice: data.models.map(() => "first") } : { [kind]: index });
    });
    return button;
  }

  function draw() {
    const focus = document.activeElement?.closest("#images, #stages, .panel");
    const again = focus && [
      focus.id ? `#${focus.id}` : `.panel[data-model=${CSS.escape(focus.dataset.model)}]`,
      document.activeElement.dataset.channel ?? null,
      [...focus.querySelectorAll("button, select")].indexOf(document.activeElement),
    ];
    document.getElementById("images").replaceChildren(
      ...data.images.map(({ label, src }, index) => pick("image", index, element("img", { src, alt: "" }), label)),
    );
    document.getElementById("stages").replaceChildren(
      ...data.models[0].stages.map(({ stage }, index) => pick("stage", index, String(stage))),
    );
    document.getElementById("panels").replaceChildren(...data.models.map(drawPanel));
    if (again) {
      const [place, channel, index] = again;
      const now = document.querySelector(place);
      const same = channel === null ? null : now?.querySelector(`[data-channel="${channel}"]`);
      (same ?? now?.querySelectorAll("button, select")[index])?.focus({ preventScroll: true });
    }
  }

  draw();
}
