"""What a resumed run has to keep, so that it does not become another one."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

from ..arguments import Args
from .environment import PACKAGES

# What has no part in the result: a resumed run may choose it anew.
RESUMABLE_WITH_OTHER_VALUE = frozenset(
    ("output_dir", "resume", "data_dir", "loader", "cache_dir", "workers", "tracker", "checkpoint_minutes", "slim")
)


def changes(now: Mapping[str, Any], before: Mapping[str, Any], ignore: Collection[str] = ()) -> dict[str, str]:
    """Compare two sets of arguments.

    Args:
        now: Arguments by name.
        before: The arguments they are compared with; one that is missing there is no difference.
        ignore: Names that do not matter.

    Returns:
        For each name that differs: the change in words.
    """
    now, before = (json.loads(json.dumps(arguments)) for arguments in (now, before))  # tuples become lists
    return {
        name: f"--{name.replace('_', '-')} {_words(now[name])} (was {_words(before[name])})"
        for name in now
        if name in before and name not in ignore and now[name] != before[name]
    }


def check_arguments(args: Args, before: Mapping[str, Any], epochs_begun: int) -> None:
    """Refuse to resume with arguments under which the run would have become another one.

    More epochs are fine as long as they leave the learning rates of the past as they were.

    Args:
        args: The arguments now.
        before: The arguments that the run began with.
        epochs_begun: Epochs that it has begun.

    Raises:
        ValueError: Naming every argument that differs, with both values.
    """
    before = asdict(Args()) | dict(before)  # a run of an earlier version had the default of what it did not know
    changed = changes(asdict(args), before, RESUMABLE_WITH_OTHER_VALUE)
    past = replace(args, **{key: before[key] for key in ("lr", "lr_decay", "epochs")})
    past = replace(past, milestones=tuple(before["milestones"] or ()))
    positions = [epoch + part for epoch in range(epochs_begun) for part in (0, 0.5)]
    if args.epochs >= epochs_begun and all(args.learning_rate(p) == past.learning_rate(p) for p in positions):
        changed.pop("epochs", None)
        changed.pop("milestones", None)
    if changed.keys() <= {"epochs", "milestones"} and changed:
        if args.schedule == "cosine":
            raise ValueError(
                f"cannot resume: with --schedule cosine, --epochs {args.epochs} (was {before['epochs']}) changes the "
                "learning rates that were; begin a new run, from the model of this one if it is to be trained on"
            )
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


def check_same(now: dict[str, Any], data: str, before: Mapping[str, Any]) -> str:
    """Refuse to resume on other data, or with another number of processes or kind of device.

    Args:
        now: What `environment` returns.
        data: Identity of the data set.
        before: Record of the checkpoint, with both as they were.

    Returns:
        What differs and may change the last bits of the result, in words; empty if nothing does.

    Raises:
        ValueError: If the number of processes, the kind of device or the data differ.
    """
    was = before["environment"]
    for key, words in (("processes", "number of processes"), ("device_type", "kind of device")):
        if now[key] != was[key]:
            raise ValueError(
                f"cannot resume on another {words}: {now[key]} now, {was[key]} when the run began; "
                "start it as it was, or begin a new run without --resume"
            )
    if data != before["data"]:
        raise ValueError(
            "cannot resume: the data set is not the one that the run began with; restore it, or begin a new run"
        )
    now, was = now | now["packages"], was | was["packages"]
    others = [key for key in ("device", "cpu_threads", *PACKAGES, "git_commit") if now.get(key) != was.get(key)]
    return ", ".join(f"{key} {now.get(key)} (was {was.get(key)})" for key in others)


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
