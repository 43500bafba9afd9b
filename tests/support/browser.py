"""Debian's Chromium without a window, driven over the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import shutil
import subprocess
import tempfile
from pathlib import Path

import aiohttp
import pytest
from support.mounts import unavailable
from support.waiting import PATIENCE_S, wait_until

# A browser that starts beside other tests on two cores takes some seconds.
_START_S = 60.0
_ANSWER_S = 30.0
_FLAGS = (
    *("--headless=new", "--remote-debugging-port=0", "--no-first-run", "--no-default-browser-check"),
    *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions", "--mute-audio"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--no-proxy-server"),
)


class Browser:
    """One browser process; each :meth:`open` is a tab of its own with cookies of its own."""

    def __init__(self, program):
        self._home = tempfile.mkdtemp(prefix="ckbrowser", dir="/tmp")
        self._process = subprocess.Popen(
            [program, *_FLAGS, f"--user-data-dir={self._home}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._loop = asyncio.new_event_loop()
        self._number = 0
        self.tabs = {}
        active = Path(self._home, "DevToolsActivePort")
        wait_until(lambda: active.exists() and "\n" in active.read_text(), "the browser's port", timeout_s=_START_S)
        port, path = active.read_text().split("\n")[:2]
        self._run(self._connect(f"ws://127.0.0.1:{port}{path}"))

    def open(self, url, *, width=1280, height=900, scale=1, dark=False, phone=False):
        """Open a page and wait until it has been loaded."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self.tabs[session] = Tab(self, session, context)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.call("Emulation.setEmulatedMedia", features=[scheme])
        tab.go(url)
        return tab

    def call(self, method, session=None, **parameters):
        """Call a method and return its result; events that come meanwhile go to their tabs."""
        return self._run(self._call(method, session, parameters))

    def close(self):
        """End it and remove what it left."""
        self._run(self._disconnect())
        self._loop.close()
        self._process.terminate()
        self._process.wait(PATIENCE_S)
        shutil.rmtree(self._home, ignore_errors=True)

    def _run(self, work):
        return self._loop.run_until_complete(asyncio.wait_for(work, _ANSWER_S))

    async def _connect(self, url):
        self._client = aiohttp.ClientSession()
        self._socket = await self._client.ws_connect(url, max_msg_size=0)

    async def _disconnect(self):
        await self._socket.close()
        await self._client.close()

    async def _call(self, method, session, parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        await self._socket.send_json({**message, "sessionId": session} if session else message)
        while True:
            answer = await self._socket.receive_json()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            tab = self.tabs.get(answer.get("sessionId"))
            if tab is not None:
                tab.hear(answer["method"], answer["params"])


class Tab:
    """One page.

    Attributes:
        complaints: What the console showed as errors or warnings, and requests that were refused or failed.
    """

    def __init__(self, browser, session, context):
        self._browser, self._session, self._context = browser, session, context
        self.complaints = []
        self.urls = []

    def call(self, method, **parameters):
        """Call a method for this page."""
        return self._browser.call(method, self._session, **parameters)

    def go(self, url):
        """Load a page."""
        answer = self.call("Page.navigate", url=url)
        assert "errorText" not in answer, answer
        self.wait("document.readyState === 'complete'", "the page to be loaded")

    def get(self, expression):
        """Return the value of an expression of JavaScript."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression, what, *, timeout_s=PATIENCE_S):
        """Wait until an expression is true."""
        try:
            wait_until(lambda: self.get(f"!!({expression})"), what, timeout_s=timeout_s)
        except AssertionError:
            raise AssertionError(f"not seen: {what}; the page shows {self.text()!r}, {self.complaints}") from None

    def text(self):
        """Return what a reader sees."""
        return self.get("document.body.innerText")

    def hear(self, method, event):
        """Note what the browser complains of."""
        if method == "Runtime.consoleAPICalled" and event["type"] in {"error", "warning", "assert"}:
            self.complaints.append(str([argument.get("value") for argument in event["args"]]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(event["exceptionDetails"]))
        elif method == "Log.entryAdded" and event["entry"]["level"] in {"error", "warning"}:
            self.complaints.append(event["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.urls.append(event["request"]["url"])

    def picture(self, *, whole=False):
        """Return a PNG of what is seen, or of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])

    def close(self):
        """Close the page."""
        self._browser.call("Target.disposeBrowserContext", browserContextId=self._context)
        del self._browser.tabs[self._session]


@pytest.fixture(scope="session")
def browser():
    """A browser for all tests."""
    program = shutil.which("chromium")
    if program is None:
        unavailable("no chromium here; `make system-packages` installs it")
    browser = Browser(program)
    yield browser
    browser.close()


@pytest.fixture
def tab(browser):
    """Open pages: ``tab(url, ...)``; they are closed at the end and must have had nothing to complain of."""
    opened = []

    def open_tab(url, **options):
        opened.append(browser.open(url, **options))
        return opened[-1]

    yield open_tab
    complaints = [complaint for page in opened for complaint in page.complaints]
    for page in opened:
        page.close()
    assert not complaints, complaints
