"""The local Hub of these tests is one for the unmodified client: what the other tests find with it holds."""

import hashlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from hub_server import HubServer

WEIGHTS = os.urandom(3_000_000)
CARD = b"---\nlicense: apache-2.0\n---\n# A model\n"

PRELUDE = """
import json, pathlib, sys
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download

def caught(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)]

folder, found, api = sys.argv[1], {}, HfApi()
"""

CLIENT = """
found["user"] = api.whoami()["name"]
found["url"] = str(api.create_repo("org/model", private=True))
found["created twice"] = caught(api.create_repo, "org/model")
api.create_repo("org/model", exist_ok=True)
found["foreign"] = caught(api.create_repo, "others/model")
found["reader creates"] = caught(HfApi(token="reader").create_repo, "org/another")
found["first"] = first = api.upload_folder(repo_id="org/model", folder_path=folder).oid
found["again"] = api.upload_folder(repo_id="org/model", folder_path=folder).oid
card = CommitOperationAdd("README.md", b"---\\nlicense: mit\\n---\\n")
found["second"] = api.create_commit("org/model", [card], commit_message="Card", parent_commit=first).oid
card = CommitOperationAdd("README.md", b"---\\nlicense: other\\n---\\n")
found["stale"] = caught(api.create_commit, "org/model", [card], commit_message="Card", parent_commit=first)
bad = CommitOperationAdd("README.md", b"---\\ntags: [a]\\n---\\n")
found["no licence"] = caught(api.create_commit, "org/model", [bad], commit_message="Card")
api.create_tag("org/model", tag="v1", revision=first)
found["tag twice"] = caught(api.create_tag, "org/model", tag="v1")
found["tags"] = {ref.name: ref.target_commit for ref in api.list_repo_refs("org/model").tags}
info = api.model_info("org/model", revision="v1", files_metadata=True)
found["sha"], found["private"] = info.sha, info.private
found["metadata"] = {file.rfilename: [file.size, file.lfs and file.lfs.sha256] for file in info.siblings}
found["files"] = api.list_repo_files("org/model")
found["tree"] = [item.path for item in api.list_repo_tree("org/model")]
found["missing"] = [api.repo_exists("org/none"), api.file_exists("org/model", "none")]
found["missing"].append(api.revision_exists("org/model", "none"))
found["download"] = [hf_hub_download("org/model", name, revision="v1") for name in ("model.safetensors", "README.md")]
found["snapshot"] = sorted(path.name for path in pathlib.Path(snapshot_download("org/model")).iterdir())
found["pinned"] = hf_hub_download("org/model", "config.json", revision=first)
found["anonymous"] = caught(HfApi(token=False).model_info, "org/model")
found["anonymous download"] = caught(hf_hub_download, "org/model", "uncached", token=False)
found["stranger"] = caught(HfApi(token="stranger").model_info, "org/model")
found["reader"] = HfApi(token="reader").model_info("org/model").id
found["reader commits"] = caught(HfApi(token="reader").delete_file, "config.json", "org/model")
found["bad token"] = caught(HfApi(token="bad").model_info, "org/public")
found["no token"] = HfApi(token=False).model_info("org/public").id
api.delete_file("config.json", "org/model")
api.delete_tag("org/model", tag="v1")
api.delete_repo("org/model2", missing_ok=True)
print(json.dumps(found))
"""

XET_CLIENT = """
found["oid"] = api.upload_folder(repo_id="org/model", folder_path=folder).oid
found["again"] = api.upload_folder(repo_id="org/model", folder_path=folder).oid
found["download"] = hf_hub_download("org/model", "model.safetensors")
found["sha256"] = [file.lfs.sha256 for file in api.model_info("org/model", files_metadata=True).siblings if file.lfs]
print(json.dumps(found))
"""


@pytest.fixture
def model_folder(tmp_path) -> Path:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for name, data in {
        "model.safetensors": WEIGHTS,
        "README.md": CARD,
        "config.json": b"{}",
        "sub/a.txt": b"a",
    }.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def server(tmp_path):
    hub = HubServer(tmp_path / "hub")
    for token, name, orgs, write in (
        ("owner", "alice", ("org",), True),
        ("reader", "bob", ("org",), False),
        ("stranger", "eve", (), True),
    ):
        hub.add_user(token, name, orgs, write)
    with hub:
        yield hub


