"""A tracker beside `metrics.jsonl`: its failure is told and never ends a run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import first_words

if TYPE_CHECKING:
    from accelerate import Accelerator


class Tracker:
    """What a run logs to, in the folder of the run.

    Args:
        accelerator: Made with `log_with`; it logs on the main process only.
        name: `"none"`, `"tensorboard"` or `"wandb"`.
        folder: The run folder, where the tracker's files go, too.
        config: The arguments of the run.

    Example:
        >>> tracker = Tracker(accelerator, "tensorboard", folder, {"lr": 0.1})
        >>> tracker.log({"top1": 98.0}, step=1)
    """

    def __init__(self, accelerator: "Accelerator", name: str, folder: Path, config: Mapping[str, Any]):
        self.accelerator = accelerator
        self.name = name
        self.works = name != "none"
        options = {"wandb": {"dir": str(folder), "name": folder.name}}
        accelerator.project_configuration.logging_dir = str(folder)
        texts = {key: str(value) for key, value in config.items()}
        self._try(lambda: accelerator.init_trackers("timm_mfd", config=texts, init_kwargs=options))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the numbers of an epoch."""
        self._try(lambda: self.accelerator.log(dict(values), step=step))

    def end(self) -> None:
        """Let the tracker finish its work."""
        self._try(self.accelerator.end_training)

    def _try(self, act: Callable[[], Any]) -> None:
        if not self.works:
            return
        try:
            act()
        except Exception as error:  # of whatever the tracker talks to
            self.works = False
            self.accelerator.trackers = []
            self.accelerator.print(
                f"warning: --tracker {self.name} failed, and nothing more is logged to it: {first_words(error)}; "
                "metrics.jsonl has all numbers"
            )
