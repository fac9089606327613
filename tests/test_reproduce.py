"""reproduce.py does what is missing, once, whatever it is cut off by, and reports what is there."""

import fcntl
import os
import re
import signal
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import reproduce
import train
from processes import ForkedPython, run_python, start_process, wait_for
from test_report import WITH, WITHOUT, results_of

from timm_mfd import recipes, report, results, scheduler
from timm_mfd.training.run_folder import BUSY

# The trial on digits with a tiny network, a second a run; for this process and those that it starts.
FAST = """
from timm_mfd import recipes
from timm_mfd import figures
figures.training_curves = lambda *_: None
short = recipes.Protocol("short", epochs=12, milestones=(3, 6, 9), batch_size=479)
recipes.PROTOCOLS = {**recipes.PROTOCOLS, "quick": short}
recipes.MODELS = {**recipes.MODELS, "resnet18": "test_resnet"}
recipes.paper_stem = lambda *_: "auto"
"""
TRAIN = (
    FAST
    + f"""
import sys
sys.path.insert(0, {str(Path(reproduce.__file__).parent)!r})
import train
from timm_mfd.launch import one_line_errors
with one_line_errors():
    train.main(train.parse())
"""
)
TRIALS = Path("runs/reproduce/results")
DIGITS = {"table": "digits", "protocol": "quick"}


@pytest.fixture
def fast(tmp_path, monkeypatch):
    for name in ("PROTOCOLS", "MODELS", "paper_stem"):
        monkeypatch.setattr(recipes, name, getattr(recipes, name))  # put back at the end
    monkeypatch.setattr(reproduce, "TRAIN", reproduce.TRAIN)
    monkeypatch.chdir(tmp_path)
    _be_fast(tmp_path)
    return tmp_path


def _be_fast(folder):
    exec(FAST, {})
    (folder / "fast_train.py").write_text(TRAIN)
    reproduce.TRAIN = folder / "fast_train.py"


