"""Downloads from a server that breaks off, lies and refuses: what arrives is whole and the right file, or nothing."""

from __future__ import annotations

import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch

import foveal
from foveal.backbones import download
from foveal.backbones.download import fetch
from foveal.weights.download import fetch as fetch_checkpoint
from foveal.weights.manifest import checkpoints

CONTENT = bytes(range(256)) * 4096  # 1 MiB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Answers with CONTENT as its settings say, and keeps the requests: path and Range."""

    content = CONTENT
    tag: str | None = '"1"'
    breaks: int = 0  # how many answers end in the middle
    ranges = True
    status: int | None = None
    page = False
    length = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str | None]] = []

    def handle_error(self, *_: object) -> None:
        pass  # a client that has seen enough hangs up

    def address(self, name: str = "weights.pth") -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers.get("Range")
        server.asked.append((self.path, wanted))
        if server.status is not None or "absent" in self.path:
            self.send_error(server.status or 404)
            return
        start = 0
        same = self.headers.get("If-Range") in (None, server.tag)
        if wanted is not None and server.ranges and same:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        else:
            self.send_response(200)
        body = server.content[start:]
        self.send_header("Content-Type", "text/html" if server.page else "application/octet-stream")
        if server.tag is not None:
            self.send_header("ETag", server.tag)
        if server.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.breaks:
            server.breaks -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setattr(download, "_PAUSE", 0.0)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "hub" / "checkpoints" / "weights.pth"


def left_over(place: Path) -> set[str]:
    return {path.name for path in place.parent.iterdir()} - {f"{place.name}.lock"}


def test_a_file_and_its_record(server: Server, place: Path) -> None:
    assert fetch("x", [server.address()]) == place
    assert place.read_bytes() == CONTENT
    assert place.with_name("weights.pth.sha256").read_text() == f"{DIGEST}  weights.pth\n"
    assert left_over(place) == {"weights.pth", "weights.pth.sha256"}
    fetch("x", [server.address()])
    assert len(server.asked) == 1  # the second time it is there


def test_broken_connections_are_taken_up(server: Server, place: Path) -> None:
    server.breaks = 3
    fetch("x", [server.address()], DIGEST)
    assert place.read_bytes() == CONTENT
    size = len(CONTENT)
    starts = [size - (size >> n) for n in range(4)]
    assert [wanted for _, wanted in server.asked] == [None, *(f"bytes={start}-" for start in starts[1:])]


