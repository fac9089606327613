"""Measure what MFD and the pipeline cost, as ratios of things timed side by side in one run.

python train_scripts/benchmark.py                  # a CPU: minutes
python train_scripts/benchmark.py --batch-size 512 --dtype bf16 --models resnet50_mfd mobilenetv2_100_mfd   # a GPU

Timings alternate between the things compared, so that a busy machine slows all of them; medians are over the rounds and
spreads are half the range between quartiles. On a GPU a timing is the mean of a loop of calls between two events.
"""

import _extra  # noqa: F401, before what it looks for

# isort: split

import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from alternatives import straightforward, with_corrcoef
from counters import Kernels, Operations, PeakMemory, Traffic, opened
from PIL import Image
from timm.data import create_dataset, create_loader
from torch import Tensor
from torch.nn.grad import conv2d_weight
from torchvision import transforms

import timm_mfd
from timm_mfd.data import ArrayImages, ImageData, TrainLoader, load_dataset, place
from timm_mfd.launch import prepare_cpu
from timm_mfd.loss.correlation import correlation
from timm_mfd.loss.samples import Scope
from timm_mfd.models import paper_stem

PARTS = ("stages", "accuracy", "step", "memory", "pipeline", "growth", "bounds")
BOUNDS_MODELS = ("mobilenetv2_100_mfd", "resnet50_mfd")  # of the paper's rows that begin with Tiny ImageNet
BOUNDS_SIDE = 64
PROCESSES = (1, 2, 4)


@dataclass(frozen=True)
class Args:
    """What to measure."""

    parts: tuple[Literal["stages", "accuracy", "step", "memory", "pipeline", "growth", "bounds"], ...] = PARTS
    """Which measurements to make."""
    batch_size: int = 128
    """Images per batch."""
    models: tuple[str, ...] = ("resnet50_mfd",)
    """Backbones of the whole training step, with the cifar stem where they have one."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the network and of the maps."""
    max_samples: int = 2048
    """The bounded variant of MFD."""
    rounds: int = 5
    """Timings of each thing."""
    data_dir: str | None = None
    """Image folder for the pipeline (train/ and val/ or test/). Default: 4,000 random JPEGs of 32 px."""
    output: str = "benchmark.json"
    """Where the figures are written."""


def main(args: Args) -> None:
    """Run the chosen measurements and write them as one JSON file."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        prepare_cpu()  # as train.py does
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    results: dict[str, Any] = {
        "args": asdict(args),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    print(f"{results['device']}, torch {torch.__version__}, batch {args.batch_size}, {args.dtype}")
    for part in args.parts:
        print(f"\n{part}: {MEASUREMENTS[part].__doc__.splitlines()[0]}")
        results[part] = MEASUREMENTS[part](args, device, dtype)
    Path(args.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {args.output}")


def resnet50_maps(batch: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The stage outputs of ResNet-50 with the cifar stem at 32 px: rectified noise with common parts."""
    torch.manual_seed(0)
    maps = []
    for channels, side in ((64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4)):
        x = torch.randn(batch, channels, side, side) + 0.5 * torch.randn(batch, 1, side, side)
        maps.append(x.relu().to(device, dtype).contiguous(memory_format=torch.channels_last))
    return maps


