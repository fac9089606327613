"""Run the paper's experiments, and set our results beside the paper's.

python train_scripts/reproduce.py list

python train_scripts/reproduce.py run --table digits --protocol quick --seeds 2   (some minutes on a CPU)

python train_scripts/reproduce.py run --table 5 --rows mobilenetv2/tiny_imagenet --seeds 3 --data-dir DIR --parallel 2

python train_scripts/reproduce.py slurm --partition gpu --time 8:00:00 --gpus-per-task 1 --data-dir DIR --submit

python train_scripts/reproduce.py report
"""

import _extra  # noqa: F401, before what it looks for

# isort: split

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

from timm_mfd import recipes, results, slurm
from timm_mfd.atomic import replacing, write_text
from timm_mfd.data import FileImages, ImageData, ImageDecodeError, load_dataset, place
from timm_mfd.figures import accuracy_against_weight, ours_against_paper
from timm_mfd.interruption import Stopped, StopSignals
from timm_mfd.launch import one_line_errors
from timm_mfd.recipes import Recipe
from timm_mfd.report import accuracy_tables, markdown, rows_of, short, spread, to_csv
from timm_mfd.results import Result
from timm_mfd.scheduler import Job, run_jobs
from timm_mfd.training.run_folder import BUSY, RunFolder

TRAIN = Path(__file__).with_name("train.py")
_SAVING = 60.0  # seconds that runs get to save themselves before a time limit
_RESULTS = Path("results")  # of the paper's recipes; the clone keeps them
Protocol = Literal["paper", "strong", "quick"]


@dataclass(frozen=True)
class Run:
    """One recipe with one seed, and where its files are."""

    recipe: Recipe
    protocol: str
    seed: int
    runs_dir: Path
    results_dir: Path

    @property
    def name(self) -> str:
        """What it is called on the screen."""
        return f"{self.recipe.id}@{self.protocol} seed {self.seed}"

    @property
    def result(self) -> Path:
        """The result file; if it is there, the run is done."""
        return results.path_of(self.results_dir, self.recipe, self.protocol, self.seed)

    def is_done(self) -> bool:
        """Return whether there is a result.

        Raises:
            ValueError: If the file of that name is no result.
        """
        return self.result.exists() and bool(results.read(self.result))

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.runs_dir / self.protocol / self.result.stem

    @property
    def epochs(self) -> int:
        """Epochs of the whole run."""
        return recipes.PROTOCOLS[self.protocol].epochs

    def epochs_done(self) -> int:
        """Return how many epochs the run folder has metrics of."""
        with suppress(ValueError):
            return len(RunFolder(self.folder).metrics)
        return 0

    def where(self, queue: Mapping[Path, str]) -> str:
        """Return in words where a run without a result stands; empty if it was not begun.

        Args:
            queue: What `slurm.queue` returns.
        """
        words = [queue.get(self.folder.absolute(), "")]
        if RunFolder(self.folder).is_begun:
            words.append(f"at epoch {self.epochs_done()} of {self.epochs}")
        return " ".join(word for word in words if word)

    def job(self, options: Sequence[str]) -> Job:
        """Return the command that begins the run or goes on with it."""
        words = ["--recipe", f"{self.recipe.id}@{self.protocol}", "--seed", str(self.seed), *options]
        words += ["--output-dir", str(self.folder), "--resume", "auto"]
        return Job(self.name, (sys.executable, str(TRAIN), *words), self.folder.with_name(f"{self.folder.name}.log"))


