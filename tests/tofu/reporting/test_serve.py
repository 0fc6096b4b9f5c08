"""`tofu serve`: a run that is going on is followed in a browser; nothing outside the folder is served."""

import http.client
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest

from client.app import app as client_app
from server.app import serve_in_process
from tests.tofu.reporting.pages import opened, problems
from tests.tofu.reporting.test_report import HOSTILE, ROWS, line, write_lines
from tofu.errors import SettingError
from tofu.files import lock_file
from tofu.observers.base import Observer
from tofu.reporting.serve import RunServer, find_entries
from tofu.rounds.record import RoundRecord
from tofu.settings import Settings

SECRET = "the secret"


def make_run(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"dataset": "digits", "model": "mlp", "rounds": 5} | config))
    write_lines(folder / "metrics.jsonl", ROWS)
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunServer]:
    """A server of `tmp_path/runs`, in a thread."""
    (tmp_path / "runs").mkdir(exist_ok=True)
    with RunServer(tmp_path / "runs") as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.1})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def get(server: RunServer, path: str, method: str = "GET", **headers: str) -> tuple[int, str, str]:
    """Status, text and entity tag of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, headers=named)
    answer = connection.getresponse()
    found = answer.status, answer.read().decode(), answer.getheader("ETag", "")
    connection.close()
    return found


class Gate(Observer):
    """Holds a run after each round until the test lets it go on."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)

    def on_round_end(self, record: RoundRecord) -> None:
        assert self.go.acquire(timeout=300)


def test_a_browser_follows_a_run_that_is_going_on(browser: Any, server: RunServer) -> None:
    settings = {
        "model": "mlp", "clients": 2, "rounds": 2, "train_images": 60, "test_images": 40, "max_evals": 3,
        "local_epochs": 1, "run_folder": str(server.root / "live"),
    }  # fmt: skip
    gate = Gate()
    run = threading.Thread(target=serve_in_process, args=(client_app, Settings.of(settings), gate))
    with opened(browser, server.url) as (page, errors):
        page.set_default_timeout(240_000)
        run.start()
        try:
            page.get_by_text("round 1 of 2").wait_for()
            page.get_by_role("link", name="live").click()
            page.get_by_text("not finished: 1 of 2 rounds").wait_for()
            page.get_by_text("Settings (").click()
            marks = page.locator(".mark.k-compressed").count()
            gate.go.release()
            page.get_by_text("not finished: 2 of 2 rounds").wait_for()  # the page was not loaded again:
            assert page.locator("details", has_text="Settings (").get_attribute("open") is not None
            assert page.locator(".mark.k-compressed").count() > marks > 0
            assert page.locator("#rounds tbody tr").count() == 3
        finally:
            gate.go.release(2)
            run.join()
        page.locator(".state").wait_for(state="detached")
        page.get_by_role("link", name="All runs").click()
        page.get_by_text("finished", exact=True).wait_for()
        assert problems(page) == []
        assert errors == []


def test_a_page_says_when_the_server_does_not_answer(browser: Any, server: RunServer) -> None:
    make_run(server.root / "one")
    with opened(browser, f"{server.url}run?name=one") as (page, _):
        page.set_default_timeout(120_000)
        page.context.set_offline(True)
        page.get_by_text("The server does not answer").wait_for()
        page.context.set_offline(False)
        page.get_by_text("The server does not answer").wait_for(state="detached")


