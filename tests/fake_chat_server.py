"""An OpenAI-compatible chat server that answers by the mean colour of the picture; a program of its own.

`python fake_chat_server.py PORT LOG [SETTINGS]`: LOG gets a line per request that was answered; SETTINGS is JSON: `key`
that must be sent, `delay` seconds per answer, `fail` HTTP states of the first requests, `drop` how many of the first
are cut off without an answer, `usage` and `logprobs` whether to tell them, `answers` to draw from at a temperature.
"""

import base64
import io
import json
import os
import random
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image, ImageStat

COLOURS = ("red", "green", "blue")
lock = threading.Lock()
trouble: dict[str, list[int]] = {"fail": [], "drop": []}


class Handler(BaseHTTPRequestHandler):
    settings: dict[str, object]
    log: Path

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with lock:
            state = trouble["fail"].pop(0) if trouble["fail"] else 200
            cut = bool(trouble["drop"]) and bool(trouble["drop"].pop(0))
        if self.settings.get("key") and self.headers["Authorization"] != f"Bearer {self.settings['key']}":
            return self.reply(401, {"error": {"message": f"no such key: {self.headers['Authorization']}"}})
        if state != 200:
            return self.reply(state, {"error": {"message": "in trouble"}})
        time.sleep(float(self.settings.get("delay", 0)))
        content = self.answer(body)
        with lock, self.log.open("a") as log:
            log.write(json.dumps({"model": body["model"], "temperature": body["temperature"]}) + "\n")
        if cut:
            self.connection.close()
            return None
        return self.reply(200, content)

    def answer(self, body: dict) -> dict:
        (message,) = body["messages"]
        url = next(part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url")
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        means = ImageStat.Stat(image.convert("RGB")).mean
        word = COLOURS[means.index(max(means))]
        if body["temperature"] > 0:
            word = random.choice(self.settings.get("answers") or COLOURS)
        choice: dict[str, object] = {"message": {"role": "assistant", "content": f" {word.title()}.\n"}}
        if body.get("logprobs") and self.settings.get("logprobs", True):
            others = [other for other in COLOURS if other != word]
            top = [(word.title(), -0.1), (f" {others[0]}", -3.0), (others[0].upper(), -4.0), (others[1][:2], -5.0)]
            first = {"token": word.title(), "logprob": -0.1}
            first["top_logprobs"] = [{"token": t, "logprob": v} for t, v in top[: body["top_logprobs"]]]
            end = {"token": ".", "logprob": -0.2, "top_logprobs": []}
            choice["logprobs"] = {"content": [first, end]}
        content: dict[str, object] = {"choices": [choice]}
        if self.settings.get("usage", True):
            content["usage"] = {"prompt_tokens": 1000, "completion_tokens": 10}
        return content

    def reply(self, state: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(state)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class Server:
    """A process that can be killed and started again on the same port."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.log, self.settings, self.port = folder / "requests.log", settings, 0
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        ready = self.log.with_suffix(".port")
        ready.unlink(missing_ok=True)
        program = [sys.executable, __file__, str(self.port), str(self.log), json.dumps(self.settings)]
        self.process = subprocess.Popen(program)
        deadline = time.monotonic() + 60
        while not (ready.exists() and ready.read_text().endswith(str(self.process.pid))):
            assert self.process.poll() is None, "the server does not start"
            assert time.monotonic() < deadline, "the server does not start in time"
            time.sleep(0.02)
        self.port = int(ready.read_text().split()[0])

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def paid(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


def main() -> None:
    port, log = int(sys.argv[1]), Path(sys.argv[2])
    Handler.settings = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    Handler.log = log
    trouble["fail"] = list(Handler.settings.get("fail", []))
    trouble["drop"] = [1] * int(Handler.settings.get("drop", 0))
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    log.with_suffix(".port").write_text(f"{server.server_port} {os.getpid()}")
    server.serve_forever()


if __name__ == "__main__":
    main()
