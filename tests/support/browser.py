"""A real browser for tests: Chromium without a window, and a page of another origin for it.

with served_page() as page:
    page.script = "return 1 + 1;"
    with visited(page, page.origin):
        assert page.report() == 2
"""

import http.server
import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Queue
from typing import Any

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WAIT_S = 120
EVIL = "evil.test"  # a name that the browser finds on this machine

PAGE = """<!doctype html><title>page</title><body><script type="module">
const report = (value) => fetch("/report", {method: "POST", body: JSON.stringify(value)});
const main = async () => { SCRIPT };
main().then(report, (error) => report({"failed": String(error.stack)}));
</script></body>"""


@dataclass
class Page:
    """Where the page is, and what it reports. `script` is the body of an async function, whose
    result is reported."""

    port: int
    script: str = ""
    reports: Queue[Any] = field(default_factory=Queue)

    def report(self) -> Any:
        """The next one."""
        return self.reports.get(timeout=WAIT_S)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def evil_origin(self) -> str:
        return f"http://{EVIL}:{self.port}"


@contextmanager
def served_page() -> Iterator[Page]:
    """A page on a port of its own."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/" else 404)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            if self.path == "/":
                self.wfile.write(PAGE.replace("SCRIPT", page.script).encode())

        def do_POST(self) -> None:
            page.reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    page = Page(server.server_address[1])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield page
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def visited(page: Page, origin: str) -> Iterator[None]:
    """A browser that opens the page under that origin, and is closed at the end."""
    assert BROWSER is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = subprocess.Popen(
            [
                BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-dev-shm-usage", f"--user-data-dir={profile}",
                f"--host-resolver-rules=MAP {EVIL} 127.0.0.1", "--remote-debugging-port=0",
                origin + "/",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            yield
        finally:
            browser.terminate()
            try:
                browser.wait(20)
            except subprocess.TimeoutExpired:
                browser.kill()
                browser.wait()
