"""The device and the processes of a run, as its arguments want them."""

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from ..arguments import Args
from ..errors import named
from ..launch import forget_foreign_settings, prepare_cpu, use_deterministic_kernels


def start(args: Args) -> Accelerator:
    """Return the accelerator of a run; what the device cannot do is refused.

    Args:
        args: Arguments of the run.

    Raises:
        ValueError: Naming the flag, its value and the remedy.
    """
    if args.deterministic:
        use_deterministic_kernels()
    foreign = forget_foreign_settings()
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
    if accelerator.device.type == "cpu":
        prepare_cpu()
        if args.mixed_precision == "fp16":
            raise ValueError("--mixed-precision fp16 needs a GPU; on a CPU choose bf16 or no")
    if args.compile:
        with named("--compile does not work on this machine (install what it lacks, or leave it out)"):
            torch.compile(torch.sin)(torch.ones(2, device=accelerator.device))
    processes = accelerator.num_processes
    if args.batch_size < 2 * processes * args.accumulate:
        parts = f" in each of {args.accumulate} parts (--accumulate)" if args.accumulate > 1 else ""
        raise ValueError(
            f"--batch-size {args.batch_size} leaves fewer than 2 images to each of {processes} processes{parts}; "
            "choose a larger one"
        )
    if args.batch_size % (processes * args.accumulate):
        factors = f"{processes} processes" + f" x --accumulate {args.accumulate}" * (args.accumulate > 1)
        least = processes * args.accumulate
        nearest = args.batch_size // least * least
        raise ValueError(
            f"--batch-size {args.batch_size} must be a multiple of {factors}; choose {nearest} or {nearest + least}"
        )
    if (args.mixup or args.cutmix) and args.batch_size // processes % 2:
        raise ValueError(f"--batch-size {args.batch_size} must give each process an even number of images to mix")
    return accelerator
