"""Lists the runs, comparisons and attack reports of a folder and follows them in a browser, for this machine only.

The server listens on 127.0.0.1 and refuses a request whose Host is another name: a web site could otherwise read it by
pointing a name of its own at this address (DNS rebinding). It takes no path from a request: a request names an entry of
the list, and an entry with a file that lies outside the folder is not in the list. A page asks every second, by its
entity tag, whether its entry has changed, and then replaces its content.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

from markupsafe import Markup

from tofu.errors import RunError, SettingError, TofuError
from tofu.files import is_locked
from tofu.formatting import format_bytes, format_fraction
from tofu.reporting.folder import FAILURE
from tofu.reporting.report.compare import render_page
from tofu.reporting.report.html import render
from tofu.reporting.report.run_data import has_compressed_rounds, read_run
from tofu.reporting.report.template import PAGE_HEAD, POLICY, render_template
from tofu.rounds.record import read_json, read_rounds, read_summary

HOST = "127.0.0.1"
_DEPTH = 5
_MAX = 500
_REASON = 300
"""Characters of the reason of a failed run."""
_NONE = "\N{EN DASH}"
_HEADER = ("name", "what", "state", "accuracy", "uplink", "last change")
_POLICY = f"{POLICY}; script-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'"

_RUN = (
    "config.json",
    "metrics.jsonl",
    "ledger.jsonl",
    "summary.json",
    "samples.npz",
    "panels.json",
    "data.json",
    FAILURE,
)
_FILES = {"run": _RUN, "comparison": ("compare.json",), "attacks": ("attacks.json", "report.html")}
_NEEDED = {"run": _RUN[:2], "comparison": ("compare.json",), "attacks": ("attacks.json", "report.html")}

_FOLLOW = """
const script = document.currentScript;
let tag = script.dataset.tag;
async function follow() {
  let text = "";
  try {
    const answer = await fetch(location.href, {cache: "no-store", headers: {"If-None-Match": tag}});
    if (answer.status === 200) {
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const details = page.querySelectorAll("main details");
      document.querySelectorAll("main details").forEach((one, at) => {
        if (details[at]) details[at].open = one.open;
      });
      document.querySelector("main").replaceWith(document.adoptNode(page.querySelector("main")));
      document.title = page.title;
      tag = answer.headers.get("ETag");
    } else if (answer.status !== 304) text = "This entry cannot be read any more.";
  } catch (error) {
    text = "The server does not answer: this page is no longer updated.";
  }
  document.getElementById("connection").textContent = text;
  setTimeout(follow, 1000);
}
setTimeout(follow, 1000);
"""

_LIST = (
    PAGE_HEAD
    + """</header>
<section class="card">
<h2>Runs, comparisons and attacks</h2>
{% if rows %}{{ table("entries", header, rows, ("left wrap", "left wrap", "left wrap"), stacked=true) }}{% else %}
<p class="soft">A run appears here after its first evaluation.</p>{% endif %}
</section>
</main>
</body>
</html>
"""
)


@dataclass(frozen=True)
class Entry:
    """A folder that can be shown.

    Attributes:
        name: path relative to the served folder.
        kind: "run", "comparison" or "attacks".
        tag: differs whenever one of its files has changed.
        changed: when that was, in seconds since the epoch.
        live: whether a process of this machine writes it; only runs without a summary are asked.
    """

    name: str
    kind: str
    folder: Path
    tag: str
    changed: float
    live: bool = False


def find_entries(root: Path) -> list[Entry]:
    """Return the entries of a resolved folder by name, at most `_MAX`; links to folders are not followed."""
    found: list[Entry] = []
    for folder, below, files in os.walk(root):
        path = Path(folder)
        depth = len(path.relative_to(root).parts)
        below[:] = sorted(
            name for name in below if depth < _DEPTH and not name.startswith(".") and name != "checkpoints"
        )
        for kind, needed in _NEEDED.items():
            entry = _entry(root, path, kind) if set(needed) <= set(files) else None
            if entry:
                found.append(entry)
        if len(found) >= _MAX:
            break
    return found[:_MAX]


def _entry(root: Path, folder: Path, kind: str) -> Entry | None:
    states: list[object] = []
    changed = 0.0
    for name in _FILES[kind]:
        path = folder / name
        try:
            status = path.stat()
        except OSError:
            continue
        if not path.resolve().is_relative_to(root):
            return None
        states.append((name, status.st_mtime_ns, status.st_size))
        changed = max(changed, status.st_mtime)
    live = kind == "run" and not (folder / "summary.json").exists() and is_locked(folder / "config.json")
    states.append(live)
    tag = f'"{hashlib.sha256(repr(states).encode()).hexdigest()[:32]}"'
    return Entry(folder.relative_to(root).as_posix(), kind, folder, tag, changed, live)


class RunServer(ThreadingHTTPServer):
    """Serves the list and the pages of a folder at `url` until `shutdown`.

    Args:
        port: 0 takes a free one.

    Raises:
        SettingError: the folder does not exist, or the port is taken.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        if not folder.is_dir():
            raise SettingError("runs", str(folder), "a folder")
        self.root = folder.resolve()
        self.name = self.root.name
        self._rows: dict[tuple[str, str], tuple[str, ...]] = {}
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise SettingError("port", port, f"a port that is free: {error}") from error
        self.url = f"http://{HOST}:{self.server_port}/"
        self.hosts = {f"{host}:{self.server_port}" for host in (HOST, "localhost")}

    def answer(self, address: str) -> tuple[str, Callable[[], str]] | None:
        """Return the entity tag of an address and a function that makes its page; None if there is no such page."""
        parts = urlsplit(address)
        entries = find_entries(self.root)
        if parts.path == "/" and not parts.query:
            tag = hashlib.sha256(repr([(entry.name, entry.tag) for entry in entries]).encode()).hexdigest()[:32]
            return f'"{tag}"', partial(self._list, entries)
        asked = parse_qs(parts.query)
        for entry in entries:
            if parts.path == f"/{entry.kind}" and asked == {"name": [entry.name]}:
                return entry.tag, partial(self._page, entry)
        return None

    def _page(self, entry: Entry) -> str:
        name = self.name if entry.name == "." else entry.name
        try:
            if entry.kind == "run":
                return render(read_run(entry.folder), name)
            if entry.kind == "comparison":
                return render_page(json.loads((entry.folder / "compare.json").read_text()), name)
            return (entry.folder / "report.html").read_text()
        except (TofuError, OSError, ValueError, LookupError, TypeError) as error:
            head = _head(f"{entry.kind} {name}", f"This page cannot be made: {error}")
            return render_template(PAGE_HEAD + "</header></main></body></html>", **head)

    def _list(self, entries: list[Entry]) -> str:
        kept = {(entry.name, entry.tag): self._rows.get((entry.name, entry.tag)) or _row(entry) for entry in entries}
        self._rows = kept
        running = sum(row[2].startswith("round ") for row in kept.values())
        lead = f"{len(kept):,} {'entry' if len(kept) == 1 else 'entries'}, {running:,} running."
        values = _head(f"Runs in {self.name}", lead)
        return render_template(_LIST, **values, header=_HEADER, rows=list(kept.values()))