def list_runs(
    table: str | None = None,
    rows: tuple[str, ...] = (),
    protocol: Protocol = "paper",
    runs_dir: Path = Path("runs/reproduce"),
    results_dir: Path | None = None,
) -> None:
    """List the runs with the paper's accuracy and ours, and what is done, begun, or in the queue of Slurm.

    Args:
        table: 2, 4, 5, 6, or, beside the paper's, eq6, weights, resnet18 or digits. Default: all tables of the paper.
        rows: Beginnings of names, in whole words, such as mobilenetv2/tiny_imagenet.
        protocol: paper, strong or quick.
        runs_dir: Where run folders are.
        results_dir: Where results are. Default: results, for trials (quick, digits) the folder results in RUNS_DIR.
    """
    with one_line_errors(ValueError):
        chosen = recipes.select(table, rows)
        homes = {recipe: results_dir or default_results(runs_dir, protocol, recipe) for recipe in chosen}
        everything = [result for home in sorted(set(homes.values())) for result in results.read_all(home)]
    found = [result for result in everything if result.protocol == protocol]
    how, queue = recipes.PROTOCOLS[protocol], slurm.queue()
    print(f"protocol {protocol}: {how.summary}, {how.epochs} epochs\n")
    print(f"{'table':<7} {'recipe':<38} {'stem':<9} {'paper':>6}  {'ours':<22} runs")
    for recipe in chosen:
        ours = [result for result in found if result.recipe == recipe.id]
        accuracy = spread([result.top1 for result in ours])
        states = [f"seeds {' '.join(str(result.seed) for result in ours)} done"] if ours else []
        slug = results.path_of(homes[recipe], recipe, protocol, 0).stem.removesuffix("0")
        folders = [*(runs_dir / protocol).glob(f"{slug}*"), *queue]
        seeds = {folder.name.removeprefix(slug) for folder in folders}
        for seed in sorted(int(seed) for seed in seeds if seed.isdigit()):
            run = Run(recipe, protocol, seed, runs_dir, homes[recipe])
            if not run.result.exists() and (where := run.where(queue)):
                states.append(f"seed {seed} {where}")
        paper = "-" if recipe.accuracy is None else f"{recipe.accuracy:.2f}"
        state = ", ".join(states) or "not begun"
        tables = ",".join(recipe.tables)
        print(f"{tables:<7} {recipe.id:<38} {recipe.stem:<9} {paper:>6}  {accuracy or '-'!s:<22} {state}")
    done = len({result.recipe for result in found} & {recipe.id for recipe in chosen})
    print(f"\n{done} of {len(chosen)} recipes have a result")
    if elsewhere := sorted({result.recipe for result in found} - {recipe.id for recipe in chosen}):
        print(f"there are results of recipes outside of these tables: {', '.join(elsewhere)}")
    others = {result.protocol for result in everything} - {protocol}
    if others:
        print(f"there are results of other protocols: {', '.join(sorted(others))}")


def run(
    table: str | None = None,
    rows: tuple[str, ...] = (),
    seeds: int = 3,
    parallel: int = 1,
    protocol: Protocol = "paper",
    data_dir: Path = Path("data"),
    mixed_precision: Literal["no", "bf16", "fp16"] = "no",
    compile: bool = False,
    time_limit: float | None = None,
    workers: int = 2,
    cache_dir: Path | None = None,
    runs_dir: Path = Path("runs/reproduce"),
    results_dir: Path | None = None,
) -> None:
    """Train what has no result yet; go on where a run was cut off. `list` shows how far the runs are.

    Exit code 142: the time is over and there is work left.

    Args:
        table: 2, 4, 5, 6, or, beside the paper's, eq6, weights, resnet18 or digits. Default: all tables of the paper.
        rows: Beginnings of names, in whole words, such as mobilenetv2/tiny_imagenet; they are run in this order.
        seeds: Runs of each recipe, with the seeds 0, 1, ...
        parallel: Runs at a time, on the GPUs in turn; on a CPU they share the cores.
        protocol: paper, strong or quick.
        data_dir: Folder of the data sets' own folders: cifar-10-batches-py or cifar10, cifar-100-python or cifar100,
            tiny-imagenet-200, facescrub.
        mixed_precision: Arithmetic of the networks.
        compile: Compile the networks with torch.compile.
        time_limit: End after so many minutes. A minute before, the runs are asked to save themselves and stop.
            (Decoding images, once, does not look at the clock.)
        workers: Decoding processes of each run.
        cache_dir: Where decoded images are kept. Default: ~/.cache/timm_mfd.
        runs_dir: Where run folders are.
        results_dir: Where results are. Default: results, for trials (quick, digits) the folder results in RUNS_DIR.
    """
    deadline = deadline_in(time_limit)
    with one_line_errors(ValueError, OSError, ImageDecodeError):
        runs = select(table, rows, seeds, protocol, runs_dir, results_dir)
        options = ["--mixed-precision", mixed_precision, "--workers", str(workers), *["--compile"] * compile]
        do_missing(runs, parallel, options, data_dir, workers, cache_dir, deadline)


