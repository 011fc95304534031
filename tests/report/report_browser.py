"""Opens a page in headless Chromium, runs a script in it, and returns what the script says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-extensions", "--disable-dev-shm-usage", "--hide-scrollbars", "--virtual-time-budget=5000",
)  # fmt: skip


def find() -> str | None:
    """Path of an installed Chromium, None without one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def run(browser: str, page: Path, script: str, work: Path, *, screenshot: Path | None = None, size=(1280, 1000)) -> dict:
    """The value of the body of `script` (a JavaScript function body that returns something JSON can hold), run after the page loaded.

    Errors of the page and of the script come back as {"error": text}.
    """
    hook = (
        "<script>window.addEventListener('error', (e) => { window.failed = String(e.message); });</script>",
        "<script>window.addEventListener('load', () => { let out; try { out = (() => {" + script + "})(); } catch (e) { out = { error: String(e) }; }"
        " if (window.failed) out = { error: window.failed };"
        " const pre = document.createElement('pre'); pre.id = 'told'; pre.textContent = JSON.stringify(out); document.body.append(pre); });</script>",
    )
    text = page.read_text(encoding="utf-8").replace("<head>", "<head>" + hook[0], 1).replace("</body>", hook[1] + "</body>", 1)
    copy = work / "hooked.html"
    copy.write_text(text, encoding="utf-8")
    command = [browser, *FLAGS, f"--user-data-dir={work / 'profile'}", f"--window-size={size[0]},{size[1]}"]
    command += [f"--screenshot={screenshot}"] if screenshot else ["--dump-dom"]
    done = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=180)
    if screenshot:
        return {"screenshot": str(screenshot)}
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    if not found:
        return {"error": f"no answer from the page; browser said {done.stderr[-600:]}"}
    return json.loads(unescape(found.group(1)))