def _row(entry: Entry) -> tuple[str, ...]:
    link = Markup('<a href="/{}?name={}">{}</a>').format(entry.kind, quote(entry.name, safe=""), entry.name)
    changed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.changed))
    if entry.kind != "run":
        return link, entry.kind, "", _NONE, _NONE, changed
    try:
        config = read_json(entry.folder / "config.json")
        rounds, summary = read_rounds(entry.folder / "metrics.jsonl"), read_summary(entry.folder / "summary.json")
        keys = ("model", "dataset", *(["compressor"] if has_compressed_rounds(config, rounds) else []))
        words = [f"{config[key]}" for key in keys if config.get(key)]
    except (RunError, AttributeError) as error:
        return link, f"{error}"[:200], "cannot be read", _NONE, _NONE, changed
    measured = [record.accuracy for record in rounds if record.accuracy is not None]
    state = f"round {rounds[-1].round if rounds else 0} of {config.get('rounds', '?')}"
    if reason := _failure(entry.folder):
        state = f"failed after {state}: {reason[:_REASON]}"
    elif summary is not None:
        state = f"stopped after {state}" if summary.stopped else "finished"
    elif not entry.live:
        state = f"interrupted after {state}"
    accuracy = format_fraction(measured[-1]) if measured else _NONE
    uplink = format_bytes(sum(record.uplink_bytes for record in rounds))
    return link, ", ".join(words)[:200], state, accuracy, uplink, changed


def _failure(folder: Path) -> str:
    """Return why a run ended with an error, or ""."""
    try:
        return str(read_json(folder / FAILURE).get("reason") or "")
    except (RunError, AttributeError):
        return ""


def _head(title: str, lead: str) -> dict[str, str]:
    return {"title": title, "lead": lead, "state": "", "aside": ""}


def _followed(page: str, tag: str) -> str:
    """Return a page with the script that follows its entry, which its content security policy then allows."""
    script = '<nav><a href="/">All runs</a> <span id="connection" role="status"></span></nav>\n<main>'
    page = page.replace(POLICY, _POLICY, 1).replace("<main>", script, 1)
    return page.replace("</body>", f"<script src=\"/follow.js\" data-tag='{tag}'></script>\n</body>", 1)


class _Handler(BaseHTTPRequestHandler):
    server: RunServer
    timeout = 30
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.headers.get("Host") not in self.server.hosts:
            self._send(HTTPStatus.FORBIDDEN, "text/plain", "this server answers to its own address only\n")
            return
        if self.path == "/follow.js":
            self._send(HTTPStatus.OK, "text/javascript", _FOLLOW)
            return
        found = self.server.answer(self.path)
        if found is None:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "there is no such page\n")
            return
        tag, page = found
        if self.headers.get("If-None-Match") == tag:
            self._send(HTTPStatus.NOT_MODIFIED, "text/html", "", tag)
        else:
            self._send(HTTPStatus.OK, "text/html", _followed(page(), tag), tag)

    def _send(self, status: HTTPStatus, kind: str, text: str, tag: str = "") -> None:
        body = text.encode(errors="replace")
        self.send_response(status)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8", "Content-Length": f"{len(body)}", "Cache-Control": "no-store",
            "Content-Security-Policy": f"{_POLICY}; frame-ancestors 'none'", "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin",
        }  # fmt: skip
        for name, value in (headers | ({"ETag": tag} if tag else {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: pages send a request every second."""
