"""What a page of another origin can do to a server on loopback, tried in a real browser.

Needs Chromium (`apt-get install chromium`); skipped without it.
"""

# ruff: noqa: E501  (scripts of pages)

import threading

import pytest

from tests.support.browser import BROWSER, EVIL, served_page, visited
from tests.support.http_stack import ANSWER, Stack

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here"),
    pytest.mark.timeout(300),
]
KEY = "k" * 40

# Everything that needs no preflight, and the rest as well. Each attempt says how it ended, so that
# one that the browser itself never made is seen.
ATTEMPTS = r"""
const url = "BASE/v1/chat/completions", get = "BASE/v1/models";
const text = '{"messages": [{"role": "user", "content": "hi"}]}';
const found = {};
const attempt = async (name, make) => {
  try { found[name] = String(await make()); } catch (error) { found[name] = "error: " + error.name; }
};
const post = (options) => async () => {
  const answer = await fetch(url, {method: "POST", body: text, ...options});
  return answer.type + " " + answer.status;
};
const plain = {"Content-Type": "text/plain"}, form = {"Content-Type": "application/x-www-form-urlencoded"};
const event = (thing, good, bad) => new Promise((done) => {
  thing.addEventListener(good, () => done(good)); thing.addEventListener(bad, () => done(bad));
});
const element = (tag, options, good, bad) => () => {
  const made = document.createElement(tag);
  const ended = event(made, good, bad);
  Object.assign(made, options);
  document.body.append(made);
  return ended;
};
const submit = (enctype) => () => {
  const frame = document.createElement("iframe");
  frame.name = "frame-" + enctype;
  const made = document.createElement("form");
  Object.assign(made, {method: "POST", action: url, target: frame.name, enctype: enctype});
  const input = document.createElement("input");
  Object.assign(input, {type: "hidden", name: text.slice(0, -1) + ', "user": "', value: '"}'});
  made.append(input);
  document.body.append(frame, made);
  const ended = event(frame, "load", "error");
  made.submit();
  return ended;
};
await attempt("fetch text no-cors", post({mode: "no-cors", headers: plain}));
await attempt("fetch form no-cors", post({mode: "no-cors", headers: form}));
await attempt("fetch untyped no-cors", post({mode: "no-cors", body: new Blob([text])}));
await attempt("fetch json no-cors", post({mode: "no-cors", body: new Blob([text], {type: "application/json"})}));
await attempt("fetch multipart no-cors", () => {
  const data = new FormData(); data.append("a", new Blob([text], {type: "application/json"}));
  return post({mode: "no-cors", body: data})();
});
await attempt("fetch no-referrer", post({mode: "no-cors", headers: plain, referrerPolicy: "no-referrer"}));
await attempt("fetch with credentials", post({mode: "no-cors", headers: plain, credentials: "include", keepalive: true}));
await attempt("fetch text cors", post({headers: plain}));
await attempt("fetch json cors", post({headers: {"Content-Type": "application/json"}}));
await attempt("fetch get", async () => (await fetch(get, {mode: "no-cors"})).type);
await attempt("beacon", () => navigator.sendBeacon(url, text));
await attempt("beacon blob", () => navigator.sendBeacon(url, new Blob([text], {type: "text/plain"})));
await attempt("xhr", async () => {
  const request = new XMLHttpRequest();
  request.open("POST", url);
  request.setRequestHeader("Content-Type", "text/plain");
  const ended = event(request, "load", "error");
  request.send(text);
  return ended;
});
await attempt("form text", submit("text/plain"));
await attempt("form urlencoded", submit("application/x-www-form-urlencoded"));
await attempt("form multipart", submit("multipart/form-data"));
await attempt("image", element("img", {src: get}, "load", "error"));
await attempt("script", element("script", {src: get}, "load", "error"));
await attempt("style", element("link", {rel: "stylesheet", href: get}, "load", "error"));
await attempt("frame", element("iframe", {src: get}, "load", "error"));
await attempt("event source", () => event(new EventSource(url), "open", "error"));
await attempt("web socket", () => event(new WebSocket(url.replace("http", "ws")), "open", "error"));
await attempt("worker", () => new Promise((done) => {
  const code = `fetch("${url}", {method: "POST", mode: "no-cors", headers: {"Content-Type": "text/plain"},
    body: '${text}'}).then((a) => postMessage(a.type), (e) => postMessage("error: " + e.name))`;
  new Worker(URL.createObjectURL(new Blob([code]))).onmessage = (said) => done(said.data);
}));
await attempt("opaque origin", () => new Promise((done) => {
  addEventListener("message", (said) => done(said.data));
  const frame = document.createElement("iframe");
  frame.sandbox = "allow-scripts";
  frame.srcdoc = `<script>fetch("${url}", {method: "POST", mode: "no-cors", headers: {"Content-Type": "text/plain"},
    body: '${text}'}).then((a) => parent.postMessage(a.type, "*"), (e) => parent.postMessage("error: " + e.name, "*"))</` + "script>";
  document.body.append(frame);
}));
return found;
"""