def array(
    table: str | None = None,
    rows: tuple[str, ...] = (),
    seeds: int = 3,
    protocol: Protocol = "paper",
    data_dir: Path = Path("data"),
    mixed_precision: Literal["no", "bf16", "fp16"] = "no",
    compile: bool = False,
    workers: int = 2,
    cache_dir: Path | None = None,
    runs_dir: Path = Path("runs/reproduce"),
    results_dir: Path | None = None,
    partition: str | None = None,
    time: str | None = None,
    gpus_per_task: str | None = None,
    array_limit: int | None = None,
    sbatch_option: tuple[str, ...] = (),
    save_before: int = 120,
    submit: bool = False,
) -> None:
    """Print an array job of Slurm that trains what has no result yet and is not in the queue, or submit it.

    A task that preemption or its time limit stops goes on later by itself. The options up to --results-dir are those of
    `run`; the environment is the one that this is called from.

    Args:
        table: 2, 4, 5, 6, or, beside the paper's, eq6, weights, resnet18 or digits. Default: all tables of the paper.
        rows: Beginnings of names, in whole words, such as mobilenetv2/tiny_imagenet; they are run in this order.
        seeds: Runs of each recipe, with the seeds 0, 1, ...
        protocol: paper, strong or quick.
        data_dir: Folder of the data sets' own folders, as for `run`.
        mixed_precision: Arithmetic of the networks.
        compile: Compile the networks with torch.compile.
        workers: Decoding processes of each run.
        cache_dir: Where decoded images are kept. Default: ~/.cache/timm_mfd.
        runs_dir: Where run folders are, and slurm/ with the output of the tasks.
        results_dir: Where results are. Default: results, for trials (quick, digits) the folder results in RUNS_DIR.
        partition: Of the cluster.
        time: Time limit of a task, such as 90 (minutes) or 8:00:00; a run that needs more goes on in the next one.
        gpus_per_task: GPUs of a run, such as 1 or a100:1; a run uses one.
        array_limit: Tasks at a time.
        sbatch_option: Further options of sbatch without their dashes, such as account=abc cpus-per-task=4 exclusive.
        save_before: Seconds before the time limit at which a run is asked to save its state. Slurm may be a minute
            early.
        submit: Hand the script to sbatch.
    """
    with one_line_errors(ValueError, OSError, ImageDecodeError):
        runs = select(table, rows, seeds, protocol, runs_dir, results_dir)
        site = {"partition": partition, "gpus-per-task": gpus_per_task}
        others: dict[str, str | None] = {name: value for name, value in site.items() if value is not None}
        for words in sbatch_option:
            name, equals, value = words.partition("=")
            others[name] = value if equals else None
        is_digits = {run.recipe.dataset == "digits" for run in runs}
        if len(is_digits) > 1:  # they take no --data-dir, and a script has one command
            raise ValueError("the digits are a trial; submit them alone, with --table digits")
        log = runs_dir.absolute() / "slurm" / "%A_%a.log"
        options = slurm.directives(time, save_before, array_limit, log, others)
        queue = slurm.queue()
        missing = [run for run in runs if not run.is_done()]
        todo = [run for run in missing if run.folder.absolute() not in queue]
        counts = f"{len(runs) - len(missing)} done, {len(missing) - len(todo)} in the queue, {len(todo)} to do"
        print(f"{len(runs)} runs: {counts}", file=sys.stderr)
        if not todo:
            return
        check_data(sorted({run.recipe.dataset for run in todo}), data_dir, workers, cache_dir)
        train = [sys.executable, str(TRAIN.absolute()), "--mixed-precision", mixed_precision, "--workers", str(workers)]
        train += ["--compile"] * compile
        train += [] if True in is_digits else ["--data-dir", str(data_dir.absolute())]
        train += ["--cache-dir", str(cache_dir.absolute())] if cache_dir else []
        script = slurm.array_script(
            [slurm.Task(f"{run.recipe.id}@{protocol}", run.seed, run.folder.name) for run in todo],
            options,
            train=train,
            collect=[sys.executable, str(Path(__file__).absolute()), "collect"],
            protocol=protocol,
            runs_dir=todo[0].folder.parent.absolute(),
            results_dir=todo[0].results_dir.absolute(),
            at_a_time=array_limit,
        )
        log.parent.mkdir(parents=True, exist_ok=True)  # Slurm makes no folder, and a task without its log ends unheard
        if submit:
            print(f"job {slurm.submit(script)} with {len(todo)} runs; reproduce.py list shows how far they are")
        else:
            print(script, end="")


