"""A real browser without a window, driven over the W3C WebDriver protocol that chromedriver speaks: no package is needed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

DRIVERS = ("chromedriver",)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1300,1000"),
)


def programs() -> tuple[str, str] | None:
    """The driver and the browser, if both are installed."""
    found = [next(filter(None, map(shutil.which, names)), None) for names in (DRIVERS, BROWSERS)]
    return (found[0], found[1]) if found[0] and found[1] else None


class Browser:
    """One window."""

    def __init__(self, driver: str, browser: str) -> None:
        self.profile = tempfile.mkdtemp(prefix="hybridfl-browser-")
        self.process = subprocess.Popen(
            [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout is not None
        said = ""
        for line in self.process.stdout:
            said += line
            if port := re.search(r"started successfully on port (\d+)", line):
                break
        else:
            raise AssertionError(f"{driver} did not start: {said}")
        self.address = f"http://127.0.0.1:{port[1]}/session"
        options = {"binary": browser, "args": [*FLAGS, f"--user-data-dir={self.profile}"]}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": logs}
        session = self._ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        self.address += f"/{session}"

    def _ask(self, how: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=how)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
                return json.loads(answer.read())["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.loads(error.read())["value"]["message"]) from None

    def open(self, page: Path, fragment: str = "") -> None:
        """Loads a file anew; what the logs held before is gone."""
        self._ask("POST", "/url", {"url": "about:blank"})
        self.log("browser"), self.log("performance")
        self._ask("POST", "/url", {"url": page.resolve().as_uri() + fragment})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a JavaScript function returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def texts(self, selector: str) -> list[str]:
        """Of the elements that can be seen."""
        script = "return [...document.querySelectorAll(arguments[0])].filter((e) => e.checkVisibility()).map((e) => e.textContent)"
        found: list[str] = self.run(script, selector)
        return found

    def click(self, selector: str) -> None:
        """The first element that can be seen, in its middle, as a hand would."""
        element = self._ask("POST", "/element", {"using": "css selector", "value": selector})
        self._ask("POST", f"/element/{next(iter(element.values()))}/click", {})

    def press(self, keys: str) -> None:
        """Keys, one after the other, for whatever has the focus."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def print(self) -> str:
        """The page as PDF, in base64."""
        return str(self._ask("POST", "/print", {}))

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What ``browser`` or ``performance`` has noted since it was last asked."""
        found: list[dict[str, Any]] = self._ask("POST", "/se/log", {"type": kind})
        return found

    def requests(self) -> list[str]:
        """Addresses that were asked for since the page was opened."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def close(self) -> None:
        """Ends the browser and its driver."""
        try:
            self._ask("DELETE", "")
        finally:
            self.process.terminate()
            self.process.wait(timeout=30)
            if self.process.stdout is not None:
                self.process.stdout.close()
            shutil.rmtree(self.profile, ignore_errors=True)
