"""The mark in a run folder by which a scheduler knows that a signal stopped the run, and that it can be resumed."""

import functools
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..arguments import Args
from ..interruption import Stopped
from ..sources import source_of
from .run_folder import RunFolder


def marking_a_stop(main: Callable[[Args], None]) -> Callable[[Args], None]:
    """Let a run that a signal stops leave a mark in its folder, after its state; an older one goes first.

    An exit code does not tell: launchers return 1 for every reason. A run that fails has a checkpoint, too, but no
    mark, nor has one whose state could not be written, so that nobody starts those again and again.

    Args:
        main: Trains a run.
    """

    @functools.wraps(main)
    def marked(args: Args) -> None:
        folder = _folder_of(args) if os.environ.get("RANK", "0") == "0" else None
        if folder is None:
            return main(args)
        folder.unmark()
        try:
            return main(args)
        except (Stopped, SystemExit) as error:
            stopped = error if isinstance(error, Stopped) else error.__context__  # which became an exit of one line
            if isinstance(stopped, Stopped) and stopped.saved:
                folder.mark_stopped(str(stopped))
            raise

    return marked


def _folder_of(args: Args) -> RunFolder | None:
    """Return the folder that a run writes into, as far as it is known before the run begins."""
    with suppress(ValueError, OSError):  # which the run will say itself
        args = replace(args, model=source_of(args.model))
        found = RunFolder.to_resume(args.resume, args.output_dir, args.name) if args.resume else None
        chosen = RunFolder(args.output_dir) if args.output_dir else None
        if found and (chosen is None or Path(found.path).resolve() == chosen.path.resolve()):
            return found
        return chosen
    return None
