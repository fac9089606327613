"""Situations in which users found a traceback, another result or nothing at all; most are started as they start it."""

import ast
import importlib.util
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import evaluate
import pytest
import timm
import torch
import train
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from processes import run_python, wait_for
from test_bad_inputs import MISTAKES
from torch import nn

import timm_mfd
from timm_mfd import extras, launch
from timm_mfd.arguments import Args
from timm_mfd.data.resident import decoded
from timm_mfd.figures import training_curves
from timm_mfd.interruption import StopSignals
from timm_mfd.launch import follow_launcher, forget_foreign_settings, one_line_errors, start_all_processes
from timm_mfd.models.download import hub_errors
from timm_mfd.training import lock
from timm_mfd.training.diagnosis import average_warnings, verdicts
from timm_mfd.training.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "train_scripts" / "train.py"
BASE = Args(model="test_resnet", epochs=1, batch_size=240, lr=0.01, output_dir="run", workers=0)
FOLDER = replace(BASE, dataset="folder", data_dir="images", batch_size=8)
WORDS = "--dataset folder --data-dir images --model test_resnet --epochs 1 --batch-size 8 --lr 0.01 --output-dir run"


@pytest.fixture(autouse=True)
def _fresh_folder(runs_here):
    """A folder and a cache of its own."""


def metrics(folder="run"):
    lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if "second" not in key} for line in lines]


# A traceback where one line belongs.


# One real interpreter imports what the script imports; each start is forked from it and ends as an interpreter ends.
STARTS = """
import json, os, runpy, sys
import sklearn.datasets, sklearn.model_selection, train
codes = []
for folder, words in json.load(sys.stdin):
    if os.fork() == 0:
        os.chdir(folder)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv = [train.__file__, *words]
        runpy.run_path(train.__file__, run_name="__main__")
        sys.exit()
    codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
print(json.dumps(codes))
"""


def start(starts):
    """Start train.py once for each pair of folder and words, and return exit codes and lines of standard error."""
    content = json.dumps([(str(folder), list(words)) for folder, words in starts])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", STARTS]
    result = subprocess.run(command, input=content, env=environment, capture_output=True, text=True, check=True)
    codes = json.loads(result.stdout)
    return [(code, Path(folder, "stderr").read_text()) for code, (folder, _) in zip(codes, starts, strict=True)]


def on_the_command_line(change):
    """Return arguments as a user writes them."""
    words = []
    for name, value in (WANTED | change).items():
        flag = f"--{name.replace('_', '-')}"
        values = value if isinstance(value, tuple) else (value,)
        words += [flag] if value is True else [f"{flag}={value}"] if len(values) == 1 else [flag, *map(str, values)]
    return words


WANTED = {"model": "test_resnet", "epochs": 1, "batch_size": 479, "lr": 0.01, "output_dir": "run"}
ACTED = {"unreadable file", "tracker that is not installed"}  # played in the process of the test
A_START_OF_EACH_KIND = ("stem for a model without", "no image", "pickled model that would run code")


def check_starts_end_in_one_line(names, tmp_path, monkeypatch):
    starts = []
    for number, name in enumerate(names):
        prepare, change, _ = MISTAKES[name]
        shutil.copytree("images", tmp_path / str(number) / "images")
        with monkeypatch.context() as there:
            there.chdir(tmp_path / str(number))
            if prepare:
                prepare()
        lock.release_all()  # of runs that were trained here, and that others are to go on with
        starts.append((tmp_path / str(number), on_the_command_line(change)))
    for name, (code, said) in zip(names, start(starts), strict=True):
        *before, last = said.splitlines()
        assert code == 1, (name, said)
        assert last.startswith("train.py: error: "), (name, said)
        assert MISTAKES[name][2] in last, (name, said)
        assert all(line.startswith(("decoding ", "decoded images ", "warning: ")) for line in before), (name, said)