def _run_in(folder, **arguments):
    """`reproduce.py run` as it is, in a process of its own, but that its runs are forked from it."""
    os.chdir(folder)
    log = os.open("reproduce.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _be_fast(Path(folder))
    scheduler.subprocess = SimpleNamespace(Popen=ForkedPython, DEVNULL=None, STDOUT=None)
    reproduce.run(**arguments)


def start_run(folder):
    return start_process(partial(_run_in, seeds=1, **DIGITS), str(folder))


def run_to_the_end(folder):
    """Return the exit code and what was said."""
    running = start_run(folder)
    running.join()
    said = (folder / "reproduce.log").read_text()
    return running.exitcode, said[said.rindex("2 runs: ") :]


# Stands for train.py: an epoch when it begins, and one when it ends.
STAND_IN = """
import os, signal, sys, time
from pathlib import Path
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "softmax@" in words["--recipe"] and os.environ.get("FAILS"):
    sys.exit("x.py: error: boom")
folder = Path(words["--output-dir"])
folder.mkdir(parents=True, exist_ok=True)

def end(code, said):
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write("{}\\n")
    print(said, flush=True)
    sys.exit(code)

told = {
    "saves": lambda *_: end(143, "stopped in epoch 2"),
    "finishes": lambda *_: end(0, "finished"),
    "stays": lambda *_: print("told", flush=True),
}
if (folder / "metrics.jsonl").exists() or "WHEN_TOLD" not in os.environ:
    end(0, "going on from there")
signal.signal(signal.SIGTERM, told[os.environ["WHEN_TOLD"]])
(folder / "metrics.jsonl").write_text("{}\\n")
print("begun", flush=True)
time.sleep(60)
"""


@pytest.fixture
def stand_in(fast, monkeypatch):
    """Runs that cost nothing, and their results; they end at once, or as `WHEN_TOLD` says after a signal."""
    (fast / "fast_train.py").write_text(STAND_IN)
    made = {
        f"resnet18-digits-{row}-seed0": results_of(f"resnet18/digits/{row}", 99.0, protocol="quick")[0]
        for row in ("softmax", "softmax+mfd")
    }
    monkeypatch.setattr(results, "collect", lambda folder: made[folder.name])
    return fast, list(made.values())


@pytest.fixture
def later(monkeypatch):
    """Makes the clock jump: by so many seconds as soon as a condition holds."""
    jumps, real, passed = [], time.monotonic, 0.0

    def monotonic():
        nonlocal passed
        while jumps and jumps[0][0]():
            passed += jumps.pop(0)[1]
        return real() + passed

    monkeypatch.setattr("reproduce.time.monotonic", monotonic)
    return lambda condition, seconds: jumps.append((condition, seconds))


def log_of(folder, row="softmax"):
    path = folder / "runs" / "reproduce" / "quick" / f"resnet18-digits-{row}-seed0.log"
    return path.read_text() if path.exists() else ""


def is_held(run):
    """Whether a process trains in this run folder."""
    with (run / "checkpoint" / "lock").open("r+") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def processes_of(folder):
    commands = (path for path in Path("/proc").glob("[0-9]*/cmdline"))
    return [path for path in commands if str(folder / "fast_train.py").encode() in _read(path)]


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_matrix_cut_off_twice_is_finished_by_the_same_command_and_nothing_is_done_twice(fast, capfd):
    done = fast / TRIALS / "quick" / "resnet18-digits-softmax-seed0.json"
    cut = fast / "runs" / "reproduce" / "quick" / "resnet18-digits-softmax+mfd-seed0"
    reached = 0

    def epochs():
        path = cut / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    for how in (signal.SIGTERM, signal.SIGKILL):
        running = start_run(fast)
        wait_for(lambda: done.exists() and epochs() > reached)  # noqa: B023
        os.kill(running.pid, how)
        running.join()
        wait_for(lambda: not is_held(cut))
        assert running.exitcode == (-how if how == signal.SIGKILL else 128 + how)
        assert [path.name for path in done.parent.iterdir()] == [done.name]
        reached = epochs()
        assert 0 < reached < 12
    before = done.stat()
    shown = (fast / "reproduce.log").read_text()
    assert "2 runs: 0 done, 2 to do" in shown
    stopped = re.search(r"stopped with 1 runs to do; (\d+) of 24 epochs are trained, and the same command", shown)
    assert 12 < int(stopped[1]) < 24  # one run and a part of another
    assert "2 runs: 1 done, 1 to do" in shown
    assert "failed" not in shown
    reproduce.list_runs(**DIGITS)
    listed = capfd.readouterr().out
    assert re.search(rf"softmax\+mfd .* seed 0 at epoch {reached} of 12", listed)
    assert re.search(r"softmax  .* seeds 0 done", listed)

    code, shown = run_to_the_end(fast)
    assert code == 0
    assert "2 runs: 1 done, 1 to do" in shown
    assert shown.count(": running, see ") == 1
    assert (
        "results are in runs/reproduce/results; reproduce.py report --results-dir runs/reproduce/results makes" in shown
    )
    after = done.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    found = results.read_all(fast / TRIALS)
    assert [(result.recipe.removeprefix("resnet18/digits/"), result.seed) for result in found] == [
        ("softmax", 0), ("softmax+mfd", 0),
    ]  # fmt: skip
    assert all(len(result.curve["top1"]) == 12 for result in found)
    assert [log_of(fast, row).count("resuming ") for row in ("softmax", "softmax+mfd")] == [0, 2]

    reproduce.run(seeds=1, **DIGITS)
    assert "2 runs: 2 done, 0 to do" in capfd.readouterr().out
    reproduce.report(TRIALS)
    assert re.search(r"resnet18 \| digits .*\d\d\.\d\d .*\d\d\.\d\d", capfd.readouterr().out)
    names = {path.name for path in (fast / TRIALS).iterdir()}
    assert names == {"quick", "README.md", "results.csv", "quick-ours-and-paper.png", "quick-ours-and-paper.svg"}


def test_a_time_limit_stops_cleanly_and_the_same_command_goes_on(stand_in, later, capfd, monkeypatch):
    """The first run is asked to stop in its middle; the limit is near as soon as it has begun."""
    fast, both = stand_in
    monkeypatch.setenv("WHEN_TOLD", "saves")
    later(lambda: "begun" in log_of(fast), 65)  # of 120 seconds: the last minute has begun
    with pytest.raises(SystemExit) as error:
        reproduce.run(seeds=1, time_limit=2, **DIGITS)
    assert error.value.code == 128 + signal.SIGALRM
    shown = capfd.readouterr().err
    assert "stopped at the time limit with 2 runs to do; 2 of 24 epochs are trained" in shown
    assert "the same command goes on" in shown
    assert "stopped in epoch" in log_of(fast)
    assert log_of(fast, "softmax+mfd") == ""
    assert not processes_of(fast)
    monkeypatch.delenv("WHEN_TOLD")
    reproduce.run(seeds=1, **DIGITS)
    assert results.read_all(fast / TRIALS) == both
    assert "going on from" in log_of(fast)


def test_a_run_that_does_not_stop_is_killed_at_the_time_limit(stand_in, later, monkeypatch):
    fast, _ = stand_in
    monkeypatch.setenv("WHEN_TOLD", "stays")
    later(lambda: "begun" in log_of(fast), 65)
    later(lambda: "told" in log_of(fast), 60)
    with pytest.raises(SystemExit) as error:
        reproduce.run(seeds=1, time_limit=2, **DIGITS)
    assert error.value.code == 128 + signal.SIGALRM
    assert "told" in log_of(fast)
    assert not processes_of(fast)
    assert not (fast / TRIALS).exists()


def test_what_is_finished_in_the_last_minute_is_a_result_and_what_failed_is_named(stand_in, later, capfd, monkeypatch):
    fast, (_, done) = stand_in
    monkeypatch.setenv("WHEN_TOLD", "finishes")
    monkeypatch.setenv("FAILS", "1")
    said = []

    def one_has_failed_and_one_has_begun():
        said.append(capfd.readouterr().err)
        return "boom" in "".join(said) and "begun" in log_of(fast, "softmax+mfd")

    later(one_has_failed_and_one_has_begun, 65)
    with pytest.raises(SystemExit) as error:
        reproduce.run(seeds=1, parallel=2, time_limit=2, **DIGITS)
    assert error.value.code == 128 + signal.SIGALRM
    words = "at the time limit with 1 runs to do, 1 of which failed (resnet18/digits/softmax@quick seed 0); 2 of"
    assert words in capfd.readouterr().err
    assert results.read_all(fast / TRIALS) == [done]


def test_a_time_limit_that_comes_when_all_is_done_is_none(stand_in, later, monkeypatch):
    fast, (_, done) = stand_in
    monkeypatch.setenv("WHEN_TOLD", "finishes")
    later(lambda: "begun" in log_of(fast, "softmax+mfd"), 65)
    reproduce.run(seeds=1, rows=("resnet18/digits/softmax+mfd",), time_limit=2, **DIGITS)
    assert results.read_all(fast / TRIALS) == [done]
    assert "finished" in log_of(fast, "softmax+mfd")


def test_runs_that_fail_or_were_trained_otherwise_are_named_and_the_others_go_on(fast):
    """One folder is somebody else's; in the other is a finished run of one epoch."""
    blocked, other = (
        fast / "runs" / "reproduce" / "quick" / f"resnet18-digits-softmax{mfd}-seed0" for mfd in ("", "+mfd")
    )
    blocked.mkdir(parents=True)
    (blocked / "notes.txt").write_text("mine")
    words = ["--recipe", "resnet18/digits/softmax+mfd@quick", "--epochs", "1", "--output-dir", str(other)]
    run_python(fast / "fast_train.py", *words).check_returncode()
    code, shown = run_to_the_end(fast)
    assert code == 1
    assert ": 2 of 2 runs have no result: resnet18/digits/softmax@quick seed 0, resnet18/digits/softmax+mfd" in shown
    first, second = (line for line in shown.splitlines() if " failed: " in line)
    assert re.search(r"softmax@quick seed 0 failed: fast_train.py: error: --output-dir .*; nothing was changed", first)
    assert re.search(r"softmax\+mfd@quick seed 0 failed: .* was not trained as its recipe says: --epochs 1 ", second)
    assert [path.name for path in blocked.iterdir()] == ["notes.txt"]
    assert not (fast / TRIALS).exists()


def test_a_run_that_another_process_trains_is_left_to_it_and_has_not_failed(fast, capfd):
    (fast / "fast_train.py").write_text(f"import sys\nsys.exit('train.py: error: runs: {BUSY}; nothing was changed')\n")
    with pytest.raises(SystemExit) as error:
        reproduce.run(seeds=1, rows=("resnet18/digits/softmax+mfd",), **DIGITS)
    assert error.value.code.endswith("1 of 1 runs have no result: resnet18/digits/softmax+mfd@quick seed 0")
    shown = capfd.readouterr().err
    assert "softmax+mfd@quick seed 0: left to the other process that trains it" in shown
    assert "failed" not in shown


def test_a_run_that_another_process_tried_to_begin_meanwhile_keeps_its_result(stand_in, capfd):
    """Both write into the same log."""
    fast, (_, done) = stand_in
    (fast / "fast_train.py").write_text(f"print('train.py: error: runs: {BUSY}; nothing was changed', flush=True)\n")
    reproduce.run(seeds=1, rows=("resnet18/digits/softmax+mfd",), **DIGITS)
    assert results.read_all(fast / TRIALS) == [done]
    assert "left to the other" not in capfd.readouterr().err


def test_a_trial_beside_runs_of_the_paper_leaves_its_result_beside_its_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = []
    monkeypatch.setattr(reproduce, "do_missing", lambda runs, *_: wanted.extend(runs))
    reproduce.run(rows=("resnet18/digits/softmax", "mobilenetv2/cifar10/softmax"), seeds=1)
    places = {run.recipe.dataset: run.results_dir for run in wanted}
    assert places == {"digits": TRIALS, "cifar10": Path("results")}
    assert reproduce.default_results(Path("runs/reproduce"), "quick", wanted[-1].recipe) == TRIALS


def test_missing_data_are_found_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(SystemExit) as error:
        reproduce.run(table="5", rows=("mobilenetv2/tiny_imagenet",))
    assert "error: tiny_imagenet: 'data' lacks wnids.txt" in error.value.code
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "mobilenetv2/tiny_imagenet",
            "tiny_imagenet has 2 classes, 12 training and 4 test images here, the recip",
        ),
        ("mobilenetv2/facescrub", "facescrub has 2 identities here, the recipes need 100; .*prepare_facescrub.py"),
        ("mobilenetv2/cifar10", "cifar10 has 10 classes, 15 training and 12 test images here, the recipes need"),
    ],
)
def test_data_that_are_not_the_papers_make_no_result(official_datasets, monkeypatch, row, message):
    monkeypatch.chdir(official_datasets)
    before = sorted(official_datasets.iterdir())
    with pytest.raises(SystemExit) as error:
        reproduce.run(table="5", rows=(row,), data_dir=official_datasets)
    assert re.search(message, error.value.code)
    assert sorted(official_datasets.iterdir()) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: reproduce.run(table="3"),
            "unknown table '3'; choose one of 2, 4, 5, 6, eq6, weights, resnet18, digits",
        ),
        (lambda: reproduce.run(table="5", rows=("vgg",)), "no row 'vgg' in Table V"),
        (lambda: reproduce.run(seeds=0), "--seeds must be at least 1, not 0"),
        (lambda: reproduce.run(parallel=0), "--parallel must be at least 1, not 0"),
        (lambda: reproduce.run(time_limit=0.5), "the time limit must be more than 1 minute, not 0.5"),
        (lambda: reproduce.run(time_limit=float("nan")), "the time limit must be more than 1 minute, not nan"),
        (lambda: reproduce.report(), "no results in 'results'; make some with reproduce.py run"),
        (lambda: reproduce.list_runs(table="9"), "unknown table '9'"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, call, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        call()
    assert message in error.value.code
    assert "\n" not in error.value.code
    assert list(tmp_path.iterdir()) == []


def test_the_report_is_made_from_the_results_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights = results_of("resnet50/cifar100/softmax+mfd10", 76.9, 76.5)
    for result in [*WITHOUT, *WITH, *weights, *results_of("resnet50/cifar100/softmax", 79.0, protocol="strong")]:
        results.write(result, tmp_path / "results")
    reproduce.report(output_dir=tmp_path / "page")
    shown = capsys.readouterr().out
    assert shown.index("## Protocol paper") < shown.index("## Protocol strong")
    assert "\033" not in shown  # no terminal, no colour
    assert {path.name for path in (tmp_path / "page").iterdir()} == {
        "README.md", "results.csv", *(f"{name}.{ending}" for ending in ("png", "svg") for name in (
            "paper-ours-and-paper", "paper-accuracy-and-weight", "strong-ours-and-paper", "strong-accuracy-and-weight"
        )),
    }  # fmt: skip
    page = (tmp_path / "page" / "README.md").read_text()
    for picture in re.findall(r"!\[.*\]\((.*)\)", page):
        assert (tmp_path / "page" / picture).is_file()
    again = tmp_path / "again"
    reproduce.report(output_dir=again)
    assert (again / "README.md").read_text() == page


def test_the_tables_are_inserted_into_a_page_that_has_a_place_for_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "draw", lambda *_: {})
    for result in [*WITHOUT, *WITH]:
        results.write(result, tmp_path / "results")
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- results -->\nold\n<!-- end of results -->\nbelow\n")
    for _ in range(2):
        reproduce.report(insert_into=page)
    before, tables, after = page.read_text().partition(report.short([*WITHOUT, *WITH]))
    assert (before, after) == ("above\n<!-- results -->\n\n", "\n<!-- end of results -->\nbelow\n")
    assert tables
    page.write_bytes("ä\r\n<!-- results --> \r\nold<!-- end of results -->\r\n".encode())
    page.chmod(0o600)
    (tmp_path / "link.md").symlink_to(page)
    reproduce.report(insert_into=tmp_path / "link.md")
    assert page.read_bytes().startswith("ä\r\n<!-- results -->\n\nProtocol `paper`".encode())
    assert page.read_bytes().endswith(b"\n<!-- end of results -->\r\n")
    assert ((tmp_path / "link.md").is_symlink(), page.stat().st_mode & 0o777) == (True, 0o600)
    page.write_bytes(b"\xff")
    for other, message in (
        (page, "cannot read --insert-into page.md: it is not UTF-8"),
        (tmp_path / "none.md", "cannot read --insert-into none.md: No such file or directory"),
        (tmp_path / "results", "cannot read --insert-into results: Is a directory"),
        (tmp_path / "results" / "README.md", "--insert-into results/README.md is the report itself; name another page"),
    ):
        with pytest.raises(SystemExit) as error:
            reproduce.report(insert_into=other.relative_to(tmp_path))
        assert message in error.value.code
    for text in ("no place\n", "<!-- end of results -->\n<!-- results -->\n", "<!-- results -->\n"):
        page.write_text(text)
        with pytest.raises(SystemExit) as error:
            reproduce.report(insert_into=page, output_dir=tmp_path / "new")
        assert "has no place for results: the comments <!-- results --> and <!-- end of" in error.value.code
        assert page.read_text() == text
        assert not (tmp_path / "new").exists()


