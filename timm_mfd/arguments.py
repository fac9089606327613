"""The arguments of a training run: their defaults, what is refused, and what a resumed run has to keep."""

import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from .criteria import CriterionName
from .run_dir import changes
from .sources import data_name

# What has no part in the result: a resumed run may choose it anew.
FREE = frozenset(
    ("output_dir", "resume", "data_dir", "loader", "cache_dir", "workers", "tracker", "nan", "checkpoint_minutes")
)


@dataclass(frozen=True)
class Args:
    """Arguments of a run; the defaults for the optimizer are the paper's."""

    recipe: str | None = None
    """A run of the paper, such as resnet50/cifar100/softmax+mfd, or with another protocol .../softmax+mfd@strong: sets
    what follows, except what is given beside it. train_scripts/reproduce.py list names all."""
    model: str = "resnet18_mfd"
    """Any name of timm or timm_mfd, a run folder or the folder of a saved model, or hf-hub:ORG/NAME."""
    pretrained: bool = False
    """Start from the model's pretrained weights."""
    stem: Literal["auto", "imagenet", "small", "cifar"] = "auto"
    """First layers of an *_mfd model; auto is the paper's choice for the model and the size of the images."""
    dataset: str = "digits"
    """digits, cifar10, cifar100, tiny_imagenet, facescrub, folder (train/ and val/ or test/ with one folder per class),
    hfds/ORG/NAME for a data set of the Hugging Face Hub, or hfds/./FOLDER for a folder that its library reads."""
    data_dir: str | None = None
    """Where the data set lies; digits needs none. For hfds/... where downloads are kept."""
    image_size: int | None = None
    """For --dataset folder and hfds/NAME: resize all images to this side."""
    criterion: CriterionName = "softmax"
    """Classification loss beside MFD: softmax cross-entropy, Center Loss, AM-Softmax or ArcFace."""
    label_smoothing: float = 0.0
    """For --criterion softmax: probability that is shared among all classes."""
    margin: float | None = None
    """For --criterion am_softmax and arcface. Default: the paper's, 0.35 and 0.5."""
    scale: float | None = None
    """For --criterion am_softmax and arcface: factor of the cosines. Default: 30."""
    center_weight: float | None = None
    """For --criterion center: weight of the distances to the centres. Default: 0.003."""
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
    """Epochs after which the learning rate drops to a tenth. Default: 30, 60 and 90 % of the epochs, or those of
    the recipe, whatever --epochs says beside it."""
    lr_decay: float = 0.1
    """Factor of the learning rate at each milestone."""
    weight_decay: float = 5e-4
    """Weight decay of all parameters."""
    ema_decay: float = 0.0
    """Decay per step of a moving average of the weights, which is then evaluated and saved; 0 is off."""
    seed: int = 0
    """Fixes initial weights, order, augmentation and dropout."""
    deterministic: bool = False
    """Use kernels that give the same bits every time; on a CPU they do so anyway."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Arithmetic of the network; the sums behind correlations are always float32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """For --compile: reduce-overhead replays CUDA graphs, max-autotune also tries kernels out."""
    sync_batch_norm: bool = True
    """Batch norm over the images of all processes, so that N of them train as one."""
    loader: Literal["auto", "resident", "workers"] = "auto"
    """resident: decode all images once and keep them on the device; workers: decode them again every epoch;
    auto: resident if they fit into 40 % of the free memory."""
    cache_dir: str | None = None
    """Where decoded images are kept between runs; the folder may be deleted at any time. Default: ~/.cache/timm_mfd."""
    workers: int = 2
    """Decoding processes of each training process, for images in files."""
    output_dir: str | None = None
    """Run folder, new or empty. Default: a new one under runs/."""
    resume: str | None = None
    """The folder of a run: go on with it, there or in a new --output-dir, under its arguments. auto: the run in
    --output-dir, or the newest unfinished one of this model, data set, weight and seed under runs/; a new one if there
    is none."""
    checkpoint_minutes: float = 5.0
    """Write the state of the run every so often, and at the end of every epoch; 0: after every step."""
    nan: Literal["stop", "skip"] = "stop"
    """What a batch does whose loss is not finite: it ends the run, or is left out (slower on a GPU)."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Also log to this tracker; metrics.jsonl is always written."""

    def __post_init__(self) -> None:
        for name in ("model", "data_dir", "cache_dir", "output_dir", "resume"):
            if isinstance(path := getattr(self, name), str):  # a shell leaves the ~ of --data-dir=~/images
                object.__setattr__(self, name, os.path.expanduser(path))

    @property
    def name(self) -> str:
        """What a run is called under `runs/`."""
        loss = f"mfd{self.mfd_weight:g}" if self.criterion == "softmax" else f"{self.criterion}-mfd{self.mfd_weight:g}"
        protocol = (self.recipe or "").partition("@")[2]
        data = data_name(self.dataset, self.data_dir)
        return "-".join(part for part in (self.model, data, loss, protocol, f"seed{self.seed}") if part)

    def learning_rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch, counted from 0."""
        # Divided, not multiplied: 0.1 / 10 is 0.01 to the last bit.
        return self.lr / (1 / self.lr_decay) ** sum(milestone <= epoch for milestone in self.milestones or ())

    def checked(self) -> "Args":
        """Fill in the default milestones, and refuse what cannot train.

        Raises:
            ValueError: Naming the flag and its value.
        """
        for flag, value in {"--lr": self.lr, "--weight-decay": self.weight_decay}.items():
            if not (math.isfinite(value) and value >= 0) or (flag == "--lr" and value == 0):
                bound = "above" if flag == "--lr" else "from"
                raise ValueError(f"{flag} must be a finite number {bound} 0, not {value}")
        least = {"--epochs": (self.epochs, 1), "--workers": (self.workers, 0), "--batch-size": (self.batch_size, 2)}
        least["--image-size"] = (1 if self.image_size is None else self.image_size, 1)
        for flag, (number, minimum) in least.items():
            if number < minimum:
                raise ValueError(f"{flag} must be at least {minimum}, not {number}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be in [0, 2^32), not {self.seed}")
        if not 0 < self.lr_decay <= 1:
            raise ValueError(f"--lr-decay must be in (0, 1], not {self.lr_decay}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema-decay must be in [0, 1), not {self.ema_decay}")
        if not self.checkpoint_minutes >= 0:
            raise ValueError(f"--checkpoint-minutes must be at least 0, not {self.checkpoint_minutes}")
        if self.compile_mode != "default" and not self.compile:
            raise ValueError(f"--compile-mode {self.compile_mode} needs --compile")
        if self.tracker != "none" and importlib.util.find_spec(self.tracker) is None:
            raise ValueError(f"--tracker {self.tracker} is not installed; pip install {self.tracker}")
        if self.milestones is None:
            parts = {max(1, round(self.epochs * part)) for part in (0.3, 0.6, 0.9)}
            return replace(self, milestones=tuple(sorted(parts)))
        if list(self.milestones) != sorted({epoch for epoch in self.milestones if epoch > 0}):
            given = " ".join(map(str, self.milestones))
            raise ValueError(f"--milestones must be increasing epochs above 0, not {given}")
        return self

    @classmethod
    def of_run(cls, before: Mapping[str, Any]) -> "Args":
        """Return the arguments that a run began with, for the same or another folder.

        Args:
            before: The arguments as a checkpoint has them.
        """
        known = {field.name for field in fields(cls)} - {"output_dir", "resume"}
        values: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in before.items() if name in known
        }
        return cls(**values)

    def check_resumable(self, before: Mapping[str, Any], epochs_begun: int) -> None:
        """Refuse to go on with arguments under which the run would have become another one.

        More epochs are fine as long as they leave the learning rates of the past as they were.

        Args:
            before: The arguments that the run began with.
            epochs_begun: Epochs that it has begun.

        Raises:
            ValueError: Naming every argument that differs, with both values.
        """
        before = asdict(Args()) | dict(before)  # a run of an earlier version had the default of what it did not know
        changed = changes(asdict(self), before, FREE)
        past = replace(self, lr=before["lr"], lr_decay=before["lr_decay"], milestones=tuple(before["milestones"]))
        epochs = range(epochs_begun)
        if self.epochs >= epochs_begun and all(self.learning_rate(e) == past.learning_rate(e) for e in epochs):
            changed.pop("epochs", None)
            changed.pop("milestones", None)
        if changed.keys() <= {"epochs", "milestones"} and changed:
            passed = [milestone for milestone in before["milestones"] if milestone < epochs_begun]
            words = f"milestones {' '.join(map(str, passed))}" if passed else "no milestone yet"
            raise ValueError(
                f"cannot resume: {epochs_begun} epochs are begun, with {words}; --epochs must be at least that many, "
                "and --milestones must begin with those and go on after them"
            )
        if changed:
            raise ValueError(
                f"cannot resume with other arguments: {', '.join(changed.values())} would change the result; "
                "leave them out, or begin a new run in another --output-dir"
            )