def test_a_start_by_a_mistake_of_every_kind_ends_in_one_line(folder_dataset, tmp_path, monkeypatch):
    """As a user starts it, for it is the end of an interpreter that had more to say."""
    check_starts_end_in_one_line(A_START_OF_EACH_KIND, tmp_path, monkeypatch)


@pytest.mark.slow
def test_a_start_by_any_mistake_ends_in_one_line(folder_dataset, tmp_path, monkeypatch):
    names = [name for name in MISTAKES if name not in {*A_START_OF_EACH_KIND, *ACTED}]
    check_starts_end_in_one_line(names, tmp_path, monkeypatch)


@pytest.mark.slow
def test_after_the_line_about_a_broken_picture_nothing_is_said_ten_times(folder_dataset):
    """Ten whole interpreters: which of two threads is first at their end differs."""
    (folder_dataset / "train" / "ant" / "h.jpg").write_text("<html>404")
    for number in range(10):
        command = [sys.executable, str(TRAIN), *WORDS.split(), "--output-dir", f"run{number}"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        *before, last = result.stderr.splitlines()
        assert result.returncode == 1
        assert last.startswith("train.py: error: cannot decode images/train/ant/h.jpg: not an image")
        assert all(line.startswith("decoding ") for line in before)


@pytest.mark.parametrize(
    ("name", "size"), [("twins_svt_small", 100), ("nest_tiny", 100), ("xcit_nano_12_p8_224", 100), ("swin_tiny", 1)]
)
def test_a_size_that_a_constructor_refuses_is_one_line_with_the_name(name, size):
    name = timm.list_models(f"{name}*")[0]
    with pytest.raises(ValueError, match=rf"^({name}|\w+) (cannot be built with|does not take images of).*{size}"):
        model = timm_mfd.create_model(name, img_size=(size, size), num_classes=3)
        timm_mfd.stages.stage_shapes(model, torch.zeros(1, 3, size, size))


def test_an_argument_that_no_network_takes_is_named():
    with pytest.raises(ValueError, match="resnet18 cannot be built with colour='blue': .*unexpected keyword"):
        timm_mfd.create_model("resnet18", colour="blue")


@pytest.mark.parametrize("name", [None, 18, ["resnet18"]])
def test_a_name_that_is_no_text_is_named(name):
    with pytest.raises(ValueError, match=rf"a model is a text, not {re.escape(repr(name))}"):
        timm_mfd.create_model(name)


def test_a_proxy_that_needs_another_package_is_one_line():
    with (
        pytest.raises(ValueError, match="cannot work with the environment as it is: Using SOCKS proxy"),
        hub_errors("a/b"),
    ):
        raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.")


def test_a_distilled_model_with_two_logits_is_refused_when_the_task_is_made():
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, img_size=32)
    model.set_distilled_training(True)
    with pytest.raises(ValueError, match=r"set_distilled_training\(False\)"):
        timm_mfd.MFDClassificationTask(model)
    with pytest.raises(TypeError, match="returns 2 logits"):
        timm_mfd.forward_stages(model.train(), torch.zeros(2, 3, 32, 32))
    model.set_distilled_training(False)
    timm_mfd.MFDClassificationTask(model)(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))["loss"].backward()


def test_a_compiler_that_is_missing_is_found_before_a_run_begins(monkeypatch):
    def compile(*_, **__):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(SystemExit, match="error: --compile does not work on this machine .*No working C"):
        train.main(replace(BASE, compile=True))
    assert not Path("run").exists()


def test_without_the_extra_every_script_and_the_pictures_say_what_to_install(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in ("tyro", "matplotlib") else name)
    monkeypatch.delitem(sys.modules, "_extra", raising=False)
    monkeypatch.setattr(sys, "stdin", None)  # closed, so that the next file would be opened in its place
    with pytest.raises(SystemExit, match=r"error: .* needs matplotlib, tyro: pip install 'timm_mfd\[train\]'"):
        importlib.import_module("_extra")
    with sys.stdin as opened:
        assert opened.read() == ""
    with pytest.raises(
        ModuleNotFoundError, match=r"timm_mfd.figures needs matplotlib: pip install 'timm_mfd\[figures\]'"
    ):
        importlib.reload(importlib.import_module("timm_mfd.figures._matplotlib"))
    for script in (ROOT / "train_scripts").glob("*.py"):
        text = script.read_text(encoding="utf-8")
        if re.search("^import tyro|^from accelerate", text, re.MULTILINE):
            assert text.index("import _extra") < text.index("import tyro"), script.name