def collect(run: tyro.conf.Positional[Path], results_dir: Path = _RESULTS) -> None:
    """Keep the result of a finished run of a recipe, as `run` does by itself.

    Args:
        run: The run folder.
        results_dir: Where results are.
    """
    with one_line_errors(ValueError, OSError):
        print(f"the result is {results.write(results.collect(run), results_dir)}")


def select(
    table: str | None, rows: Sequence[str], seeds: int, protocol: str, runs_dir: Path, results_dir: Path | None
) -> list[Run]:
    """Return the runs that are wanted: every recipe with the first seed, then with the next one.

    Raises:
        ValueError: If there are none.
    """
    if seeds < 1:
        raise ValueError(f"--seeds must be at least 1, not {seeds}")
    chosen = recipes.select(table, rows)
    homes = {recipe: results_dir or default_results(runs_dir, protocol, recipe) for recipe in chosen}
    return [Run(recipe, protocol, seed, runs_dir, homes[recipe]) for seed in range(seeds) for recipe in chosen]


def default_results(runs_dir: Path, protocol: str, recipe: Recipe) -> Path:
    """Return where a result goes: that of a trial, which says nothing of the paper, lies beside its run."""
    return runs_dir / "results" if protocol == "quick" or recipe.dataset == "digits" else _RESULTS


def deadline_in(minutes: float | None) -> float | None:
    """Return when so many minutes are over, by the monotonic clock; None: never."""
    with one_line_errors(ValueError):
        if minutes is None:
            return None
        if not _SAVING < minutes * 60 < 1e9:
            raise ValueError(f"the time limit must be more than {_SAVING / 60:g} minute, not {minutes:g}")
        return time.monotonic() + minutes * 60


def do_missing(
    runs: Sequence[Run],
    parallel: int,
    options: Sequence[str],
    data_dir: Path,
    workers: int,
    cache_dir: Path | None,
    deadline: float | None,
) -> None:
    """Do what has no result yet, in this order; exit with 1 and their names if runs failed or others train them.

    Args:
        runs: What is wanted.
        parallel: Runs at a time.
        options: Options of the training script.
        data_dir: Folder of the data sets' folders.
        workers: Decoding processes.
        cache_dir: Where decoded images are kept.
        deadline: By when to be done, in seconds of the monotonic clock.

    Raises:
        Stopped: If a signal or the deadline came; every run can go on then.
    """
    if parallel < 1:
        raise ValueError(f"--parallel must be at least 1, not {parallel}")
    missing = [run for run in runs if not run.is_done()]
    print(f"{len(runs)} runs: {len(runs) - len(missing)} done, {len(missing)} to do", flush=True)
    decode(sorted({run.recipe.dataset for run in missing}), data_dir, workers, cache_dir, parallel)
    cached = ["--cache-dir", str(cache_dir)] if cache_dir else []
    if failed := train(missing, parallel, [*options, *cached], data_dir, deadline):
        sys.exit(f"{Path(sys.argv[0]).name}: {len(failed)} of {len(missing)} runs have no result: {', '.join(failed)}")
    for folder in sorted({run.results_dir for run in missing}):
        where = "" if folder == _RESULTS else f" --results-dir {folder}"
        print(f"results are in {folder}; reproduce.py report{where} makes tables and pictures of them")


