"""Train any timm backbone with multi-stage feature decorrelation.

accelerate launch train_scripts/train.py                     # handwritten digits, about a minute on a CPU
accelerate launch train_scripts/train.py --dataset tiny_imagenet --data-dir DIR --model mobilenetv2_100_mfd --epochs 100
"""

import importlib.util
import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torch import Tensor, nn
from tqdm import tqdm

from timm_mfd import MFDClassificationTask, MFDLoss, create_model, save_pretrained
from timm_mfd.data import EvalLoader, ImageData, ImageDecodeError, TrainLoader, load_dataset, place
from timm_mfd.figures import training_curves
from timm_mfd.launch import check_run_dir, claim_run_dir, one_line_errors, prepare_cpu, to_json
from timm_mfd.models import arguments_for
from timm_mfd.redundancy import mean_abs_correlation
from timm_mfd.stages import stage_shapes
from timm_mfd.tables import correlation_table, stage_table

CORRELATION_IMAGES = 1000  # held-out images behind the correlations before and after training


@dataclass(frozen=True)
class Args:
    """Arguments of a run; the defaults for the optimizer are the paper's."""

    model: str = "resnet18_mfd"
    """Any name of timm or timm_mfd, or local-dir:FOLDER or hf-hub:ORG/NAME."""
    pretrained: bool = False
    """Start from the model's pretrained weights."""
    stem: Literal["auto", "imagenet", "small", "cifar"] = "auto"
    """First layers of an *_mfd model; auto is the paper's choice for the model and the size of the images."""
    dataset: str = "digits"
    """digits, cifar10, cifar100, tiny_imagenet or folder (train/ and val/ or test/ with one folder per class)."""
    data_dir: str | None = None
    """Where the data set lies; digits needs none."""
    image_size: int | None = None
    """For --dataset folder: resize all images to this side."""
    mfd_weight: float = 1.0
    """Balance factor lambda of Eq. 7; 0 is the baseline without MFD."""
    mfd_center: Literal["channel", "position"] = "channel"
    """The mean in Eq. 6: one number per channel, or one map per channel."""
    mfd_max_samples: int | None = None
    """Use only so many positions per stage and process for MFD: cheaper and noisier. Default: all."""
    stages: tuple[int, ...] | None = None
    """Stages to constrain, by their index in the stage table. Default: all of them."""
    epochs: int = 20
    """Passes over the training images (the paper: 100)."""
    batch_size: int = 128
    """Images per step over all processes."""
    lr: float = 0.1
    """Learning rate of SGD with momentum 0.9."""
    milestones: tuple[int, ...] | None = None
    """Epochs after which the learning rate drops to a tenth. Default: 30, 60 and 90 % of the epochs."""
    weight_decay: float = 5e-4
    """Weight decay of all parameters."""
    ema_decay: float = 0.0
    """Decay per step of a moving average of the weights, which is then evaluated and saved; 0 is off."""
    seed: int = 0
    """Fixes initial weights, order and augmentation."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Arithmetic of the network; correlations are always taken in float32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    loader: Literal["auto", "resident", "workers"] = "auto"
    """resident: decode all images once and keep them on the device; workers: decode them again every epoch;
    auto: resident if they fit into 40 % of the free memory."""
    cache_dir: str | None = None
    """Where decoded images are kept between runs. Default: ~/.cache/timm_mfd."""
    workers: int = 2
    """Decoding processes of each training process, for images in files."""
    output_dir: str | None = None
    """Run folder, new or empty. Default: a new one under runs/."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Also log to this tracker; metrics.jsonl is always written."""