def test_a_warning_is_one_line_without_code():
    with one_line_errors():  # pytest keeps those that are raised for itself
        assert warnings.formatwarning(UserWarning("two\nlines"), UserWarning, "file.py", 1) == "warning: two lines\n"
    assert "file.py" in warnings.formatwarning(UserWarning("two"), UserWarning, "file.py", 1)


def test_a_name_that_the_terminal_cannot_show_ends_no_run(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="gbk")
    monkeypatch.setattr(sys, "stdout", shown)
    with one_line_errors():
        sys.stdout.write("🐜 été\n")
        shown.flush()
    assert shown.buffer.getvalue().startswith(rb"\U0001f41c ")


# The environment.


def test_settings_of_accelerate_from_another_project_change_nothing_and_are_told(folder_dataset, monkeypatch, capsys):
    train.main(replace(FOLDER, output_dir="alone"))
    AcceleratorState._reset_state(reset_partial_state=True)
    for name, value in {"GRADIENT_ACCUMULATION_STEPS": "4", "DYNAMO_BACKEND": "inductor", "USE_FSDP": "true"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    capsys.readouterr()
    train.main(FOLDER)
    assert (
        "note: the environment has ACCELERATE_DYNAMO_BACKEND=inductor, ACCELERATE_GRADIENT_" in capsys.readouterr().out
    )
    assert metrics("run") == metrics("alone")


def test_what_accelerate_launch_sets_by_itself_is_not_told(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "False")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert forget_foreign_settings() == []
    assert "ACCELERATE_USE_CPU" in os.environ


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_run_that_a_shell_started_does_not_die_with_it_for_an_exported_variable(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    asked = []
    monkeypatch.setattr(launch, "end_with_parent", lambda: asked.append(True))
    told = {}
    monkeypatch.setattr(Path, "read_bytes", lambda path: told["words"])
    for words, is_launcher in (
        (b"bash\0-c\0nohup python accelerate/train.py", False),
        (b"/usr/bin/python3\0/usr/bin/accelerate\0launch\0train.py", True),
        (b"python\0-m\0torch.distributed.run\0train.py", True),
        (b"python\0sweep.py", False),
    ):
        told["words"], asked[:] = words, []
        follow_launcher()
        assert bool(asked) == is_launcher, words


def test_a_precision_of_accelerate_is_told_and_torch_rounds_nothing_for_a_container(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")  # as torch does for that variable when it is imported
        told = forget_foreign_settings()
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
    assert told == ["ACCELERATE_MIXED_PRECISION=bf16", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1"]
    assert "ACCELERATE_MIXED_PRECISION" in os.environ  # by which a launcher is known; an argument overrules it


@pytest.mark.parametrize("left", [{"WORLD_SIZE": "4"}, {"RANK": "3", "LOCAL_RANK": "3"}])
def test_what_another_job_left_of_a_launcher_is_named(left, monkeypatch):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"has {', '.join(f'{k}={v}' for k, v in left.items())}, .* no .*MASTER_ADDR"):
        start_all_processes()


def test_what_is_said_of_loading_is_said_by_the_first_process_alone(folder_dataset, monkeypatch, capsys):
    images = timm_mfd.data.load_dataset("folder", folder_dataset).train
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        decoded(images, Path(rank), 0, "images")
        path = next(Path(rank).glob("*.safetensors"))
        path.write_bytes(b"damaged")
        decoded(images, Path(rank), 0, "images")
        said = capsys.readouterr().err
        assert bool(said) == (rank == "0"), said
    size = path.stat().st_size / 2**20
    assert f"decoded images are kept in 0: {size:.1f} MiB of {size:.1f} MiB; the folder may be deleted" in said


def test_a_home_that_a_shell_did_not_fill_in_is_filled_in(folder_dataset, monkeypatch):
    monkeypatch.setenv("HOME", str(folder_dataset.parent))
    args = Args(data_dir="~/images", output_dir="~/run", resume="auto")
    assert (args.data_dir, args.output_dir) == (str(folder_dataset), str(folder_dataset.parent / "run"))
    assert timm_mfd.data.load_dataset("folder", "~/images").num_classes == 3


DRAW = """
import os, sys
for name in [name for name in sys.modules if name.startswith("matplotlib")]:
    del sys.modules[name]
from timm_mfd.figures import training_curves
line = dict(epoch=1, top1=1.0, top5=2.0, loss=1.0, criterion_loss=1.0, mfd_loss=0.1, mfd_per_stage=[0.1])
training_curves([line], "curves.svg", "title")
assert os.environ["MPLBACKEND"] == "module://matplotlib_inline.backend_inline"
"""


def test_a_backend_of_another_environment_is_no_condition_for_a_picture():
    result = run_python("-c", DRAW, env=os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    assert result.returncode == 0, result.stderr
    assert Path("curves.svg").stat().st_size > 1000


def test_a_picture_of_the_same_numbers_is_the_same_file():
    line = {"epoch": 1, "top1": 1.0, "top5": 2.0, "criterion_loss": 1.0, "mfd_loss": 0.1, "mfd_per_stage": [0.1]}
    for ending in ("svg", "png"):
        first, second = (training_curves([line], f"{name}.{ending}", "title") for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
    assert b"<dc:date>" not in Path("first.svg").read_bytes()


# Conveniences are no conditions.


def test_a_user_without_a_home_decodes_without_a_cache(folder_dataset, monkeypatch, capsys):
    data = timm_mfd.data.load_dataset("folder", folder_dataset)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # of a user whom the system does not know
    pixels = decoded(data.train, None, 0, "images")
    assert torch.equal(pixels, torch.stack(list(data.train)))
    assert "not kept: there is no home; choose a --cache-dir" in capsys.readouterr().err


def test_a_tracker_that_cannot_start_ends_no_run_and_logs_into_the_run_folder(monkeypatch, capsys):
    places = []

    def init_trackers(self, *_, init_kwargs, **__):
        places.extend([self.logging_dir, init_kwargs["wandb"]["dir"]])
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setattr(Accelerator, "init_trackers", init_trackers)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "wandb" or find(name))
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_: ["wandb"])
    train.main(replace(BASE, tracker="wandb"))
    assert places == ["run", "run"]
    said = capsys.readouterr().out
    assert said.count("warning: --tracker wandb failed, and nothing more is logged to it: api_key not configured") == 1
    assert len(metrics()) == 1


def test_a_log_on_a_full_disk_ends_no_run():
    """It says less than a run, and is often a pipe whose reader is gone."""
    before = os.dup(1)
    try:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        plain = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)))
        lasting = launch._lasting(plain)
        lasting.write(10_000 * "lost\n")
        lasting.flush()
        with pytest.raises(OSError, match="No space left"):
            plain.write(10_000 * "lost\n")
        plain.detach().detach()
    finally:
        os.dup2(before, 1)
        os.close(before)


