"""The guard in front of any frontend, without sockets."""

import asyncio

import pytest

from core.errors import ConfigError
from core.interfaces.http import EXTENSION, RequestRecord
from core.serve.guard import Guard
from core.settings.config import FrontendConfig

UI = "http://localhost:3000"


class Called:
    """What a request got: `status` (200 comes from the application), `headers`, `code`."""

    def __init__(self, *, key=None, method="POST", path="/x", headers=None, **config):
        self.record = RequestRecord()
        self.status, self.headers = 0, {}
        guard = Guard(self._app, FrontendConfig(**config), key)
        fields = {"host": "localhost:30000", **(headers or {})}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
            "extensions": {EXTENSION: self.record},
        }
        asyncio.run(guard(scope, None, self._send))
        self.code = self.record.code

    async def _app(self, scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def _send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
            sent = [*message["headers"], *self.record.headers]
            self.headers = {name.decode(): value.decode() for name, value in sent}


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("POST", {}, 200),  # curl, a library
        ("POST", {"origin": "http://evil.example"}, 403),
        ("POST", {"origin": "http://evil.example", "content-type": "text/plain"}, 403),
        ("POST", {"origin": "null"}, 403),
        ("POST", {"origin": "http://localhost:3000"}, 403),  # another port is another origin
        ("POST", {"origin": UI, "sec-fetch-site": "same-site"}, 403),
        ("POST", {"origin": "http://localhost:30000"}, 200),
        ("POST", {"origin": "https://LOCALHOST:30000"}, 200),  # behind a proxy with TLS
        ("POST", {"origin": "http://localhost:30000.evil.example"}, 403),
        ("POST", {"origin": "http://proxied.example", "sec-fetch-site": "same-origin"}, 200),
        ("POST", {"sec-fetch-site": "cross-site"}, 403),
        ("GET", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ("GET", {"sec-fetch-site": "same-site"}, 403),
        ("GET", {"sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, 200),
        ("GET", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),  # a link
        ("POST", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 403),  # a form
        ("OPTIONS", {"origin": UI, "access-control-request-method": "POST"}, 403),
        ("OPTIONS", {}, 200),
    ],
)
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_pages_of_other_origins(method, headers, status, host):
    called = Called(method=method, headers=headers, host=host, allow_anonymous=True)
    assert called.status == status
    assert called.code == ("cross_origin" if status == 403 else "")
    assert "access-control-allow-origin" not in called.headers


def test_a_listed_origin_may_call_and_read():
    called = Called(headers={"origin": UI, "sec-fetch-site": "same-site"}, cors_origins=[UI])
    assert called.status == 200
    assert called.headers["access-control-allow-origin"] == UI
    assert called.headers["vary"] == "Origin"
    other = Called(headers={"origin": "http://localhost:3001"}, cors_origins=[UI])
    assert (other.status, "access-control-allow-origin" in other.headers) == (403, False)
    anybody = Called(headers={"origin": "null"}, cors_origins=["*"])
    assert (anybody.status, anybody.headers["access-control-allow-origin"]) == (200, "*")


@pytest.mark.parametrize("key", [None, "key"])
def test_a_preflight_is_answered_without_the_key(key):
    asked = {
        "origin": UI,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
        "access-control-request-private-network": "true",
    }
    called = Called(key=key, method="OPTIONS", headers=asked, cors_origins=[UI])
    assert called.status == 204
    assert called.headers == {
        "access-control-allow-origin": UI,
        "access-control-allow-methods": "POST",
        "access-control-allow-headers": "authorization,content-type",
        "access-control-allow-private-network": "true",
        "access-control-expose-headers": "*",
        "access-control-max-age": "600",
        "vary": "Origin",
    }
    assert Called(key=key, method="OPTIONS", headers=asked).status == 403
    hostile = {**asked, "access-control-request-headers": "a\r\nset-cookie: b"}
    called = Called(method="OPTIONS", headers=hostile, cors_origins=[UI])
    assert "access-control-allow-headers" not in called.headers


def test_the_key_decides_where_there_is_one():
    """A page can't send it unless a preflight allowed that."""
    origin = {"origin": "app://desktop"}
    right = {"authorization": "Bearer key"}
    assert Called(key="key", headers=origin | right).status == 200
    assert Called(key="key", headers=origin).status == 401
    assert Called(key="key", headers=right).status == 200
    assert Called(key="key", headers={"authorization": "Bearer kex"}).code == "invalid_api_key"
    assert Called(key="key", path="/health").status == 200
    assert Called(key="key", path="/health/").status == 401
    assert Called(key="key", path="/health", headers=origin).status == 403
    readable = Called(key="key", headers={"origin": UI}, cors_origins=[UI])
    assert readable.status == 401
    assert readable.headers["access-control-allow-origin"] == UI, "the page may read the refusal"


@pytest.mark.parametrize(
    ("host", "allowed", "sent", "status"),
    [
        ("127.0.0.1", [], "evil.example", 403),
        ("127.0.0.1", [], "10.0.0.5:30000", 403),
        ("127.0.0.1", ["ours.example"], "OURS.example:1", 200),
        ("0.0.0.0", [], "any.example", 200),
        ("0.0.0.0", ["ours.example"], "any.example", 403),
        ("0.0.0.0", ["ours.example"], "ours.example", 200),
        ("0.0.0.0", ["ours.example"], "10.0.0.5:30000", 200),
        ("0.0.0.0", ["ours.example"], "[fe80::1]:30000", 200),
        ("0.0.0.0", ["ours.example"], "10.0.0.5.evil.example", 403),
    ],
)
def test_hosts(host, allowed, sent, status):
    called = Called(host=host, allowed_hosts=allowed, headers={"host": sent})
    assert (called.status, called.code) == (status, "invalid_host" if status == 403 else "")


@pytest.mark.parametrize("origin", ["localhost:3000", "http://a/", "http://", "http://a b", ""])
def test_what_is_no_origin(origin):
    with pytest.raises(ConfigError, match=r"frontend\.cors_origins holds"):
        FrontendConfig(cors_origins=[origin])
    FrontendConfig(cors_origins=["*", "https://a.example:8443", "chrome-extension://abc"])
