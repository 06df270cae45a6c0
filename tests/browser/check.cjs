// Opens pages of the built book in Chromium and prints, as JSON, what went wrong and what the
// attention viewer showed. Usage: node check.cjs '{"chromium": ..., "profile": ..., "root": ...,
// "pages": [...], "printed": ..., "widths": [...], "viewer": ...}'; puppeteer-core and axe-core are
// those of package.json beside it.
"use strict";
const settings = JSON.parse(process.argv[2]);
const { address, opened, reported } = require("./browser.cjs")(settings);

function state() {
  const root = document.querySelector(".icl-viewer");
  const tokens = [...root.querySelectorAll('[role="option"]')];
  return {
    current: tokens.findIndex((token) => token.getAttribute("aria-selected") === "true"),
    numbers: tokens.map((token) => token.querySelector(".icl-viewer-number").textContent.trim()),
    labels: tokens.map((token) => token.getAttribute("aria-label")),
    focused: tokens.indexOf(document.activeElement),
    report: root.querySelector(".icl-viewer-report").textContent,
    announced: root.querySelector('[role="status"]').textContent,
    blocked: root.querySelector('[role="switch"]').checked,
    choices: [...root.querySelectorAll("select")].map((select) => Number(select.value)),
    tagged: document.activeElement.tagName + (document.activeElement.getAttribute("role") || ""),
  };
}

async function operated(browser, report) {
  const tab = await opened(browser, settings.viewer, { width: 1300 }, report);
  const steps = {};
  const keep = async (name) => { steps[name] = await tab.evaluate(state); };
  const token = (index) => `.icl-viewer [role="option"][data-index="${index}"]`;
  await tab.waitForSelector(token(0));
  steps.data = await tab.$eval('.icl-viewer script[type="application/json"]', (e) => JSON.parse(e.textContent));
  await keep("start");
  await tab.hover(token(20));
  await keep("hovered");
  await tab.click(token(30));
  await keep("clicked");
  await tab.click('.icl-viewer [role="switch"]');
  await keep("switched");
  await tab.select(".icl-viewer select", "1");
  await keep("promptChosen");
  await tab.mouse.move(0, 0);
  await tab.focus(".icl-viewer select");
  for (let press = 0; press < 3; press += 1) await tab.keyboard.press("Tab");
  await keep("tabbed");
  for (const key of ["ArrowLeft", "ArrowLeft", "ArrowUp", "Home", "ArrowRight", "End"]) {
    await tab.keyboard.press(key);
    await keep(key + (steps[key] ? "Again" : ""));
  }
  await tab.keyboard.down("Shift");
  await tab.keyboard.press("Tab");
  await tab.keyboard.up("Shift");
  await tab.keyboard.press("Space");
  await keep("switchedByKey");
  steps.stillThere = (await tab.url()) === address(settings.viewer);
  await tab.close();
  const phone = await browser.newPage();
  await phone.setViewport({ width: 390, height: 844, hasTouch: true, isMobile: true });
  await phone.goto(address(settings.viewer), { waitUntil: "load" });
  await phone.tap(token(25));
  steps.tapped = await phone.evaluate(state);
  return steps;
}

// Whether a reader without scripts, and one on paper, sees the viewer's tokens and a figure.
async function fallenBack(browser) {
  const seen = async (scripts, medium) => {
    const tab = await browser.newPage();
    await tab.setJavaScriptEnabled(scripts);
    await tab.emulateMediaType(medium);
    await tab.goto(address(settings.viewer), { waitUntil: "load" });
    const shown = async (selector) => {
      for (const element of await tab.$$(selector)) {
        const box = await element.boundingBox();
        if (box && box.width > 100 && box.height > 100) return true;
      }
      return false;
    };
    const found = { viewer: await shown(".icl-viewer-tokens"), figure: await shown("figure img") };
    await tab.close();
    return found;
  };
  return { withoutScripts: await seen(false, "screen"), printed: await seen(true, "print") };
}

reported(settings.pages, async (browser, report) => {
  report.viewer = await operated(browser, report);
  report.fallback = await fallenBack(browser);
});