def backward_of(loss: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """A call that computes the loss of a map and its gradient."""
    leaf = x.detach().requires_grad_()

    def run() -> None:
        leaf.grad = None
        loss(leaf).backward()

    return run


def seconds_of(thing: Callable[[], object], device: torch.device, calls: int) -> float:
    """Time one call on a CPU, or the mean of many on a GPU: between two events, as the host runs ahead of it."""
    if device.type != "cuda":
        started = time.perf_counter()
        thing()
        return time.perf_counter() - started
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        thing()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / calls / 1e3


def counts_of(thing: Callable[[], object]) -> dict[str, int]:
    """Count what a call does: kernels, bytes moved and operations."""
    with opened(), Kernels() as kernels, Traffic() as traffic, Operations() as operations:
        thing()
    return {"kernels": kernels.started, "bytes": traffic.bytes, "operations": operations.total}


def time_side_by_side(
    things: dict[str, Callable[[], object]], rounds: int, device: torch.device, calls: int = 20
) -> dict[str, Any]:
    """Return `{name: {median, spread, ratio}}` in seconds; ratios are to the first thing, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for number in range(rounds + 1):
        for name, thing in things.items():
            value = seconds_of(thing, device, calls)
            if number:  # the first round warms up
                seconds[name].append(value)
    first = seconds[next(iter(things))]
    return {
        name: {
            "median": statistics.median(values),
            "spread": float(np.subtract(*np.percentile(values, [75, 25]))) / 2,
            "ratio": statistics.median(value / base for value, base in zip(values, first, strict=True)),
        }
        for name, values in seconds.items()
    }


def show(title: str, timings: dict[str, Any]) -> None:
    """Print one row a thing."""
    for name, value in timings.items():
        milliseconds = f"{value['median'] * 1e3:9.2f} ms +- {value['spread'] * 1e3:6.2f}"
        print(f"  {title:<14} {name:<22} {milliseconds}   x{value['ratio']:.3f}")


def measure_stages(args: Args, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """MFD forward and backward per stage, against the bare products, other ways to write it, and the device's limit.

    The limit: the time that operations or bytes, whichever take longer, need at the rates of `measured_rates`.
    """
    results = {}
    rates = measured_rates(args.rounds, device, dtype)
    for index, x in enumerate(resnet50_maps(args.batch_size, device, dtype)):
        rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        a = torch.randn(x.shape[1], x.shape[1], device=device, dtype=dtype)
        nchw = x.contiguous()
        bounded = timm_mfd.MFDLoss(max_samples=args.max_samples)
        kernel = a[:, :, None, None]
        things = {
            "two bare products": lambda rows=rows, a=a: (rows.T @ rows, rows @ a),
            "... as convolutions": lambda x=x, k=kernel: (conv2d_weight(x, k.shape, x), F.conv2d(x, k)),
            "timm_mfd": backward_of(timm_mfd.mfd_loss, x),
            "timm_mfd, NCHW": backward_of(timm_mfd.mfd_loss, nchw),
            "timm_mfd, max_samples": backward_of(lambda t, bounded=bounded: bounded([t]).loss, x),
            "straightforward": backward_of(straightforward, x),
            "torch.corrcoef": backward_of(with_corrcoef, x),
        }
        results[f"stage {index}"] = time_side_by_side(things, args.rounds, device)
        show(f"{x.shape[1]}x{x.shape[2]}x{x.shape[3]}", results[f"stage {index}"])
        counts = counts_of(things["timm_mfd"])
        least = max(counts["operations"] / rates["operations"], counts["bytes"] / rates["bytes"])
        results[f"stage {index}"]["timm_mfd"] |= counts | {"limit": least}
        print(
            f"  {'':<14} {counts['kernels']} kernels, {counts['bytes'] / 1e6:,.0f} MB "
            f"({counts['bytes'] / x.numel():.1f} bytes an element), {counts['operations'] / 1e9:,.1f} GFLOP; "
            f"limit {least * 1e3:.2f} ms, {least / results[f'stage {index}']['timm_mfd']['median']:.0%} of the time"
        )
    total = {name: sum(stage[name]["median"] for stage in results.values()) for name in next(iter(results.values()))}
    results["all stages"] = {
        name: {"median": value, "ratio": value / total["two bare products"]} for name, value in total.items()
    }
    ours = total["timm_mfd"]
    print(f"  all stages     straightforward / timm_mfd = {total['straightforward'] / ours:.2f}, ", end="")
    print(f"timm_mfd / two bare products = {ours / total['two bare products']:.3f}", end=", ")
    print(f"as convolutions = {ours / total['... as convolutions']:.3f}")
    return results


def measure_accuracy(args: Args, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Largest |r - r64| against float64 of the same inputs, and the error that max_samples makes."""
    results = {}
    for index, x in enumerate(resnet50_maps(args.batch_size, device, dtype)):
        exact = correlation(x.double(), Scope())
        shifted = (x.float() + 1000 * x.float().std()).contiguous(memory_format=torch.channels_last)
        bounded = correlation(x, Scope(max_samples=args.max_samples))
        results[f"stage {index}"] = row = {
            "as is": float((correlation(x, Scope()) - exact).abs().max()),
            "mean = 1000 std": float(
                (correlation(shifted, Scope()) - correlation(shifted.double(), Scope())).abs().max()
            ),
            "max_samples, max": float((bounded - exact).abs().max()),
            "max_samples, rms": float((bounded - exact).square().mean().sqrt()),
            "max_samples, mean |r|": float(bounded.abs().mean() - exact.abs().mean()),
        }
        print(f"  stage {index}  " + "  ".join(f"{name} {value:.1e}" for name, value in row.items()))
    return results


def build_task(
    name: str, mfd: timm_mfd.MFDLoss, device: torch.device, classes: int = 100, stem: str = "cifar"
) -> timm_mfd.MFDClassificationTask:
    """A task with a stem where the model has stems."""
    torch.manual_seed(0)
    arguments = {"stem": stem} if name in timm_mfd.list_models() else {}
    model = timm_mfd.create_model(name, num_classes=classes, **arguments).to(device, memory_format=torch.channels_last)
    return timm_mfd.MFDClassificationTask(model, None, mfd, device=device, verbose=False).train()


def training_step(
    task: timm_mfd.MFDClassificationTask, images: Tensor, labels: Tensor, dtype: torch.dtype
) -> Callable[[], None]:
    """One step of SGD."""
    optimizer = torch.optim.SGD(task.model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = task(images, labels)["loss"]
        loss.backward()
        optimizer.step()

    return step


def measure_step(args: Args, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A whole training step at 32 px with and without MFD."""
    results = {}
    images = torch.randn(args.batch_size, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 100, (args.batch_size,), device=device)
    variants = {
        "without MFD": timm_mfd.MFDLoss(0),
        "with MFD": timm_mfd.MFDLoss(1),
        f"max_samples {args.max_samples}": timm_mfd.MFDLoss(1, max_samples=args.max_samples),
    }
    for name in args.models:
        steps = {
            variant: training_step(build_task(name, mfd, device), images, labels, dtype)
            for variant, mfd in variants.items()
        }
        results[name] = time_side_by_side(steps, args.rounds, device)
        show(name, results[name])
    return results


def measure_memory(args: Args, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Bytes kept for the backward beside the input, and peak of the bytes made, as parts of the input's bytes."""
    results = {}
    totals: dict[str, int] = {}
    for index, x in enumerate(resnet50_maps(args.batch_size, device, dtype)):
        row = {}
        for name, loss in (("timm_mfd", timm_mfd.mfd_loss), ("straightforward", straightforward)):
            kept: dict[int, int] = {}
            leaf = x.detach().requires_grad_()

            def keep(tensor: Tensor, kept: dict[int, int] = kept, leaf: Tensor = leaf) -> Tensor:
                if tensor.untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr():
                    kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with (
                opened(),
                PeakMemory() as memory,
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            ):
                value = loss(leaf)
                value.backward()
            size = x.numel() * x.element_size()
            row[name] = {"kept": sum(kept.values()) / size, "peak": memory.peak / size}
            totals[name] = totals.get(name, 0) + sum(kept.values())
            totals["input"] = totals.get("input", 0) + (size if name == "timm_mfd" else 0)
        results[f"stage {index}"] = row
        print(
            f"  stage {index}  "
            + "   ".join(f"{n}: kept {v['kept']:.3f}, peak {v['peak']:.2f}" for n, v in row.items())
        )
    results["all stages"] = {name: totals[name] / totals["input"] for name in ("timm_mfd", "straightforward")}
    print("  all stages  " + "   ".join(f"{name}: kept {part:.3f}" for name, part in results["all stages"].items()))
    return results


def write_random_jpegs(root: Path, count: int = 4000) -> None:
    """An image folder of 10 classes."""
    rng = np.random.default_rng(0)
    for split, images in (("train", count), ("val", 100)):
        for i in range(images):
            path = root / split / f"class{i % 10}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            coarse.resize((32, 32), Image.Resampling.BICUBIC).save(path)  # about as smooth as photographs


def measure_pipeline(args: Args, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Images per second of mobilenetv2_100, baseline loss: train.py's pipeline against timm's with its own defaults."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(args.data_dir) if args.data_dir else Path(scratch) / "images"
        if args.data_dir is None:
            write_random_jpegs(root)
        data = load_dataset("folder", root)
        side, classes = data.image_size[0], data.num_classes
        steps = len(data.train) // args.batch_size

        started = time.perf_counter()
        resident = place(data, "resident", device, workers=2, cache_dir=scratch, quiet=True)
        decoding_seconds = time.perf_counter() - started
        ours = TrainLoader(resident, args.batch_size, seed=0, device=device)
        decoding = TrainLoader(data, args.batch_size, seed=0, device=device, workers=2)
        dataset = create_dataset("", root=str(root / "train"))
        theirs = create_loader(
            dataset,
            input_size=(3, side, side),
            batch_size=args.batch_size,
            is_training=True,
            device=device,
            num_workers=2,
        )
        # The same augmentation: timm's default is a random resized crop. Arrays are what its collate function takes.
        theirs.dataset.transform = transforms.Compose(
            [
                transforms.RandomCrop(side, padding=data.pad),
                transforms.RandomHorizontalFlip(),
                transforms.Lambda(lambda image: np.array(image).transpose(2, 0, 1)),
            ]
        )

        def run(batches: Any, channels_last: bool) -> Callable[[], None]:
            torch.manual_seed(0)
            model = timm.create_model("mobilenetv2_100", num_classes=classes).to(device)
            if channels_last:
                model = model.to(memory_format=torch.channels_last)
            task = timm_mfd.MFDClassificationTask(
                model, None, timm_mfd.MFDLoss(0), device=device, verbose=False
            ).train()

            def epoch() -> None:
                for images, labels in batches():
                    training_step(task, images, labels, dtype)()

            return epoch

        things = {
            "timm's loader": run(lambda: theirs, channels_last=False),
            "timm_mfd resident": run(lambda: ours.epoch(0), channels_last=True),
            "timm_mfd workers": run(lambda: decoding.epoch(0), channels_last=True),
        }
        timings = time_side_by_side(things, max(args.rounds // 2, 2), device, calls=1)
    for value in timings.values():
        value["images_per_second"] = steps * args.batch_size / value["median"]
    print(f"  decoding {len(data.train) + len(data.test):,} images once took {decoding_seconds:.1f} s")
    timings["decoding once"] = {"seconds": decoding_seconds}
    for name, value in list(timings.items())[:-1]:
        speed = timings["timm's loader"]["median"] / value["median"]
        print(f"  {name:<18} {value['images_per_second']:9,.0f} images/s   {speed:.2f} times timm's")
    return timings


def measure_growth(args: Args, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Forward and backward of one map when samples or channels grow, and of all maps with 1, 2 and 4 processes.

    Every process has the same number of images. On a CPU it has one thread: more processes than cores cannot be fast.
    """
    batch, channels, side = min(args.batch_size, 32), 256, 16
    cases = {
        "base": (batch, channels, side),
        "2 x samples": (2 * batch, channels, side),
        "4 x samples": (4 * batch, channels, side),
        "2 x channels": (batch, 2 * channels, side),
        "fewer samples than channels": (2, 2048, 4),
    }
    things = {}
    for name, (images, width, extent) in cases.items():
        x = torch.randn(images, width, extent, extent, device=device, dtype=dtype)
        things[name] = backward_of(timm_mfd.mfd_loss, x.contiguous(memory_format=torch.channels_last))
    results = time_side_by_side(things, args.rounds, device)
    show("growth", results)
    for processes in PROCESSES:
        if device.type == "cuda" and processes > torch.cuda.device_count():
            continue
        name = f"{processes} process" + "es" * (processes > 1)
        with tempfile.TemporaryDirectory() as scratch:
            arguments = processes, scratch, device.type, dtype, batch, args.rounds
            if processes == 1:
                measure_share(0, *arguments)
            else:
                torch.multiprocessing.spawn(measure_share, arguments, processes)
            results[name] = json.loads((Path(scratch) / "share.json").read_text(encoding="utf-8"))
        results[name]["ratio"] = results[name]["median"] / results["1 process"]["median"]
        show("growth", {name: results[name]})
        print(f"  {'':<14} {results[name]['bytes'] / 1e6:.1f} MB in {results[name]['collectives']} collectives")
    gradients = sum(p.numel() for p in timm_mfd.create_model("resnet50_mfd", num_classes=100).parameters()) * 4
    results["gradients of ResNet-50"] = {"bytes": gradients}
    print(f"  {'':<14} {gradients / 1e6:.0f} MB are the gradients of ResNet-50, which DDP sends")
    return results


def measure_share(
    rank: int, processes: int, folder: str, kind: str, dtype: torch.dtype, batch: int, rounds: int
) -> None:
    """Time five maps in one of several processes; the first one writes `share.json`."""
    device, threads = torch.device(kind, rank) if kind == "cuda" else torch.device(kind), torch.get_num_threads()
    if kind == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    if processes > 1:
        backend, meet = "nccl" if kind == "cuda" else "gloo", f"file://{folder}/meet"
        dist.init_process_group(backend, init_method=meet, rank=rank, world_size=processes)
    sent: list[int] = []
    reduce, mfd = dist.all_reduce, timm_mfd.MFDLoss()
    stages = [x.requires_grad_() for x in resnet50_maps(batch, device, dtype)]
    with mock.patch.object(dist, "all_reduce", lambda t, **kwargs: sent.append(t.nbytes) or reduce(t, **kwargs)):
        mfd(stages)
    counts = {"bytes": sum(sent), "collectives": len(sent)}
    share = time_side_by_side({"share": lambda: mfd(stages).loss.backward()}, rounds, device)["share"]
    if rank == 0:
        (Path(folder) / "share.json").write_text(json.dumps(share | counts), encoding="utf-8")
    if processes > 1:
        dist.destroy_process_group()
    torch.set_num_threads(threads)


@functools.cache
def measured_rates(rounds: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this device reaches: operations per second of a large product or convolution, bytes per second of a copy."""
    side, size = (8192, 2**28) if device.type == "cuda" else (2048, 2**26)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    maps = torch.randn(side // 16, 256, 16, 16, device=device, dtype=dtype)
    kernel = torch.randn(256, 256, 3, 3, device=device, dtype=dtype)
    maps, kernel = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (maps, kernel))
    source = torch.zeros(size, device=device)
    target = torch.empty_like(source)
    # On some CPUs, libraries for convolutions are faster than those for products.
    things = {"product": lambda: a @ b, "convolution": lambda: F.conv2d(maps, kernel, padding=1)}
    timings = time_side_by_side({**things, "copy": lambda: target.copy_(source)}, rounds, device)
    speeds = []
    for name, thing in things.items():
        with Operations() as operations:
            thing()
        speeds.append(operations.total / timings[name]["median"])
    return {"operations": max(speeds), "bytes": 2 * source.nbytes / timings["copy"]["median"]}


def measure_bounds(args: Args, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What bounds a training step at 64 px: the least time of each of its parts, in percent of the step.

    data: the loader alone. launch: the same step with 2 images, so what does not depend on the images. arithmetic and
    memory: operations and bytes of the uncompiled step at the rates of a large product or convolution, and of a copy.
    """
    side, classes = BOUNDS_SIDE, 200
    rates = measured_rates(args.rounds, device, dtype)
    print(f"  at most {rates['operations'] / 1e9:,.0f} GFLOP/s and {rates['bytes'] / 1e9:,.1f} GB/s")
    results: dict[str, Any] = {"rates": rates}
    pixels = torch.randint(0, 256, (8 * args.batch_size, side, side, 3), dtype=torch.uint8, device=device)
    noise = ArrayImages(pixels, torch.randint(0, classes, (len(pixels),)).tolist())
    data = ImageData("noise", noise, noise, tuple(map(str, range(classes))))
    loader = TrainLoader(data, args.batch_size, seed=0, device=device)
    images, labels = next(iter(loader.epoch(0)))
    images = images.contiguous(memory_format=torch.channels_last)
    for name in BOUNDS_MODELS:
        task = build_task(name, timm_mfd.MFDLoss(1), device, classes, paper_stem(name, side))
        step, small = (training_step(task, images[:n], labels[:n], dtype) for n in (args.batch_size, 2))
        counts = counts_of(step)
        compiled = build_task(name, timm_mfd.MFDLoss(1), device, classes, paper_stem(name, side))
        compiled.compile()
        things: dict[str, Callable[[], object]] = {
            "step": step,
            "2 images": small,
            "loader": lambda: list(loader.epoch(1)),
            "compiled": training_step(compiled, images, labels, dtype),
            "compiled, 2 images": training_step(compiled, images[:2], labels[:2], dtype),
        }
        # Else the second number of images would make the compiled step one for any number.
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
            timings = time_side_by_side(things, args.rounds, device)
        seconds = {thing: value["median"] for thing, value in timings.items()}
        results[name] = {}
        for variant, whole, fixed in (("eager", "step", "2 images"), ("compiled", "compiled", "compiled, 2 images")):
            least = {
                "data": seconds["loader"] / len(loader),
                "launch": seconds[fixed],
                "arithmetic": counts["operations"] / rates["operations"],
                "memory": counts["bytes"] / rates["bytes"],
            }
            speed = args.batch_size / seconds[whole]
            shares = {part: value / seconds[whole] for part, value in least.items()}
            results[name][variant] = {"images_per_second": speed, **counts, **shares}
            parts = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
            print(f"  {name:<20} {variant:<9} {speed:7,.0f} images/s   {parts}")
    return results


MEASUREMENTS: dict[str, Callable[[Args, torch.device, torch.dtype], dict[str, Any]]] = {
    "stages": measure_stages,
    "accuracy": measure_accuracy,
    "step": measure_step,
    "memory": measure_memory,
    "pipeline": measure_pipeline,
    "growth": measure_growth,
    "bounds": measure_bounds,
}

if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
