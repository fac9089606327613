"""Train any timm backbone with multi-stage feature decorrelation.

accelerate launch train_scripts/train.py   (handwritten digits, about a minute on a CPU)

accelerate launch train_scripts/train.py --dataset tiny_imagenet --data-dir DIR --model mobilenetv2_100_mfd --epochs 100

accelerate launch train_scripts/train.py --recipe resnet50/cifar100/softmax+mfd --data-dir DIR

accelerate launch train_scripts/train.py --resume RUN
"""

import _extra  # noqa: F401, before what it looks for

# isort: split

import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

from timm_mfd import MFDClassificationTask, MFDLoss, checkpoint, create_model, recipes, run_dir, save_pretrained
from timm_mfd.arguments import Args
from timm_mfd.criteria import create_criterion
from timm_mfd.data import EvalLoader, ImageData, ImageDecodeError, TrainLoader, load_dataset, place
from timm_mfd.errors import first_words, named
from timm_mfd.evaluation import evaluate
from timm_mfd.guards import average_warnings, sample_warnings, verdicts
from timm_mfd.interruption import StopSignals
from timm_mfd.launch import (
    follow_launcher,
    forget_foreign_settings,
    on_main_process,
    one_line_errors,
    prepare_cpu,
    start_all_processes,
    use_deterministic_kernels,
)
from timm_mfd.loss.samples import Scope, effective_samples
from timm_mfd.models import arguments_for
from timm_mfd.redundancy import CORRELATION_IMAGES, mean_abs_correlation
from timm_mfd.sources import source_of
from timm_mfd.stages import stage_shapes
from timm_mfd.sync_batch_norm import synchronise_batch_norm
from timm_mfd.tables import correlation_table, losses_text, stage_table
from timm_mfd.tracking import Tracker
from timm_mfd.training import Training


def main(args: Args) -> None:
    """Train, evaluate after each epoch, and leave a run folder with a model that loads, or a mark if a signal came."""
    with one_line_errors(ValueError, OSError):
        folder = folder_of(replace(args, model=source_of(args.model)))
    with run_dir.marking_a_stop(folder):
        train(args)


def folder_of(args: Args) -> Path | None:
    """Return the folder that a run writes into, as far as it is known before the run begins."""
    folder = Path(args.output_dir) if args.output_dir else None
    if args.resume and (source := run_dir.find_checkpoint(args.resume, args.output_dir, args.name)):
        return run_dir.to_go_on_in(source, args.output_dir) or folder
    return folder


