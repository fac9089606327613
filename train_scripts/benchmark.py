"""Measure what MFD and the pipeline cost, as ratios of things timed side by side in one run.

python train_scripts/benchmark.py                  # a CPU: minutes; the table of README
python train_scripts/benchmark.py --parts pipeline bounds                    # training as a whole
python train_scripts/benchmark.py --batch-size 512 --dtype bf16 --models resnet50_mfd mobilenetv2_100_mfd   # a GPU

Timings alternate between the things compared, so that a busy machine slows all of them; medians are over the rounds and
spreads are half the range between quartiles. On a GPU a timing is the mean of a loop of calls between two events.
"""

import _extra  # noqa: F401, before what it looks for

# isort: split

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
import tyro
from benchmark_mfd import count_on_gpu, measure_growth, measure_stages, measure_step
from benchmark_training import measure_bounds, measure_pipeline

from timm_mfd.launch import prepare_cpu

Part = Literal["stages", "step", "growth", "counts", "pipeline", "bounds"]


@dataclass(frozen=True)
class Args:
    """What to measure."""

    parts: tuple[Part, ...] = ("stages", "step", "growth", "counts")
    """Which measurements to make."""
    batch_size: int = 128
    """Images per batch."""
    models: tuple[str, ...] = ("resnet50_mfd",)
    """Backbones of the whole training step, with the paper's stem where they have stems."""
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


MEASUREMENTS: dict[Part, Callable[[Args, torch.device, torch.dtype], dict[str, Any]]] = {
    "stages": measure_stages,
    "step": measure_step,
    "growth": measure_growth,
    "counts": count_on_gpu,
    "pipeline": measure_pipeline,
    "bounds": measure_bounds,
}


def main(args: Args) -> None:
    """Run the chosen measurements, write them as one JSON file and print what README says of them."""
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
        print(f"\n{part}: {(MEASUREMENTS[part].__doc__ or '').splitlines()[0]}")
        results[part] = MEASUREMENTS[part](args, device, dtype)
    Path(args.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {args.output}")
    if set(get_args(Part)[:4]) <= set(results):
        print("\n| | |\n|---|---|\n" + "\n".join(f"| {what} | {value} |" for what, value in table(results).items()))


def table(results: dict[str, Any]) -> dict[str, str]:
    """Return the rows of README's "What it costs"."""
    stages, growth, counts = results["stages"]["all stages"], results["growth"], results["counts"]
    ours, name, bound = stages["timm_mfd"], results["args"]["models"][0], results["args"]["max_samples"]
    step = results["step"][f"{name}, 32 px"]
    processes = [key for key in growth if "process" in key]

    def in_all(key: str) -> str:
        return f"{ours['median'] / stages[key]['median']:.2f}"

    return {
        "MFD forward and backward, five stages: straightforward PyTorch / timm_mfd": (
            f"{stages['straightforward']['median'] / ours['median']:.1f}"
        ),
        "timm_mfd / the two bare products that it stands on (x^T x and x A): BLAS, convolutions": (
            f"{in_all('two bare products')}, {in_all('... as convolutions')}"
        ),
        f"whole training step of {name}, with MFD / without": f"{step['with MFD']['ratio']:.2f}",
        f"the same with `max_samples={bound}` (single r off by {results['stages']['error of max_samples']:.3f} rms)": (
            f"{step[f'max_samples {bound}']['ratio']:.2f}"
        ),
        "MFD of one map with samples x 2, samples x 4, channels x 2": ", ".join(
            f"{growth[key]['ratio']:.1f}" for key in ("2 x samples", "4 x samples", "2 x channels")
        ),
        f"{', '.join(key.split()[0] for key in processes)} processes, each with its own images": ", ".join(
            f"{growth[key]['ratio']:.1f}" for key in processes
        ),
        "sent by a process each step: MFD (upper triangles and means, one all-reduce) / gradients of ResNet-50 (DDP)": (
            f"{growth[processes[-1]]['bytes'] / 1e6:.0f} MB / {growth['gradients of ResNet-50']['bytes'] / 1e6:.0f} MB"
        ),
        **{
            f"on a GPU, five maps at 64 px, {kind}: bytes an element / operations of the two products / kernels": (
                f"{count['bytes']:.1f} / {count['operations']:.2f} / {count['kernels']}"
            )
            for kind, count in counts.items()
        },
    }


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
