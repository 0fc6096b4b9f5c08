"""MkDocs hooks: pages that are kept elsewhere or generated, and links from pages to files of the repository.

Links in the Markdown files are relative paths of the repository, so that they work wherever the files are read. In
the site, a README is a page, and any other linked file outside docs/ is copied to `files/`.
"""

import inspect
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

import tofu
from tofu.settings import FIELDS, accepted_values, dashed, expected, section_of, shown_default

ROOT = Path(__file__).parents[1]
READMES = {
    "README.md": "index.md",
    "examples/README.md": "examples.md",
    "benchmarks/README.md": "benchmarks.md",
    "client/plugins/README.md": "plugins/your-own.md",
}
"""Markdown files outside docs/ that are pages -> their names in the site."""
REFERENCES = {"tofu/settings/groups.py": "reference/settings.md"}
"""Source files -> the pages of the site that are made from them."""
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add READMEs, generated references, and the files that pages link to."""
    for source, name in READMES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    for name, text in {"reference/settings.md": settings_page(), "reference/api.md": api_page()}.items():
        files.append(File.generated(config, name, content=text))
    pages = [file for file in files if file.src_uri.endswith(".md")]
    linked = {path for page in pages for path in linked_files(page.content_string, source_of(page.src_uri))}
    for path in sorted(linked):
        files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite a page's links from paths in the repository to paths in the site, and keep its figures together."""
    source = source_of(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        path = repository_path(match[1], source)
        if path is None:
            return match[0]
        target = posixpath.relpath(site_path(path), posixpath.dirname(page.file.src_uri) or ".")
        return f"]({target}{match[2] or ''})"

    # A mean stays in one line with its deviation, also in a narrow column.
    return LINK.sub(rewritten, re.sub(r"(?<=\d) ± (?=\d)", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}", markdown))


def source_of(uri: str) -> str:
    """The path in the repository of a page of the site."""
    return next((source for source, name in READMES.items() if name == uri), f"docs/{uri}")


def site_path(path: str) -> str:
    """Where the site has a file of the repository."""
    return (READMES | REFERENCES).get(path) or (
        path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"
    )


def repository_path(link: str, source: str) -> str | None:
    """The file of the repository that a link in `source` names; None for addresses and for what is no file."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return path if "://" not in link and os.path.isfile(ROOT / path) else None


def linked_files(markdown: str, source: str) -> set[str]:
    """Files outside docs/, other than pages, that a page links to."""
    found = {repository_path(match[1], source) for match in LINK.finditer(markdown)}
    return {path for path in found if path and path not in READMES | REFERENCES and not path.startswith("docs/")}


def settings_page() -> str:
    """The reference of all settings, by section."""
    lines = ["# All settings", "", "Made from the definitions in `tofu/settings/groups.py`. On the command line, "]
    lines += ["a setting is an option `--NAME`; in TOML and `flwr run --run-config`, a key. "]
    lines += ["[Settings](../settings.md) explains which ones matter."]
    section = ""
    for name, field in FIELDS.items():
        if section_of(name) != section:
            section = section_of(name)
            lines += ["", f"## {section}", "", "| setting | default | accepted | meaning |", "|---|---|---|---|"]
        choices = accepted_values(name)
        accepted = ", ".join(map(str, choices)) if choices else expected(field)
        default = shown_default(field)
        cells = (f"`{dashed(name)}`", f"`{default}`" if default else "", accepted, str(field.description))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def api_page() -> str:
    """The reference of the public names of `tofu`, from their docstrings."""
    lines = ["# Python API", "", "Every name is imported from `tofu`, and loaded when it is first used.", ""]
    for name in tofu.__all__:
        value = getattr(tofu, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            lines += [f"::: {value.__module__}.{value.__qualname__}", ""]
    return "\n".join(lines)
