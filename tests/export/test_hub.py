"""`fv-distill push` against a Hub on loopback, over real sockets, in processes of its own."""

import hashlib
import json
import random
import subprocess
import sys
import threading

import pytest
from hub_client import assert_same_files, hub_environment, run_python
from hub_server import READ_TOKEN, WRITE_TOKEN, HubServer, Repository

from fv_distill.export.hub import check_pushable, push_directory
from fv_distill.export.model_card import write_model_card
from fv_distill.export.student_info import StudentInfo, write_info

WEIGHTS = "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server
        # Credentials belong into one header, and nowhere else.
        for request in server.requests:
            assert WRITE_TOKEN.encode() not in request.body and WRITE_TOKEN not in request.path


@pytest.fixture
def export(tmp_path):
    """What looks like an export to the Hub: regular files, an empty one, several large ones."""
    directory = tmp_path / "student"
    for name in ("transformer", "vae"):
        (directory / name).mkdir(parents=True)
    (directory / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    (directory / "vae/config.json").write_text("{}")
    (directory / "vae/empty.txt").touch()
    content = random.Random(0)
    for index in range(3):
        path = directory / f"transformer/diffusion_pytorch_model-0000{index + 1}-of-00003.safetensors"
        path.write_bytes(content.randbytes(200_000 + index))
    info = StudentInfo("owner/base", "m", (1.0, 0.5))
    write_info(directory, info)
    write_model_card(directory / "README.md", info, name="student")
    return directory


@pytest.fixture
def push(hub, tmp_path):
    def run(*words, status=0, token=WRITE_TOKEN):
        environment = hub_environment(hub, tmp_path / "home", token=token)
        return run_python(("-m", "fv_distill", "push", *words), environment, status=status)

    return run


def oid(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_byte_arrives_and_a_second_push_sends_nothing(hub, export, push):
    hub.part_size = 64_000
    done = push(export, "me/student", "--private")
    assert f"{hub.endpoint}/me/student" in done.stdout
    repository = hub.repositories["me/student"]
    assert repository.private
    assert_same_files(export, repository.files)
    assert len(hub.sent("^PUT /lfs/.*/part/")) == 3 * 4
    assert len(repository.commits) == 1
    hub.forget()
    push(export, "me/student", "--private")
    assert hub.sent("^PUT") == [] and len(repository.commits) == 1


def test_an_update_replaces_the_exports_own_files_and_leaves_others(hub, export, push):
    stale, other = "transformer/diffusion_pytorch_model.safetensors", "notes/by_hand.md"
    hub.repositories["me/student"] = Repository(
        files={stale: b"of an earlier push", other: b"mine", "demo.txt": b"mine"}
    )
    push(export, "me/student")
    files = hub.repositories["me/student"].files
    assert stale not in files and files.pop(other) == b"mine" and files.pop("demo.txt") == b"mine"
    assert_same_files(export, files)


def test_failures_that_pass_are_waited_for(hub, export, push):
    hub.fail("POST /api/repos/create")
    hub.fail("/preupload/", status=503)
    hub.fail(f"PUT /lfs/{oid(export / WEIGHTS)}")
    hub.fail("/commit/", status=502, message="bad gateway")
    done = push(export, "me/student")
    assert_same_files(export, hub.repositories["me/student"].files)
    assert "500: broken on purpose" in done.stdout and "Trying again" in done.stdout
    assert len(hub.sent("/commit/")) == 2


def test_a_connection_that_breaks_is_made_anew(hub, export, push):
    hub.fail(f"PUT /lfs/{oid(export / WEIGHTS)}", after=50_000)
    push(export, "me/student")
    assert_same_files(export, hub.repositories["me/student"].files)


def test_after_a_cut_only_what_is_missing_is_sent(hub, export, tmp_path, push):
    """The connection breaks in the middle of one file, when the others are there, and the process dies."""
    environment = hub_environment(hub, tmp_path / "home")
    command = [sys.executable, "-m", "fv_distill", "push", str(export), "me/student"]
    others_there, is_cut = threading.Event(), threading.Event()

    def cut():
        assert others_there.wait(60)
        is_cut.set()

    hub.fail(f"PUT /lfs/{oid(export / WEIGHTS)}", times=100, after=50_000, reached=cut)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(hub.objects) == 2)
    others_there.set()
    assert is_cut.wait(60)
    process.kill()
    process.wait()
    assert hub.repositories["me/student"].commits == []
    hub.mend()
    hub.forget()
    push(export, "me/student")
    assert [request.path for request in hub.sent("^PUT")] == [f"/lfs/{oid(export / WEIGHTS)}"]
    assert_same_files(export, hub.repositories["me/student"].files)


def wait_until(condition, seconds=60):
    done = threading.Event()
    for _ in range(seconds * 20):
        if condition():
            return
        done.wait(0.05)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, ("not logged in", "hf auth login")),
        ("hf_wrong0123456789", ("401", "hf auth login")),
        (READ_TOKEN, ("403", "write permission", "settings/tokens")),
    ],
)
def test_a_login_that_will_not_do_says_what_will(hub, export, push, token, said):
    done = push(export, "me/student", status=2, token=token)
    assert [words for words in said if words not in done.stderr] == []
    assert "Traceback" not in done.stderr and hub.repositories == {}


def test_a_reader_of_an_existing_repository_is_told_before_the_upload(hub, export, push):
    hub.repositories["me/student"] = Repository()
    assert "write permission" in push(export, "me/student", status=2, token=READ_TOKEN).stderr
    assert hub.sent("^PUT|preupload") == []


def test_what_shall_be_private_is_not_pushed_to_a_public_repository(hub, export, push):
    hub.repositories["me/student"] = Repository(private=False)
    assert "exists and is public" in push(export, "me/student", "--private", status=2).stderr
    assert hub.sent("^PUT|preupload|commit") == []


def test_the_pushed_card_loads_the_repository_and_shows_the_evaluation(hub, export, push, tmp_path):
    card = (export / "README.md").read_text()
    (export / "README.md").write_text(card + '\nA line of my own, with `from_pretrained("student")`.\n')
    rows = [{"name": "teacher", "steps": 50, "frechet": 1.25}, {"name": "student", "steps": None, "frechet": 0.5}]
    (tmp_path / "results.json").write_text(json.dumps({"seed": 0, "rows": rows}))
    push(export, "me/student", "--evaluation", tmp_path / "results.json")
    pushed = hub.repositories["me/student"].files["README.md"].decode()
    assert 'from_pretrained("me/student"' in pushed
    assert "| teacher | 50 | 1.25 |" in pushed and "| student |  | 0.5 |" in pushed
    assert 'A line of my own, with `from_pretrained("student")`.' in pushed
    assert hub.repositories["me/student"].files["evaluation.json"] == (tmp_path / "results.json").read_bytes()


def test_an_evaluation_without_rows_is_refused_before_anything_is_sent(export, tmp_path):
    (tmp_path / "results.json").write_text('{"row": []}')
    with pytest.raises(ValueError, match=r"results\.json: an evaluation is"):
        push_directory(export, "me/student", evaluation=tmp_path / "results.json")
    assert not (export / "evaluation.json").exists()


def test_only_what_can_be_loaded_is_pushed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        check_pushable(tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    check_pushable(tmp_path)
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="training checkpoint"):
        check_pushable(tmp_path)