def decode(datasets: Sequence[str], data_dir: Path, workers: int, cache_dir: Path | None, parallel: int) -> None:
    """Decode images once for all runs, after all data were found."""
    for data in check_data(datasets, data_dir, workers, cache_dir):
        if isinstance(data.train, FileImages):
            cpu = torch.device("cpu")
            place(data, "auto", cpu, workers=workers, processes=parallel, cache_dir=cache_dir)


def check_data(datasets: Sequence[str], data_dir: Path, workers: int, cache_dir: Path | None) -> list[ImageData]:
    """Find out that data are missing, or not the paper's, before anything runs."""
    found = []
    for name in datasets:
        data = load_dataset(name, None if name == "digits" else data_dir, cache_dir=cache_dir, workers=workers)
        recipes.check_data(name, data.num_classes, len(data.train), len(data.test))
        found.append(data)
    return found


def train(
    runs: Sequence[Run], parallel: int, options: Sequence[str], data_dir: Path, deadline: float | None
) -> list[str]:
    """Run the training script for each run, and keep each result as soon as it is there.

    Args:
        runs: What to train.
        parallel: How many at a time.
        options: Options of the training script.
        data_dir: Folder of the data sets' folders.
        deadline: By when to be done, in seconds of the monotonic clock.

    Returns:
        Names of the runs that failed or that another process trains.

    Raises:
        Stopped: If a signal or the deadline came; every run can go on then.
    """
    by_name = {run.name: run for run in runs}
    data = {run.name: [] if run.recipe.dataset == "digits" else ["--data-dir", str(data_dir)] for run in runs}
    jobs = [run.job([*options, *data[run.name]]) for run in runs]
    failed, busy = [], []
    with StopSignals() as stop, tqdm(total=sum(run.epochs for run in runs), unit="epoch", disable=None) as bar:

        def show_progress() -> None:
            bar.update(sum(run.epochs_done() for run in runs) - bar.n)
            if deadline is None:
                return
            if time.monotonic() > deadline - _SAVING:
                stop.ask(signal.SIGALRM)
            if time.monotonic() > deadline:  # still compiling, say: its last state is on disk, and it is killed
                raise stopped()

        def stopped() -> Stopped:
            left = sum(not run.result.exists() for run in runs)
            epochs = f"{sum(run.epochs_done() for run in runs)} of {bar.total} epochs are trained"
            when = " at the time limit" if stop.received == signal.SIGALRM else ""
            bad = f", {len(failed)} of which failed ({', '.join(failed)})" if failed else ""
            message = f"stopped{when} with {left} runs to do{bad}; {epochs}, and the same command goes on"
            return Stopped(message, stop.received)

        def started(job: Job) -> None:
            tqdm.write(f"{job.name}: running, see {job.log}")

        show_progress()
        bar.unpause()
        for job, code, words in run_jobs(jobs, parallel, stop, show_progress, started):
            run = by_name[job.name]
            try:
                if code == 1 and BUSY in words:  # the log of a run that went well may hold another's such words
                    busy.append(job.name)
                    tqdm.write(f"{run.name}: left to the other process that trains it", file=sys.stderr)
                    continue
                if code != 0:
                    raise ValueError(f"{words} ({job.log})")
                result = results.collect(run.folder)
                results.write(result, run.results_dir)
                paper = "" if run.recipe.accuracy is None else f" (paper {run.recipe.accuracy:.2f})"
                tqdm.write(f"{run.name}: top-1 {result.top1:.2f}{paper} in {result.wall_seconds / 60:.1f} minutes")
                for warning in result.warnings:
                    tqdm.write(f"{run.name}: warning: {warning}", file=sys.stderr)
            except (ValueError, OSError) as error:  # the other runs go on
                if not stop.received:
                    failed.append(job.name)
                    tqdm.write(f"{run.name} failed: {error}", file=sys.stderr)
        if stop.received and not all(run.result.exists() for run in runs):
            raise stopped()
    return failed + busy