def test_the_list_names_what_the_folder_holds(server: RunServer, tmp_path: Path) -> None:
    root = server.root
    assert "A run appears here after its first evaluation." in get(server, "/")[1]
    make_run(root / "deep" / "er" / HOSTILE.replace("/", "-"))
    make_run(root / "damaged")
    (root / "damaged" / "metrics.jsonl").write_text("{}\n")
    (root / "mine").mkdir()
    (root / "mine" / "compare.json").write_text("{}")
    (root / "attacked").mkdir()
    (root / "attacked" / "attacks.json").write_text("{}")
    (root / "attacked" / "report.html").write_text("<main>what leaks</main></body>")
    _, page, tag = get(server, "/")
    assert "interrupted after round 3 of 5" in page
    (root / "refused").mkdir()
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(root / "damaged" / name, root / "refused" / name)
    write_lines(root / "refused" / "metrics.jsonl", [line(0, "start", 0.1)])
    (root / "refused" / "failure.json").write_text(json.dumps({"reason": "no valid <b>reply</b>"}))
    assert "failed after round 0 of 5: no valid &lt;b&gt;reply" in get(server, "/")[1]
    shutil.rmtree(root / "refused")
    assert "0 running" in page
    assert "<script>alert" not in page
    assert "cannot be read" in page
    assert get(server, "/", If_None_Match=tag)[:2] == (304, "")
    addresses = [address.replace("&amp;", "&") for address in re.findall(r'<a href="(/\w+\?[^"]*)"', page)]
    assert len(addresses) == 4
    texts = [get(server, address)[1] for address in addresses]
    for part in ("94.7%", "This page cannot be made", "what leaks", 'script src="/follow.js"'):
        assert any(part in text for text in texts), part
    write_lines(root / "damaged" / "metrics.jsonl", [line(0, "start", 0.1)])
    lock = lock_file(root / "damaged" / "config.json")
    assert lock is not None
    _, page, tag = get(server, "/", If_None_Match=tag)
    assert ">round 0 of 5" in page
    assert "1 running" in page
    lock.release()
    _, page, _ = get(server, "/", If_None_Match=tag)
    assert "interrupted after round 0 of 5" in page


def test_nothing_outside_the_folder_is_served(server: RunServer, tmp_path: Path) -> None:
    root = server.root
    outside = make_run(tmp_path / "outside", dataset=SECRET)
    (tmp_path / "runs" / "link").symlink_to(outside, target_is_directory=True)
    for name in ("config.json", "summary.json"):
        inside = make_run(root / f"with-{name}")
        (inside / name).unlink(missing_ok=True)
        (inside / name).symlink_to(outside / "config.json")
    make_run(root / "fine")
    assert [entry.name for entry in find_entries(root)] == ["fine"]
    for path in (
        "/run?name=link", "/run?name=../outside", "/run?name=%2e%2e%2foutside", f"/run?name={outside}",
        "/run?name=with-config.json",
        "/../outside/config.json", "/%2e%2e/outside/config.json", "/fine/config.json", "/run?name=fine/../../outside",
        "/attacks?name=fine", "/run?name=fine&name=../outside", "//etc/passwd", "/run?name=%00", "*",
    ):  # fmt: skip
        status, text, _ = get(server, path)
        assert status == 404, path
        assert SECRET not in text
    assert get(server, "/run?name=fine")[0] == 200


def test_only_its_own_name_and_only_reading(server: RunServer) -> None:
    make_run(server.root / "fine")
    port = server.server_port
    assert server.server_address[0] == "127.0.0.1"
    for host in ("attacker.example", f"attacker.example:{port}", "127.0.0.1", f"127.0.0.1.attacker.example:{port}", ""):
        status, text, _ = get(server, "/run?name=fine", Host=host)
        assert (status, "digits" in text) == (403, False), host
    assert get(server, "/", Host=f"localhost:{port}")[0] == 200
    assert [get(server, "/", method)[0] for method in ("POST", "PUT", "DELETE", "OPTIONS")] == [501] * 4


def test_a_folder_and_a_port_that_cannot_be_used(server: RunServer, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"runs='.*nowhere' is not usable: expected a folder"):
        RunServer(tmp_path / "nowhere")
    with pytest.raises(SettingError, match=f"port={server.server_port} is not usable: expected a port that is free"):
        RunServer(server.root, server.server_port)


def test_the_command_prints_its_address_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    from signal import SIGINT
    from sys import executable

    root = Path(__file__).parents[3]
    command = [executable, "-m", "tofu.cli", "serve", str(tmp_path)]
    with Popen(
        command, stdout=PIPE, stderr=PIPE, text=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}
    ) as made:
        assert made.stdout is not None
        assert re.search(r"http://127\.0\.0\.1:\d+/", made.stdout.readline())
        made.send_signal(SIGINT)
        _, errors = made.communicate(timeout=120)
    assert (made.returncode, errors) == (0, "")