def main(args: Args) -> None:
    """Train, evaluate after each epoch, and leave a run folder with a model that loads."""
    started = time.time()

    # 1. Everything that can be wrong with the arguments is found before anything is written.
    with one_line_errors(ValueError, OSError):
        args = checked(args)
        check_run_dir(args.output_dir)
        data = load_dataset(args.dataset, args.data_dir, args.image_size)
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else torchrun's processes on a CPU would not find each other
            mixed_precision=args.mixed_precision,
            log_with=None if args.tracker == "none" else args.tracker,
            project_dir=args.output_dir or "runs",
        )
        device, processes, main_process = accelerator.device, accelerator.num_processes, accelerator.is_main_process
        if device.type == "cpu":
            prepare_cpu()
        if args.batch_size < 2 * processes:
            raise ValueError(
                f"--batch-size {args.batch_size} leaves fewer than 2 images to each of {processes} processes"
            )

        # 2. A plain timm model inside one task. Every process starts from the same weights.
        set_seed(args.seed)
        kwargs = arguments_for(args.model, data.image_size, None if args.stem == "auto" else args.stem)
        args = replace(args, stem=kwargs.get("stem", "auto"))
        model = create_model(args.model, args.pretrained, num_classes=data.num_classes, **kwargs)
        model = model.to(device, memory_format=torch.channels_last)
        mfd = MFDLoss(args.mfd_weight, center=args.mfd_center, max_samples=args.mfd_max_samples)
        task = MFDClassificationTask(
            model, nn.CrossEntropyLoss(), mfd, stage_indices=args.stages, device=device, verbose=False
        )
        shapes = stage_shapes(model, torch.zeros(1, 3, *data.image_size, device=device), args.stages)

        with accelerator.local_main_process_first():  # the others read the cache that the first one wrote
            quiet = not accelerator.is_local_main_process
            share = {"workers": args.workers, "processes": processes, "cache_dir": args.cache_dir, "quiet": quiet}
            data = place(data, args.loader, device, **share)
        shard = {"rank": accelerator.process_index, "processes": processes, "device": device, "workers": args.workers}
        train_loader = TrainLoader(data, args.batch_size, seed=args.seed, **shard)
        test_loader = EvalLoader(data, 256, **shard)
        before = stage_correlations(model, data, args) if main_process else []
        name = f"{args.model}-{args.dataset}-mfd{args.mfd_weight:g}-seed{args.seed}"
        run_dir = claim_run_dir(args.output_dir, name, asdict(args)) if main_process else Path()

    kind = f"{processes} x {device.type}, {torch.get_num_threads()} CPU threads, precision {args.mixed_precision}"
    accelerator.print(f"{args.model} on {data.name} ({len(data.train):,} training, {len(data.test):,} held-out images)")
    accelerator.print(f"{kind}; MFD weight {args.mfd_weight:g}; writing to {run_dir}\n")
    accelerator.print(stage_table(shapes, args.batch_size // processes) + "\n")

    # 3. The scheduler is not prepared: Accelerate would step it once per process.
    if args.ema_decay:
        task.setup_ema(decay=args.ema_decay)
    if args.compile:
        task.compile()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, args.milestones, gamma=0.1)
    prepared_task, optimizer = accelerator.prepare(task, optimizer)
    if args.tracker != "none":
        accelerator.init_trackers("timm_mfd", config={key: str(value) for key, value in asdict(args).items()})

    # 4. Train, evaluate, log: one line of metrics an epoch.
    metrics: list[dict[str, Any]] = []
    images = args.epochs * len(train_loader) * args.batch_size
    with (
        one_line_errors(ImageDecodeError, FloatingPointError, OSError),
        tqdm(total=images, unit="img", unit_scale=True, smoothing=0.05, disable=None if main_process else True) as bar,
    ):
        for epoch in range(args.epochs):
            losses, seconds = train_epoch(prepared_task, task, train_loader, optimizer, accelerator, epoch, bar)
            if not math.isfinite(losses["loss"]):
                raise FloatingPointError(f"the loss is {losses['loss']} in epoch {epoch + 1}; try a lower --lr")
            top1, top5, count = evaluate(task.get_eval_model(ema=bool(args.ema_decay)), test_loader, accelerator)
            speed = round(len(train_loader) * args.batch_size / seconds, 1)
            line = {"epoch": epoch + 1, "top1": top1, "top5": top5, **losses}
            line |= {"lr": scheduler.get_last_lr()[0], "images_per_second": speed}
            scheduler.step()
            metrics.append(line)
            if main_process:
                with (run_dir / "metrics.jsonl").open("a") as file:
                    file.write(to_json(line, indent=None))
                tqdm.write(
                    f"epoch {epoch + 1:>3}/{args.epochs}  top-1 {top1:6.2f}  top-5 {top5:6.2f}  "
                    f"loss {line['loss']:.4f} = {line['criterion_loss']:.4f} + MFD {line['mfd_loss']:.4f}  "
                    f"{speed:,.0f} images/s"
                )
            per_stage = {f"mfd_stage{s.index}": v for (s, _), v in zip(shapes, line["mfd_per_stage"], strict=True) if v}
            numbers = {key: value for key, value in line.items() if isinstance(value, float)}
            accelerator.log(numbers | per_stage, step=epoch + 1)
    accelerator.end_training()

    # 5. Export and report.
    if main_process:
        with one_line_errors(OSError):
            trained = task.get_eval_model(ema=bool(args.ema_decay))
            after = stage_correlations(trained, data, args)
            indices = [stage.index for stage, _ in shapes]
            summary = {
                "top1": top1,
                "top5": top5,
                "count": count,
                "split": data.test_split,
                "stages": indices,
                "mean_abs_correlation": {"before": before, "after": after},
                "seconds": round(time.time() - started, 1),
                "images_per_second": statistics.median(line["images_per_second"] for line in metrics),
                "device": kind,
            }
            save_pretrained(
                trained,
                run_dir / "model",
                label_names=data.class_names,
                mean=data.mean,
                std=data.std,
                image_size=data.image_size,
                dataset=data.name,
                top1=top1,
                mfd_weight=args.mfd_weight,
                summary=f"Trained for {args.epochs} epochs with seed {args.seed}.",
            )
            title = f"{args.model} on {data.name}, MFD weight {args.mfd_weight:g}, seed {args.seed}"
            training_curves(metrics, run_dir / "curves.png", title, indices)
            (run_dir / "summary.json").write_text(to_json(summary))
        print("\n" + correlation_table(indices, before, after, min(CORRELATION_IMAGES, count)))
        print(f"\ntop-1 {top1:.2f} %, top-5 {top5:.2f} %, {count:,} images")
        print(f"{summary['seconds']:.0f} seconds; the model is in {run_dir / 'model'}\n\nimport timm\nimport timm_mfd")
        print(f'model = timm.create_model("local-dir:{run_dir / "model"}", pretrained=True).eval()')


def train_epoch(
    prepared_task: nn.Module,
    task: MFDClassificationTask,
    loader: TrainLoader,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    epoch: int,
    bar: tqdm,
) -> tuple[dict[str, Any], float]:
    """Run one epoch; return the mean losses over steps and processes, and the seconds it took."""
    started = shown = time.time()
    prepared_task.train()
    totals: Tensor | None = None
    for images, labels in loader.epoch(epoch):
        out = prepared_task(images, labels)
        optimizer.zero_grad()
        accelerator.backward(out["loss"])
        optimizer.step()
        task.update_ema()
        # Sums stay on the device: reading a number every step would stall it.
        parts = torch.stack([out["loss"].detach(), out["criterion_loss"], out["mfd_loss"]])
        parts = torch.cat([parts, out["mfd_per_stage"]])
        totals = parts if totals is None else totals + parts
        bar.update(loader.batch_size)
        if not bar.disable and time.time() - shown > 0.5:
            shown = time.time()
            loss, criterion, mfd = parts[:3].tolist()
            bar.set_postfix_str(f"epoch {epoch + 1}, loss {loss:.3f} = {criterion:.3f} + MFD {mfd:.4f}", refresh=False)
    means = accelerator.reduce(totals / len(loader), "mean").tolist()
    losses = dict(zip(("loss", "criterion_loss", "mfd_loss"), means, strict=False))
    # NaN stands for "not computed" and has no place in JSON.
    per_stage = [None if task.mfd.weight == 0 else value for value in means[3:]]
    return {**losses, "mfd_per_stage": per_stage}, time.time() - started


@torch.no_grad()
def evaluate(model: nn.Module, loader: EvalLoader, accelerator: Accelerator) -> tuple[float, float, int]:
    """Return top-1 and top-5 in percent and the number of images, exact for any number of processes."""
    model.eval()
    if accelerator.num_processes > 1:
        # Batch norms have seen each process's own images; what is measured is what the main process saves.
        broadcast(list(model.buffers()))
    counts = torch.zeros(3, dtype=torch.long, device=accelerator.device)
    for images, labels in loader:
        with accelerator.autocast():
            logits = model(images)
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=counts.device)])
    top1, top5, count = accelerator.reduce(counts, "sum").tolist()
    return 100 * top1 / count, 100 * top5 / count, count


