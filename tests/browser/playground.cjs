// Opens the page on which heads are switched off in Chromium, has its functions compute what the
// test asks for, operates it by pointer, keyboard and touch, and prints what came of it as JSON.
// Usage: node playground.cjs SETTINGS.json, with what browser.cjs needs and `page`, `widths`, `texts`
// (to be tokenised), `patterns` (prompts) and `cases` (context, labels, heads, blocked).
"use strict";
const settings = JSON.parse(require("fs").readFileSync(process.argv[2], "utf-8"));
const { opened, reported } = require("./browser.cjs")(settings);

function computed({ texts, patterns, cases }) {
  let plain;
  const { encode, inductionPattern, score, forward } = window.iclTiny;
  const tried = (compute) => {
    try { return compute(); } catch (error) { return error.message; }
  };
  return {
    tokens: texts.map((text) => encode(text).map(({ id }) => id)),
    patterns: patterns.map((prompt) => tried(() => inductionPattern(prompt))),
    cases: cases.map(({ context, labels, heads, blocked }, index) => {
      const edit = { heads, pattern: blocked ? inductionPattern(context) : null };
      // As on the page: the full model's passes are kept while the prompt stays.
      if (index === 0 || cases[index - 1].context !== context) plain = score(context, labels);
      const changed = score(context, labels, edit, plain.passes);
      // The same without what is known of the pass before.
      const alone = forward(encode(context).map(({ id }) => id), edit);
      const last = alone.states.length - 1;
      return {
        plain: plain.logs,
        changed: changed.logs,
        reused: changed.whole.states[last].every((value, i) => value === alone.states[last][i]),
        attention: index ? null : Array.from(changed.whole.attention[3]),
      };
    }),
  };
}

function state() {
  const root = document.getElementById("icl-playground");
  const tokens = [...root.querySelectorAll('[role="option"]')];
  const cells = (row) => [...row.children].map((cell) => cell.textContent);
  return {
    status: root.querySelector('.icl-playground-status').textContent,
    answers: [...root.querySelectorAll(".icl-playground-answers tr")].map(cells),
    checked: [...root.querySelectorAll("fieldset input:checked")].map((box) => box.labels[0].firstChild.nextSibling.textContent),
    blocked: root.querySelector(".icl-playground-how input").checked,
    canBlock: !root.querySelector(".icl-playground-how input").disabled,
    current: tokens.findIndex((token) => token.getAttribute("aria-selected") === "true"),
    numbers: tokens.map((token) => [...token.querySelectorAll(".icl-viewer-number")].map((it) => it.textContent.trim())),
    report: root.querySelector(".icl-viewer-report").textContent,
    focused: document.activeElement.closest("label")?.textContent ?? document.activeElement.textContent,
    width: [document.documentElement.scrollWidth, window.innerWidth],
    unnamed: [...root.querySelectorAll("input, select, textarea, button")].filter((it) =>
      !(it.labels && it.labels[0] && it.labels[0].textContent.trim()) && !it.textContent.trim()).length,
  };
}

async function operated(browser, report) {
  const steps = {};
  const tab = await opened(browser, settings.page, { width: 1300 }, report);
  await tab.waitForSelector("#icl-playground [role=option]");
  steps.computed = await tab.evaluate(computed, settings);
  steps.data = await tab.evaluate(() => ({ ...window.iclTiny.data, tensors: null }));
  const keep = async (name) => { steps[name] = await tab.evaluate(state); };
  const press = async (key, times = 1) => { for (let i = 0; i < times; i += 1) await tab.keyboard.press(key); };
  await keep("start");
  // From the list of prompts through the prompt and its labels to the first button, by keyboard.
  await tab.focus("#icl-playground select");
  await press("Tab", 3);
  await keep("onButton");
  await press("Enter");
  await keep("induction");
  await press("Tab");
  await press("Space");
  await keep("control");
  await press("Tab");
  await press("Space");
  await keep("none");
  await press("Tab");
  await keep("onPattern");
  await press("Tab");
  await keep("onFirstHead");
  await press("Space");
  await keep("firstHead");
  await press("Space");
  const [induction] = await tab.$$("#icl-playground button");
  await induction.click();
  await tab.click(".icl-playground-how input");
  await keep("blocked");
  // Another prompt, with what is checked.
  await tab.select("#icl-playground select", "12");
  await keep("another");
  // One's own: a further word in front, typed.
  await tab.focus("#icl-playground textarea");
  await tab.keyboard.down("Control");
  await press("Home");
  await tab.keyboard.up("Control");
  await tab.keyboard.type("Look. ");
  await tab.waitForFunction(() => !document.querySelector(".icl-playground-answers").textContent.includes("(right)"));
  await keep("own");
  const write = async (text, name) => {
    await tab.$eval("#icl-playground textarea", (field, value) => {
      field.value = value;
      field.dispatchEvent(new Event("input", { bubbles: true }));
    }, text);
    await new Promise((resolve) => setTimeout(resolve, 900));
    await keep(name);
  };
  await write("No blank line here:", "noPattern");
  await write("   ", "empty");
  await write("A B ".repeat(400), "tooLong");
  await write("Again.\n\nV V A:Foo\n\nV V A:", "again");
  await tab.close();
  const phone = await opened(browser, settings.page, { width: 390, height: 844, hasTouch: true, isMobile: true }, report);
  await phone.waitForSelector("#icl-playground [role=option]");
  await phone.tap(".icl-playground-induction input");
  await phone.tap('#icl-playground [role="option"][data-index="20"]');
  steps.tapped = await phone.evaluate(state);
  return steps;
}

reported([settings.page], async (browser, report) => {
  report.steps = await operated(browser, report);
});
