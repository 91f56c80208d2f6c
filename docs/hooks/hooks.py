"""What MkDocs asks of this site: pages written from the code, and links that lead to lines of source."""

from pathlib import Path
from typing import Any

import code_pages
import scripts
import sources
import what_opens
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent.parent


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are written here; the last are those of the sources that any page links to."""
    written = {
        "reference/config.md": code_pages.config_page(),
        "reference/commands.md": code_pages.commands_page(),
        "reference/api.md": code_pages.api_page(ROOT),
        "reference/what_opens.md": what_opens.what_opens_page(),
        **code_pages.package_pages(ROOT),
    }
    for script in sorted((ROOT / "docs/notebooks").glob("*.py")):
        path = f"notebooks/{script.stem}.md"
        written[path] = scripts.script_page(script.read_text(encoding="utf-8"), f"docs/notebooks/{script.name}")
    by_hand = {file.src_uri: file.content_string for file in files.documentation_pages()}
    linked = set()
    for page, text in (by_hand | written).items():
        linked |= _rewrite(text, page)[1]
    written |= {sources.page_of(path): sources.source_page(path, ROOT) for path in sorted(linked)}
    for path, text in written.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links to files of the repository into links to the pages that show them."""
    path = page.file.src_uri
    return markdown if path.startswith("source/") else _rewrite(markdown, path)[0]


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuses a page that would ask another server for a script, a style, a font or a picture."""
    if foreign := sources.foreign_loads(output):
        raise PluginError(f"docs/{page.file.src_uri}: is to work without a network, but loads {', '.join(foreign)}")
    return output


def _rewrite(text: str, page: str) -> tuple[str, set[str]]:
    try:
        return sources.rewrite_links(text, page, ROOT)
    except ValueError as error:
        raise PluginError(str(error)) from None
