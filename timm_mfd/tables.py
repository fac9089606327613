"""What the redundancy of models comes to, as a table and in words."""

from collections.abc import Mapping, Sequence

from .pruning import Pruned
from .redundancy import StageRedundancy
from .stages import StageInfo


def redundancy_table(
    models: Mapping[str, Sequence[StageRedundancy]], unmeasured: Mapping[str, Sequence[StageInfo]] | None = None
) -> str:
    """Set what `measure_redundancy` found in each stage side by side for one or more models.

    Args:
        models: For each model its stages.
        unmeasured: For each model the stages that gave one sample only, of which nothing is known.

    Returns:
        A Markdown table.
    """
    rows = [
        "| model | stage | channels | size | mean \\|r\\| | mean r^2 | above noise | effective rank | dead | near-dead "
        "| in groups | of class means |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, stages in models.items():
        for s in stages:
            grouped = sum(len(group) for group in s.groups)
            of_means = "-" if s.class_mean_abs_r is None else f"{s.class_mean_abs_r:.3f}"
            rows.append(
                f"| {name} | {s.stage} | {s.channels} | {s.size[0]}x{s.size[1]} | {s.mean_abs_r:.3f} | {s.mean_r2:.4f} "
                f"| {s.corrected_r2:.4f} | {s.effective_rank:.1f} | {len(s.dead)} | {len(s.near_dead)} | {grouped} "
                f"| {of_means} |"
            )
        for info in (unmeasured or {}).get(name, ()):
            rows.append(f"| {name} | {info.index} | {info.channels} |" + " - |" * 9)
    return "\n".join(rows)


def removable_text(name: str, pruned: Pruned) -> str:
    """Say what the silent channels of a model cost.

    Args:
        name: Of the model.
        pruned: What `prune_silent` returned.

    Returns:
        A sentence.
    """
    if not pruned.channels:
        return f"{name}: no channel is 0 on all of these images in every layer that uses it, so none is free to remove."
    saved = [
        f"{before - after:,} of {before:,} {what} ({100 * (before - after) / before:.1f} %)"
        for (before, after), what in ((pruned.parameters, "parameters"), (pruned.multiply_adds, "multiply-adds"))
    ]
    return (
        f"{name}: {pruned.channels:,} channels, inside of stages and at their ends, are 0 on all of these images in "
        f"every layer that uses them; they cost {' and '.join(saved)}."
    )
