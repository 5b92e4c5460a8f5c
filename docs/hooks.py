"""mkdocs hooks: pages from outside docs/, and links between all pages."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# by their place in the repository, the name of the page
PAGES = {
    "README.md": "overview.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "heads/README.md": "dense.md",
    "kernels/README.md": "operations.md",
    "train/README.md": "training.md",
}


def on_files(files: Files, config: Any) -> Files:
    for place, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / place)))
    return files


LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
SOURCE = re.compile(r'\b(src|srcset|href)="([^"]+)"')


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite repository links to site links; links to files outside the site become plain text."""
    here = page.file.src_uri
    place = next((place for place, uri in PAGES.items() if uri == here), f"docs/{here}")

    def moved(target: str) -> str | None:
        path, hash_, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return target
        file = posixpath.normpath(posixpath.join(posixpath.dirname(place), path))
        uri = PAGES.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
        return uri and f"{posixpath.relpath(uri, posixpath.dirname(here) or '.')}{hash_}{anchor}"

    def link(match: re.Match) -> str:
        mark, text, target = match.groups()
        text, target = LINK.sub(link, text), moved(target)  # the text may be a picture
        return f"{mark}[{text}]({target})" if target else text

    def source(match: re.Match) -> str:
        return f'{match[1]}="{moved(match[2]) or match[2]}"'

    parts = re.split(r"(```.*?```)", markdown, flags=re.DOTALL)
    return "".join(part if part.startswith("```") else SOURCE.sub(source, LINK.sub(link, part)) for part in parts)