def test_a_picture_that_cannot_be_drawn_ends_no_run(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm_mfd.figures", None)
    train.main(BASE)
    assert "warning: curves.png is not drawn: " in capsys.readouterr().err
    assert Path("run/summary.json").is_file()


# What is saved is loaded.


def changed(act):
    model = timm_mfd.create_model("test_resnet", num_classes=3)
    act(model)
    return model


def head_of_two_layers(model):
    model.fc = nn.Sequential(nn.Dropout(0.2), nn.Linear(model.num_features, 3))


def norm_of_a_layer(model):
    nn.utils.parametrizations.weight_norm(model.fc)


def other_stride(model):
    model.conv1[0].stride = (1, 1)


def other_activation(model):
    model.act1 = nn.Tanh()


@pytest.mark.parametrize("act", [head_of_two_layers, norm_of_a_layer, other_stride, other_activation])
def test_a_model_that_would_not_come_back_is_refused_and_nothing_is_written(act):
    with pytest.raises(ValueError, match=r"^ResNet (could not be loaded again|would come back as another model)"):
        timm_mfd.save_pretrained(changed(act), "export")
    assert list(Path().iterdir()) == []


def test_what_others_built_of_a_network_by_its_arguments_loads_as_timm_loads_it():
    theirs = timm.create_model("test_vit", num_classes=3, img_size=32, act_layer="relu", init_values=0.5)
    timm.models.save_for_hf(theirs, "theirs", safe_serialization=True)
    images = torch.randn(2, 3, 32, 32)
    loaded = timm_mfd.create_model("local-dir:theirs", pretrained=True)
    assert torch.equal(loaded.eval()(images), theirs.eval()(images))
    folder = timm_mfd.save_pretrained(loaded, "ours")
    assert torch.equal(timm_mfd.create_model(f"local-dir:{folder}", pretrained=True).eval()(images), theirs(images))


def test_a_mark_in_front_of_a_configuration_is_named_for_timm_cannot_read_it():
    folder = timm_mfd.save_pretrained(timm_mfd.create_model("test_resnet", num_classes=3), "export")
    path = folder / "config.json"
    path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ValueError, match="export/config.json' begins with a byte order mark"):
        timm_mfd.create_model("local-dir:export", pretrained=True)