def report(
    results_dir: Path = Path("results"), output_dir: Path | None = None, insert_into: Path | None = None
) -> None:
    """Write README.md, results.csv and pictures (PNG and SVG) from the results, and print the tables.

    Args:
        results_dir: Where results are.
        output_dir: Where to write. Default: the folder of the results.
        insert_into: A page of Markdown that also gets the tables of accuracy, between two comments that it has:
            <!-- results --> and <!-- end of results -->.
    """
    with one_line_errors(ValueError, OSError):
        found = results.read_all(results_dir)
        if not found:
            raise ValueError(f"no results in {str(results_dir)!r}; make some with reproduce.py run")
        folder = output_dir or results_dir
        if insert_into is not None and insert_into.resolve() == (folder / "README.md").resolve():
            raise ValueError(f"--insert-into {insert_into} is the report itself; name another page")
        page = None if insert_into is None else with_results(insert_into, short(found))
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {protocol: draw(protocol, found, folder) for protocol in {result.protocol for result in found}}
        write_text(folder / "README.md", markdown(found, pictures))
        write_text(folder / "results.csv", to_csv(found))
        if insert_into is not None and page is not None:
            mode = insert_into.stat().st_mode
            with replacing(insert_into.resolve()) as partial:
                partial.write_text(page, encoding="utf-8", newline="")
            insert_into.chmod(mode)
    for protocol in recipes.PROTOCOLS:
        if ours := [result for result in found if result.protocol == protocol]:
            print(f"## Protocol {protocol}\n\n{accuracy_tables(ours, coloured)}\n")
    print(f"{len(found)} runs; the report is {folder / 'README.md'}")


def with_results(page: Path, tables: str) -> str:
    """Return the text of a page with tables between its two comments."""
    try:
        with page.open(encoding="utf-8", newline="") as file:  # its line ends stay as they are
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"cannot read --insert-into {page}: {reason}") from None
    before, start, rest = text.partition("<!-- results -->")
    _, end, after = rest.partition("<!-- end of results -->")
    if not start or not end:
        raise ValueError(f"{page} has no place for results: the comments <!-- results --> and <!-- end of results -->")
    return f"{before}{start}\n\n{tables}\n{end}{after}"


def draw(protocol: str, found: Sequence[Result], folder: Path) -> dict[str, str]:
    """Draw the pictures of a protocol and return title and file name of each."""
    ours = [result for result in found if result.protocol == protocol]
    rows = [row for table in recipes.TABLES for row in rows_of(table, ours)]
    rows = list({row.recipe.id: row for row in rows}.values())  # one row of Table II is in Table IV, too
    whose = "Ours" if all(row.recipe.accuracy is None for row in rows) else "Ours and the paper's"
    pictures = {f"{whose}, protocol {protocol}": (f"{protocol}-ours-and-paper", ours_against_paper, rows)}
    if weights := rows_of("2", ours):
        title = f"ResNet50 on CIFAR-100, protocol {protocol}"
        pictures[title] = (f"{protocol}-accuracy-and-weight", accuracy_against_weight, weights)
    for title, (name, function, its_rows) in pictures.items():
        for ending in ("png", "svg"):
            function(its_rows, folder / f"{name}.{ending}", title)
    return {title: f"{name}.png" for title, (name, _, _) in pictures.items()}


def coloured(text: str, sign: int) -> str:
    """Colour a significant difference on a terminal."""
    if not sign:
        return text
    text = f"{text} {'▲' if sign > 0 else '▼'}"
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    return f"\033[{'32' if sign > 0 else '31'}m{text}\033[0m"


def main() -> None:
    """Do what the command line says."""
    commands = {"list": list_runs, "run": run, "slurm": array, "collect": collect, "report": report}
    with one_line_errors():
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)


if __name__ == "__main__":
    main()
