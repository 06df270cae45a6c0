// What the checks in a browser share: Chromium, a page in it whose complaints are noted, and axe.
// `settings` has `chromium`, `profile`, `root`, the folder of the pages, and perhaps `printed`, one of
// them; a report has the lists `console`, `foreign`, `wide` and `violations`.
"use strict";
const path = require("path");
const { pathToFileURL } = require("url");
const puppeteer = require("puppeteer-core");
const axe = require("axe-core");

module.exports = (settings) => {
  const address = (page) => pathToFileURL(path.join(settings.root, page)).href;

  const launch = () => puppeteer.launch({
    executablePath: settings.chromium,
    userDataDir: settings.profile,
    args: ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
      "--disable-background-networking", "--disable-component-update"],
  });

  async function opened(browser, page, view, report) {
    const tab = await browser.newPage();
    const note = (text) => report.console.push(`${page} at ${view.width}: ${text}`);
    tab.on("console", (message) => ["error", "warning"].includes(message.type()) && note(message.text()));
    tab.on("pageerror", (error) => note(error.message));
    tab.on("requestfailed", (request) => note(`${request.url()} was not loaded`));
    tab.on("request", (request) => {
      if (/^(https?|wss?):/.test(request.url())) report.foreign.push(`${page}: ${request.url()}`);
    });
    await tab.setViewport({ height: 900, ...view });
    await tab.goto(address(page), { waitUntil: "load" });
    return tab;
  }

  async function checked(browser, page, width, report) {
    const tab = await opened(browser, page, { width }, report);
    // Colours fade from one theme to the other: here they change at once.
    await tab.addStyleTag({ content: "*, ::before, ::after { transition: none !important }" });
    await tab.evaluate(axe.source);
    for (const theme of ["light", "dark"]) {
      await tab.evaluate((mode) => {
        document.documentElement.dataset.theme = mode;
        document.documentElement.dataset.mode = mode;
      }, theme);
      const size = await tab.evaluate(() => [document.documentElement.scrollWidth, window.innerWidth]);
      if (size[0] > size[1]) report.wide.push(`${page} at ${width}: ${size[0]}`);
      // No script is there to make the page for paper dark.
      if (page === settings.printed && theme === "dark") continue;
      const found = await tab.evaluate(() => axe.run({ resultTypes: ["violations"], preload: false }));
      for (const violation of found.violations) {
        if (!["serious", "critical"].includes(violation.impact)) continue;
        const where = violation.nodes.slice(0, 3).map((node) => `${node.target} ${node.html.slice(0, 160)}`);
        const count = violation.nodes.length;
        report.violations.push(`${page} at ${width}, ${theme}: ${violation.id} (${count}): ${where.join("; ")}`);
      }
    }
    await tab.close();
  }

  // Every page named at each width and in both themes, then what `more` does; the report is printed.
  function reported(pages, more) {
    const report = { console: [], foreign: [], wide: [], violations: [] };
    const whole = async () => {
      const browser = await launch();
      try {
        for (const page of pages) {
          await Promise.all(settings.widths.map((width) => checked(browser, page, width, report)));
        }
        await more(browser, report);
      } finally {
        await browser.close();
      }
      console.log(JSON.stringify(report));
    };
    whole().catch((error) => {
      console.error(error);
      process.exit(1);
    });
  }

  return { address, opened, reported };
};