def test_saving_draws_no_random_number_that_a_training_would_miss():
    model = timm_mfd.create_model("test_resnet", num_classes=3)
    before = torch.get_rng_state()
    timm_mfd.save_pretrained(model, "export")
    assert torch.equal(torch.get_rng_state(), before)


def test_names_by_index_are_kept_and_a_text_is_no_list_of_names():
    model = timm_mfd.create_model("test_resnet", num_classes=3)
    for number, names in enumerate(({2: "cat", 0: "ant", 1: "bee"}, {"0": "ant", "1": "bee", "2": "cat"})):
        folder = timm_mfd.save_pretrained(model, f"export{number}", label_names=names)
        assert json.loads((folder / "config.json").read_text())["label_names"] == ["ant", "bee", "cat"]
    theirs = timm.create_model("test_resnet", num_classes=3)
    timm.models.save_for_hf(theirs, "theirs", {"label_names": {0: "ant", 2: "cat"}}, safe_serialization=True)
    loaded = timm_mfd.create_model("local-dir:theirs", pretrained=True)
    assert loaded.pretrained_cfg["label_names"] == {"0": "ant", "2": "cat"}  # as timm has it
    folder = timm_mfd.save_pretrained(loaded, "again")
    assert json.loads((folder / "config.json").read_text())["label_names"] == ["ant", "class 1", "cat"]
    for names, words in (("cat", "not the text 'cat'"), ({1: "a", 2: "b", 3: "c"}, "must have the indices 0 to 2")):
        with pytest.raises(ValueError, match=words):
            timm_mfd.save_pretrained(model, "export", label_names=names)


# What the program knows already.


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 224), ("small", 64), ("cifar", 32)])
def test_a_model_says_for_images_of_which_size_its_stem_is(stem, side):
    model = timm_mfd.create_model("resnet18_mfd", stem=stem, num_classes=3)
    assert timm.data.resolve_data_config({}, model=model)["input_size"] == (3, side, side)


def test_timms_weights_fit_where_the_stem_is_timms(monkeypatch):
    torch.save(timm.create_model("resnet18", num_classes=1000).state_dict(), "weights.pth")
    theirs = replace(timm.models.get_pretrained_cfg("resnet18"), file="weights.pth", hf_hub_id=None)
    model = timm_mfd.create_model("resnet18_mfd", pretrained=True, pretrained_cfg=theirs, num_classes=3)
    assert torch.equal(model.conv1.weight, torch.load("weights.pth")["conv1.weight"])


