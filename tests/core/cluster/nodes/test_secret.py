"""The cluster token and its keys."""

from pathlib import Path

import pytest

from core.cluster.nodes.secret import TOKEN_VARIABLE, ClusterKeys, derive, load_keys
from core.errors import ConfigError
from core.settings.config import ClusterConfig

TOKEN = "0123456789abcdef"


def token_file(folder: Path, contents: str, mode: int = 0o600) -> ClusterConfig:
    path = folder / "token"
    path.write_text(contents)
    path.chmod(mode)
    return ClusterConfig(token_file=str(path))


def test_file_and_environment_give_the_same_keys(tmp_path: Path) -> None:
    """A newline at the end of the file does not count."""
    config = token_file(tmp_path, TOKEN + "\n")
    keys = load_keys(config, {TOKEN_VARIABLE: "another token of the environment"})
    assert keys == load_keys(ClusterConfig(), {TOKEN_VARIABLE: TOKEN}) == derive(TOKEN.encode())


def test_keys_differ_by_purpose_and_token() -> None:
    keys, other = derive(TOKEN.encode()), derive(TOKEN.encode()[:-1] + b"g")
    found = {keys.link, bytes.fromhex(keys.wire), other.link, bytes.fromhex(other.wire)}
    assert len(found) == 4
    assert all(len(key) == 32 for key in found)


def test_all_of_a_long_token_counts() -> None:
    assert derive(b"x" * 200 + b"a") != derive(b"x" * 200 + b"b")


def test_keys_are_not_shown() -> None:
    keys = derive(TOKEN.encode())
    assert repr(keys) == f"{ClusterKeys.__name__}()"


def test_without_a_token_the_error_says_how_to_make_one() -> None:
    with pytest.raises(ConfigError, match=r"openssl rand -hex 32 > FILE.*cluster\.token_file=FILE"):
        load_keys(ClusterConfig(), {TOKEN_VARIABLE: ""})


@pytest.mark.parametrize(
    ("contents", "mode", "fragment"),
    [
        (TOKEN[:-1], 0o600, "has 15 bytes; allowed: 16 to 4096"),
        (" \n", 0o600, "has 0 bytes"),
        ("x" * 5000, 0o600, "allowed: 16 to 4096"),
        (TOKEN, 0o640, r"other users may use this file \(mode 0640\); run `chmod 600 "),
        (TOKEN, 0o604, r"mode 0604"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, contents: str, mode: int, fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment) as caught:
        load_keys(token_file(tmp_path, contents, mode), {})
    assert "cluster.token_file=" in str(caught.value)
    assert contents.strip() == "" or contents not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.token_file=.*/none: No such file"):
        load_keys(ClusterConfig(token_file=str(tmp_path / "none")), {})
