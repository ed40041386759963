"""What mkdocs does beside its plugins: the README is the site's first page, and links between it, the project's files and docs/ hold."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OWN = {"CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
"""Files at the top of the repository, and the pages that show them."""


def _from_top(text: str) -> str:
    """Links of a file at the top as those of a page in docs/."""
    text = text.replace("](docs/", "](")
    for name, page in OWN.items():
        text = text.replace(f"]({name}", f"]({page}")
    return text


def on_files(files, config):
    """Add the first page."""
    files.append(File.generated(config, "index.md", content=_from_top((ROOT / "README.md").read_text())))
    return files


def on_page_markdown(markdown, page, config, files):
    """A page that is a link to a file at the top shows that file, whose links are written for there."""
    shown = re.fullmatch(r"\[(\w+\.md)\]\(\.\./\1\)\s*", markdown)
    return _from_top((ROOT / shown[1]).read_text()) if shown else markdown


def on_page_content(html, page, config, files):
    """Sphinx's roles in docstrings are names in code here."""
    return re.sub(r":(?:func|class|meth|mod|attr|data):(?=<code>)", "", html)
