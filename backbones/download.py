"""Files of published weights, from the caches of torch.hub and the Hugging Face hub or from the network.

Web addresses are downloaded with urllib (proxies from ``https_proxy`` ...) into torch.hub's folder,
``hf://OWNER/REPOSITORY`` by the hub's client into its cache. A file gets its final name only when it is complete and
its hash is correct. With ``HF_HUB_OFFLINE`` nothing is downloaded. `timm.create_model` reads the same caches without
checking hashes.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import Request, getproxies, urlopen

import huggingface_hub
import torch
from filelock import FileLock
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import PretrainedCfg

from ..files import atomic

HUB = "hf://"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # in order of preference
_TIMEOUT = 10  # seconds without any data
_PAGES = ("text/html", "text/xml", "application/xhtml+xml", "application/xml", "application/json")


def addresses(cfg: PretrainedCfg) -> list[str]:
    """The addresses of a pretrained configuration, in the order to try; see `fetch`."""
    hub = "/".join(filter(None, [cfg.hf_hub_id, cfg.hf_hub_filename]))
    return [*filter(None, [cfg.url]), *([f"{HUB}{hub}"] if hub else [])]


def hash_in_name(address: str) -> str | None:
    """The prefix of the SHA-256 in a file name, torch.hub's ``NAME-HASH.pth``; None if there is none."""
    match = re.search(r"-([0-9a-f]{8,64})\.\w+$", address)
    return match and match[1]


def fetch(name: str, addresses: Sequence[str], sha256: str | None = None) -> Path:
    """The file of the weights ``name``: the first one in a cache, otherwise the first one that can be downloaded.

    Args:
        addresses: in the order to try: ``https://...``, or ``hf://OWNER/REPOSITORY`` (with ``@REVISION`` and ``/FILE``
            if they are not the default).
        sha256: of the file at the web addresses, or its first digits. Without it, and without a hash in the file
            name, the hash of the first download is written to ``FILE.sha256`` and checked from then on.

    Raises:
        OSError: a cached file has a wrong hash, or no address works: the message has the reason for each, and where to
            put a file that is downloaded manually.
    """
    for address in addresses:
        if (file := _cached(address, sha256)) is not None:
            return file
    failures = []
    for address in addresses:
        try:
            if huggingface_hub.constants.HF_HUB_OFFLINE:
                raise OSError("HF_HUB_OFFLINE is set, so nothing is downloaded")
            return _from_hub(address) if address.startswith(HUB) else _from_web(address, sha256)
        except (OSError, HTTPException) as error:
            failures.append(f"{address}: {' '.join(str(error).split()) or type(error).__name__}")
    by_hand = [f". Download {each} elsewhere and put it at {_place(each)}" for each in addresses if HUB not in each]
    raise OSError(f"cannot fetch the weights of {name} ({'; '.join(failures)}){''.join(by_hand[:1])}")


def file_sha256(file: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def recorded_sha256(address: str) -> str | None:
    """The hash recorded at the first download of a web address; None if it was never downloaded."""
    record = Path(f"{_place(address)}.sha256")
    return record.read_text(encoding="utf-8").partition(" ")[0] if record.is_file() else None


def _place(address: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(address).path).name


def _cached(address: str, sha256: str | None) -> Path | None:
    if not address.startswith(HUB):
        file = _place(address)
        if not file.is_file():
            return None
        _verify(file, address, sha256)
        return file
    repository, revision, names = _repository(address)
    for name in names:
        file = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(file, str):
            known = Path(file).resolve().name  # for large files, the hash
            if re.fullmatch(r"[0-9a-f]{64}", known) and (digest := file_sha256(Path(file))) != known:
                raise OSError(f"{file} is damaged: its sha256 is {digest}, not {known}. Delete it to fetch it again")
            return Path(file)
    return None


def _from_hub(address: str) -> Path:
    repository, revision, names = _repository(address)
    if not getproxies():  # without a network, the hub's client would retry for half a minute
        socket.getaddrinfo(urlparse(huggingface_hub.constants.ENDPOINT).hostname, None)
    for file in names:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
        except LocalEntryNotFoundError:  # no connection
            raise
        except EntryNotFoundError:
            continue
    raise OSError(f"the repository has no {' or '.join(names)}")


def _repository(address: str) -> tuple[str, str | None, tuple[str, ...]]:
    """Repository, revision and candidate names of the file."""
    owner, repository, *file = address.removeprefix(HUB).split("/", 2)
    repository, _, revision = repository.partition("@")
    return f"{owner}/{repository}", revision or None, tuple(file) or _HUB_FILES


def _from_web(address: str, sha256: str | None) -> Path:
    target = _place(address)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_file():  # otherwise another process was faster
            with atomic(target) as new:
                _receive(address, new)
                _verify(new, address, sha256)
    return target


def _receive(address: str, new: Path) -> None:
    with urlopen(Request(address, headers={"User-Agent": "foveal"}), timeout=_TIMEOUT) as response:
        kind, coding = response.headers.get_content_type(), response.headers.get("Content-Encoding", "identity")
        length = response.headers.get("Content-Length", "")
        if kind in _PAGES:
            raise OSError(f"the server sent {kind}, not the file")
        if coding != "identity":
            raise OSError(f"the server sent the file with Content-Encoding {coding}")
        if not length.isdecimal() and not response.chunked:  # a broken connection would not be noticed
            raise OSError(f"the server did not send the length of the file (Content-Length {length or 'missing'})")
        with new.open("wb") as out:
            shutil.copyfileobj(response, out, 1 << 20)
    if length.isdecimal() and new.stat().st_size != int(length):
        raise OSError(f"the connection broke after {new.stat().st_size:,} of {int(length):,} bytes")


def _verify(file: Path, address: str, sha256: str | None) -> None:
    """Raise OSError if a file from ``address`` has a wrong hash; record the hash if none is known."""
    digest, target = file_sha256(file), _place(address)
    known = sha256 or hash_in_name(target.name)
    if known and not digest.startswith(known):
        raise OSError(f"{target.name} is not the published file: its sha256 is {digest}, it should be {known}")
    if (recorded := recorded_sha256(address)) not in (None, digest):
        raise OSError(
            f"{target.name} is not the file that was downloaded first: its sha256 is {digest}, {target}.sha256 has "
            f"{recorded}. Delete that record if you trust this file"
        )
    if recorded is None and os.access(target.parent, os.W_OK):  # a shared cache may be read-only
        with atomic(f"{target}.sha256") as new:
            new.write_text(f"{digest}  {target.name}\n", encoding="utf-8")