def test_the_readme_and_the_report_show_the_committed_results():
    root = Path(reproduce.__file__).parents[1]
    found = results.read_all(root / "results")
    if not found:
        pytest.skip("no results are committed yet")
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert reproduce.with_results(root / "README.md", report.short(found)) == readme
    written = (root / "results" / "README.md").read_text(encoding="utf-8")
    pictures = {protocol: {} for protocol in recipes.PROTOCOLS}
    lines = [line for line in written.splitlines() if not line.startswith("![")]
    assert [line for line in lines if line] == [line for line in report.markdown(found, pictures).splitlines() if line]


def test_a_significant_difference_is_coloured_on_a_terminal_unless_the_user_wants_none(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    painted = [reproduce.coloured("+1", sign) for sign in (1, 0, -1)]
    assert painted == ["\033[32m+1 ▲\033[0m", "+1", "\033[31m+1 ▼\033[0m"]
    monkeypatch.setenv("NO_COLOR", "1")
    assert reproduce.coloured("+1", 1) == "+1 ▲"


def test_the_list_names_all_recipes_and_counts_what_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for result in WITHOUT:
        results.write(result, tmp_path / "results")
    reproduce.list_runs()
    shown = capsys.readouterr().out
    assert all(f" {recipe.id} " in shown for recipe in recipes.PAPER_RECIPES)
    assert "1 of 42 recipes have a result" in shown
    assert "other protocols" not in shown
    line = next(line for line in shown.splitlines() if " resnet50/cifar100/softmax " in line)
    assert " ".join(line.split()) == "2,4 resnet50/cifar100/softmax cifar 76.42 76.20 ± 0.20 (n=3) seeds 0 1 2 done"


@pytest.mark.parametrize("protocol", recipes.PROTOCOLS)
@pytest.mark.parametrize("recipe", ["resnet50/cifar100/softmax+mfd0.1", "resnet50/facescrub/arcface"])
def test_the_command_of_a_run_trains_exactly_its_recipe(tmp_path, protocol, recipe):
    run = reproduce.Run(recipes.RECIPES[recipe], protocol, 4, tmp_path, tmp_path)
    args = train.parse(run.job(["--mixed-precision", "bf16", "--workers", "3", "--data-dir", "d"]).command[2:])
    assert run.job([]).command[1] == train.__file__
    wanted = asdict(run.recipe.arguments(protocol, seed=4))
    changed = {
        "mixed_precision": "bf16",
        "workers": 3,
        "data_dir": "d",
        "resume": "auto",
        "output_dir": str(run.folder),
    }
    assert asdict(args) == wanted | changed


def test_protocols_on_the_command_line_are_those_of_the_recipes():
    assert get_args(reproduce.Protocol) == tuple(recipes.PROTOCOLS)


def test_an_empty_result_is_not_taken_for_a_done_run(fast):
    path = fast / TRIALS / "quick" / "resnet18-digits-softmax-seed0.json"
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(SystemExit) as error:
        reproduce.run(seeds=1, **DIGITS)
    assert "seed0.json is not a result" in error.value.code


def test_no_two_runs_share_a_folder_or_a_log(tmp_path):
    runs = [
        reproduce.Run(recipe, protocol, seed, tmp_path, tmp_path)
        for recipe in recipes.RECIPES.values()
        for protocol in recipes.PROTOCOLS
        for seed in (0, 1, 10)
    ]
    assert len({run.folder for run in runs}) == len({run.job([]).log for run in runs}) == len(runs) == 50 * 3 * 3


def test_help_and_list_work_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = run_python(reproduce.__file__, "list", "--table", "6")
    assert shown.returncode == 0, shown.stderr
    assert "resnet50/facescrub/arcface+mfd" in shown.stdout
    assert "0 of 6 recipes have a result" in shown.stdout
