"""Structured logs: one JSON object a line, for those who collect the logs of many machines.

Every line has `time`, `level`, `app` (server, client or deploy), `event`, `run`, `round` and `node`, null where there
is none, and beside them what the event has. `run` and `node` are Flower's numbers, as text: they have 64 bits, which
many readers of JSON round. With the setting `log=json` lines go to standard error; where the environment variable
TOFU_LOG names a file they are appended to it, whatever the setting. Nobody else hears of them.

    LOG = logging.getLogger("tofu.server")
    LOG.warning("client failed", extra=about(run=run, round=3, node=node, reason="no reply"))
"""

import json
import logging
import logging.handlers
import os
import sys
import threading
from datetime import UTC, datetime
from typing import Any

from tofu.errors import TofuError

FILE = "TOFU_LOG"
STYLES = ("text", "json")
_ROOT = logging.getLogger("tofu")
_ROOT.addHandler(logging.NullHandler())  # else Python prints warnings where nobody asked for logs
_ABOUT = "about"
_lock = threading.Lock()
_started: dict[tuple[str, str], logging.Handler] = {}


def about(
    *, run: int | None = None, round: int | None = None, node: int | None = None, **fields: Any
) -> dict[str, Any]:
    """What a line says beside its event, as the `extra` of a logging call. None is null."""
    named = {"run": run, "node": node}
    where = {name: None if value is None else str(value) for name, value in named.items()}
    return {_ABOUT: {"run": where["run"], "round": round, "node": where["node"]} | fields}


class JsonLines(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "app": record.name.removeprefix("tofu."),
            "event": record.getMessage(),
        }
        line |= getattr(record, _ABOUT, None) or about()[_ABOUT]
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _StandardError(logging.Handler):
    """Writes to what standard error is now: Flower puts another stream in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def start_logging(style: str) -> None:
    """From now on, log as the setting `log` and the environment say. To be called again costs nothing.

    Raises:
        TofuError: the file that TOFU_LOG names cannot be written.
    """
    wanted = {("stderr", "")} if style == "json" else set()
    if path := os.environ.get(FILE):
        wanted.add(("file", path))
    with _lock:
        for key in _started.keys() - wanted:
            handler = _started.pop(key)
            _ROOT.removeHandler(handler)
            handler.close()
        for kind, name in sorted(wanted - _started.keys()):
            handler = _file(name) if kind == "file" else _StandardError()
            handler.setFormatter(JsonLines())
            _ROOT.addHandler(handler)
            _started[kind, name] = handler
        _ROOT.setLevel(logging.INFO if _started else logging.NOTSET)


def _file(path: str) -> logging.Handler:
    try:
        # Opened again where logrotate moved it away. Lines of several processes do not mix: each is appended at once.
        return logging.handlers.WatchedFileHandler(path, encoding="utf-8")
    except OSError as error:
        raise TofuError(
            f"{FILE}={path!r} is not usable: expected a file that can be written ({error.strerror})"
        ) from error
