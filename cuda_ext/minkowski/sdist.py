"""Downloads the source archive of MinkowskiEngine from pip's package index.

`pip download` would run the archive's setup.py for its metadata, which fails in the search for a BLAS. So this module reads the
index itself, in the JSON form of the simple API, or else in the HTML form.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import hashlib
import html.parser
import json
import re
import ssl
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

VERSION = "0.5.4"
SDIST_NAME = f"MinkowskiEngine-{VERSION}.tar.gz"
SDIST_SHA256 = "b1879c00d0b0b1d30ba622cce239886a7e3c78ee9da1064cdfe2f64c2ab15f94"


class BuildError(Exception):
    """A problem that the user can correct, in one line."""


def check_sha256(content: bytes, origin: str) -> bytes:
    """Returns `content` if it has the hash of the published archive, wherever it comes from."""
    digest = hashlib.sha256(content).hexdigest()
    if digest != SDIST_SHA256:
        raise BuildError(f"{origin} is not the published {SDIST_NAME}: sha256 {digest}, expected {SDIST_SHA256}.")
    return content


def read_sdist(path: Path) -> bytes:
    if not path.is_file():
        raise BuildError(f"--sdist {path} does not exist.")
    return check_sha256(path.read_bytes(), str(path))


def pip_settings() -> dict[str, str]:
    """pip's configuration files and PIP_* variables, merged like pip does; {} without pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    settings: dict[str, str] = {}
    for section in ("global.", "install.", ":env:."):  # later ones win
        for line in listing.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(section):
                with contextlib.suppress(ValueError, SyntaxError):
                    settings[name.removeprefix(section)] = str(ast.literal_eval(value))
    return settings


def default_index() -> str:
    """pip's default index, which has no public name in pip."""
    command = [sys.executable, "-c", "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def download_sdist() -> bytes:
    """Returns the archive from the first of pip's indexes that has it."""
    settings = pip_settings()
    indexes = [settings.get("index-url") or default_index(), *settings.get("extra-index-url", "").split()]
    timeout_s = float(settings.get("timeout") or settings.get("default-timeout") or 60)
    failures = []
    for index in indexes:
        page = index.rstrip("/") + "/minkowskiengine/" + ("index.html" if index.startswith("file:") else "")
        try:
            url = find_in_index_page(*_get(page, settings.get("cert"), timeout_s), page)
            if url is not None:
                return check_sha256(_get(url, settings.get("cert"), timeout_s)[0], _without_secret(url))
            failures.append(f"{_without_secret(index)} lacks {SDIST_NAME}")
        except (OSError, ValueError, KeyError) as error:
            failures.append(f"{_without_secret(index)}: {error}")
    raise BuildError(
        f"cannot download {SDIST_NAME} from the package index ({'; '.join(failures)}). Configure pip's index-url, or pass"
        " the file with --sdist FILE (SPARKME_MINKOWSKI_SDIST=FILE for pip install)."
    )


def find_in_index_page(body: bytes, content_type: str, page_url: str) -> str | None:
    """The archive's URL on an index page (JSON or HTML), or None."""
    if "json" in content_type:
        links = [file["url"] for file in json.loads(body)["files"]]
    else:
        parser = _Links()
        parser.feed(body.decode(errors="replace"))
        links = parser.links
    for link in links:
        url = urllib.parse.urljoin(page_url, link)
        if urllib.parse.unquote(urllib.parse.urlsplit(url).path).endswith("/" + SDIST_NAME):
            return urllib.parse.urldefrag(url).url
    return None


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _get(url: str, certificates: str | None, timeout_s: float) -> tuple[bytes, str]:
    """The body at `url` and its content type. User and password in the URL become a header, as in pip."""
    parts = urllib.parse.urlsplit(url)
    headers = {"Accept": "application/vnd.pypi.simple.v1+json, text/html;q=0.5, */*;q=0.1"}
    if parts.username:
        secret = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(secret.encode()).decode()
    request = urllib.request.Request(_without_secret(url), headers=headers)
    context = ssl.create_default_context(cafile=certificates) if parts.scheme == "https" else None
    with urllib.request.urlopen(request, timeout=timeout_s, context=context) as response:
        return response.read(), response.headers.get("Content-Type", "")


def _without_secret(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url)