def stage_correlations(model: nn.Module, data: ImageData, args: Args) -> list[float]:
    """Mean |r| of each stage on held-out images, as in Tables I and III."""
    device = next(model.parameters()).device
    loader = EvalLoader(data, 128, device=device, workers=args.workers, limit=CORRELATION_IMAGES)
    return mean_abs_correlation(model, (images for images, _ in loader), args.stages)


def checked(args: Args) -> Args:
    """Refuse hyper-parameters that cannot train, and fill in the default milestones."""
    finite = {"--lr": args.lr, "--weight-decay": args.weight_decay}
    for flag, value in finite.items():
        if not (math.isfinite(value) and value >= 0) or (flag == "--lr" and value == 0):
            raise ValueError(f"{flag} must be a finite number {'above' if flag == '--lr' else 'from'} 0, not {value}")
    least = {"--epochs": (args.epochs, 1), "--workers": (args.workers, 0), "--batch-size": (args.batch_size, 2)}
    least["--image-size"] = (1 if args.image_size is None else args.image_size, 1)
    for flag, (number, minimum) in least.items():
        if number < minimum:
            raise ValueError(f"{flag} must be at least {minimum}, not {number}")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be in [0, 2^32), not {args.seed}")
    if not 0 <= args.ema_decay < 1:
        raise ValueError(f"--ema-decay must be in [0, 1), not {args.ema_decay}")
    if args.tracker != "none" and importlib.util.find_spec(args.tracker) is None:
        raise ValueError(f"--tracker {args.tracker} is not installed; pip install {args.tracker}")
    if args.milestones is None:
        return replace(args, milestones=tuple(sorted({max(1, round(args.epochs * part)) for part in (0.3, 0.6, 0.9)})))
    if list(args.milestones) != sorted({epoch for epoch in args.milestones if epoch > 0}):
        raise ValueError(f"--milestones must be increasing epochs above 0, not {' '.join(map(str, args.milestones))}")
    return args


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
