"""A page in headless Chromium, driven through the pipe of its debugging protocol: no driver, no further package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page:
    """``Page(url, width, height)`` as a context manager; ``errors`` are the messages of its console."""

    def __init__(self, url: str, width: int = 1200, height: int = 900) -> None:
        self.url, self.size, self.errors, self.number, self.events = url, (width, height), [], 0, []

    def __enter__(self) -> Page:
        self.profile = tempfile.mkdtemp()
        read, self.write = os.pipe()
        self.read, write = os.pipe()

        def connect() -> None:  # the protocol's pipes are the file descriptors 3 and 4
            ours = os.dup(read), os.dup(write)
            os.dup2(ours[0], 3)
            os.dup2(ours[1], 4)

        command = [
            BROWSER, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
            "--disable-dev-shm-usage", f"--user-data-dir={self.profile}", "--no-first-run", "about:blank",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, preexec_fn=connect, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(read)
        os.close(write)
        self.stream = os.fdopen(self.read, "rb")
        self.session = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.resize(*self.size)
        self.send("Page.navigate", url=self.url)
        self.wait("document.readyState === 'complete'")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        self.stream.close()
        os.close(self.write)
        shutil.rmtree(self.profile, ignore_errors=True)

    def send(self, method: str, **params: object) -> dict:
        """The result of a command; RuntimeError if it fails."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def receive(self) -> dict:
        text = bytearray()
        while (byte := self.stream.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("Chromium has ended")
            text += byte
        answer = json.loads(text)
        params = answer.get("params", {})
        if answer.get("method") == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"].get("exception", params["exceptionDetails"]))
        if answer.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"])
        if answer.get("method") == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.errors.append(params["args"])
        return answer

    def run(self, script: str) -> object:
        """The value of a JavaScript expression, promises awaited."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        look = f"const look = () => ({condition}) ? done() : setTimeout(look, 20)"
        self.run(f"new Promise(done => {{ {look}; look(); }})")

    def resize(self, width: int, height: int) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def click(self, selector: str) -> None:
        """A press of the mouse in the middle of an element."""
        element = f"const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}})"
        middle = "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]"
        x, y = self.run(f"(() => {{ {element}; {middle}; }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, selector: str, key: str, code: int) -> None:
        """A key ("End", 35) while an element has the focus."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)
