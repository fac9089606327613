"""Publishing and loading against a local server that speaks the Hub's protocol, with the unmodified client."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import evaluate
import publish
import pytest
import torch
from hub_server import HubServer
from processes import run_python

from timm_mfd import create_model, recipes, results, save_pretrained
from timm_mfd.data import load_dataset

TOKEN = "hf_secretOwner0123456789"
SCRIPTS = Path(publish.__file__).parent
REPO = "org/resnet18_mfd.digits"

RESULT = results.Result(
    recipe="", protocol="paper", seed=0, top1=0.0, top5=99.0, images=10000, split="test",
    curve={"top1": [10.0, 50.0]}, stages=[0, 1], correlation_before=[0.3, 0.3], correlation_after=[0.1, 0.2],
    wall_seconds=3600.0, images_per_second=1000.0, device="1 x gpu", arithmetic={"mixed_precision": "bf16"},
    environment={"git_commit": "0123456789abcdef", "git_modified": False}, data="0", warnings=[],
)  # fmt: skip

PRELUDE = """
import importlib, json, sys, warnings
import timm, timm_mfd, torch
from safetensors.torch import load_file
from timm_mfd.hub import probe
from timm_mfd.models import _pretrained, resnet_mfd

def tag(row):
    "Make a published tag known, as a release of the package would."
    _pretrained.PRETRAINED.update(eval("{" + row + "}", vars(_pretrained)))
    warnings.simplefilter("ignore")
    importlib.reload(resnet_mfd)

