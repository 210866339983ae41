"""What `make docs` does beyond mkdocs: pages and files outside docs/ that pages link to are part of the site."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md"} | {name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")}
"""Pages at the root, and what they are on the site."""
LINK = re.compile(r"\]\(([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside."""
    linked = {name for page in PAGES for name in LINK.findall((ROOT / page).read_text())}
    for page in (ROOT / "docs").glob("*.md"):
        linked |= {name.removeprefix("../") for name in LINK.findall(page.read_text()) if name.startswith("../")}
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=_at_root((ROOT / name).read_text())))
    for name in sorted(linked - PAGES.keys()):
        if not name.startswith("docs/") and (ROOT / name).is_file():
            path = str(ROOT / name)
            files.append(File.generated(config, name, abs_src_path=path, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Have links lead there."""
    return _at_root(markdown)


def _at_root(text: str) -> str:
    """The text with links as they are where docs/ and the root are one folder."""

    def moved(link: re.Match[str]) -> str:
        target = re.sub(r"^((\.\./)*)docs/", r"\1", link[1])
        outside = target.removeprefix("../")
        target = outside if (ROOT / outside).exists() else target
        return "](" + PAGES.get(target, target)

    return LINK.sub(moved, text)