def test_another_process_takes_it_up(server: Server, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.breaks = 1
    monkeypatch.setattr(download, "_PAUSE", None)  # dies while it waits
    with pytest.raises(TypeError):
        fetch("x", [server.address()])
    assert not place.exists()
    monkeypatch.setattr(download, "_PAUSE", 0.0)
    fetch("x", [server.address()], DIGEST)
    assert server.asked[-1][1] == f"bytes={len(CONTENT) // 2}-"
    assert place.read_bytes() == CONTENT


def test_a_file_that_was_replaced_meanwhile_is_not_patched(
    server: Server, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.breaks = 1
    monkeypatch.setattr(download, "_PAUSE", None)
    with pytest.raises(TypeError):
        fetch("x", [server.address()])
    monkeypatch.setattr(download, "_PAUSE", 0.0)
    server.content, server.tag = CONTENT[::-1], '"2"'
    fetch("x", [server.address()])
    assert place.read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("setting", [{"ranges": False}, {"tag": None}, {"tag": 'W/"1"'}])
def test_servers_that_cannot_continue(setting: dict[str, object], server: Server, place: Path) -> None:
    vars(server).update(setting)
    server.breaks = 2
    fetch("x", [server.address()], DIGEST)
    assert place.read_bytes() == CONTENT


def test_a_replaced_file_where_the_server_does_not_look_at_if_range(
    server: Server, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be half of one and half of the other, with the right size."""
    original = Handler.do_GET

    def answer(self: Handler) -> None:
        if self.headers.get("Range"):
            self.server.content, self.server.tag = CONTENT[::-1], '"2"'
            self.headers.replace_header("If-Range", '"2"')
        original(self)

    monkeypatch.setattr(Handler, "do_GET", answer)
    server.breaks = 1
    fetch("x", [server.address()])
    assert place.read_bytes() == CONTENT[::-1]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({"Content-Encoding": "gzip", "Content-Length": "9"}, "sends the file in another coding than asked for, gzip"),
        ({}, r"does not say how long the file is \(Content-Length missing\)"),
        ({"Content-Length": "many"}, r"does not say how long the file is \(Content-Length many\)"),
        (
            {"Content-Type": "application/xml", "Content-Length": "9"},
            r"web page instead of the file \(application/xml\)",
        ),
    ],
    ids=["compressed", "no length", "no number", "a message"],
)
def test_answers_that_are_not_the_file(
    headers: dict[str, str], says: str, server: Server, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(self: Handler) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"123456789")

    monkeypatch.setattr(Handler, "do_GET", answer)
    with pytest.raises(OSError, match=says):
        fetch("x", [server.address()])
    assert left_over(place) == set()


def test_a_part_that_is_the_whole(server: Server, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 206 that nobody has asked for."""
    original = Handler.do_GET

    def answer(self: Handler) -> None:
        self.headers.add_header("Range", "bytes=0-")
        original(self)

    monkeypatch.setattr(Handler, "do_GET", answer)
    fetch("x", [server.address()])
    assert place.read_bytes() == CONTENT


def test_what_was_complete_but_not_renamed(server: Server, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server says 416 to a range after the end."""
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(download, "_compare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        fetch("x", [server.address()])
    original = Handler.do_GET

    def refuse(self: Handler) -> None:
        if self.headers.get("Range") == f"bytes={len(CONTENT)}-":
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.end_headers()
        else:
            original(self)

    monkeypatch.setattr(Handler, "do_GET", refuse)
    fetch("x", [server.address()], DIGEST)
    assert place.read_bytes() == CONTENT
    assert len(server.asked) == 1


def test_a_connection_that_always_breaks(server: Server, place: Path) -> None:
    server.breaks, server.ranges = 1000, False
    with pytest.raises(
        OSError, match=r"cannot fetch the weights of x .*broke again and again.* 524,288 bytes.*put it at"
    ):
        fetch("x", [server.address()])
    assert not place.exists()


def test_wrong_bytes(server: Server, place: Path) -> None:
    server.content = b"\xff" + CONTENT[1:]
    with pytest.raises(OSError, match=rf"not the published file: its sha256 is [0-9a-f]{{64}}, it should be {DIGEST}"):
        fetch("x", [server.address()], DIGEST)
    assert left_over(place) == set()


def test_mirrors_in_order(server: Server, place: Path) -> None:
    """Nothing there, the wrong file, the right one, one that is not needed: named alike, kept apart."""
    wrong = b"wrong"
    original = Handler.do_GET

    def answer(self: Handler) -> None:
        self.server.content = wrong if "wrong" in self.path else CONTENT
        original(self)

    Handler.do_GET = answer
    try:
        names = ["absent/weights.pth", "wrong/weights.pth", "right/weights.pth", "spare/weights.pth"]
        fetch("x", [server.address(name) for name in names], DIGEST[:8])
    finally:
        Handler.do_GET = original
    assert place.read_bytes() == CONTENT
    assert [path for path, _ in server.asked] == [f"/{name}" for name in names[:3]]


def test_everything_that_was_tried_is_said(server: Server) -> None:
    dead = Server()
    dead.server_close()  # nobody listens there now
    server.page = True
    addresses = [server.address("absent.pth"), dead.address(), server.address()]
    with pytest.raises(OSError, match="cannot fetch the weights of dinat_x") as caught:
        fetch("dinat_x", addresses)
    message = str(caught.value)
    for address, reason in zip(addresses, ("404", "refused", "web page instead of the file"), strict=True):
        assert re.search(rf"{re.escape(address)}: [^;]*{reason}", message)


@pytest.mark.parametrize(("status", "times"), [(404, 1), (403, 1), (503, 4), (429, 4)])
def test_which_answers_are_asked_for_again(status: int, times: int, server: Server) -> None:
    server.status = status
    with pytest.raises(OSError, match=str(status)):
        fetch("x", [server.address()])
    assert len(server.asked) == times


def test_the_first_hash_is_held(server: Server, place: Path) -> None:
    fetch("x", [server.address()])
    place.write_bytes(b"\x01" + CONTENT[1:])  # a bit of the disk
    with pytest.raises(OSError, match=r"weights.pth is not the file that was first received.*\.sha256 says " + DIGEST):
        fetch("x", [server.address()])
    place.unlink()
    server.content = CONTENT[::-1]  # the address holds another file now
    with pytest.raises(OSError, match="not the file that was first received"):
        fetch("x", [server.address()])
    assert not place.exists()
    place.with_name("weights.pth.sha256").unlink()
    fetch("x", [server.address()])
    assert place.read_bytes() == CONTENT[::-1]


def test_a_damaged_file_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = tmp_path / hashlib.sha256(b"good").hexdigest()
    blob.write_bytes(b"good")
    file = tmp_path / "model.safetensors"
    file.symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(file))
    assert fetch("x", ["hf://a/b"]) == file
    blob.write_bytes(b"bad")
    with pytest.raises(OSError, match=r"model\.safetensors is damaged"):
        fetch("x", ["hf://a/b"])


def test_offline(server: Server, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"):
        fetch("x", [server.address(), "hf://a/b"])
    assert server.asked == []
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT)
    assert fetch("x", [server.address()]) == place


def test_a_proxy_of_the_environment(server: Server, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is asked for a host that does not exist: it is the proxy."""
    monkeypatch.setenv("http_proxy", server.address("")[:-1])
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setattr("urllib.request._opener", None)  # made once in a process, with the proxies of its start
    fetch("x", ["http://weights.invalid/weights.pth"])
    assert server.asked == [("http://weights.invalid/weights.pth", None)]


@pytest.mark.slow
def test_the_client_of_the_hub(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a mirror that has nothing; its own process, as the client reads the environment when it is imported."""

    def headers(self: Handler) -> None:
        self.server.asked.append((self.command, self.path))
        found = self.path.endswith("/resolve/main/pytorch_model.bin")
        self.send_response(200 if found else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{DIGEST}"')
        self.send_header("Content-Length", str(len(CONTENT) if found else 0))
        self.end_headers()

    monkeypatch.setattr(Handler, "do_HEAD", headers, raising=False)
    addresses = [server.address("absent.pth"), "hf://someone/model"]
    script = f"from foveal.backbones.download import fetch; print(fetch('x', {addresses}))"
    environment = {**os.environ, "HF_ENDPOINT": server.address("")[:-1], "HF_HUB_CACHE": str(tmp_path / "cache")}
    environment |= {"TORCH_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    file = Path(done.stdout.strip())
    assert file.name == "pytorch_model.bin"
    assert file.read_bytes() == CONTENT
    assert file.resolve().name == DIGEST
    paths = [path for path, _ in server.asked if path.startswith("/")]
    assert paths[0] == "/absent.pth"
    # the second time, without a network
    server.asked.clear()
    environment["HF_HUB_OFFLINE"] = "1"
    again = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert Path(again.stdout.strip()) == file
    assert server.asked == []


@pytest.mark.slow
def test_the_files_of_torch_hub(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """timm reads the one that was fetched here and does not compare it; `foveal.load` does."""

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("a download begins")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setattr(download, "urlopen", no_network)
    model = timm.create_model("overlock_xt")
    file = place.with_name("overlock_xt_in1k_224.pth")
    file.parent.mkdir(parents=True)
    torch.save(model.state_dict(), file)
    weight = foveal.load("overlock_xt.in1k").head[4].weight  # which writes the hash down
    assert torch.equal(weight, model.head[4].weight)
    model.head[4].weight.data[0] += 1
    torch.save(model.state_dict(), file)
    assert not torch.equal(timm.create_model("overlock_xt.in1k", pretrained=True).head[4].weight, weight)
    with pytest.raises(OSError, match="not the file that was first received"):
        foveal.load("overlock_xt.in1k")


def test_one_file_for_two_who_ask(server: Server, place: Path) -> None:
    server.breaks = 1
    errors: list[BaseException] = []

    def ask(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001  for the main thread
            errors.append(error)

    threads = [threading.Thread(target=ask, args=[lambda: fetch("x", [server.address()])]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(server.asked) == 2  # one broke off
    assert place.read_bytes() == CONTENT


def test_checkpoints_of_the_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr("foveal.weights.download.download.fetch", lambda *given: asked.append(given))
    fetch_checkpoint(checkpoints()["dinat_mini.maskrcnn_coco"])
    fetch_checkpoint(checkpoints()["halo26t.a1h_in1k"])
    detector, hybrid = asked
    assert detector[1] == ("https://shi-labs.com/projects/dinat/checkpoints/coco/maskrcnn_dinat_mini.pth",)
    assert hybrid[1][1:] == ("hf://timm/halonet26t.a1h_in1k",)
    assert hybrid[2] == "3083328c"
    with pytest.raises(
        OSError, match=r"CARETrans_S0\.pth\.tar cannot be fetched.*by hand from https:..drive\.google\.com"
    ):
        fetch_checkpoint(checkpoints()["care_s0.in1k"])
