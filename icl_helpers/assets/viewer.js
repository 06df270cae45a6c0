(function () {
  "use strict";
  const SHOWN_FROM = 0.01;
  const NAMED_TOKENS = 5;
  const percent = (share) => (share > 0 && share < SHOWN_FROM ? "under 1" : Math.round(share * 100)) + "\u00a0%";
  // A token as it is read aloud and in sentences: line breaks and spaces have names.
  function spoken(text) {
    const word = text.replace(/\n/g, "").trim();
    if (word) return "“" + word + "”";
    return text.includes("\n\n") ? "blank line" : text.includes("\n") ? "line break" : "space";
  }
  function element(tag, className, parent, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  }
  function choice(parent, label, names) {
    const holder = element("label", "", parent, label + " ");
    const select = element("select", "", holder);
    names.forEach((name, index) => {
      element("option", "", select, name).value = String(index);
    });
    return select;
  }
  function headName(head) {
    const score = head.score === null ? "" : ", score " + head.score.toFixed(2);
    return "layer " + head.layer + ", head " + head.head + score;
  }
  // Shows what viewer_data gives. Live data change while they are shown: `data.row(kind, head, query)`
  // gives the shares, both kinds stand together where `data.changed`, and the function that is
  // returned shows the data as they are by then.
  function Viewer(root, data) {
    const live = Boolean(data.row);
    const controls = element("div", "icl-viewer-controls", root);
    const promptChoice = choice(controls, "Prompt", data.prompts.map((prompt) => prompt.name));
    const headChoice = choice(controls, "Head", data.heads.map(headName));
    const holder = element("label", "", controls);
    const blockedSwitch = element("input", "", holder);
    blockedSwitch.type = "checkbox";
    blockedSwitch.setAttribute("role", "switch");
    holder.append("Induction pattern blocked");
    if (live) {
      headChoice.value = String(data.first);
      promptChoice.parentNode.remove();
      holder.remove();
    }
    const help = element("p", "icl-viewer-help", root,
      "Point at a token, tap it, or reach it with Tab and the arrow keys: numbers under the tokens "
      + "before it say what share of its attention goes there"
      + (live ? " in the full model and, below, in the changed one" : "")
      + ". The token has a solid frame. Dashed "
      + "frames are what the blocked pattern forbids it to look at.");
    help.id = root.id + "-help";
    const list = element("div", "icl-viewer-tokens", root);
    list.setAttribute("role", "listbox");
    list.setAttribute("aria-label", "Tokens of the prompt");
    list.setAttribute("aria-describedby", help.id);
    list.setAttribute("aria-orientation", "horizontal");
    // What the pointer passes over is shown; only what is chosen is also announced.
    const report = element("p", "icl-viewer-report", root);
    const announced = element("p", "", root);
    announced.setAttribute("role", "status");
    announced.style.cssText = "position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);margin:0";
    let tokens = [];
    let drawn = [];
    let current = 0;
    const prompt = () => data.prompts[Number(promptChoice.value)];
    const head = () => Number(headChoice.value);
    const kind = () => (blockedSwitch.checked ? "blocked" : "plain");
    function row(query, of = kind()) {
      if (live) return data.row(of, head(), query);
      return prompt().attention[of][head()][query].map((value) => value / data.unit);
    }
    function looks(query, of) {
      const shares = row(query, of);
      const order = shares.map((_, key) => key).filter((key) => shares[key] >= SHOWN_FROM);
      order.sort((a, b) => shares[b] - shares[a]);
      const named = order.slice(0, NAMED_TOKENS).map((key) => percent(shares[key]) + " to " +
        (key === query ? "itself" : spoken(prompt().tokens[key]) + " (" + (key + 1) + ")"));
      return (named.length ? named.join(", ") : "under 1 % to every token") + ".";
    }
    function sentence(query) {
      const forbidden = prompt().blocked[query];
      const lost = (of) => percent(forbidden.reduce((sum, key) => sum + row(query, of)[key], 0));
      const text = "From token " + (query + 1) + ", " + spoken(prompt().tokens[query]) + ": " +
        looks(query) + (data.changed ? " Changed model: " + looks(query, "blocked") : "");
      if (!forbidden.length) return text + " The pattern forbids this token nothing.";
      return text + (blockedSwitch.checked
        ? " Blocked: " + forbidden.length + " tokens."
        : " On the induction pattern, " + forbidden.length + " tokens: " + lost() +
          (data.changed ? ", changed model: " + lost("blocked") : "") + ".");
    }
    const numberOf = (share) => (share >= SHOWN_FROM ? String(Math.round(share * 100)) : "");
    function show(query, announce) {
      current = query;
      const shares = row(query);
      const changed = data.changed ? row(query, "blocked") : null;
      const forbidden = new Set(prompt().blocked[query]);
      tokens.forEach((token, key) => {
        const share = key <= query ? shares[key] : 0;
        const after = changed && key <= query ? changed[key] : 0;
        const number = numberOf(share);
        token.style.setProperty("--icl-share", (changed ? after : share).toFixed(3));
        // The space keeps word and number apart where the token is read as one text.
        token.children[0].textContent = number && " " + number;
        if (live) token.children[1].textContent = changed ? " " + numberOf(after) : "";
        token.toggleAttribute("data-blocked", forbidden.has(key));
        token.setAttribute("aria-selected", String(key === query));
        token.tabIndex = key === query ? 0 : -1;
        // The name begins with what is seen, so that it can be asked for by that.
        token.setAttribute("aria-label", spoken(prompt().tokens[key]) +
          (number ? " " + number + " %" : "") +
          (numberOf(after) ? ", changed " + numberOf(after) + " %" : "") + ", token " + (key + 1) +
          (forbidden.has(key) ? ", in the pattern" : ""));
      });
      report.textContent = sentence(query);
      if (announce) announced.textContent = report.textContent;
    }
    function build() {
      list.replaceChildren();
      let line = null;
      drawn = prompt().tokens;
      tokens = prompt().tokens.map((text, index) => {
        if (!line) {
          line = element("div", "icl-viewer-line", list);
          line.setAttribute("role", "presentation");
        }
        const token = element("div", "icl-viewer-token", line, text.replace(/\n/g, "↵").trim() || "␣");
        token.setAttribute("role", "option");
        token.dataset.index = String(index);
        element("span", "icl-viewer-number", token);
        if (live) element("span", "icl-viewer-number", token);
        if (text.includes("\n")) line = null;
        return token;
      });
      show(tokens.length - 1, false);
    }
    // The token of the line above or below that is nearest to the current one.
    function vertical(step) {
      const lines = Array.from(list.children);
      const here = tokens[current];
      const line = lines[lines.indexOf(here.parentNode) + step];
      if (!line) return current;
      const left = (token) => token.getBoundingClientRect().left;
      const nearest = Array.from(line.children).reduce((best, token) =>
        Math.abs(left(token) - left(here)) < Math.abs(left(best) - left(here)) ? token : best);
      return Number(nearest.dataset.index);
    }
    function target(key) {
      if (key === "ArrowRight") return Math.min(current + 1, tokens.length - 1);
      if (key === "ArrowLeft") return Math.max(current - 1, 0);
      if (key === "Home") return 0;
      if (key === "End") return tokens.length - 1;
      if (key === "ArrowUp") return vertical(-1);
      return key === "ArrowDown" ? vertical(1) : null;
    }
    const indexOf = (event) => {
      const token = event.target.closest(".icl-viewer-token");
      return token ? Number(token.dataset.index) : null;
    };
    list.addEventListener("keydown", (event) => {
      const next = event.ctrlKey || event.metaKey || event.altKey ? null : target(event.key);
      if (next === null) return;
      // The theme turns pages with the arrow keys.
      event.preventDefault();
      event.stopPropagation();
      show(next, true);
      tokens[next].focus();
    });
    // Moves only: a page that scrolls below a resting pointer changes nothing.
    list.addEventListener("pointermove", (event) => {
      const index = indexOf(event);
      if (index !== null && index !== current) show(index, false);
    });
    list.addEventListener("click", (event) => {
      const index = indexOf(event);
      if (index === null) return;
      show(index, true);
      tokens[index].focus();
    });
    list.addEventListener("focusin", (event) => {
      const index = indexOf(event);
      if (index !== null && index !== current) show(index, true);
    });
    promptChoice.addEventListener("change", build);
    headChoice.addEventListener("change", () => show(current, true));
    blockedSwitch.addEventListener("change", () => show(current, true));
    build();
    return () => {
      if (drawn.join("\0") === prompt().tokens.join("\0")) show(current, false);
      else build();
    };
  }
  window.iclViewer = Viewer;
  document.querySelectorAll("[data-icl-viewer]:not([data-ready])").forEach((root) => {
    root.setAttribute("data-ready", "");
    Viewer(root, JSON.parse(root.querySelector('script[type="application/json"]').textContent));
  });
})();