def test_a_run_folder_names_its_data_and_its_model(folder_dataset, capsys):
    train.main(replace(FOLDER, image_size=8))
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("run", "run/model", "local-dir:run/model"):
        args = evaluate.with_data_of_run(evaluate.Args(name, workers=0))
        assert (args.dataset, args.data_dir, args.image_size) == ("folder", "images", 8)
    assert evaluate.measure(args)["count"] == 12
    assert evaluate.with_data_of_run(evaluate.Args("run", image_size=16)).image_size == 16
    with pytest.raises(ValueError, match="give a --dataset: resnet18 is no run folder"):
        evaluate.with_data_of_run(evaluate.Args("resnet18"))
    train.main(replace(FOLDER, model="run", pretrained=True, image_size=8, output_dir="second"))
    assert json.loads(Path("second/args.json").read_text(encoding="utf-8"))["model"] == "local-dir:run/model"


def test_the_time_of_a_run_is_that_of_all_its_parts():
    train.main(replace(BASE, epochs=2))
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads(Path("run/summary.json").read_text(encoding="utf-8"))
    assert summary["seconds"] == round(sum(line["seconds"] for line in lines), 1)


# Places, times and signals.


def test_a_run_may_be_in_a_thread():
    ThreadPoolExecutor(1).submit(train.main, BASE).result()
    assert len(metrics()) == 1


def test_a_closed_terminal_is_a_signal_like_any_other_unless_nohup_has_it_ignored():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == signal.SIGHUP
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == 0
    finally:
        signal.signal(signal.SIGHUP, before)


IN_A_TERMINAL = """
import os, signal, sys, time
from timm_mfd.interruption import StopSignals
with StopSignals() as stop:
    open("ready", "w").close()
    while not stop.received:
        time.sleep(0.01)
    print("a line to a terminal that is gone", file=sys.stderr, flush=True)
    open("saved", "w").close()
"""


@pytest.mark.slow
def test_a_closed_terminal_stops_no_saving(tmp_path):
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", IN_A_TERMINAL])
    wait_for(Path("ready").exists)
    os.close(terminal)
    wait_for(Path("saved").exists)
    os.waitpid(pid, 0)


def test_a_log_of_the_scheduler_makes_a_begun_run_no_other_run():
    RunFolder.create("run", "x", {"old": 1})
    for name in ("slurm-1.out", "timm_mfd"):
        Path("run", name).write_text("of somebody else")
    RunFolder.create("run", "x", {"new": 1}, resume=True)
    assert json.loads(Path("run/args.json").read_text()) == {"new": 1}
    assert Path("run/slurm-1.out").read_text() == "of somebody else"
    Path("run/model").mkdir()  # of a finished run
    with pytest.raises(FileExistsError, match="holds another run"):
        RunFolder.create("run", "x", {}, resume=True)


def test_a_moving_average_that_is_still_the_beginning_is_told_and_blamed():
    (said,) = average_warnings(0.9999, 108)
    assert "--ema-decay 0.9999" in said
    assert "still holds 99 % of the initial weights after 108 steps; at most 0.958" in said
    assert average_warnings(0.958, 108) == average_warnings(0.0, 5) == average_warnings(0.9999, 50_000) == []
    labels = torch.tensor([0, 1, 1])
    (constant,) = verdicts([1.0], [3, 0], labels, 33.3, ["ant", "bee"], said)
    assert constant.endswith(said)
    assert "--lr" not in constant


def test_no_text_is_read_or_written_in_the_systems_encoding():
    for path in [*(ROOT / "timm_mfd").rglob("*.py"), *(ROOT / "train_scripts").glob("*.py")]:
        for call in (
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
        ):
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            is_file = name == "read_text" or (name == "write_text" and isinstance(call.func, ast.Attribute))
            named = [word.arg for word in call.keywords]
            assert not is_file or "encoding" in named, f"{path.name}:{call.lineno}"