# A stream read as a client in a page reads it; that something came is reported at once.
STREAM = r"""
const answer = await fetch("BASE/v1/chat/completions", {
  method: "POST",
  headers: {"Content-Type": "application/json", "X-Request-Id": "from-a-page", HEADERS},
  body: JSON.stringify({messages: [{role: "user", content: "hi"}], stream: true}),
});
const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
let text = "";
for (;;) {
  const {done, value} = await reader.read();
  if (done) break;
  if (text === "") await report("begun");
  text += value;
}
const events = text.split("\n\n").filter((line) => line.startsWith("data: {"));
const said = events.map((line) => JSON.parse(line.slice(6)).choices[0].delta.content ?? "").join("");
return {status: answer.status, id: answer.headers.get("x-request-id"), said,
        done: text.endsWith("data: [DONE]\n\n")};
"""


@pytest.mark.parametrize(
    ("base", "is_local_page"),
    [("http://127.0.0.1", True), ("http://localhost", False), (f"http://{EVIL}", False)],
    ids=["page of another port", "page of a site", "page of a site that gave the server its name"],
)
def test_a_page_starts_no_generation(base: str, is_local_page: bool) -> None:
    """Under the server's own names, and under the page's own (DNS rebinding)."""
    with served_page() as page, Stack() as stack:
        port = stack.url.rpartition(":")[2]
        page.script = ATTEMPTS.replace("BASE", f"{base}:{port}")
        with visited(page, page.origin if is_local_page else page.evil_origin):
            found = page.report()
        assert "failed" not in found, found
        assert not stack.engine.seen
        posts = [record for record in stack.records if record.path.endswith("completions")]
        assert len(posts) > 8, "the browser made these requests"
        assert {record.status for record in posts} <= {403, 415}, posts
        # Nothing could be read either.
        assert found["fetch text cors"] == found["fetch json cors"] == "error: TypeError"
        assert found["web socket"] == found["event source"] == found["image"] == "error"


@pytest.mark.parametrize(("origins", "key"), [("listed", KEY), ("*", None)])
def test_a_page_that_is_allowed_streams(origins: str, key: str | None) -> None:
    headers = f'"Authorization": "Bearer {key}"' if key else ""
    with served_page() as page:
        listed = [page.evil_origin] if origins == "listed" else ["*"]
        with Stack(cors_origins=listed, api_key=key) as stack:
            page.script = STREAM.replace("BASE", stack.url).replace("HEADERS", headers)
            permits = stack.engine.permits = threading.Semaphore(2)
            with visited(page, page.evil_origin):
                assert page.report() == "begun", "the page reads while the answer goes on"
                stack.engine.permits = None
                permits.release()
                found = page.report()
            assert len(stack.engine.seen) == 1
    assert found == {"status": 200, "id": "from-a-page", "said": ANSWER, "done": True}