def failure(name, create=timm_mfd.create_model, **kwargs):
    try:
        create(name, pretrained=True, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A run on digits with a moving average, published on a server that the tests then ask."""
    folder = tmp_path_factory.mktemp("publish")
    flags = ["--epochs", "1", "--ema-decay", "0.5", "--output-dir", folder / "run"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    call([SCRIPTS / "train.py", *flags], environment)
    with HubServer(folder / "hub") as server:
        server.add_user(TOKEN, "alice", ("org",))
        server.add_user("hf_reader", "bob", (), write=False)
        output = push(server, folder / "home", folder / "run")
        yield SimpleNamespace(server=server, folder=folder, run=folder / "run", output=output)


def call(command, environment, code=0):
    result = run_python(*command, env=environment)
    output = result.stdout + result.stderr
    assert result.returncode == code, output
    assert TOKEN not in output
    return output


def push(server, home, run, *flags, token=TOKEN, xet=False, code=0, repo=REPO):
    command = [SCRIPTS / "publish.py", "--run-dir", run, "--repo-id", repo, "--push", *flags]
    return call(command, server.environment(home, token, xet), code)


def ask(server, home, code, token=None, **more):
    output = call(["-c", PRELUDE + code], server.environment(home, token, **more))
    return json.loads(output.splitlines()[-1])


def row_of(output):
    return output.split("pretrained=True loads them:\n", 1)[1]


def test_every_way_of_loading_gives_the_trained_average_bit_for_bit(published, tmp_path):
    code = f"""
tag({row_of(published.output)!r})
trained = timm_mfd.create_model("resnet18_mfd", num_classes=10, stem="cifar")
state = load_file("{published.run}/checkpoint/state.safetensors")
def part(prefix):
    return {{key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}}
ema, raw = part("state_dict_ema/"), part("state_dict/")
images = torch.randn(3, 3, 8, 8)
def logits(model):
    with torch.no_grad():
        return model.eval()(images)
trained.load_state_dict(raw)
of_raw = logits(trained)
trained.load_state_dict(ema)
wanted = logits(trained)
models = {{
    "hub": timm_mfd.create_model("hf-hub:{REPO}", pretrained=True),
    "revision": timm_mfd.create_model("hf-hub:{REPO}@v1.0", pretrained=True),
    "timm": timm.create_model("hf-hub:{REPO}", pretrained=True),
    "tag": timm.create_model("resnet18_mfd.digits", pretrained=True),
    "tag here": timm_mfd.create_model("resnet18_mfd.digits", pretrained=True),
}}
print(json.dumps({{
    "equal": [name for name, model in models.items() if torch.equal(logits(model), wanted)],
    "raw": torch.equal(of_raw, wanted),
    "pretrained": timm.list_pretrained("resnet18_mfd*"),
    "listed": timm_mfd.list_models("resnet18_mfd*", pretrained=True),
    "name alone": failure("resnet18_mfd"),
    "untrained": timm_mfd.create_model("resnet18_mfd").num_classes,
    "head": timm_mfd.create_model("resnet18_mfd.digits", pretrained=True, num_classes=3)(images).shape[1],
    "features": len(timm.create_model("resnet18_mfd.digits", pretrained=True, features_only=True)(images)),
    "stem": failure("resnet18_mfd.digits", stem="small"),
    "source": models["hub"].pretrained_cfg["hf_hub_id"],
    "paths": [name for name, model in models.items() if "{tmp_path}" in str(model.pretrained_cfg)],
}}))
"""
    found = ask(published.server, tmp_path / "home", code)
    assert found["equal"] == ["hub", "revision", "timm", "tag", "tag here"]
    assert not found["raw"]
    assert found["pretrained"] == found["listed"] == ["resnet18_mfd.digits"]
    assert "there are those of resnet18_mfd.digits" in found["name alone"]
    assert (found["untrained"], found["head"], found["features"]) == (1000, 3, 5)
    assert "were trained with stem 'cifar', not 'small'" in found["stem"]
    assert found["source"] == f"{REPO}@{published.server.repos[REPO].tags['v1.0']}"
    assert found["paths"] == []


def test_a_cache_that_may_only_be_read_is_enough(published, tmp_path):
    """The place where it would be noted which commit a tag was is a file here: read-only binds no administrator."""
    code = f"""
from pathlib import Path
from huggingface_hub import constants, snapshot_download
snapshot_download("{REPO}", revision="v1.0")
(Path(constants.HF_HUB_CACHE) / "models--{REPO.replace("/", "--")}" / "timm_mfd").write_text("")
print(json.dumps(failure("hf-hub:{REPO}@v1.0")))
"""
    assert ask(published.server, tmp_path / "home", code) is None


def test_large_files_come_from_the_second_origin_without_the_token(published):
    asked = [request for request in published.server.requests if request.origin == "cdn"]
    assert {request.method for request in asked} >= {"GET", "PUT"}
    assert all(request.authorization is None for request in asked)
    assert any(request.authorization == f"Bearer {TOKEN}" for request in published.server.requests)


def test_publishing_again_changes_nothing_and_a_tag_never_moves(published, tmp_path):
    commits = dict(published.server.repos[REPO].commits)
    assert "was there already" in push(published.server, tmp_path / "home", published.run)
    assert published.server.repos[REPO].commits == commits
    other = shutil.copytree(published.run, tmp_path / "other")
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps(summary | {"top1": summary["top1"] + 1}))
    output = push(published.server, tmp_path / "home", other, code=1)
    assert "has the tag 'v1.0' on other files (README.md); choose a new --tag" in output
    assert published.server.repos[REPO].commits == commits


def test_what_is_not_as_published_is_refused(published, tmp_path):
    server, good = published.server, published.run / "publish"
    config, weights = (good / "config.json").read_bytes(), (good / "model.safetensors").read_bytes()
    files = {"config.json": config, "model.safetensors": weights}
    changed = {
        "architecture": {"architecture": "resnet34_mfd"},
        "unknown": {"architecture": "evil"},
        "arguments": {"model_args": {"stem": "cifar", "checkpoint_path": "/etc/passwd"}},
        "stem": {"model_args": json.loads(config)["model_args"] | {"stem": "small"}},
        "classes": {"num_classes": 7},
    }
    for name, change in changed.items():
        server.put(f"org/{name}", files | {"config.json": json.dumps(json.loads(config) | change).encode()})
    # Other weights than the good ones: the server stores equal files once.
    unsigned = {key: value for key, value in json.loads(config).items() if key != "timm_mfd"}
    others = {"config.json": json.dumps(unsigned).encode(), "model.safetensors": weights[:-1] + b"\0"}
    server.put("org/flipped", others)
    server.flip_byte("org/flipped", "model.safetensors")
    server.put("org/pickled", {"config.json": config, "pytorch_model.bin": b"\x80\x04."})
    server.put("org/moving", files)
    server.repos["org/moving"].tags["v1"] = server.repos["org/moving"].branches["main"]
    server.put("org/private", files, private=True)
    wrong = row_of(published.output).replace("digits", "wrong", 1)
    sha256 = wrong.split('sha256="')[1][:64]
    code = f"""
tag({wrong.replace(sha256, "0" * 64)!r})
names = {[*changed, "flipped", "pickled", "private", "none"]!r}
found = {{name: failure(f"hf-hub:org/{{name}}") for name in names}}
for name in ("flipped", "stem", "classes"):
    found[f"timm {{name}}"] = failure(f"hf-hub:org/{{name}}", timm.create_model)
found["traversal"] = failure("hf-hub:../../etc")
found["revision"] = failure("hf-hub:org/stem@../x")
found["tag"] = failure("resnet18_mfd.wrong", timm.create_model)
timm_mfd.create_model("hf-hub:org/moving@v1", pretrained=True)
print(json.dumps(found))
"""
    found = ask(server, tmp_path / "home", code)
    for name, message in {
        "architecture": 'architecture is "resnet34_mfd", was "resnet18_mfd"',
        "unknown": "names an unknown architecture: 'evil'",
        "arguments": "has the argument checkpoint_path='/etc/passwd', which a saved model may not set",
        "stem": "is not the configuration that the weights were saved with: model_args is",
        "classes": "contradicts itself: num_classes is 7, model_args.num_classes is 10",
        "flipped": "is not what was saved: its sha256 is",
        "pickled": "has no model.safetensors; other formats are not loaded",
        "private": "the Hub has no model 'org/private' that you may see",
        "none": "the Hub has no model 'org/none' that you may see",
        "timm flipped": "is not what was saved",
        "timm stem": "is not the configuration that the weights were saved with",
        "timm classes": "contradicts itself",
        "traversal": "is not a model of the Hub",
        "revision": "is not a model of the Hub",
        "tag": f"expected {'0' * 64}; nothing was loaded",
    }.items():
        assert found[name] is not None, name
        assert found[name].startswith("ValueError: "), (name, found[name])
        assert message in found[name], (name, found[name])
    server.put("org/moving", {"more": b"x"})
    server.repos["org/moving"].tags["v1"] = server.repos["org/moving"].branches["main"]
    code = "print(json.dumps([failure('hf-hub:org/moving@v1'), failure('hf-hub:org/private')]))"
    moved, refused = ask(server, tmp_path / "home", code, token="hf_wrong")
    assert "the Hub refused the token (401)" in moved
    assert "the Hub refused the token (401)" in refused
    code = """
server_moved = [failure('hf-hub:org/moving@v1', create) for create in (timm.create_model, timm_mfd.create_model)]
print(json.dumps(server_moved))
"""  # timm asks the Hub's cache first, which then knows the new commit only
    assert all("the tag 'v1' of 'org/moving' moved" in said for said in ask(server, tmp_path / "home", code))
    server.put("org/racing", files)
    server.before("HEAD", "/org/racing/resolve/main/config.json", lambda: server.put("org/racing", {"new": b"x"}))
    code = "print(json.dumps(failure('hf-hub:org/racing')))"
    assert "changed while it was loaded" in ask(server, tmp_path / "home", code)


@pytest.mark.slow
def test_without_a_network_the_cache_answers_and_an_empty_one_says_so_at_once(published, tmp_path):
    other = HubServer(tmp_path / "hub")
    with other:
        environment = other.environment(tmp_path / "home")
        files = {name: (published.run / "publish" / name).read_bytes() for name in ("config.json", "model.safetensors")}
        commit = other.put("org/model", files)
        code = (
            PRELUDE + "print(probe(timm_mfd.create_model('hf-hub:org/model', pretrained=True), (3, 8, 8)).sum().item())"
        )
        online = call(["-c", code], environment).splitlines()[-1]
    assert call(["-c", code], environment).splitlines()[-1] == online
    assert call(["-c", code], environment | {"HF_HUB_OFFLINE": "1"}).splitlines()[-1] == online
    pinned = code.replace("org/model", f"org/model@{commit}")
    assert call(["-c", pinned], environment).splitlines()[-1] == online
    empty = environment | {"HF_HOME": str(tmp_path / "empty")}
    output = call(["-c", PRELUDE + "print(failure('hf-hub:org/model'))"], empty)
    assert "ConnectionError: the Hub cannot be reached, and the cache does not hold 'org/model'" in output
    assert "Retrying" not in output  # which the client does for half a minute


@pytest.mark.slow
def test_a_private_model_is_published_by_xet_and_loaded_with_a_token_only(published, tmp_path):
    push(published.server, tmp_path / "home", published.run, "--private", xet=True, repo="org/secret")
    assert published.server.repos["org/secret"].private
    code = "print(json.dumps(failure('hf-hub:org/secret')))"
    assert ask(published.server, tmp_path / "reader", code, token=TOKEN) is None
    assert "that you may see" in ask(published.server, tmp_path / "nobody", code)


@pytest.mark.slow
def test_a_cut_or_raced_upload_is_refused_and_can_be_run_again(published, tmp_path):
    server = published.server
    server.fail_next("POST", "/api/models/org/cut/commit", status=500)
    assert "the Hub failed (500)" in push(server, tmp_path / "home", published.run, code=1, repo="org/cut")
    assert server.repos["org/cut"].tags == {}
    assert "published: org/cut" in push(server, tmp_path / "home", published.run, repo="org/cut")
    server.before("POST", "/api/models/org/raced/commit", lambda: server.put("org/raced", {"other.txt": b"x"}))
    assert "changed by somebody else meanwhile" in push(
        server, tmp_path / "home", published.run, code=1, repo="org/raced"
    )
    assert "that may write" in push(
        server, tmp_path / "home", published.run, code=1, repo="org/mine", token="hf_reader"
    )


@pytest.mark.slow
def test_a_push_sends_its_own_files_and_refuses_what_would_not_be_them(published, tmp_path):
    server, good = published.server, tmp_path / "model"
    torch.manual_seed(2)
    save_pretrained(create_model("test_resnet", num_classes=4), good, image_size=(32, 32))
    (good / ".env").write_text("SECRET")
    server.put("org/public", {"a": b"x"})
    server.put("org/pickled", {"pytorch_model.bin": b"x"})
    server.put("org/stale", {"curves.png": b"of other weights"})
    others = lambda: server.put("org/others", {"evil.bin": b"x"})  # noqa: E731
    server.before("POST", "org/others/commit", lambda: server.before("GET", "/api/models/org/others", others))
    server.before("GET", "/org/damaged/resolve", lambda: server.flip_byte("org/damaged", "model.safetensors"))
    code = f"""
from timm_mfd import hub
def push(name, **kwargs):
    try:
        return timm_mfd.push_to_hub({str(good)!r}, f"org/{{name}}", **kwargs).commit
    except ValueError as error:
        return str(error)
print(json.dumps({{
    "stale": push("stale", tag="v1"),
    "others": push("others", tag="v1"),
    "parent": push("stale", parent_commit="0" * 40),
    "branch": push("stale", tag="main"),
    "public": push("public", private=True),
    "pickled": push("pickled"),
    "differs": [setattr(hub, "_is_same", lambda *_: False), push("sums", tag="v1")][1],
    "damaged": [setattr(hub, "_is_same", lambda *_: True), push("damaged", tag="v1")][1],
}}))
"""
    found = ask(server, tmp_path / "home", code, TOKEN)
    sent = {"model.safetensors", "config.json", "README.md", ".gitattributes"}
    assert set(server.repos["org/stale"].files("v1")) == set(server.repos["org/others"].files("v1")) == sent
    for name, message in {
        "parent": "not at 0000",
        "branch": "'main' cannot be a tag",
        "public": "exists and is public; nothing was uploaded",
        "pickled": "holds weights in other formats (pytorch_model.bin)",
        "differs": "does not hold what was sent (model.safetensors, config.json, README.md); nothing was tagged",
        "damaged": "is not what was saved",
    }.items():
        assert message in found[name], (name, found[name])
    assert server.repos["org/sums"].tags == server.repos["org/damaged"].tags == {}


@pytest.mark.slow
def test_an_upload_cut_inside_the_weights_leaves_nothing_and_can_be_run_again(published, tmp_path):
    server = published.server
    torch.manual_seed(1)  # weights that the server does not have yet, else they are not sent
    folder = save_pretrained(create_model("resnet18_mfd", num_classes=10, stem="cifar"), tmp_path / "model")
    code = "from timm_mfd.launch import one_line_errors\nwith one_line_errors(ValueError, OSError):\n"
    code += f"    print(timm_mfd.push_to_hub({str(folder)!r}, 'org/torn').changed)"
    environment = server.environment(tmp_path / "home", TOKEN)
    rule = server.fail_next("PUT", "", status=0, times=100)
    output = call(["-c", PRELUDE + code], environment, code=1)
    assert "Traceback" not in output
    assert any((asked.method, asked.status) == ("PUT", 0) for asked in server.requests)
    assert "model.safetensors" not in server.repos["org/torn"].files("main")
    assert server.repos["org/torn"].tags == {}
    rule.times = 0
    assert call(["-c", PRELUDE + code], environment).splitlines()[-1] == "True"
    assert server.read("org/torn", "model.safetensors") == (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_compiled_run_is_published_and_answers_as_its_weights(published, tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(published.folder / "cache")}
    call([SCRIPTS / "train.py", "--epochs", "1", "--compile", "--output-dir", tmp_path / "run"], environment)
    push(published.server, tmp_path / "home", tmp_path / "run", repo="org/compiled")
    code = f"""
trained = timm_mfd.create_model("resnet18_mfd", num_classes=10, stem="cifar")
state = load_file("{tmp_path}/run/checkpoint/state.safetensors")
prefix = "state_dict/"
trained.load_state_dict({{key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}})
wanted = probe(trained, (3, 8, 8))
loaded = [create("hf-hub:org/compiled", pretrained=True) for create in (timm.create_model, timm_mfd.create_model)]
print(json.dumps([torch.equal(probe(model, (3, 8, 8)), wanted) for model in loaded]))
"""
    assert ask(published.server, tmp_path / "empty", code) == [True, True]


@pytest.mark.slow
def test_without_push_nothing_is_sent(published, tmp_path):
    before = len(published.server.requests)
    command = [SCRIPTS / "publish.py", "--run-dir", published.run, "--repo-id", REPO]
    output = call(command, published.server.environment(tmp_path, TOKEN))
    assert "nothing was sent" in output
    assert "model.safetensors" in output
    assert len(published.server.requests) == before
    command[2] = tmp_path
    assert "is not a finished run" in call(command, published.server.environment(tmp_path), code=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repo_id": "NAME"}, "'NAME' is not a name that the Hub accepts"),
        ({"repo_id": "a/b/c"}, "'a/b/c' is not a name that the Hub accepts"),
        ({"repo_id": "ORG/NA ME"}, "'ORG/NA ME' is not a name that the Hub accepts"),
        ({"repo_id": "ORG/NAME@v1"}, "'ORG/NAME@v1' is not a name that the Hub accepts"),
        ({"tag": "main"}, "'main' cannot be a tag"),
        ({"tag": "v 1"}, "'v 1' cannot be a tag"),
        ({"license": "MIT-0"}, "--license MIT-0 is none of the Hub's names; did you mean mit"),
        ({"license": "other"}, "--license other is none of the Hub's names"),
        ({"results": Path("nowhere")}, "--results nowhere is not a folder"),
        ({"run_dir": Path("nowhere")}, "--run-dir nowhere does not exist or is not a folder"),
    ],
)
def test_what_cannot_be_published_is_refused_before_anything_is_built(published, change, message, capsys):
    before = (published.run / "publish").stat().st_mtime_ns
    with pytest.raises(SystemExit) as stopped:
        publish.main(publish.Args(**{"run_dir": published.run, "repo_id": REPO} | change))
    assert message in str(stopped.value)
    assert (published.run / "publish").stat().st_mtime_ns == before


def test_evaluate_repeats_the_accuracy_of_the_run(published, tmp_path):
    top1 = json.loads((published.run / "summary.json").read_text())["top1"]
    environment = published.server.environment(tmp_path / "home")
    command = [SCRIPTS / "evaluate.py", "--model", f"hf-hub:{REPO}", "--dataset", "digits", "--json", tmp_path / "a"]
    assert f"| {top1:.2f} |" in call(command, environment)
    assert json.loads((tmp_path / "a").read_text())["top1"] == top1
    assert "exists; nothing was changed" in call(command, environment, code=1)
    for name in ("b", "c"):  # the run folder, and the model inside
        source = published.run if name == "b" else published.run / "model"
        evaluate.main(evaluate.Args(model=str(source), dataset="digits", json=tmp_path / name))
        assert json.loads((tmp_path / name).read_text())["top1"] == top1


def test_files_of_somebody_else_in_the_folder_to_publish_are_kept(published, tmp_path):
    run = shutil.copytree(published.run, tmp_path / "run")
    (run / "publish" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt; move that away first"):
        publish.build(publish.Args(run_dir=run, repo_id=REPO))
    assert (run / "publish" / "notes.txt").read_text() == "mine"


def test_a_folder_that_does_not_answer_as_its_weights_is_noticed(published, monkeypatch):
    publish.prove(published.run / "publish")
    other = create_model("resnet18_mfd", num_classes=10, stem="cifar")
    monkeypatch.setattr(publish, "timm", SimpleNamespace(create_model=lambda *_, **__: other))
    with pytest.raises(ValueError, match="does not answer as its own weights"):
        publish.prove(published.run / "publish")


@pytest.mark.parametrize("repo_id", ["me/resnet18_mfd", "me/other.digits", "me/resnet18.digits"])
def test_no_row_of_the_table_is_printed_for_names_that_no_tag_can_have(repo_id):
    assert publish.tag_name(repo_id, {"architecture": "resnet18_mfd"}) is None


def test_the_card_compares_runs_of_a_recipe_with_its_baseline_and_the_paper(tmp_path):
    recipe, _ = recipes.find("resnet50/cifar100/softmax+mfd")
    baseline, _ = recipes.find("resnet50/cifar100/softmax")
    of_runs = {recipe: (78.0, 78.2, 78.4), baseline: (76.0, 76.4, 76.2)}
    for which, accuracies in of_runs.items():
        for seed, top1 in enumerate(accuracies):
            curve = {"top1": [10.0, top1]}
            results.write(replace(RESULT, recipe=which.id, seed=seed, top1=top1, curve=curve), tmp_path)
    found = publish.compare(recipe.id, tmp_path)
    assert (found["ours"], found["baseline"]) == ("78.20 ± 0.20 (n=3)", "76.20 ± 0.20 (n=3)")
    assert found["difference"] == "+2.00 [+1.50, +2.50]"  # t(2) = 4.303, and the differences are 2.0, 1.8, 2.2
    assert (found["paper"], found["paper_baseline"]) == (
        f"{recipe.accuracy} (protocol here: paper)", str(baseline.accuracy)
    )  # fmt: skip
    assert publish.compare(baseline.id, tmp_path) == found
    assert publish.compare("resnet50/cifar10/softmax+mfd", tmp_path) is None  # never run
    assert publish.compare(None, tmp_path) is None
    assert publish.compare(recipe.id, tmp_path / "none") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 7}, "m has 7 classes, digits has 10"),
        ({"label_names": ["0", "1", "3", *"2456789"]}, "m calls a class '3' that digits calls '2'"),
        ({"fixed_input_size": True}, "m needs images of (224, 224), digits has (8, 8)"),
    ],
)
def test_a_model_of_other_classes_or_another_size_is_not_evaluated(change, message):
    model = create_model("resnet18_mfd", num_classes=change.pop("num_classes", 10))
    model.pretrained_cfg.update(change)
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate.as_trained(load_dataset("digits", None), model, "m")


def test_evaluation_uses_the_preprocessing_of_the_model():
    model = create_model("resnet18_mfd", num_classes=10)
    model.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    data = evaluate.as_trained(load_dataset("digits", None), model, "m")
    assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
