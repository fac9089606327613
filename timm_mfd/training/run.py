"""A run from what was asked for to its folder: new or resumed, what it says before the first step, and its export."""

import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn

from .. import checkpoint
from ..arguments import Args
from ..data import EvalLoader, ImageData, TrainLoader
from ..errors import first_words
from ..evaluation import Accuracy
from ..hub import save_pretrained
from ..launch import on_main_process
from ..loss.samples import Scope, effective_samples
from ..redundancy import CORRELATION_IMAGES, mean_abs_correlation
from ..sources import data_name
from ..stages import StageInfo
from ..task import MFDClassificationTask
from .diagnosis import (
    average_warnings,
    correlation_table,
    few_steps,
    sample_warnings,
    stage_table,
    token_warnings,
    verdicts,
)
from .environment import environment
from .resume import changes, check_arguments, check_same
from .run_folder import RunFolder


class Run:
    """What was asked for, what is resumed, and where it is kept; `Session` takes its steps.

    Args:
        args: Arguments of the run.
        data: Its data set.
        accelerator: Its processes.

    Attributes:
        folder: Where the run writes; a new run has it from `begin` on.
        record: What every checkpoint holds beside the state.
        resumed: What the checkpoint holds that is resumed; None for a new run.
        tensors: Tensors of that checkpoint, from `restore` on.
        is_finished: Whether there is nothing left to do.
        stages: Index of each stage that MFD sees, from `begin` on.

    Raises:
        ValueError: If the run cannot be resumed as it was begun.
        FileExistsError: If another process writes into it.
    """

    folder: RunFolder

    def __init__(self, args: Args, data: ImageData, accelerator: Accelerator):
        self.args, self.data, self.accelerator = args, data, accelerator
        self.record: dict[str, Any] = {
            "args": asdict(args),
            "environment": environment(accelerator.device, accelerator.num_processes),
            "data": data.identity(),
        }
        self.resumed: dict[str, Any] | None = None
        self.tensors: Mapping[str, Tensor] = {}
        self.is_finished = False
        self.stages: list[int] = []
        find = partial(RunFolder.to_resume, args.resume or "", args.output_dir, args.name)
        self._source = on_main_process(find) if args.resume else None
        if self._source:
            self._resume(self._source)

    def _resume(self, source: RunFolder) -> None:
        here = self._is_resumed_in_place
        if here:
            self.folder = source
            on_main_process(source.lock)
        if not source.checkpoint.is_file():
            if not here or self.args.epochs > len(source.metrics):
                raise ValueError(f"{source} is finished, and --slim deleted its state; train it anew without --slim")
            self.is_finished = True
            return
        self.resumed = saved = checkpoint.read_record(source.checkpoint)
        check_arguments(self.args, saved["args"], saved["epoch"] + 1)
        differs = check_same(self.record["environment"], self.record["data"], saved)
        if differs:
            self._say(f"warning: the last bits may differ from a run without interruption: {differs}")
        changed = changes(asdict(self.args), saved["args"], {"output_dir", "resume"})
        if changed:
            self._say(f"note: {', '.join(changed.values())}")
        if here and source.is_finished:
            if self.args.epochs > len(saved["metrics"]) + 1:
                raise ValueError(f"{source} is finished; to train on for more epochs, choose a new --output-dir")
            self.is_finished = True

    @property
    def _is_resumed_in_place(self) -> bool:
        chosen, source = self.args.output_dir, self._source
        return source is not None and (chosen is None or Path(chosen).resolve() == source.path.resolve())

    def restore(self, task: MFDClassificationTask, optimizer: torch.optim.Optimizer) -> None:
        """Put weights, averages and momentum back as they were; a new run has none.

        Raises:
            ValueError: If the checkpoint is damaged, or of another model.
        """
        if self._source and self.resumed:
            self.tensors = checkpoint.read(self._source.checkpoint).tensors
            checkpoint.restore(task, optimizer, self.tensors, self.resumed.get("optimizer"))

    def begin(
        self,
        task: MFDClassificationTask,
        shapes: Sequence[tuple[StageInfo, torch.Size]],
        loader: TrainLoader,
        preprocessing: str = "",
    ) -> None:
        """Measure the stages before training, take the folder, and say what is going to be done.

        Args:
            task: The task, not compiled yet.
            shapes: What `stage_shapes` returns.
            loader: Training batches; its data set is on the device.
            preprocessing: In words, what of it was taken from the model.

        Raises:
            OSError: If the folder cannot be made, or holds another run.
        """
        args, processes = self.args, self.accelerator.num_processes
        self.data, self.stages = loader.data, [stage.index for stage, _ in shapes]
        if self.accelerator.is_main_process:
            self.record["before"] = self.resumed["before"] if self.resumed else self.correlations(task.model)
        self._content = self.record["args"] | {"environment": self.record["environment"]}
        if self._is_resumed_in_place:
            on_main_process(partial(self.folder.note_changes, self._content))
        else:
            create = partial(RunFolder.create, args.output_dir, args.name, self._content, bool(args.resume))
            self.folder = on_main_process(create)

        scope, share = Scope(args.mfd_center, args.mfd_max_samples), args.batch_size // (processes * args.accumulate)
        self.samples = [effective_samples((share, *shape[1:]), scope, processes) for _, shape in shapes]
        self._steps = args.epochs * len(loader)
        sizes = [(shape[2], shape[3]) for _, shape in shapes]
        self.warnings = self._warnings([stage for stage, _ in shapes], sizes, task)
        self._device = f"{processes} x {self.record['environment']['device']}, {torch.get_num_threads()} CPU threads"
        self._device += f", precision {args.mixed_precision}"
        data, name = self.data, data_name(args.dataset, args.data_dir)
        self._say(f"{args.model} on {name} ({len(data.train):,} training, {len(data.test):,} held-out images)")
        for words in (data.source and f"read from the {data.source}", preprocessing):
            if words:
                self._say(words)
        self._say(f"{self._device}; {args.criterion}, MFD weight {args.mfd_weight:g}; writing to {self.folder}")
        if self.resumed:
            position = f"epoch {self.resumed['epoch'] + 1}, step {self.resumed['step']} of {len(loader)}"
            self._say(f"resuming {self._source} after {position}")
        self._say(f"\n{stage_table([stage for stage, _ in shapes], sizes, self.samples)}")
        self._say("".join(f"warning: {warning}\n" for warning in self.warnings))

    def _warnings(
        self, stages: Sequence[StageInfo], sizes: Sequence[tuple[int, int]], task: MFDClassificationTask
    ) -> list[str]:
        found = sample_warnings(stages, self.samples) if self.args.mfd_weight else []
        found += average_warnings(self.args.ema_decay, self._steps)
        found += token_warnings(sizes, self.args.image_size)
        if self.args.opt not in ("paper", "sgd", "momentum", "nesterov") and self.args.lr == Args.lr:
            found.append(f"--lr {self.args.lr:g} is the default, for SGD; --opt {self.args.opt} may want another one")
        if self.accelerator.device.type == "cpu" and self.args.mixed_precision == "bf16":
            # oneDNN leaves the kernel positions that see only padding unwritten (torch 2.15).
            found.append("bf16 on a CPU has wrong gradients for 3x3 convolutions of stride 2 on 1x1 maps")
        needed, free = checkpoint.disk_space(task), shutil.disk_usage(self.folder.path).free
        if free < needed:
            found.append(f"the run needs about {needed >> 20:,} MiB in {self.folder}, {free >> 20:,} MiB are free")
        return found

    def correlations(self, model: nn.Module) -> list[float]:
        """Return mean |r| of each stage on held-out images, as in Tables I and III."""
        device, workers = self.accelerator.device, self.args.workers
        loader = EvalLoader(self.data, 128, device=device, workers=workers, limit=CORRELATION_IMAGES)
        return mean_abs_correlation(model, (images for images, _ in loader), self.args.stages)

    def finish(self, metrics: Sequence[Mapping[str, Any]], model: nn.Module, accuracy: Accuracy) -> None:
        """Write the model, the curves and, last, the summary, by which a run is known to be finished.

        Args:
            metrics: One line per epoch.
            model: What was evaluated after the last one.
            accuracy: What came of it.

        Raises:
            OSError: If it cannot be written; resumed, the run writes it once more.
        """
        args, data, folder = self.args, self.data, self.folder
        reason = " ".join(average_warnings(args.ema_decay, self._steps)) or few_steps(self._steps)
        losses = [line["criterion_loss"] for line in metrics]
        failures = verdicts(losses, accuracy.answers, data.test.labels, accuracy.top1, data.class_names, reason)
        before, after = self.record["before"], self.correlations(model)
        summary = {
            "top1": accuracy.top1,
            "top5": accuracy.top5,
            "count": accuracy.images,
            "split": data.test_split,
            "data": self.record["data"],
            "stages": self.stages,
            "mean_abs_correlation": {"before": before, "after": after},
            "samples": self.samples,
            "noise_floor": [1 / max(n - 1, 1) for n in self.samples],
            "warnings": [*self.warnings, *failures],
            "seconds": round(sum(line["seconds"] for line in metrics), 1),  # also before it was resumed
            "images_per_second": statistics.median(line["images_per_second"] for line in metrics),
            "device": self._device,
        }
        try:
            self._export(model, summary)
            self._draw(metrics)
            folder.write_summary(summary)
        except (OSError, SafetensorError) as error:
            raise OSError(f"cannot write the model: {error}; once it can be, --resume {folder}") from None
        if args.slim:
            folder.checkpoint.unlink(missing_ok=True)
        self._say("\n" + correlation_table(self.stages, before, after, min(CORRELATION_IMAGES, accuracy.images)))
        self._say(f"\ntop-1 {accuracy.top1:.2f} %, top-5 {accuracy.top5:.2f} %, {accuracy.images:,} images")
        for warning in failures:
            self._say(f"warning: {warning}")
        self._say(f"{summary['seconds']:.0f} seconds of training and evaluation; the model is in {folder.model}\n")
        package = "timm_mfd" if getattr(model, "pruned", False) else "timm"
        self._say("import timm\nimport timm_mfd")
        self._say(f'model = {package}.create_model("local-dir:{folder.model}", pretrained=True).eval()')

    def _export(self, model: nn.Module, summary: Mapping[str, Any]) -> None:
        data, new = self.data, self.folder.model.with_name("model.partial")
        shutil.rmtree(new, ignore_errors=True)
        save_pretrained(
            model, new, label_names=data.class_names, mean=data.mean, std=data.std, image_size=data.image_size,
            crop_pct=data.crop_pct,
            run={"args": self._content, "summary": summary},
        )  # fmt: skip
        self.folder.put_model(new)

    def _draw(self, metrics: Sequence[Mapping[str, Any]]) -> None:
        args = self.args
        name = data_name(args.dataset, args.data_dir)
        title = f"{args.model} on {name}, {args.criterion}, MFD weight {args.mfd_weight:g}, seed {args.seed}"
        try:
            from ..figures import training_curves  # here: no run ends for want of a picture

            training_curves(metrics, self.folder.curves, title, self.stages)
        except Exception as error:
            print(f"warning: curves.png is not drawn: {first_words(error)}", file=sys.stderr)  # noqa: T201

    def _say(self, words: str) -> None:
        self.accelerator.print(words)
