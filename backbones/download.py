"""Files of published weights: from the caches of torch.hub and the Hugging Face hub, else from the network.

What is received is resumed after a broken connection, checked, and gets its name only when it is whole. Proxies are
those of the environment (``https_proxy`` ...); with ``HF_HUB_OFFLINE`` nothing is asked for.

`foveal.load` and ``foveal convert`` come here. ``timm.create_model(NAME, pretrained=True)`` does not: timm asks the
hub's client, or, where the hub has no copy, torch.hub, which downloads into the same folder as this module and compares
nothing (after ``timm.models.set_pretrained_check_hash(True)``, what it downloads with a hash at the end of the file's
name, which only the HaloNet hybrids' have). So a file that was fetched here is the one that timm then reads, and one
that timm fetched is checked here.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import zlib
from collections.abc import Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import huggingface_hub
import torch
from filelock import FileLock

HUB = "hf://"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # what a repository may hold the weights in
_TIMEOUT = 10  # seconds without any answer
_ATTEMPTS = 4  # that bring nothing, in a row
_PAUSE = 1.0  # seconds before another one
_CHUNK = 1 << 20
_PAGES = ("text/html", "text/xml", "application/xhtml+xml", "application/xml", "application/json")


def fetch(name: str, addresses: Sequence[str], sha256: str | None = None) -> Path:
    """The file of the weights ``name``: the first that a cache holds, else the first that a server gives.

    Args:
        addresses: where the file is, in the order in which to ask: ``https://...``, or ``hf://OWNER/REPOSITORY``
            (with ``@REVISION`` and ``/FILE`` if they are to be others than the repository's default).
        sha256: of the file at the web addresses, or how it begins. Without it the hash is written beside the file at
            first, ``FILE.sha256``, and held from then on.

    Raises:
        OSError: if a cached file is not the one that was recorded; or if there is none and no server has the file: the
            message lists what was tried and says where to put it by hand.
    """
    for address in addresses:
        file = _cached(address)
        if file is not None:
            if address.startswith(HUB):
                _check_blob(file)
            else:
                _record(file, _compare(file, file, sha256))
            return file

    failures = []
    for address in addresses:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            failures.append(f"{address}: HF_HUB_OFFLINE is set, so nothing is downloaded")
            continue
        if address.startswith(HUB):
            file = _from_hub(address, failures)
            if file is not None:
                return file
            continue
        try:
            return download(address, _place(address), sha256)
        except OSError as error:
            failures.append(f"{address}: {_first_lines(error)}")
    by_hand = [address for address in addresses if not address.startswith(HUB)]
    if by_hand:
        advice = f"Download {by_hand[0]} elsewhere and put it at {_place(by_hand[0])}"
    else:
        advice = f"See https://huggingface.co/{addresses[0].removeprefix(HUB)}"
    raise OSError(f"cannot fetch the weights of {name} ({'; '.join(failures)}). {advice}")


def download(address: str, target: Path, sha256: str | None = None) -> Path:
    """Receive a file under a temporary name beside ``target``, check it, and rename it to ``target``; returns that.

    A broken connection is taken up where it broke, also by another process later, if the server can do that and says
    that the file is still the same. ``target.sha256`` holds the hash of what was received first: if the address gives
    something else later, that is an error.

    Raises:
        OSError: if there is no answer, another one than the file, or the file is not the one expected.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_file():  # from another process, while this one waited
            return target
        # another address may hold another file of that name
        part = target.with_name(f"{target.name}.{zlib.crc32(address.encode()):08x}.part")
        _receive(address, part)
        try:
            digest = _compare(part, target, sha256)
        except OSError:
            _forget(part)
            raise
        os.replace(part, target)
        _forget(part)
        _record(target, digest)
    return target


def file_sha256(file: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def recorded_sha256(address: str) -> str | None:
    """The hash that was written down when the file of a web address was first received; None if it never was."""
    if address.startswith(HUB):
        return None
    record = _hash_file(_place(address))
    return (record.read_text(encoding="utf-8").split() or [None])[0] if record.is_file() else None


# ---- servers


def _receive(address: str, part: Path) -> None:
    """Bring ``part`` to the size of the file; what is there already is kept, if it is of the same file."""
    furthest, fruitless = 0, 0
    while True:
        total, trouble = None, "it ended early"
        try:
            with _ask(address, part) as response:
                total = _write(response, part)
        except HTTPError as error:
            if error.code == 416 and part.exists():  # there is nothing after what is there
                if error.headers.get("Content-Range") == f"bytes */{part.stat().st_size}":
                    return
                _forget(part)
            elif error.code < 500 and error.code != 429:
                raise
            trouble = str(error)
        except (ConnectionError, TimeoutError, HTTPException, URLError) as error:
            if isinstance(error, URLError) and not furthest:
                raise  # no server there; one that answered before may come back
            trouble = str(error) or type(error).__name__
        size = part.stat().st_size if part.exists() else 0
        if size and size == total:
            return
        fruitless = 0 if size > furthest else fruitless + 1
        furthest = max(furthest, size)
        if fruitless == _ATTEMPTS:
            raise OSError(f"the connection broke again and again, the last time after {size:,} bytes: {trouble}")
        time.sleep(_PAUSE)


def _ask(address: str, part: Path) -> HTTPResponse:
    headers = {"User-Agent": "foveal", "Accept-Encoding": "identity"}
    if kept := _kept_version(part):
        headers |= {"Range": f"bytes={part.stat().st_size}-", "If-Range": kept}
    return urlopen(Request(address, headers=headers), timeout=_TIMEOUT)


def _write(response: HTTPResponse, part: Path) -> int | None:
    """Append or begin anew, as the answer says. Returns the size of the whole file, if untold of what came."""
    kind, coding = response.headers.get_content_type(), response.headers.get("Content-Encoding", "identity")
    if kind in _PAGES:
        raise OSError(f"it answers with a web page instead of the file ({kind})")
    if coding.lower() not in ("", "identity"):  # what came would be kept as it came
        raise OSError(f"it sends the file in another coding than asked for, {coding}")
    tag, date = response.headers.get("ETag", ""), response.headers.get("Last-Modified")
    start, total = 0, None
    if response.status == 206:
        extent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        kept = _kept_version(part)
        if extent is None or int(extent[1]) != (part.stat().st_size if kept else 0):
            _forget(part)
            raise ConnectionError(f"it continues at another place: {response.headers.get('Content-Range')}")
        start, total = int(extent[1]), int(extent[2])
        if start and ((tag if kept.startswith('"') else date) or kept) != kept:  # the server does not look at If-Range
            _forget(part)
            raise ConnectionError("the file was replaced meanwhile")
    elif (length := response.headers.get("Content-Length", "")).isdecimal():
        total = int(length)
    elif not response.chunked:  # whose end is marked
        raise OSError(f"it does not say how long the file is (Content-Length {length or 'missing'})")
    if not start:
        _forget(part)
        version = tag if tag.startswith('"') else date  # a weak tag does not identify
        if version:
            _version_file(part).write_text(version, encoding="utf-8")
    with part.open("ab" if start else "wb") as out:
        while block := response.read(_CHUNK):
            out.write(block)
    size = part.stat().st_size
    if total is not None and size > total:
        _forget(part)
        raise OSError(f"it sent {size:,} bytes, more than the {total:,} that it announced")
    return size if total is None else total


def _from_hub(address: str, failures: list[str]) -> Path | None:
    """The file of a repository, by the hub's own client; None and what went wrong, if it has none."""
    repository, revision, names = _hub(address)
    for file in names:
        location = huggingface_hub.hf_hub_url(repository, file, revision=revision)
        try:
            # the client tries again for a minute where nobody answers
            with urlopen(Request(location, method="HEAD", headers={"User-Agent": "foveal"}), timeout=_TIMEOUT):
                pass
            return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
        except OSError as error:
            failures.append(f"{location}: {_first_lines(error)}")
            if not isinstance(error, HTTPError):
                break  # no server, so no other file of it
    return None


# ---- what is there already


def _cached(address: str) -> Path | None:
    if not address.startswith(HUB):
        place = _place(address)
        return place if place.is_file() else None
    repository, revision, names = _hub(address)
    for file in names:
        path = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision)
        if isinstance(path, str):
            return Path(path)
    return None


def _place(address: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(address).path).name


def _hub(address: str) -> tuple[str, str | None, tuple[str, ...]]:
    """Repository, revision and the names that its file may have."""
    owner, repository, *file = address.removeprefix(HUB).split("/", 2)
    repository, _, revision = repository.partition("@")
    return f"{owner}/{repository}", revision or None, tuple(file) or _HUB_FILES


def _check_blob(file: Path) -> None:
    """Raise OSError if a file of the hub's cache has changed; large ones are named by their hash there."""
    known = file.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", known) and (digest := file_sha256(file)) != known:
        raise OSError(f"{file} is damaged: its sha256 is {digest}, it was {known}. Delete it to fetch it again")


def _compare(file: Path, target: Path, sha256: str | None) -> str:
    """The hash of ``file``, which is or becomes ``target``; OSError if it is not the one that is known of that."""
    digest = file_sha256(file)
    if sha256 is not None and not digest.startswith(sha256):
        raise OSError(f"{target.name} is not the published file: its sha256 is {digest}, it should be {sha256}")
    record = _hash_file(target)
    if record.is_file():
        known = record.read_text(encoding="utf-8").split()[:1]
        if known != [digest]:
            raise OSError(
                f"{target.name} is not the file that was first received: its sha256 is {digest}, {record} says "
                f"{' '.join(known) or 'nothing'}. Delete that file if you trust this one"
            )
    return digest


def _record(target: Path, digest: str) -> None:
    record = _hash_file(target)
    if record.is_file() or not os.access(target.parent, os.W_OK):  # a shared cache may be read-only
        return
    temporary = record.with_name(f"{record.name}.{os.getpid()}.new")
    temporary.write_text(f"{digest}  {target.name}\n", encoding="utf-8")
    os.replace(temporary, record)


def _hash_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def _version_file(part: Path) -> Path:
    return part.with_suffix(".version")


def _kept_version(part: Path) -> str | None:
    """Of which version of the file the bytes in ``part`` are; None if there are none, or it was not told."""
    version = _version_file(part)
    return version.read_text(encoding="utf-8") if part.exists() and version.is_file() else None


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version_file(part).unlink(missing_ok=True)


def _first_lines(error: BaseException, count: int = 3) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count]) + (" ..." if len(lines) > count else "")
