"""Structured logs: one JSON object per line, for collectors of logs from many machines.

Every line has `time`, `level`, `app` (server, client or deploy), `event`, `run`, `round` and `node` (null if they
do not apply), and the event's own fields. `run` and `node` are Flower's 64-bit numbers, written as text because many
JSON readers round such numbers. With the setting `log=json`, lines go to standard error; if the environment variable
TOFU_LOG names a file, they are appended to it with any setting. Otherwise nothing is logged.

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
_ROOT = logging.getLogger("tofu")
_ROOT.addHandler(logging.NullHandler())  # otherwise Python prints warnings to standard error
_ABOUT = "about"
_lock = threading.Lock()
_started: dict[tuple[str, str], logging.Handler] = {}


def about(
    *, run: int | None = None, round: int | None = None, node: int | None = None, **fields: Any
) -> dict[str, Any]:
    """Build the `extra` of a logging call: the fields of a line in addition to its event. None becomes null."""
    named = {"run": run, "node": node}
    where = {name: None if value is None else str(value) for name, value in named.items()}
    return {_ABOUT: {"run": where["run"], "round": round, "node": where["node"]} | fields}


class JsonLines(logging.Formatter):
    """Formats a log record as one line of JSON."""

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
    """Writes to the current `sys.stderr`, which Flower replaces after the handler was made."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def start_logging(style: str) -> None:
    """Configure logging from the setting `log` and the environment. Repeated calls are cheap.

    Raises:
        TofuError: the file named by TOFU_LOG cannot be written.
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
        # Reopens the file after logrotate moved it. Lines of several processes do not mix: each is one append.
        return logging.handlers.WatchedFileHandler(path, encoding="utf-8")
    except OSError as error:
        raise TofuError(
            f"{FILE}={path!r} is not usable: expected a file that can be written ({error.strerror})"
        ) from error
