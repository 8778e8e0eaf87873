"""What tests compile is kept in the user's cache folder, under the hash of everything that it was made from."""

import hashlib
import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(root) / "sparkme" / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def digest(*parts: bytes | str) -> str:
    """Hash of these parts in this order."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return whole.hexdigest()[:32]


def write_whole(path: Path, content: bytes) -> None:
    """A reader finds the file with all of its content or none: another process may be writing the same one."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
