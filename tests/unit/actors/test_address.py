"""What is found out about an address and a folder before Ray is asked, on sockets of loopback."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from rayk.actors import address
from rayk.actors.address import host_and_port, knock, make_temp_dir, refusal, running_address
from rayk.errors import ConfigError

HTTP2 = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """An address where one caller gets `answer`; None says nothing, and keeps the line open."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            line, _ = server.accept()
            with line, suppress(OSError):  # of a caller that has heard enough
                if answer is not None:
                    line.sendall(answer)
                    line.shutdown(socket.SHUT_WR)
                while line.recv(1 << 10):
                    pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join(10)


def test_who_speaks_as_ray_does_is_taken_for_one() -> None:
    with listening(HTTP2) as place:
        knock(place)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH", b""])
def test_who_says_something_else_is_not(answer: bytes) -> None:
    with listening(answer) as place, pytest.raises(ConnectionError, match="something else than Ray listens"):
        knock(place)


def test_who_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "PATIENCE", 0.05)
    with listening(None) as place, pytest.raises(ConnectionError, match="something is there and says nothing"):
        knock(place)


def test_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConnectionError, match="nobody listens there"):
        knock(f"127.0.0.1:{port}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert running_address() is None
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{port}\n")
    assert running_address() is None  # a record of a cluster that is gone
    with listening(HTTP2) as place:
        (tmp_path / "ray" / "ray_current_cluster").write_text(place)
        assert running_address() == place


def test_other_forms_of_addresses_are_left_to_ray() -> None:
    assert [host_and_port(each) for each in ("auto", "ray://host:1", "host", ":1")] == [None] * 4
    assert host_and_port("host:1") == ("host", 1)
    knock("ray://nobody:1")


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "it is not set here"),
        ({"RAY_AUTH_MODE": "disabled"}, "it is 'disabled' here"),
        ({"RAY_AUTH_MODE": "token"}, "RAY_AUTH_TOKEN is not set here"),
        ({"RAY_AUTH_MODE": "Token", "RAY_AUTH_TOKEN": "secret"}, "RAY_AUTH_TOKEN here has another"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "secret"}, "RAY_AUTH_TOKEN_PATH here has another"),
    ],
)
def test_a_refusal_names_what_to_set(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], says: str) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    text = refusal("host:1")
    assert says in text and "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to" in text
    assert "'host:1'" in text and "\n" not in text and "secret" not in text


def test_folders_that_cannot_hold_rays_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/nowhere")
    with pytest.raises(
        ConfigError, match=r"RAY_TMPDIR='/nowhere' cannot hold .*No such file.*exists and can be written"
    ):
        make_temp_dir()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setattr(
        tempfile, "mkdtemp", lambda **_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(ConfigError, match=r"cannot hold Ray's files \(Permission denied\)"):
        make_temp_dir()


def test_a_path_that_leaves_no_room_for_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest one that is let through is one that Ray can use: the path of its socket has 107 bytes at most."""
    socket_name = f"/session_2026-11-30_12-34-56_123456_{os.getpid()}/sockets/plasma_store"
    with tempfile.TemporaryDirectory(prefix="rk-") as short:
        room = 107 - len(socket_name) - len("/rayk-12345678")
        for size, fits in ((room, True), (room + 1, False)):
            folder = Path(short, "x" * (size - len(short) - 1))
            folder.mkdir()
            monkeypatch.setenv("RAY_TMPDIR", str(folder))
            if fits:
                assert len(make_temp_dir() + socket_name) == 107
            else:
                with pytest.raises(
                    ConfigError, match=rf"{size} bytes long, .* room for {room}; set RAY_TMPDIR to a sh"
                ):
                    make_temp_dir()
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setattr(tempfile, "tempdir", "/" + "y" * 90)
    with pytest.raises(ConfigError, match="the folder for temporary files, '/y"):
        make_temp_dir()