def train(args: Args) -> None:
    """Do all of it."""
    follow_launcher()
    foreign = forget_foreign_settings()

    # 1. Everything that can be wrong is found before anything is written.
    with one_line_errors(ValueError, OSError):
        args = replace(args, model=source_of(args.model)).checked()
        if args.resume is None:
            run_dir.check(args.output_dir)
        if args.deterministic:
            use_deterministic_kernels()
        data = load_dataset(
            args.dataset, args.data_dir, args.image_size, cache_dir=args.cache_dir, workers=args.workers
        )
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else torchrun's processes on a CPU would not find each other
            mixed_precision=args.mixed_precision,
            log_with=None if args.tracker == "none" else args.tracker,
            # The others wait while the first process decodes a large data set.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
            project_dir="runs",  # until the folder of the run is known
        )
        if foreign:
            accelerator.print(f"note: the environment has {', '.join(foreign)}; a run goes by its arguments alone")
        device, processes, main_process = accelerator.device, accelerator.num_processes, accelerator.is_main_process
        if device.type == "cpu":
            prepare_cpu()
            if args.mixed_precision == "fp16":
                raise ValueError("--mixed-precision fp16 needs a GPU; on a CPU choose bf16 or no")
        if args.compile:
            with named("--compile does not work on this machine (install what it lacks, or leave it out)"):
                torch.compile(torch.sin)(torch.ones(2, device=device))
        if args.batch_size < 2 * processes:
            raise ValueError(
                f"--batch-size {args.batch_size} leaves fewer than 2 images to each of {processes} processes"
            )
        kwargs = arguments_for(args.model, data.image_size, None if args.stem == "auto" else args.stem)
        args = replace(args, stem=kwargs.get("stem", "auto"))

        # 2. A run that goes on must find its arguments, its data and its processes as they were.
        record: dict[str, Any] = {
            "args": asdict(args),
            "environment": run_dir.environment(device, processes),
            "data": data.identity(),
        }
        folder, saved = None, None
        if args.resume:
            source = on_main_process(partial(run_dir.find_checkpoint, args.resume, args.output_dir, args.name))
            if source:
                folder = run_dir.to_go_on_in(source, args.output_dir)
                if folder:
                    on_main_process(partial(run_dir.hold, folder))
                saved = checkpoint.read(source)
                args.check_resumable(saved.record["args"], saved.record["epoch"] + 1)
                differs = run_dir.check_same(record["environment"], record["data"], saved.record)
                if differs:
                    accelerator.print(f"warning: the last bits may differ from a run without interruption: {differs}")
                changed = run_dir.changes(asdict(args), saved.record["args"], {"output_dir", "resume"})
                if changed:
                    accelerator.print(f"note: {', '.join(changed.values())}")
            if folder and (folder / "summary.json").exists():
                if args.epochs > len(saved.record["metrics"]) + 1:
                    raise ValueError(f"{folder} is finished; to train on for more epochs, choose a new --output-dir")
                accelerator.print(f"{folder} is finished")
                return

        # 3. A plain timm model inside one task. Every process starts from the same weights.
        set_seed(args.seed)
        with catch_warnings():
            if saved:  # its weights follow, so nobody needs to hear that these are random
                filterwarnings("ignore", ".*has random weights")
            model = create_model(args.model, args.pretrained and not saved, num_classes=data.num_classes, **kwargs)
        model = model.to(device, memory_format=torch.channels_last)
        shapes = stage_shapes(model, torch.zeros(1, 3, *data.image_size, device=device), args.stages)
        stages = [stage for stage, _ in shapes]
        model, synchronised = synchronise_batch_norm(model, args.sync_batch_norm)
        task = build_task(args, model, device)
        # One kernel for all parameters; on a CPU its last bits would differ from those of runs before.
        fused = {"fused": True} if device.type == "cuda" else {}
        optimizer = torch.optim.SGD(
            model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, **fused
        )
        if args.ema_decay:
            task.setup_ema(decay=args.ema_decay)
        if saved:
            checkpoint.restore(task, optimizer, saved.tensors)

        with accelerator.local_main_process_first():  # the others read the cache that the first one wrote
            quiet = not accelerator.is_local_main_process
            share = {"workers": args.workers, "processes": processes, "cache_dir": args.cache_dir, "quiet": quiet}
            data = place(data, args.loader, device, **share)
        shard = {"rank": accelerator.process_index, "processes": processes, "device": device, "workers": args.workers}
        train_loader = TrainLoader(data, args.batch_size, seed=args.seed, **shard)
        test_loader = EvalLoader(data, 256, **shard)
        if main_process:
            record["before"] = saved.record["before"] if saved else stage_correlations(model, data, args)
        content = record["args"] | {"environment": record["environment"]}
        if folder is None:
            folder = on_main_process(partial(run_dir.claim, args.output_dir, args.name, content, bool(args.resume)))
        else:
            on_main_process(partial(run_dir.note_changes, folder, content))

    kind = f"{processes} x {record['environment']['device']}, {torch.get_num_threads()} CPU threads"
    kind += f", precision {args.mixed_precision}"
    share_of_batch = args.batch_size // processes
    scope = Scope(args.mfd_center, args.mfd_max_samples)
    samples = [effective_samples((share_of_batch, *shape[1:]), scope, processes) for _, shape in shapes]
    accelerator.print(f"{args.model} on {data.name} ({len(data.train):,} training, {len(data.test):,} held-out images)")
    if data.source:
        accelerator.print(f"read from the {data.source}")
    accelerator.print(f"{kind}; {args.criterion}, MFD weight {args.mfd_weight:g}; writing to {folder}")
    if saved:
        position = f"epoch {saved.record['epoch'] + 1}, step {saved.record['step']} of {len(train_loader)}"
        accelerator.print(f"going on from {source} after {position}")
    accelerator.print()
    accelerator.print(stage_table(stages, [tuple(shape[2:]) for _, shape in shapes], samples))
    warnings = sample_warnings(stages, samples) if args.mfd_weight else []
    steps = args.epochs * len(train_loader)
    warnings += average_warnings(args.ema_decay, steps)
    if device.type == "cpu" and args.mixed_precision == "bf16":
        # oneDNN leaves the kernel positions that see only padding unwritten (torch 2.15).
        warnings.append("bf16 on a CPU has wrong gradients for 3x3 convolutions of stride 2 on 1x1 maps")
    needed = checkpoint.disk_space(task)
    if main_process and (free := shutil.disk_usage(folder).free) < needed:
        warnings.append(f"the run needs about {needed >> 20:,} MiB in {folder}, {free >> 20:,} MiB are free")
    for warning in warnings:
        accelerator.print(f"warning: {warning}")
    accelerator.print()

    # 4. Learning rate, order, augmentation and dropout are functions of the position: there is no scheduler.
    if args.compile:
        task.compile(mode=args.compile_mode, dynamic=False)  # two shapes: a whole batch and the last held-out one
    indices = [stage.index for stage in stages]
    training = Training(
        args, accelerator, task, optimizer, train_loader,
        stages=indices, folder=folder, record=record, context=synchronised,
    )  # fmt: skip
    if saved:
        training.go_on(saved)
    tracker = Tracker(accelerator, args.tracker, folder, record["args"])

    # 5. Train, evaluate, log: one line of metrics an epoch.
    evaluated = partial(task.get_eval_model, ema=bool(args.ema_decay))
    total = steps * args.batch_size
    begun = (training.epoch * len(train_loader) + training.step) * args.batch_size
    with (
        one_line_errors(ImageDecodeError, FloatingPointError, OSError),
        StopSignals() as stop,
        tqdm(
            total=total, initial=begun, unit="img", unit_scale=True, smoothing=0.05,
            disable=None if main_process else True,
        ) as bar,
    ):  # fmt: skip
        while training.epoch < args.epochs:
            epoch = training.epoch + 1
            losses = training.train_epoch(stop, bar)
            began = time.monotonic()
            hint = f"stopped while evaluating epoch {epoch}; go on with --resume {folder}"
            batches = stop.watch(test_loader, hint, training.is_saved)
            accuracy = evaluate(evaluated(), batches, data.num_classes, accelerator.autocast)
            line = {"epoch": epoch, "top1": accuracy.top1, "top5": accuracy.top5, **losses}
            if main_process:  # of every run, so that those without MFD can be compared
                line["mean_abs_correlation"] = [round(r, 5) for r in stage_correlations(evaluated(), data, args)]
            line["seconds"] = round(line["seconds"] + time.monotonic() - began, 1)
            training.finish_epoch(line)
            if main_process:
                tqdm.write(
                    f"epoch {epoch:>3}/{args.epochs}  top-1 {accuracy.top1:6.2f}  top-5 {accuracy.top5:6.2f}  "
                    f"{losses_text(line['loss'], line['criterion_loss'], line['mfd_loss'], 4)}  "
                    f"{line['images_per_second']:,.0f} images/s"
                )
            per_stage = {
                f"mfd_stage{i}": v for i, v in zip(indices, line["mfd_per_stage"], strict=True) if v is not None
            }
            numbers = {key: value for key, value in line.items() if isinstance(value, float)}
            tracker.log(numbers | per_stage, step=epoch)
    tracker.end()

    # 6. Export and report.
    if main_process:
        trained = evaluated()
        after = stage_correlations(trained, data, args)
        losses = [line["criterion_loss"] for line in training.metrics]
        average = " ".join(average_warnings(args.ema_decay, steps))
        failures = verdicts(losses, accuracy.answers, data.test.labels, accuracy.top1, data.class_names, average)
        summary = {
            "top1": accuracy.top1,
            "top5": accuracy.top5,
            "count": accuracy.images,
            "split": data.test_split,
            "data": record["data"],
            "stages": indices,
            "mean_abs_correlation": {"before": record["before"], "after": after},
            "samples": samples,
            "noise_floor": [1 / max(n - 1, 1) for n in samples],
            "warnings": [*warnings, *failures],
            "seconds": round(sum(line["seconds"] for line in training.metrics), 1),  # of all parts of the run
            "images_per_second": statistics.median(line["images_per_second"] for line in training.metrics),
            "device": kind,
        }
        with one_line_errors(OSError):
            try:
                export(trained, folder, data, args, training.metrics, indices, summary, content)
            except (OSError, SafetensorError) as error:
                raise OSError(f"cannot write the model: {error}; once it can be, --resume {folder}") from None
        print("\n" + correlation_table(indices, record["before"], after, min(CORRELATION_IMAGES, accuracy.images)))
        print(f"\ntop-1 {accuracy.top1:.2f} %, top-5 {accuracy.top5:.2f} %, {accuracy.images:,} images")
        for warning in failures:
            print(f"warning: {warning}")
        print(f"{summary['seconds']:.0f} seconds of training and evaluation; the model is in {folder / 'model'}\n")
        print("import timm\nimport timm_mfd")
        package = "timm_mfd" if getattr(model, "pruned", False) else "timm"
        print(f'model = {package}.create_model("local-dir:{folder / "model"}", pretrained=True).eval()')