def client(server: HubServer, code: str, folder: Path, xet: bool = False) -> dict:
    environment = server.environment(folder.parent / "home", token="owner", xet=xet)
    command = [sys.executable, "-c", PRELUDE + code, str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def ask(url: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    asked = urllib.request.Request(url, body, headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(asked, timeout=10) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_the_client_can_publish_and_load_and_meets_the_hubs_refusals(server, model_folder):
    server.put("org/public", {"config.json": b"{}"})
    found = client(server, CLIENT, model_folder)
    repo = server.repos["org/model"]
    history = list(repo.commits)

    assert (found["user"], found["url"], repo.private) == ("alice", f"{server.url}/org/model", True)
    assert found["created twice"] == ["HfHubHTTPError", 409]
    assert found["foreign"] == found["reader creates"] == found["reader commits"] == ["HfHubHTTPError", 403]
    assert history[1:3] == [found["first"], found["second"]]
    assert len(history) == 4  # of two refused commits there is no trace; the last one is a deletion
    assert found["again"] == found["first"]
    assert found["stale"] == ["HfHubHTTPError", 412]
    assert found["no licence"] == ["ValueError", None]
    assert found["tag twice"] == ["HfHubHTTPError", 409]
    assert found["tags"] == {"v1": found["first"]}
    assert repo.tags == {}
    assert (found["sha"], found["private"]) == (found["first"], True)
    sha256 = repo.commits[found["first"]].files["model.safetensors"].sha256
    assert found["metadata"]["model.safetensors"] == [len(WEIGHTS), sha256]
    assert found["metadata"]["config.json"] == [2, None]
    files = [".gitattributes", "README.md", "config.json", "model.safetensors", "sub/a.txt"]
    assert sorted(found["files"]) == files
    assert sorted(found["tree"]) == [*files[:4], "sub"]
    assert found["missing"] == [False, False, False]
    assert found["snapshot"] == [*files[:4], "sub"]
    assert [Path(path).read_bytes() for path in found["download"]] == [WEIGHTS, CARD]
    assert found["anonymous"] == found["anonymous download"] == ["RepositoryNotFoundError", 401]
    assert found["stranger"] == ["RepositoryNotFoundError", 404]
    assert (found["reader"], found["no token"]) == ("org/model", "org/public")
    assert found["bad token"] == ["HfHubHTTPError", 401]
    assert "config.json" not in repo.files("main")

    elsewhere = [request for request in server.requests if request.origin == "cdn"]
    assert {(request.method, request.authorization) for request in elsewhere} == {("PUT", None), ("GET", None)}
    assert [request.method for request in elsewhere].count("PUT") == 1  # unchanged weights are not sent again


def test_the_client_can_publish_and_load_by_xet(server, model_folder):
    server.put("org/model", {"config.json": b"{}"})
    found = client(server, XET_CLIENT, model_folder, xet=True)

    assert server.read("org/model", "model.safetensors") == WEIGHTS
    assert Path(found["download"]).read_bytes() == WEIGHTS
    assert found["again"] == found["oid"] == server.repos["org/model"].branches["main"]
    assert found["sha256"] == [hashlib.sha256(WEIGHTS).hexdigest()]
    assert any("xet-write-token" in request.path for request in server.requests)
    assert any("xet-read-token" in request.path for request in server.requests)
    assert all(request.origin == "hub" for request in server.requests)
    assert ask(f"{server.url}/org/model/resolve/main/model.safetensors") == (200, WEIGHTS)  # also without xet


def test_a_damaged_file_keeps_its_announced_hash(server):
    server.put("org/model", {"model.safetensors": WEIGHTS})
    blob = server.repos["org/model"].files("main")["model.safetensors"]
    server.flip_byte("org/model", "model.safetensors")

    status, data = ask(f"{server.url}/org/model/resolve/main/model.safetensors")
    assert (status, len(data)) == (200, len(WEIGHTS))
    assert sum(a != b for a, b in zip(data, WEIGHTS, strict=True)) == 1
    assert server.repos["org/model"].files("main")["model.safetensors"] == blob


def test_tests_can_interfere_with_the_next_requests(server):
    server.put("org/model", {"a": b"a"})
    url = f"{server.url}/api/models/org/model"
    server.fail_next("GET", "/api/models/", status=503, times=2)
    server.before("GET", "/api/models/", lambda: server.put("org/model", {"a": b"b"}))
    assert [ask(url)[0] for _ in range(3)] == [503, 503, 200]
    assert server.read("org/model", "a") == b"b"

    server.fail_next("PUT", "/", status=0)
    with pytest.raises(OSError, match=r"closed|reset|pipe"):
        ask(f"{server.cdn_url}/{'0' * 64}", "PUT", WEIGHTS)
    assert ask(f"{server.cdn_url}/{'0' * 64}", "PUT", WEIGHTS)[0] == 403
    assert [request.status for request in server.requests] == [503, 503, 200, 0, 403]


def test_ranges_and_paths_that_leave_the_repository(server):
    server.put("org/model", {"model.safetensors": WEIGHTS})
    url = f"{server.url}/org/model/resolve/main/"
    assert ask(url + "model.safetensors", Range="bytes=10-19") == (206, WEIGHTS[10:20])
    assert ask(url + "model.safetensors", Range="bytes=2999990-") == (206, WEIGHTS[-10:])
    assert ask(url + "model.safetensors", Range="bytes=3000000-")[0] == 416
    for path in ("..%2F..%2Fsecret", "a%5Cb", "%2Fetc/passwd", "a//b"):
        assert ask(url + path)[0] == 400, path
    for path in ("../a", "/a", "a\\b", "C:/a"):
        lines = [{"key": "header", "value": {"summary": ""}}, {"key": "file", "value": {"path": path, "content": ""}}]
        body = "\n".join(map(json.dumps, lines)).encode()
        status, reply = ask(
            f"{server.url}/api/models/org/model/commit/main", "POST", body, Authorization="Bearer owner"
        )
        assert (status, "Invalid path" in json.loads(reply)["error"]) == (400, True), path


def test_nothing_answers_after_the_end_also_not_on_open_connections(tmp_path):
    code = """
import time
api.model_info("org/model")
input()
start = time.time()
found["error"] = caught(api.model_info, "org/model")
found["seconds"] = time.time() - start
print(json.dumps(found))
"""
    with HubServer(tmp_path) as server:
        server.put("org/model", {"a": b"a"})
        command = [sys.executable, "-c", PRELUDE + code, ""]
        process = subprocess.Popen(
            command, env=server.environment(tmp_path / "home"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 60
        while not server.requests and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)  # the answer is read, its connection is kept
    with process:
        output, _ = process.communicate("\n", timeout=60)
    found = json.loads(output)
    assert found["error"] == ["ConnectError", None]
    assert found["seconds"] < 2
    with pytest.raises(urllib.error.URLError, match="refused"):
        ask(server.url)
