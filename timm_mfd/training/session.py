"""What happens between two training steps: they are seeded, guarded, saved, shown, and can be cut off after any."""

import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import checkpoint
from ..data import TrainLoader
from ..evaluation import Accuracy
from ..gathering import from_all_processes
from ..interruption import Agreement, Stopped, StopSignals
from ..launch import on_main_process, seed_step
from ..task import MFDClassificationTask
from ..tracking import Tracker
from .diagnosis import losses_text
from .guards import BadStep, LossGuard, all_finite
from .run import Run

CHECKPOINT_MINUTES = 5.0
SECONDS_PER_LINE = 60  # of a log: without a terminal there is no bar to show that a long epoch moves
_Item = TypeVar("_Item")


class Session:
    """The steps and epochs of a run, inside a `with` block, from where it stands to its last one.

    Everything random in a step is a function of (seed, epoch, step, rank), and so is its learning rate. So the tensors
    of task and optimizer, the position and the sums of the epoch are the whole state of a run. It is written every five
    minutes and at the end of every epoch, or as `checkpoint_minutes` says, and when a signal ends the run.

    Args:
        run: The run, begun.
        task: The task, compiled or not.
        net: What is called in its place: the task as the accelerator has prepared it.
        optimizer: Over the model's parameters.
        loader: Training batches.

    Attributes:
        epoch: Epochs that are finished.
        step: Steps that are finished in the epoch now running.
        metrics: One line per finished epoch.

    Example:
        >>> with Session(run, task, net, optimizer, loader) as session:
        ...     for epoch in session.epochs():
        ...         for images, labels in session.steps():
        ...             session.log(train_step(images, labels))
        ...         session.end_epoch(evaluate(model, session.interruptible(test_loader), 10))
    """

    def __init__(
        self,
        run: Run,
        task: MFDClassificationTask,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: TrainLoader,
    ):
        self.run, self.args, self.accelerator = run, run.args, run.accelerator
        self.task, self.net, self.optimizer, self.loader = task, net, optimizer, loader
        self.epoch = self.step = 0
        self.metrics: list[dict[str, Any]] = []
        # Of this process in this epoch: steps, then the sums over them of loss, criterion, MFD and MFD of each stage.
        # They stay on the device: reading a number every step would stall it.
        self._sums = torch.zeros(4 + len(run.stages), device=self.accelerator.device)
        self._seconds = 0.0
        self._saved_at = time.monotonic()
        self._is_saved = False  # after the newest step
        self._is_written = True  # or there was no space for it
        self._guard = LossGuard()
        self._agree = Agreement()
        self._is_settled = self.accelerator.num_processes == 1
        self._last: Tensor | None = None
        if run.resumed:
            self._take_up(run.resumed, run.tensors["sums"])
        self._stop = StopSignals()
        self._bar: tqdm[Any]
        self._tracker = Tracker(self.accelerator, self.args.tracker, run.folder.path, run.record["args"])

    def _take_up(self, saved: Mapping[str, Any], sums: Tensor) -> None:
        self.epoch, self.step = saved["epoch"], saved["step"]
        self.metrics, self._seconds = list(saved["metrics"]), saved["seconds"]
        self._sums.copy_(sums[self.accelerator.process_index])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        if self.accelerator.is_main_process:
            self._write_metrics()

    def __enter__(self) -> "Session":
        self._stop.__enter__()
        images, shown = self.loader.batch_size, self.accelerator.is_main_process
        self._bar = tqdm(
            total=self.args.epochs * len(self.loader) * images,
            initial=(self.epoch * len(self.loader) + self.step) * images,
            unit="img", unit_scale=True, smoothing=0.05, disable=None if shown else True,
        )  # fmt: skip
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self._bar.close()
        self._stop.__exit__(kind, error, traceback)
        if kind is None:
            self._tracker.end()

    def epochs(self) -> Iterator[int]:
        """Yield the number of each epoch that is left, from 0; `end_epoch` goes to the next."""
        while self.epoch < self.args.epochs:
            yield self.epoch

    def steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches that are left in the epoch, each with its own seed; between them the run is saved.

        Raises:
            Stopped: If a signal came; the state is saved before.
            FloatingPointError: If a loss, or a weight, is not finite. The checkpoint stays what it was.
        """
        self._shown = started = time.monotonic()
        seconds_before = self._seconds
        for images, labels in self.loader.epoch(self.epoch, self.step):
            if not self._is_settled:
                self._settle(images, labels)
            seed_step(self.args.seed, self.epoch, self.step, self.accelerator.process_index)
            if self.args.compile:  # imports the compiler
                torch.compiler.cudagraph_mark_step_begin()  # the results of the last step may be overwritten
            yield images, labels
            self.step += 1
            self._seconds = seconds_before + time.monotonic() - started
            self._show()
            self._save_or_stop()
        if self.epoch + 1 == self.args.epochs and not self._is_saved:  # so that the export can be repeated
            self._save()
        self._evaluation_began = time.monotonic()

    def parts(self, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the parts of a batch that `accumulate` asks for; processes exchange gradients after the last one."""
        count = self.args.accumulate
        for number, part in enumerate(zip(images.chunk(count), labels.chunk(count), strict=True), 1):
            with nullcontext() if number == count else self.accelerator.no_sync(self.net):
                yield part

    @property
    def position(self) -> float:
        """Epochs before the step, whole ones and the part of the one that it is in."""
        return self.epoch + self.step / len(self.loader)

    def log(self, out: Mapping[str, Tensor]) -> None:
        """Add what the task returned to the means of the epoch, and watch that it is finite."""
        loss, criterion, per_stage = out["loss"].detach(), out["criterion_loss"], out["mfd_per_stage"]
        self._guard.watch(self.step, loss, criterion, per_stage if self.args.mfd_weight else per_stage[:0])
        self._last = torch.cat([torch.stack([torch.ones_like(loss), loss, criterion, out["mfd_loss"]]), per_stage])
        self._sums += self._last

    def interruptible(self, batches: Iterable[_Item]) -> Iterator[_Item]:
        """Pass the batches of an evaluation on until a signal comes.

        If the end of the epoch is not saved, they all pass, and the signal is met in the next step, with all processes.

        Raises:
            Stopped: As soon as one came.
        """
        where = f"stopped while evaluating epoch {self.epoch + 1}; resume with --resume {self.run.folder}"
        return self._stop.watch(batches, where, self._is_written) if self._is_saved else iter(batches)

    def end_epoch(self, accuracy: Accuracy, correlations: list[float]) -> None:
        """Write and show the line of the epoch, and go to the next one.

        Args:
            accuracy: On held-out images.
            correlations: Mean |r| of each stage on held-out images, on the main process.
        """
        line = {"epoch": self.epoch + 1, "top1": accuracy.top1, "top5": accuracy.top5, **self._means()}
        if self.accelerator.is_main_process:  # of every run, so that those without MFD can be compared
            line["mean_abs_correlation"] = [round(r, 5) for r in correlations]
        line["seconds"] = round(self._seconds + time.monotonic() - self._evaluation_began, 1)
        self.metrics.append(line)
        self.epoch, self.step, self._seconds = self.epoch + 1, 0, 0.0
        self._sums.zero_()
        if self.accelerator.is_main_process:
            self._write_metrics()
            losses = losses_text(line["loss"], line["criterion_loss"], line["mfd_loss"], 4)
            tqdm.write(
                f"epoch {self.epoch:>3}/{self.args.epochs}  top-1 {accuracy.top1:6.2f}  top-5 {accuracy.top5:6.2f}  "
                f"{losses}  {line['images_per_second']:,.0f} images/s"
            )
        stages = zip(self.run.stages, line["mfd_per_stage"], strict=True)
        per_stage = {f"mfd_stage{stage}": value for stage, value in stages if value is not None}
        numbers = {key: value for key, value in line.items() if isinstance(value, float)}
        self._tracker.log(numbers | per_stage, step=self.epoch)

    def _means(self) -> dict[str, Any]:
        steps, *sums = self.accelerator.reduce(self._sums, "sum").tolist()
        loss, criterion, mfd, *per_stage = (value / steps for value in sums)
        return {
            "loss": loss,
            "criterion_loss": criterion,
            "mfd_loss": mfd,
            # NaN stands for "not computed" and has no place in JSON.
            "mfd_per_stage": per_stage if self.args.mfd_weight else [None] * len(per_stage),
            "lr": self.args.learning_rate(self.epoch),  # in its first step
            "images_per_second": round(len(self.loader) * self.loader.batch_size / self._seconds, 1),
            "seconds": self._seconds,
        }

    def _settle(self, images: Tensor, labels: Tensor) -> None:
        """Take a warm-up step, after which DDP rebuilds its gradient buckets.

        From three processes on the last bits of a sum depend on its place in a bucket. So that step must not be one of
        the run, which would differ with where it was resumed.
        """
        before = [(buffer, buffer.clone()) for buffer in self.task.buffers()]
        part = slice(len(images) // self.args.accumulate)  # of the size of every other one, where memory is short
        self.accelerator.backward(self.net(images[part], labels[part])["loss"])
        self.optimizer.zero_grad()
        for buffer, value in before:
            buffer.copy_(value)
        self._is_settled = True

    def _show(self) -> None:
        interval = SECONDS_PER_LINE if self._bar.disable else 0.5
        self._bar.update(self.loader.batch_size)
        if not self.accelerator.is_main_process or self._last is None or time.monotonic() - self._shown <= interval:
            return
        self._shown = time.monotonic()
        loss, criterion, mfd = self._last[1:4].tolist()
        losses = losses_text(loss, criterion, mfd, 3)
        if self._bar.disable:
            self._say(f"epoch {self.epoch + 1}, step {self.step:,} of {len(self.loader):,}, {losses}")
        else:
            self._bar.set_postfix_str(f"epoch {self.epoch + 1}, {losses}", refresh=False)

    def _save_or_stop(self) -> None:
        """After a step: all processes agree on what is to be done."""
        minutes, bad_step = self.args.checkpoint_minutes, self._guard.bad_step()
        is_due = time.monotonic() - self._saved_at >= 60 * (CHECKPOINT_MINUTES if minutes is None else minutes)
        if minutes is None:
            is_due |= self.step == len(self.loader)
        self._is_saved = False
        signum, due, failed = self._agree(
            [self._stop.received, int(is_due and self.accelerator.is_main_process), int(bad_step is not None)]
        )
        if failed:
            self._fail(bad_step, "a loss")
        if signum:
            self._save()
            kept = "" if self._is_written else ", with an older checkpoint"
            where = f"in epoch {self.epoch + 1} after step {self.step} of {len(self.loader)}"
            name = signal.Signals(signum).name
            raise Stopped(
                f"{name}: stopped {where}; resume with --resume {self.run.folder}{kept}", signum, self._is_written
            )
        if due:
            self._save()

    def _save(self) -> None:
        """Write the checkpoint; if that is not possible, the previous one stays, and a warning says why."""
        bad_step = self._guard.bad_step(wait=True)
        broken = bad_step is not None or not all_finite([*self.task.parameters(), *self.task.buffers()])
        if self._agree([int(broken)])[0]:
            self._fail(bad_step, "a weight")
        sums = self.accelerator.gather(self._sums[None])
        scaler, folder = self.accelerator.scaler, self.run.folder
        self._saved_at = time.monotonic()
        self._is_saved = self._is_written = True
        if self.accelerator.is_main_process:
            position = {"epoch": self.epoch, "step": self.step, "seconds": self._seconds, "metrics": self.metrics}
            record = self.run.record | position | {"optimizer": checkpoint.values_of(self.optimizer)}
            record["scaler"] = None if scaler is None else scaler.state_dict()
            tensors = checkpoint.tensors_of(self.task, self.optimizer) | {"sums": sums}
            try:
                checkpoint.write(folder.checkpoint, tensors, record)
            except OSError as error:
                self._is_written = False
                kept = "the previous one is kept" if folder.checkpoint.exists() else "there is none yet"
                self._say(f"warning: {error}; {kept}, and training goes on")

    def _fail(self, bad_step: BadStep | None, otherwise: str) -> NoReturn:
        """Raise an error that names what is not finite, a loss or something else; all processes call it."""
        bad_step = next((bad for bad in from_all_processes(bad_step) if bad is not None), None)
        on_main_process(partial(self._raise, bad_step, otherwise))
        raise AssertionError("unreachable")

    def _raise(self, bad_step: BadStep | None, otherwise: str) -> NoReturn:
        path, stages, images = self.run.folder.checkpoint, self.run.stages, self.loader.data.train
        kept = f"{path} keeps the last good state" if path.exists() else "there is no checkpoint yet"
        if bad_step is None:
            where = f"after step {self.step} of epoch {self.epoch + 1}"
            raise FloatingPointError(f"not finite {where}: {otherwise}; {kept}; try a lower --lr")
        batch = self.loader.batch_indices(self.epoch, bad_step.step)
        details = {
            "epoch": self.epoch + 1,
            "step": bad_step.step + 1,
            "criterion_loss": str(bad_step.criterion),
            "mfd_per_stage": dict(zip(map(str, stages), map(str, bad_step.per_stage), strict=False)),
            "image_indices": batch,
            "image_files": [images.paths[i] for i in batch] if images.paths else None,
        }
        with suppress(OSError):
            self.run.folder.write_bad_batch(details)
        raise FloatingPointError(
            f"not finite in step {bad_step.step + 1} of epoch {self.epoch + 1}: {bad_step.culprits(stages)}; the "
            f"images of the batch are in {self.run.folder.bad_batch}; {kept}; try a lower --lr"
        )

    def _write_metrics(self) -> None:
        try:
            self.run.folder.write_metrics(self.metrics)
        except OSError as error:
            self._say(f"warning: metrics.jsonl is not up to date: {error}")

    def _say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(message, file=sys.stderr)
