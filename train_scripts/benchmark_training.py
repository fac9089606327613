"""What bounds training as a whole: the data pipeline, and the parts of a step."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from benchmark_mfd import build_task, training_step
from PIL import Image
from timing import counts_of, measured_rates, time_side_by_side
from timm.data import create_dataset, create_loader
from torchvision import transforms

import timm_mfd
from timm_mfd.data import ArrayImages, ImageData, TrainLoader, load_dataset, place

BOUNDS_MODELS = ("mobilenetv2_100_mfd", "resnet50_mfd")  # of the paper's rows that begin with Tiny ImageNet
BOUNDS_SIDE = 64


def write_random_jpegs(root: Path, count: int = 4000) -> None:
    """An image folder of 10 classes."""
    rng = np.random.default_rng(0)
    for split, images in (("train", count), ("val", 100)):
        for i in range(images):
            path = root / split / f"class{i % 10}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            coarse.resize((32, 32), Image.Resampling.BICUBIC).save(path)  # about as smooth as photographs


def measure_pipeline(args: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
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


def measure_bounds(args: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
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
        task = build_task(name, timm_mfd.MFDLoss(1), device, side, classes)
        step, small = (training_step(task, images[:n], labels[:n], dtype) for n in (args.batch_size, 2))
        counts = counts_of(step)
        compiled = build_task(name, timm_mfd.MFDLoss(1), device, side, classes)
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
