"""The arguments of a training run: their defaults, and what is refused."""

import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal

from timm.optim import list_optimizers

from .criteria import CriterionName
from .sources import data_name
from .training.run_folder import RunFolder

_WARMUP_LR = 1e-5
# What cannot be resumed to the bit from its tensors and counters, or needs more than a gradient.
_NO_OPTIMIZER = {"adahessian": "it needs second derivatives"} | dict.fromkeys(
    ("kron", "kronc", "kronw"), "it draws random numbers of its own, which no checkpoint holds"
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
    """digits, cifar10, cifar100, tiny_imagenet, facescrub, folder (train/ and val/ or test/ with a folder per class),
    hfds/ORG/NAME for a data set of the Hugging Face Hub, or hfds/./FOLDER for a folder that its library reads."""
    data_dir: str | None = None
    """Where the data set lies; digits needs none. For hfds/... where downloads are kept."""
    image_size: int | None = None
    """For --dataset folder and hfds/NAME: resize all images to this side."""
    val_fraction: float | None = None
    """For --dataset folder with the class folders alone, or train/ alone: hold out this part of the images. Which
    images, --seed decides; those of equal content stay together."""
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
    accumulate: int = 1
    """Parts in which the batch of a step passes the network, where memory is short. Batch norm and MFD see a part at a
    time."""
    opt: str = "paper"
    """paper: SGD with momentum 0.9, without Nesterov, with weight decay on all parameters; or an optimizer of timm,
    such as adamw, without weight decay on norms and biases."""
    lr: float = 0.1
    """Learning rate; the default is the paper's, for SGD."""
    layer_decay: float | None = None
    """For an optimizer of timm: factor of the learning rate from each layer to the one below it."""
    schedule: Literal["step", "cosine"] = "step"
    """step: the learning rate drops at --milestones; cosine: it falls to 0 along half a cosine, in every step."""
    warmup_epochs: int = 0
    """Epochs in which the learning rate first rises from 1e-5, in every step."""
    milestones: tuple[int, ...] | None = None
    """Epochs after which the learning rate drops to a tenth. Default: 30, 60 and 90 % of the epochs, or those of
    the recipe, whatever --epochs says beside it."""
    lr_decay: float = 0.1
    """Factor of the learning rate at each milestone."""
    weight_decay: float = 5e-4
    """Weight decay."""
    clip_grad: float | None = None
    """Largest norm of the gradient of all parameters; longer ones are scaled down to it."""
    drop_path: float = 0.0
    """Probability of leaving out the last residual block of a network that supports it (stochastic depth)."""
    augment: Literal["paper", "timm"] = "paper"
    """paper: random crops of padded images and flips; timm: random crops of other sizes, flips and what follows, from
    images of their own size, and evaluation with timm's crop of resized images."""
    aa: str | None = None
    """For --augment timm: auto-augmentation by timm's name for it, such as rand-m9-mstd0.5-inc1."""
    random_erasing: float = 0.0
    """For --augment timm: probability of erasing a rectangle of an image."""
    mixup: float = 0.0
    """Alpha of MixUp; 0 is off."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0 is off."""
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
    """The folder of a run: resume it, there or in a new --output-dir, under its arguments. auto: the run in
    --output-dir, or the newest unfinished one of this model, data set, weight and seed under runs/; a new one if there
    is none."""
    checkpoint_minutes: float | None = None
    """Write the state of the run every so often, and at its end; 0: after every step. Default: every 5 minutes and at
    the end of every epoch."""
    slim: bool = False
    """Delete the state of the run when it is finished; it cannot be resumed for more epochs then."""
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

    def learning_rate(self, position: float) -> float:
        """Return the learning rate of a step, as timm's schedulers have it.

        Args:
            position: Epochs before the step, whole ones and the part of the one that it is in.
        """
        if position < self.warmup_epochs:
            return _WARMUP_LR + position * (self.lr - _WARMUP_LR) / self.warmup_epochs
        if self.schedule == "cosine":
            return 0.5 * self.lr * (1 + math.cos(math.pi * position / self.epochs))
        # Divided, not multiplied: 0.1 / 10 is 0.01 to the last bit.
        return self.lr / (1 / self.lr_decay) ** sum(milestone <= position for milestone in self.milestones or ())

    def checked(self) -> "Args":
        """Fill in the default milestones, and refuse what cannot train.

        Raises:
            ValueError: Naming the flag and its value.
            FileExistsError: If a new run is to write into a folder that holds something.
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
        self._check_recipe_of_today()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema-decay must be in [0, 1), not {self.ema_decay}")
        if self.checkpoint_minutes is not None and not self.checkpoint_minutes >= 0:
            raise ValueError(f"--checkpoint-minutes must be at least 0, not {self.checkpoint_minutes}")
        if self.compile_mode != "default" and not self.compile:
            raise ValueError(f"--compile-mode {self.compile_mode} needs --compile")
        if self.tracker != "none" and importlib.util.find_spec(self.tracker) is None:
            raise ValueError(f"--tracker {self.tracker} is not installed; pip install {self.tracker}")
        if self.resume is None:
            RunFolder.check_new(self.output_dir)
        if self.schedule == "cosine":
            return self
        if self.milestones is None:
            parts = {max(1, round(self.epochs * part)) for part in (0.3, 0.6, 0.9)}
            return replace(self, milestones=tuple(sorted(parts)))
        if list(self.milestones) != sorted({epoch for epoch in self.milestones if epoch > 0}):
            given = " ".join(map(str, self.milestones))
            raise ValueError(f"--milestones must be increasing epochs above 0, not {given}")
        return self

    def _check_recipe_of_today(self) -> None:
        """Refuse what the optimizers, schedules and augmentations of timm would not do."""
        if self.opt != "paper" and self.opt not in (known := list_optimizers()):
            close = get_close_matches(self.opt.lower(), ["paper", *known], n=3)
            hint = f"did you mean {', '.join(close)}?" if close else "timm.optim.list_optimizers() names all"
            raise ValueError(f"--opt {self.opt} is unknown; {hint}")
        if self.opt in _NO_OPTIMIZER:
            raise ValueError(f"--opt {self.opt} cannot be used: {_NO_OPTIMIZER[self.opt]}; choose another one")
        if self.layer_decay is not None and (self.opt == "paper" or not 0 < self.layer_decay <= 1):
            raise ValueError(f"--layer-decay {self.layer_decay} must be in (0, 1], and needs an --opt of timm")
        if self.schedule == "cosine" and self.milestones is not None:
            raise ValueError("--milestones belong to --schedule step; leave them out with cosine")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"--warmup-epochs {self.warmup_epochs} must be from 0 to less than --epochs {self.epochs}")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"--clip-grad must be above 0, not {self.clip_grad}")
        if self.accumulate < 1 or self.batch_size % self.accumulate:
            raise ValueError(f"--accumulate {self.accumulate} must divide --batch-size {self.batch_size}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"--drop-path must be in [0, 1), not {self.drop_path}")
        for flag, value in (("--aa", self.aa), ("--random-erasing", self.random_erasing)):
            if value and self.augment != "timm":
                raise ValueError(f"{flag} {value} needs --augment timm")
        if not 0 <= self.random_erasing <= 1:
            raise ValueError(f"--random-erasing must be in [0, 1], not {self.random_erasing}")
        for flag, alpha in (("--mixup", self.mixup), ("--cutmix", self.cutmix)):
            if not (math.isfinite(alpha) and alpha >= 0):
                raise ValueError(f"{flag} must be a finite number from 0, not {alpha}")
            if alpha and self.criterion != "softmax":
                raise ValueError(
                    f"{flag} {alpha:g} mixes labels, which --criterion {self.criterion} cannot take; leave it out, or "
                    "choose --criterion softmax"
                )

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
