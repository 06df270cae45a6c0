// icl-tiny in the reader's browser: its tokenizer, the induction pattern of a prompt, its forward
// pass with heads removed or blocked, and the page around them. The weights come from icl-tiny.js,
// the drawing of attention from viewer.js; both are loaded before. Everything before the page is in
// `iclTiny`, also for the console: iclTiny.score(iclTiny.data.prompts[0].context, ["Foo", "Bar"]).
(function () {
  "use strict";
  const data = window.iclTinyData;
  const { layers, hidden, heads, groups, size, theta, epsilon, positions } = data.config;

  // ---- Weights: whole numbers from -127 to 127 with a scale for each row, or plain vectors ----
  const bytesOf = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  function weightsOf({ values, scales }) {
    const bytes = bytesOf(values);
    if (!scales) return new Float32Array(bytes.buffer);
    const whole = new Int8Array(bytes.buffer);
    const scale = new Float32Array(bytesOf(scales).buffer);
    const columns = whole.length / scale.length;
    return Float32Array.from(whole, (value, index) => value * scale[Math.floor(index / columns)]);
  }
  const weights = {};
  for (const [name, stored] of Object.entries(data.tensors)) weights[name] = weightsOf(stored);
  const embedding = weights["model.embed_tokens.weight"]; // Also the output's: they are tied.

  // ---- Tokenizer: byte-level BPE, as tokenizer.json says ----
  // A printable character stands for each byte; those that have none of their own follow 255.
  let nextCharacter = 256;
  const CHARACTERS = Array.from({ length: 256 }, (_, byte) => {
    const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    return String.fromCharCode(printable ? byte : nextCharacter++);
  });
  const ids = new Map(data.tokenizer.vocabulary.map((token, id) => [token, id]));
  const ranks = new Map(data.tokenizer.merges.map((pair, rank) => [pair, rank]));
  // What JavaScript calls a space is not quite what Unicode does.
  const spaces = (source) => source.replace(/\\s/g, "\\p{White_Space}").replace(/\\S/g, "\\P{White_Space}");
  const WORDS = new RegExp(spaces(data.tokenizer.words), "gu");
  const escaped = (text) => text.replace(/\W/g, "\\$&");
  const SPECIAL = new RegExp("(" + data.tokenizer.special.map(escaped).join("|") + ")");
  const utf8 = new TextEncoder();

  // The tokens of a text, each with its id and the characters [start, end) that it stands for.
  function encode(text) {
    const tokens = [];
    let start = 0;
    for (const part of text.split(SPECIAL)) {
      if (data.tokenizer.special.includes(part)) {
        tokens.push({ id: ids.get(part), start, end: start + part.length });
      } else {
        for (const word of part.matchAll(WORDS)) tokens.push(...merged(word[0], start + word.index));
      }
      start += part.length;
    }
    return tokens;
  }
  function merged(word, start) {
    const parts = [];
    for (const character of word) {
      const end = start + character.length;
      for (const byte of utf8.encode(character)) parts.push({ text: CHARACTERS[byte], start, end });
      start = end;
    }
    const rankAt = (place) => ranks.get(parts[place].text + " " + parts[place + 1].text) ?? Infinity;
    for (;;) {
      let best = -1;
      for (let place = 0; place + 1 < parts.length; place += 1) {
        if (rankAt(place) < (best < 0 ? Infinity : rankAt(best))) best = place;
      }
      if (best < 0) return parts.map(({ text, start, end }) => ({ id: ids.get(text), start, end }));
      const [left, right] = parts.slice(best, best + 2);
      parts.splice(best, 2, { text: left.text + right.text, start: left.start, end: right.end });
    }
  }

  // ---- Induction pattern (paper, section 5): induction_pattern.py in other words ----
  // Elements of a prompt: their kind, their characters, and those of what follows them.
  function elementsOf(prompt) {
    const [description, ...blocks] = prompt.split("\n\n");
    if (!blocks.length) throw new Error("No induction pattern: the prompt has no blank line after its description.");
    const elements = [];
    let start = description.length + 2;
    blocks.forEach((block, number) => {
      const last = number === blocks.length - 1;
      const cut = block.lastIndexOf(":");
      const [sequence, label] = [block.slice(0, Math.max(cut, 0)), block.slice(cut + 1)];
      const labelled = label !== "" && !/^ |\n/.test(label);
      if (cut < 1 || /[:\n]/.test(sequence) || (last ? label !== "" : !labelled)) {
        throw new Error("No induction pattern: a block of the prompt is no “sequence:label” (at the end “sequence:”).");
      }
      const colon = start + cut;
      const end = start + block.length;
      const words = sequence.split(" ");
      if (words.length === 2 && words.every((word) => Object.hasOwn(data.words, word))) {
        const middle = start + words[0].length; // The space belongs to the second word.
        elements.push({ kind: data.words[words[0]], start, end: middle, follower: [middle, colon] });
        elements.push({ kind: data.words[words[1]], start: middle, end: colon, follower: [colon, colon + 1] });
      }
      elements.push({ kind: "colons", start: colon, end: colon + 1, follower: last ? null : [colon + 1, end] });
      if (!last) {
        elements.push({ kind: "labels", start: colon + 1, end, follower: [end, end + 2] });
        elements.push({ kind: "blank_lines", start: end, end: end + 2, follower: [end + 2, end + 3] });
      }
      start = end + 2;
    });
    return elements;
  }
  // For every token the earlier tokens that it is kept from: those that follow an earlier element
  // of a kind that it is part of, when the first of them lies before its element's first token.
  function inductionPattern(prompt, tokens = encode(prompt)) {
    const overlap = (start, end) => {
      const found = [];
      tokens.forEach((token, place) => token.end > start && token.start < end && found.push(place));
      return found;
    };
    const kinds = new Map();
    for (const { kind, start, end, follower } of elementsOf(prompt)) {
      if (!kinds.has(kind)) kinds.set(kind, { begins: new Map(), follows: new Map() });
      const { begins, follows } = kinds.get(kind);
      const own = overlap(start, end);
      for (const place of own) begins.set(place, Math.max(own[0], begins.get(place) ?? -1));
      const next = follower ? overlap(...follower) : [];
      // Of the sequence that follows a blank line only the first token.
      for (const place of kind === "blank_lines" ? next.slice(0, 1) : next) {
        follows.set(place, Math.min(next[0], follows.get(place) ?? Infinity));
      }
    }
    return tokens.map((_, query) => tokens.map((_, key) => key).filter((key) => key < query &&
      [...kinds.values()].some(({ begins, follows }) => follows.get(key) < begins.get(query))));
  }

  // ---- Forward pass of a Llama: [tokens, width] is one array, token after token ----
  function linear(weight, x, columns) {
    const rows = weight.length / columns;
    const tokens = x.length / columns;
    const y = new Float32Array(tokens * rows);
    for (let token = 0; token < tokens; token += 1) {
      for (let row = 0; row < rows; row += 1) {
        let sum = 0;
        for (let column = 0; column < columns; column += 1) {
          sum += weight[row * columns + column] * x[token * columns + column];
        }
        y[token * rows + row] = sum;
      }
    }
    return y;
  }
  function normed(weight, x) {
    const y = new Float32Array(x.length);
    for (let start = 0; start < x.length; start += hidden) {
      let squares = 0;
      for (let i = 0; i < hidden; i += 1) squares += x[start + i] ** 2;
      const scale = 1 / Math.sqrt(squares / hidden + epsilon);
      for (let i = 0; i < hidden; i += 1) y[start + i] = x[start + i] * scale * weight[i];
    }
    return y;
  }
  // Rotary positions: pair (i, i + size / 2) of each head turns with the token's place.
  function rotated(x, width) {
    const half = size / 2;
    for (let start = 0; start < x.length; start += size) {
      const place = Math.floor(start / width);
      for (let i = 0; i < half; i += 1) {
        const angle = place * theta ** (-i / half);
        const [cosine, sine] = [Math.cos(angle), Math.sin(angle)];
        const [a, b] = [x[start + i], x[start + half + i]];
        x[start + i] = a * cosine - b * sine;
        x[start + half + i] = b * cosine + a * sine;
      }
    }
    return x;
  }
  function softmax(row) {
    const largest = row.reduce((a, b) => Math.max(a, b), -Infinity);
    let sum = 0;
    for (let i = 0; i < row.length; i += 1) sum += row[i] = Math.exp(row[i] - largest);
    for (let i = 0; i < row.length; i += 1) row[i] /= sum;
  }
  const summed = (x, y) => x.map((value, i) => value + y[i]);

  // Attention of one layer. Shares of head h and query q stand at rowOf(h, q), one for each key.
  const rowStart = (head, query, tokens) => (head * tokens * (tokens + 1) + query * (query + 1)) / 2;
  function attend(prefix, x, edited, pattern) {
    const tokens = x.length / hidden;
    const q = rotated(linear(weights[prefix + "q_proj.weight"], x, hidden), heads * size);
    const k = rotated(linear(weights[prefix + "k_proj.weight"], x, hidden), groups * size);
    const v = linear(weights[prefix + "v_proj.weight"], x, hidden);
    const shares = new Float32Array(rowStart(heads, 0, tokens));
    const output = new Float32Array(tokens * heads * size);
    for (let head = 0; head < heads; head += 1) {
      const group = Math.floor(head / (heads / groups)); // Several heads share keys and values.
      for (let query = 0; query < tokens; query += 1) {
        const start = rowStart(head, query, tokens);
        const row = shares.subarray(start, start + query + 1);
        const from = (query * heads + head) * size;
        for (let key = 0; key <= query; key += 1) {
          const to = (key * groups + group) * size;
          let sum = 0;
          for (let i = 0; i < size; i += 1) sum += q[from + i] * k[to + i];
          row[key] = sum / Math.sqrt(size);
        }
        if (edited.has(head) && pattern) for (const key of pattern[query] ?? []) row[key] = -Infinity;
        softmax(row);
        // A removed head still looks, but what it gives, before the output projection, is zero.
        if (edited.has(head) && !pattern) continue;
        for (let key = 0; key <= query; key += 1) {
          const to = (key * groups + group) * size;
          for (let i = 0; i < size; i += 1) output[from + i] += row[key] * v[to + i];
        }
      }
    }
    return { shares, output: linear(weights[prefix + "o_proj.weight"], output, heads * size) };
  }
  function feedForward(prefix, x) {
    const gate = linear(weights[prefix + "gate_proj.weight"], x, hidden);
    const up = linear(weights[prefix + "up_proj.weight"], x, hidden);
    const inner = gate.map((value, i) => (value / (1 + Math.exp(-value))) * up[i]);
    return linear(weights[prefix + "down_proj.weight"], inner, inner.length / (x.length / hidden));
  }
  // One pass over token ids. `edit.heads`, pairs [layer, head], are removed or, with `edit.pattern`,
  // kept from it. `plain` is a pass over the same ids without edits, of which the layers below the
  // first edited one are taken.
  function forward(tokenIds, { heads: edits = [], pattern = null } = {}, plain = null) {
    const first = plain ? Math.min(layers, ...edits.map(([layer]) => layer)) : 0;
    const attention = plain ? plain.attention.slice(0, first) : [];
    const states = plain ? plain.states.slice(0, first + 1) : [new Float32Array(tokenIds.length * hidden)];
    if (!plain) {
      tokenIds.forEach((id, i) => states[0].set(embedding.subarray(id * hidden, (id + 1) * hidden), i * hidden));
    }
    for (let layer = first; layer < layers; layer += 1) {
      const prefix = "model.layers." + layer + ".";
      const edited = new Set(edits.filter(([of]) => of === layer).map(([, head]) => head));
      const read = normed(weights[prefix + "input_layernorm.weight"], states[layer]);
      const { shares, output } = attend(prefix + "self_attn.", read, edited, pattern);
      const middle = summed(states[layer], output);
      const again = normed(weights[prefix + "post_attention_layernorm.weight"], middle);
      attention.push(shares);
      states.push(summed(middle, feedForward(prefix + "mlp.", again)));
    }
    return { attention, states, tokens: tokenIds.length };
  }
  // Log-probability of a token after a position of a pass.
  function logProbability({ states }, position, id) {
    const x = states[layers].subarray(position * hidden, (position + 1) * hidden);
    const logits = linear(embedding, normed(weights["model.norm.weight"], x), hidden);
    const largest = logits.reduce((a, b) => Math.max(a, b));
    return logits[id] - largest - Math.log(logits.reduce((sum, logit) => sum + Math.exp(logit - largest), 0));
  }
  // Log-probability of each label after a prompt, and the passes, by their ids; `plain` are those
  // passes without an edit, where they are known.
  function score(prompt, labels, edit = {}, plain = new Map()) {
    const context = prompt.trimEnd(); // Spaces at its end belong to the label.
    const before = encode(context).map(({ id }) => id);
    if (!before.length) throw new Error("The prompt is empty.");
    const passes = new Map();
    const pass = (tokenIds) => {
      const name = tokenIds.join();
      if (tokenIds.length > positions) throw new Error("The prompt is longer than " + positions + " tokens.");
      if (!passes.has(name)) passes.set(name, forward(tokenIds, edit, plain.get(name)));
      return passes.get(name);
    };
    const whole = pass(before);
    const logs = labels.map((label) => {
      const after = encode(prompt + label).map(({ id }) => id).slice(before.length);
      if (!after.length) throw new Error("A label is empty. Separate labels by commas.");
      const done = after.length > 1 ? pass([...before, ...after.slice(0, -1)]) : whole;
      return after.reduce((sum, id, i) => sum + logProbability(done, before.length - 1 + i, id), 0);
    });
    return { logs, passes, whole };
  }
  window.iclTiny = { data, encode, inductionPattern, forward, score };

  // ---- The page ----
  const root = document.getElementById("icl-playground");
  function element(tag, className, parent, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }
  const percent = (share) => (share > 0 && share < 0.001 ? "under 0.1" : (100 * share).toFixed(1)) + "\u00a0%";
  const name = ([layer, head]) => layer + "." + head;

  function Page() {
    let waiting = 0;
    let full = null; // The passes over the present prompt without an edit.
    let changed = null; // And with what is checked.
    const boxes = new Map();
    const top = element("div", "icl-viewer-controls", root);
    const promptChoice = element("select", "", element("label", "", top, "Prompt of a task "));
    data.prompts.forEach(({ task, example }, index) => {
      const group = [...promptChoice.children].find((it) => it.label === task) || element("optgroup", "", promptChoice);
      group.label = task;
      element("option", "", group, task + ", prompt " + example).value = String(index);
    });
    function field(tag, title) {
      const made = element(tag, "", element("label", "icl-playground-text", root, title));
      made.spellcheck = false;
      made.addEventListener("input", () => {
        full = null;
        clearTimeout(waiting);
        waiting = setTimeout(update, 300);
      });
      return made;
    }
    const text = field("textarea", "Prompt, yours to change");
    text.rows = 9;
    const labels = field("input", "Labels, separated by commas; a space before a label belongs to it");
    const buttons = element("div", "icl-viewer-controls", root);
    buttons.setAttribute("role", "group");
    buttons.setAttribute("aria-label", "Sets of heads");
    const every = data.heads.map(({ layer, head }) => [layer, head]);
    const chosen = () => every.filter((head) => boxes.get(name(head)).checked);
    function preset(title, wanted) {
      element("button", "", buttons, title).addEventListener("click", () => {
        for (const [head, box] of boxes) box.checked = wanted.some((it) => name(it) === head);
        update();
      });
    }
    preset("Check the " + data.induction.length + " induction heads", data.induction);
    preset("Check as many others of the layer", data.control);
    preset("Check none", []);
    const how = element("label", "icl-playground-how", root);
    const patternBox = element("input", "", how);
    patternBox.type = "checkbox";
    how.append("Keep the checked heads and block only their induction pattern");
    const status = element("p", "icl-playground-status", root);
    status.setAttribute("role", "status");
    const table = element("table", "icl-playground-answers", root);
    for (let layer = 0; layer < layers; layer += 1) {
      const row = element("fieldset", "icl-playground-heads", root);
      element("legend", "", row, "Layer " + layer);
      for (let head = 0; head < heads; head += 1) {
        const chip = element("label", "", row);
        const box = element("input", "", chip);
        box.type = "checkbox";
        chip.append(name([layer, head]));
        if (data.induction.some((it) => name(it) === name([layer, head]))) {
          chip.className = "icl-playground-induction";
          element("span", "", chip, data.heads[layer * heads + head].score.toFixed(2));
        }
        boxes.set(name([layer, head]), box);
        box.addEventListener("change", () => update());
      }
    }
    const panel = element("section", "icl-viewer", root);
    panel.id = "icl-playground-attention";
    const title = element("p", "icl-viewer-title", panel, "Attention");
    title.id = panel.id + "-title";
    panel.setAttribute("aria-labelledby", title.id);

    const shown = { name: "", tokens: [], blocked: [] };
    const live = {
      heads: data.heads,
      first: every.findIndex((head) => name(head) === name(data.induction[0])),
      prompts: [shown],
      changed: false,
      row(kind, index, query) {
        const { attention, tokens } = (kind === "blocked" ? changed : full).whole;
        const start = rowStart(index % heads, query, tokens);
        return Array.from(attention[Math.floor(index / heads)].subarray(start, start + query + 1));
      },
    };
    let refresh = null;

    function prepare() {
      const context = text.value.trimEnd();
      full = score(text.value, labels.value.split(","));
      const tokens = encode(context);
      shown.tokens = tokens.map(({ start, end }) => context.slice(start, end));
      shown.pattern = null;
      try {
        shown.pattern = inductionPattern(context, tokens);
        shown.why = "";
      } catch (error) {
        shown.why = " " + error.message + " Checked heads are removed, not blocked.";
      }
      shown.blocked = shown.pattern || tokens.map(() => []);
      patternBox.disabled = !shown.pattern;
      patternBox.checked = patternBox.checked && !patternBox.disabled;
    }
    function update() {
      try {
        if (!full) prepare();
        const edit = { heads: chosen(), pattern: patternBox.checked ? shown.pattern : null };
        const count = edit.heads.length;
        live.changed = count > 0;
        changed = count ? score(text.value, labels.value.split(","), edit, full.passes) : full;
        const list = count > 8 ? count + " heads" : edit.heads.map(name).join(", ");
        report(count && (edit.pattern ? "Induction pattern blocked in " : "Without ") + list);
        if (refresh) refresh();
        else refresh = window.iclViewer(panel, live);
        panel.hidden = false;
      } catch (error) {
        full = null;
        table.replaceChildren();
        panel.hidden = true;
        status.textContent = error.message;
      }
    }
    function report(what) {
      // `what` was changed, 0 if nothing.
      const words = labels.value.split(",");
      const prompt = data.prompts[Number(promptChoice.value)];
      const asked = text.value === prompt.context && labels.value === prompt.choices.join();
      const best = ({ logs }) => logs.indexOf(Math.max(...logs));
      const said = (found) => words[best(found)].trim() + ", " + percent(Math.exp(found.logs[best(found)])) + ".";
      status.textContent = "Full model: " + said(full) + " " +
        (what ? what + ": " + said(changed) : "No head is checked: nothing is changed.") + shown.why;
      table.replaceChildren();
      const count = data.tokenizer.vocabulary.length.toLocaleString("en");
      element("caption", "", table, "Probability of each label, out of all " + count + " tokens");
      const header = element("tr", "", element("thead", "", table));
      for (const column of ["Label", "Full model", what || "Nothing changed"]) {
        element("th", "", header, column).scope = "col";
      }
      const body = element("tbody", "", table);
      words.forEach((word, index) => {
        const row = element("tr", "", body);
        const right = asked && index === prompt.target ? " (right)" : "";
        element("th", "", row, word.trim() + right).scope = "row";
        for (const found of [full, changed]) {
          const share = Math.exp(found.logs[index]);
          const cell = element("td", index === best(found) ? "icl-playground-best" : "", row, percent(share));
          cell.style.setProperty("--icl-share", share.toFixed(4));
        }
      });
    }
    function choose() {
      const { context, choices } = data.prompts[Number(promptChoice.value)];
      text.value = context;
      labels.value = choices.join();
      full = null;
      update();
    }
    promptChoice.addEventListener("change", choose);
    patternBox.addEventListener("change", update);
    choose();
  }
  if (root) Page();
})();
