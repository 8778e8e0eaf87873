"""The site's pages link to files of the repository: pictures go along, and what is no page becomes plain text."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#]+)\)")


def on_files(files: Files, config: Any) -> Files:
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    def follow(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        if not (ROOT / target).exists():
            raise PluginError(f"{page.file.src_path} links to ../{target}, which does not exist")
        return (
            f"![{text}](results/{Path(target).name})" if picture else f"{text} (`{target}`)" if text != f"`{target}`" else text
        )

    return LINK.sub(follow, markdown)
