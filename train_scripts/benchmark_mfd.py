"""What MFD costs: beside the straightforward way, in a training step, as maps and processes grow, and on a GPU."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timing import counts_of, measured_rates, show, time_side_by_side
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.grad import conv2d_weight

import timm_mfd
from timm_mfd.loss import correlation
from timm_mfd.loss.samples import Scope
from timm_mfd.models import paper_stem

PROCESSES = (1, 2, 4)
STEPS = {"cpu": [(32, False)], "cuda": [(32, False), (32, True), (64, False), (64, True)]}  # side, whether compiled
RESNET50_32_PX = ((64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4))  # with the cifar stem
RESNET50_64_PX = ((64, 64), *RESNET50_32_PX[1:])  # with the small one


def resnet50_maps(batch: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The stage outputs of ResNet-50 with the cifar stem at 32 px: rectified noise with common parts."""
    torch.manual_seed(0)
    maps = []
    for channels, side in RESNET50_32_PX:
        x = torch.randn(batch, channels, side, side) + 0.5 * torch.randn(batch, 1, side, side)
        maps.append(x.relu().to(device, dtype).contiguous(memory_format=torch.channels_last))
    return maps


def straightforward(x: Tensor) -> Tensor:
    """Eq. 5 as one writes it down: centre, normalise, multiply, and let autograd do the rest."""
    z = x.float().transpose(0, 1).flatten(1)
    z = z - z.mean(1, keepdim=True)
    z = z / (z.norm(dim=1, keepdim=True) + 1e-8)
    r = z @ z.T
    return (r - torch.diag(r.diagonal())).square().sum() / (len(r) * (len(r) - 1))


def backward_of(loss: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """A call that computes the loss of a map and its gradient."""
    leaf = x.detach().requires_grad_()

    def run() -> None:
        leaf.grad = None
        loss(leaf).backward()

    return run


def measure_stages(args: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """MFD forward and backward per stage, against the bare products, the straightforward way, and the device's limit.

    The limit: the time that operations or bytes, whichever take longer, need at the rates of `measured_rates`.
    """
    results, errors = {}, []
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
        whole, part = (correlation.correlation(x, Scope(max_samples=most)) for most in (None, args.max_samples))
        errors.append(float((part - whole).square().mean().sqrt()))
    total = {name: sum(stage[name]["median"] for stage in results.values()) for name in next(iter(results.values()))}
    results["all stages"] = {
        name: {"median": value, "ratio": value / total["two bare products"]} for name, value in total.items()
    }
    results["error of max_samples"] = max(errors)
    ours = total["timm_mfd"]
    print(f"  all stages     straightforward / timm_mfd = {total['straightforward'] / ours:.2f}, ", end="")
    print(f"timm_mfd / two bare products = {ours / total['two bare products']:.3f}", end=", ")
    print(f"as convolutions = {ours / total['... as convolutions']:.3f}")
    return results


def build_task(
    name: str, mfd: timm_mfd.MFDLoss, device: torch.device, side: int = 32, classes: int = 100
) -> timm_mfd.MFDClassificationTask:
    """A task whose model has the paper's stem for images of a side, where it has stems."""
    torch.manual_seed(0)
    arguments = {"stem": paper_stem(name, side)} if name in timm_mfd.list_models() else {}
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


def measure_step(args: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A whole training step with and without MFD: at 32 px, on a GPU at 64 px and compiled, too."""
    results = {}
    variants = {
        "without MFD": timm_mfd.MFDLoss(0),
        "with MFD": timm_mfd.MFDLoss(1),
        f"max_samples {args.max_samples}": timm_mfd.MFDLoss(1, max_samples=args.max_samples),
    }
    labels = torch.randint(0, 100, (args.batch_size,), device=device)
    for name in args.models:
        for side, compiled in STEPS[device.type]:
            images = torch.randn(args.batch_size, 3, side, side, device=device)
            images = images.contiguous(memory_format=torch.channels_last)
            tasks = {variant: build_task(name, mfd, device, side) for variant, mfd in variants.items()}
            if compiled:
                for task in tasks.values():
                    task.compile()
            steps = {variant: training_step(task, images, labels, dtype) for variant, task in tasks.items()}
            title = f"{name}, {side} px" + ", compiled" * compiled
            print(f"  {title}")
            results[title] = time_side_by_side(steps, args.rounds, device)
            show("", results[title])
    return results


def measure_growth(args: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Forward and backward of one map when samples or channels grow, and of five maps with 1, 2 and 4 processes.

    Every process has the same number of images. On a CPU it has one thread: more processes than cores cannot be fast.
    """
    batch, channels, side = min(args.batch_size, 32), 256, 16
    cases = {
        "base": (batch, channels, side),
        "2 x samples": (2 * batch, channels, side),
        "4 x samples": (4 * batch, channels, side),
        "2 x channels": (batch, 2 * channels, side),
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


def count_on_gpu(args: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What a GPU does for five maps of ResNet-50 at 64 px, forward and backward: counted, so no GPU is needed.

    Bytes are for an element of the maps, operations in units of those of the two bare products.
    """
    results = {}
    for kind in (torch.bfloat16, torch.float32):
        with FakeTensorMode(), torch.no_grad():
            stages = [
                torch.empty(128, c, side, side, dtype=kind, device="cuda").to(memory_format=torch.channels_last)
                for c, side in RESNET50_64_PX
            ]

            def step(stages: list[Tensor] = stages) -> None:
                losses, *kept = correlation.loss_forward(stages, *Scope())
                correlation.loss_backward(torch.empty_like(losses), stages, kept, range(len(stages)), *Scope())

            counts = counts_of(step)
        name = str(kind).removeprefix("torch.")
        results[name] = {
            "kernels": counts["kernels"],
            "bytes": counts["bytes"] / sum(x.numel() for x in stages),
            "operations": counts["operations"] / sum(4 * x.numel() * x.shape[1] for x in stages),
        }
        print(f"  {name:<10} " + ", ".join(f"{value:.3g} {what}" for what, value in results[name].items()))
    return results