def build_task(args: Args, model: nn.Module, device: torch.device) -> MFDClassificationTask:
    """Put model, criterion and MFD into one `forward`."""
    criterion = create_criterion(
        args.criterion,
        model,
        label_smoothing=args.label_smoothing,
        margin=args.margin,
        scale=args.scale,
        center_weight=args.center_weight,
    )
    mfd = MFDLoss(args.mfd_weight, center=args.mfd_center, max_samples=args.mfd_max_samples)
    return MFDClassificationTask(model, criterion, mfd, stage_indices=args.stages, device=device, verbose=False)


def stage_correlations(model: nn.Module, data: ImageData, args: Args) -> list[float]:
    """Mean |r| of each stage on held-out images, as in Tables I and III."""
    device = next(model.parameters()).device
    loader = EvalLoader(data, 128, device=device, workers=args.workers, limit=CORRELATION_IMAGES)
    return mean_abs_correlation(model, (images for images, _ in loader), args.stages)


def export(
    model: nn.Module,
    folder: Path,
    data: ImageData,
    args: Args,
    metrics: Sequence[dict[str, Any]],
    stages: Sequence[int],
    summary: dict[str, Any],
    run_args: dict[str, Any],
) -> None:
    """Write model, curves and, last, the summary, by which a run is known to be finished."""
    partial_model = folder / "model.partial"
    shutil.rmtree(partial_model, ignore_errors=True)
    save_pretrained(
        model,
        partial_model,
        label_names=data.class_names,
        mean=data.mean,
        std=data.std,
        image_size=data.image_size,
        run={"args": run_args, "summary": summary},
    )
    run_dir.replace_folder(partial_model, folder / "model")
    title = f"{args.model} on {data.name}, {args.criterion}, MFD weight {args.mfd_weight:g}, seed {args.seed}"
    try:
        from timm_mfd.figures import training_curves  # here: no run ends for want of a picture

        training_curves(metrics, folder / "curves.png", title, stages)
    except Exception as error:
        print(f"warning: curves.png is not drawn: {first_words(error)}", file=sys.stderr)
    run_dir.write_text(folder / "summary.json", run_dir.to_json(summary))


def parse(words: Sequence[str] | None = None) -> Args:
    """Read the command line; what it leaves out is as in the recipe, or as in the run that goes on.

    Args:
        words: The command line without the script. Default: that of this process.
    """
    cli = partial(tyro.cli, Args, description=__doc__, args=words)
    args, name = cli(), None
    if args.recipe is not None:
        recipe, protocol = recipes.find(args.recipe)
        name = recipe.name(protocol)  # one name for a recipe, however it was written
        args = replace(cli(default=recipe.arguments(protocol)), recipe=name)
    called = replace(args, model=source_of(args.model)).name
    source = run_dir.find_checkpoint(args.resume, args.output_dir, called) if args.resume else None
    if source is not None:
        args = cli(default=Args.of_run(checkpoint.read_record(source)["args"]))
        args = replace(args, recipe=name) if name else args
    return args


if __name__ == "__main__":
    with one_line_errors(ValueError):
        parsed = parse()
        start_all_processes()
    with one_line_errors():  # an interruption anywhere is one line
        main(parsed)
