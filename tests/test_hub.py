"""`harness-ext publish --hub`: proposed once, whatever the hub answers; against a server on this machine that fails as it is told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub
from made_outputs import write_output

from harness_ext.publishing import prepare_run
from harness_ext.results.publish import Submission
from harness_ext.results.store import lay_out

COMMAND = """
import sys, time
time.sleep = lambda seconds: None
from harness_ext.cli import main
sys.exit(main(["publish", *sys.argv[1:]]))
"""
"""In a process of its own, since huggingface_hub reads its environment once."""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    write_output(folder, date="2026-11-20T10-00-00.000000")
    write_output(folder, date="2026-11-21T10-00-00.000000", right=lambda *_: True)
    return folder


@pytest.fixture(scope="module")
def files(out: Path) -> dict[str, bytes]:
    return dict(lay_out(prepare_run(file, Submission())) for file in sorted(out.glob("results_*.json")))


def publish(
    hub: Hub | str, out: Path, *more: str, token: str = TOKEN, offline: bool = False, repository: str = "org/records"
) -> subprocess.CompletedProcess[str]:
    address = hub if isinstance(hub, str) else hub.address
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HOME": str(out / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    environment |= {"HF_TOKEN": token} if token else {}
    arguments = [str(out), "--hub", repository, *more]
    return subprocess.run([sys.executable, "-c", COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=120)


def test_runs_are_proposed_as_one_pull_request_that_says_what_it_holds(out: Path, files: dict[str, bytes]) -> None:
    with Hub() as hub:
        found = publish(hub, out)
        assert (found.returncode, found.stderr) == (0, "")
        assert re.search(
            r"org/records: http://127.0.0.1:\d+/datasets/org/records/discussions/1 holds what is new of 2 runs", found.stdout
        )
        (proposed,) = hub.proposed
        assert proposed["files"] == files
        assert re.fullmatch(r"harness_ext: 2 runs \[[0-9a-f]{12}\]", proposed["title"])
        assert all(name in proposed["text"] for name in files)


def test_what_is_there_is_not_sent_again(out: Path, files: dict[str, bytes]) -> None:
    first, second = files
    with Hub(files={first: files[first], "README.md": b"what this is"}) as hub:
        assert publish(hub, out).returncode == 0
        assert [one["files"].keys() for one in hub.proposed] == [{second}]
    with Hub(files=files) as hub:
        found = publish(hub, out)
        assert (found.returncode, hub.proposed) == (0, [])
        assert "all 2 runs are there" in found.stdout


def test_what_is_proposed_and_not_yet_taken_is_not_proposed_again(out: Path) -> None:
    with Hub() as hub:
        publish(hub, out)
        found = publish(hub, out)
        assert (found.returncode, len(hub.proposed)) == (0, 1)
        assert "/discussions/1 holds" in found.stdout


def test_a_folder_and_the_hub_are_given_the_same_files(out: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    with Hub() as hub:
        assert publish(hub, out, "--results", str(tmp_path)).returncode == 0
        assert (
            {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
            == hub.proposed[0]["files"]
            == files
        )


FAULTS = {
    "too many requests": [("commit", "status 429 0"), ("commit", "status 429")],
    "an error inside": [("tree", "status 500"), ("commit", "status 500")],
    "a bad gateway each time something is asked": [("tree", "status 502"), ("discussions", "status 503"), ("commit", "status 504")],
    "a connection that is closed before the answer": [("tree", "close"), ("discussions", "close"), ("commit", "close")],
    "a pull request that was made, and its answer lost": [("commit", "close after")],
    "made, lost, and the hub busy after it": [
        ("commit", "close after"),
        ("discussions", "status 500"),
        ("discussions", "status 429 0"),
    ],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_that_fails_half_way_gets_every_file_once(fault: str, out: Path, files: dict[str, bytes]) -> None:
    with Hub(FAULTS[fault]) as hub:
        found = publish(hub, out)
        assert found.returncode == 0, found.stderr
        assert "Traceback" not in found.stderr
        assert hub.faults == [], "all happened"
        assert [one["files"] for one in hub.proposed] == [files]
        assert "/discussions/1 holds" in found.stdout


def test_a_hub_that_stays_busy_is_given_up_after_five_attempts_in_one_line(out: Path) -> None:
    with Hub([("commit", "status 503")] * 50) as hub:
        found = publish(hub, out)
        assert (found.returncode, hub.proposed) == (1, [])
        assert hub.calls.count("commit") == 5
        assert (
            found.stderr.strip()
            .splitlines()[-1]
            .startswith("PublishError: org/records: the hub answered 503 and was given up; nothing is lost")
        )
        assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": "hf_wrong"}, "401: no token, or one that is not valid; log in with `hf auth login`"),
        ({"token": ""}, "401: no token, or one that is not valid; log in with `hf auth login`"),
        ({"repository": "org/nowhere"}, "404: no such dataset, or none that this token may see"),
        ({"repository": "not a name/x/y"}, "give ORG/NAME of a dataset"),
        ({"offline": True}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_trying_again_does_not_mend_is_said_at_once(options: dict[str, object], message: str, out: Path) -> None:
    with Hub() as hub:
        found = publish(hub, out, **options)  # type: ignore[arg-type]
        assert (found.returncode, hub.proposed) == (1, [])
        assert message in found.stderr
        assert "Traceback" not in found.stderr
        assert str(options.get("token") or "hf_wrong") not in found.stderr + found.stdout


def test_a_token_that_may_not_write_is_told_so(out: Path) -> None:
    with Hub([("commit", "status 403")]) as hub:
        assert "403: the token may not do that" in publish(hub, out).stderr


def test_nobody_there_is_said_in_one_line(out: Path) -> None:
    found = publish("http://127.0.0.1:9", out)
    assert found.returncode == 1
    assert re.search(r"org/records: the hub could not be reached \(ConnectError\) and was given up", found.stderr)
    assert "Traceback" not in found.stderr


def test_several_hundred_files_go_as_one_pull_request() -> None:
    """Called in this process, offline or not: what is sent is counted by a hub of our own."""
    many = {f"lab__tiny/none-{number:016x}.jsonl": b"x" * 50_000 for number in range(600)}
    code = "import sys,pickle; from harness_ext.results.hub import propose; print(propose('org/records', pickle.load(sys.stdin.buffer)))"
    import pickle

    with Hub() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
        found = subprocess.run(
            [sys.executable, "-c", code], input=pickle.dumps(many), env=environment, capture_output=True, timeout=120
        )
        assert found.returncode == 0, found.stderr.decode()
        (proposed,) = hub.proposed
        assert proposed["files"] == many
        assert hub.calls.count("preupload") == 3
