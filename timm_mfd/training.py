"""Training steps that can be cut off anywhere: guarded, saved and resumed between any two of them."""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from . import checkpoint
from .arguments import Args
from .data import TrainLoader
from .guards import BadStep, LossGuard, all_finite
from .interruption import Agreement, Stopped, StopSignals
from .launch import on_main_process, seed_step
from .run_dir import CHECKPOINT, to_json, write_text
from .tables import losses_text
from .task import MFDClassificationTask

if TYPE_CHECKING:
    from accelerate import Accelerator

SKIPS_IN_A_ROW = 10  # batches that `nan="skip"` leaves out before it gives up
SECONDS_PER_LINE = 60  # of a log: without a terminal there is no bar to show that a long epoch moves


class Training:
    """A run and where it is.

    Everything random in a step is a function of (seed, epoch, step, process), and so is its learning rate. So the
    tensors of task and optimizer, the position and the sums of the epoch are the whole state of a run.

    Args:
        args: Arguments of the run.
        accelerator: What `task` and `optimizer` are prepared by.
        task: The task, compiled or not.
        optimizer: Over the model's parameters.
        loader: Training batches.
        stages: Index of each stage that the task constrains.
        folder: The run folder.
        record: What every checkpoint holds beside the state.
        context: Makes the context that a step runs in.

    Attributes:
        epoch: Epochs that are finished.
        step: Steps that are finished in the epoch now running.
        metrics: One line per finished epoch.
        is_saved: Whether the newest checkpoint could be written.
    """

    def __init__(
        self,
        args: Args,
        accelerator: "Accelerator",
        task: MFDClassificationTask,
        optimizer: torch.optim.Optimizer,
        loader: TrainLoader,
        *,
        stages: Sequence[int],
        folder: Path,
        record: dict[str, Any],
        context: Callable[[], AbstractContextManager[Any]],
    ):
        self.args = args
        self.accelerator = accelerator
        self.task = task
        self.optimizer = optimizer
        self.loader = loader
        self.stages = list(stages)
        self.folder = folder
        self.record = record
        self.context = context
        self.epoch = 0
        self.step = 0
        self.metrics: list[dict[str, Any]] = []
        self.is_saved = True
        # Of this process in this epoch: steps, then the sums over them of loss, criterion, MFD and MFD of each stage.
        # They stay on the device: reading a number every step would stall it.
        self._sums = torch.zeros(4 + len(self.stages), device=accelerator.device)
        self._seconds = 0.0
        self._saved_at = time.monotonic()
        self._guard = LossGuard()
        self._agree = Agreement()
        self._is_settled = accelerator.num_processes == 1
        self._wrapped_task, self._wrapped_optimizer = accelerator.prepare(task, optimizer)

    def go_on(self, saved: checkpoint.Checkpoint) -> None:
        """Take up the position of a checkpoint; its tensors are back in place already."""
        self.epoch, self.step = saved.record["epoch"], saved.record["step"]
        self.metrics, self._seconds = list(saved.record["metrics"]), saved.record["seconds"]
        self._sums.copy_(saved.tensors["sums"][self.accelerator.process_index])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved.record["scaler"])
        if self.accelerator.is_main_process:
            self._write_metrics()

    def train_epoch(self, stop: StopSignals, bar: "tqdm[Any]") -> dict[str, Any]:
        """Take the remaining steps of the epoch, and save the state after the last one.

        Args:
            stop: Tells when to leave; the state is saved before.
            bar: Moved by the images of each step.

        Returns:
            Mean losses over steps and processes, learning rate, time and images per second.

        Raises:
            Stopped: If a signal came.
            FloatingPointError: If a loss, or a weight, is not finite. The checkpoint stays what it was.
        """
        args, main_process = self.args, self.accelerator.is_main_process
        for group in self.optimizer.param_groups:
            group["lr"] = args.learning_rate(self.epoch)
        self._wrapped_task.train()
        started = shown = time.monotonic()
        seconds_before, skipped_in_a_row = self._seconds, 0
        for images, labels in self.loader.epoch(self.epoch, self.step):
            if not self._is_settled:
                self._settle(images, labels)
            parts, bad = self._forward_and_backward(images, labels)
            if bad:
                skipped_in_a_row += 1
                self._say(
                    f"left out step {self.step + 1} of epoch {self.epoch + 1}: its loss or gradient is not finite"
                )
            else:
                skipped_in_a_row = 0
                self._wrapped_optimizer.step()
                self.task.update_ema()
                self._sums += parts
            self._wrapped_optimizer.zero_grad()
            self.step += 1
            self._seconds = seconds_before + time.monotonic() - started
            bar.update(self.loader.batch_size)
            if main_process and time.monotonic() - shown > (SECONDS_PER_LINE if bar.disable else 0.5):
                shown = time.monotonic()
                loss, criterion, mfd = parts[1:4].tolist()
                losses = losses_text(loss, criterion, mfd, 3)
                if bar.disable:
                    self._say(f"epoch {self.epoch + 1}, step {self.step:,} of {len(self.loader):,}, {losses}")
                else:
                    bar.set_postfix_str(f"epoch {self.epoch + 1}, {losses}", refresh=False)

            bad_step = self._guard.bad_step()
            is_due = main_process and time.monotonic() - self._saved_at >= 60 * args.checkpoint_minutes
            is_due &= self.step < len(self.loader)  # after the last step it is written anyway
            signum, due, failed = self._agree([stop.received, int(is_due), int(bad_step is not None)])
            if failed or skipped_in_a_row == SKIPS_IN_A_ROW:
                self._fail(bad_step, f"the loss or gradient of {SKIPS_IN_A_ROW} steps in a row")
            if signum:
                self._stop(signum)
            if due:
                self.save()
        self.save()
        return self._means()

    def finish_epoch(self, line: dict[str, Any]) -> None:
        """Add the epoch's line to `metrics.jsonl` and go to the start of the next epoch."""
        self.metrics.append(line)
        self.epoch, self.step, self._seconds = self.epoch + 1, 0, 0.0
        self._sums.zero_()
        if self.accelerator.is_main_process:
            self._write_metrics()

    def save(self) -> bool:
        """Write the checkpoint; all processes call it.

        Returns:
            Whether it was written. If not, the previous one is still there and a warning says why.

        Raises:
            FloatingPointError: If the newest loss, or a weight, is not finite.
        """
        bad_step = self._guard.bad_step(wait=True)
        broken = bad_step is not None or not all_finite([*self.task.parameters(), *self.task.buffers()])
        if self._agree([int(broken)])[0]:
            self._fail(bad_step, "a weight")
        sums = self.accelerator.gather(self._sums[None])
        scaler = self.accelerator.scaler
        written = True
        if self.accelerator.is_main_process:
            position = {"epoch": self.epoch, "step": self.step, "seconds": self._seconds, "metrics": self.metrics}
            record = self.record | position | {"scaler": None if scaler is None else scaler.state_dict()}
            tensors = checkpoint.tensors_of(self.task, self.optimizer) | {"sums": sums}
            try:
                checkpoint.write(self.folder / CHECKPOINT, tensors, record)
            except OSError as error:
                written = False
                kept = "the previous one is kept" if (self.folder / CHECKPOINT).exists() else "there is none yet"
                self._say(f"warning: {error}; {kept}, and training goes on")
        self._saved_at, self.is_saved = time.monotonic(), written
        return written

    def _settle(self, images: Tensor, labels: Tensor) -> None:
        """Take a step that does not count.

        After its first backward DDP arranges the gradients in other buckets, and from three processes on the last bits
        of a sum depend on its place in a bucket. So that backward must not be one of the run, which would differ with
        where it was resumed.
        """
        before = [(buffer, buffer.clone()) for buffer in self.task.buffers()]
        with self.context():
            loss = self._wrapped_task(images, labels)["loss"]
        self.accelerator.backward(loss)
        self._wrapped_optimizer.zero_grad()
        for buffer, value in before:
            buffer.copy_(value)
        self._is_settled = True

    def _forward_and_backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, bool]:
        """Compute the gradients of a step; return what it adds to the sums, and whether to leave it out."""
        args, skip = self.args, self.args.nan == "skip"
        seed_step(args.seed, self.epoch, self.step, self.accelerator.process_index)
        buffers = [(buffer, buffer.clone()) for buffer in self.task.buffers()] if skip else []
        torch.compiler.cudagraph_mark_step_begin()  # what the graphs of the last step returned may be overwritten
        with self.context():
            out = self._wrapped_task(images, labels)
        loss, criterion, per_stage = out["loss"].detach(), out["criterion_loss"], out["mfd_per_stage"]
        self._guard.watch(self.step, loss, criterion, per_stage if args.mfd_weight else per_stage[:0])
        self.accelerator.backward(out["loss"])
        parts = torch.cat([torch.stack([torch.ones_like(loss), loss, criterion, out["mfd_loss"]]), per_stage])
        if not skip:
            return parts, False
        bad = self._guard.bad_step(wait=True) is not None
        if self.accelerator.scaler is None:  # which has its own way with gradients that are not finite
            bad |= not all_finite([p.grad for p in self.task.parameters() if p.grad is not None])
        bad = bool(self._agree([int(bad)])[0])
        if bad:
            for buffer, before in buffers:  # batch norms have seen the batch
                buffer.copy_(before)
        return parts, bad

    def _means(self) -> dict[str, Any]:
        steps, *sums = self.accelerator.reduce(self._sums, "sum").tolist()
        if steps == 0:
            self._fail(None, "the loss or gradient of every step")
        loss, criterion, mfd, *per_stage = (value / steps for value in sums)
        return {
            "loss": loss,
            "criterion_loss": criterion,
            "mfd_loss": mfd,
            # NaN stands for "not computed" and has no place in JSON.
            "mfd_per_stage": per_stage if self.args.mfd_weight else [None] * len(per_stage),
            "lr": self.args.learning_rate(self.epoch),
            "images_per_second": round(len(self.loader) * self.loader.batch_size / self._seconds, 1),
            "seconds": self._seconds,
            "skipped_steps": self.step - round(steps / self.accelerator.num_processes),
        }

    def _stop(self, signum: int) -> NoReturn:
        where = f"in epoch {self.epoch + 1} after step {self.step} of {len(self.loader)}"
        saved = self.save()
        kept = "" if saved else ", with an older checkpoint"
        name = signal.Signals(signum).name
        raise Stopped(f"{name}: stopped {where}; go on with --resume {self.folder}{kept}", signum, saved)

    def _fail(self, bad_step: BadStep | None, otherwise: str) -> NoReturn:
        """Raise an error that names what is not finite, a loss or something else; all processes call it."""
        found: list[BadStep | None] = [bad_step]
        if self.accelerator.num_processes > 1:
            found = [None] * self.accelerator.num_processes
            dist.all_gather_object(found, bad_step)
        bad_step = next((bad for bad in found if bad is not None), None)
        on_main_process(partial(self._raise, bad_step, otherwise))
        raise AssertionError("unreachable")

    def _raise(self, bad_step: BadStep | None, otherwise: str) -> NoReturn:
        path = self.folder / CHECKPOINT
        kept = f"{path} keeps the last good state" if path.exists() else "there is no checkpoint yet"
        advice = "try a lower --lr" + (", or --nan skip" if self.args.nan == "stop" else "")
        if bad_step is None:
            where = f"after step {self.step} of epoch {self.epoch + 1}"
            raise FloatingPointError(f"not finite {where}: {otherwise}; {kept}; {advice}")
        images = self.loader.batch_indices(self.epoch, bad_step.step)
        details = {
            "epoch": self.epoch + 1,
            "step": bad_step.step + 1,
            "criterion_loss": str(bad_step.criterion),
            "mfd_per_stage": dict(zip(map(str, self.stages), map(str, bad_step.per_stage), strict=False)),
            "image_indices": images,
            "image_files": [self.loader.data.train.paths[i] for i in images] if self.loader.data.train.paths else None,
        }
        with suppress(OSError):
            write_text(self.folder / "nonfinite.json", to_json(details, indent=None))
        raise FloatingPointError(
            f"not finite in step {bad_step.step + 1} of epoch {self.epoch + 1}: {bad_step.culprits(self.stages)}; the "
            f"images of the batch are in {self.folder / 'nonfinite.json'}; {kept}; {advice}"
        )

    def _write_metrics(self) -> None:
        try:
            write_text(self.folder / "metrics.jsonl", "".join(to_json(line, indent=None) for line in self.metrics))
        except OSError as error:
            self._say(f"warning: metrics.jsonl is not up to date: {error}")

    def _say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(message, file=sys.stderr)
