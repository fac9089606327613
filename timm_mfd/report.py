"""Tables of our results beside the paper's: means, spreads and paired differences with their confidence intervals."""

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

from scipy.stats import t as student_t

from .recipes import CORRELATIONS, OPEN_CHOICES, PAPER_RECIPES, PROTOCOLS, RECIPES, TABLES, Recipe
from .results import Result

CONFIDENCE = 0.95


class Spread(NamedTuple):
    """Accuracies of one recipe over its seeds.

    Attributes:
        n: Number of runs.
        mean: Their mean.
        std: Their standard deviation (with n - 1); None for a single run.
    """

    n: int
    mean: float
    std: float | None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}") + f" (n={self.n})"


class Difference(NamedTuple):
    """Mean difference over pairs of runs with the same seed, so with the same initial weights, order and crops.

    Attributes:
        n: Number of pairs.
        mean: Mean difference.
        low: Lower end of the interval; None where there is none: for one pair, or if all differ by the same.
        high: Its upper end.
    """

    n: int
    mean: float
    low: float | None
    high: float | None

    @property
    def sign(self) -> int:
        """1 or -1 if the interval is above or below 0, else 0: the difference may be chance."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:+.2f}, {self.high:+.2f}]"
        return f"{self.mean:+.2f}{interval}" + (f" (n={self.n})" if self.low is None else "")


class Row(NamedTuple):
    """A recipe with MFD beside the same one without.

    Attributes:
        recipe: The recipe with MFD.
        baseline: The recipe without.
        ours: Our accuracies with MFD.
        ours_baseline: Our accuracies without.
        difference: With MFD minus without.
    """

    recipe: Recipe
    baseline: Recipe
    ours: Spread | None
    ours_baseline: Spread | None
    difference: Difference | None

    @property
    def paper_difference(self) -> float | None:
        """The paper's accuracy with MFD minus the one without."""
        if self.recipe.accuracy is None or self.baseline.accuracy is None:
            return None
        return self.recipe.accuracy - self.baseline.accuracy

    @property
    def verdict(self) -> str:
        """Whether MFD did here what it does in the paper, in words; `-` without an interval to tell it by."""
        effect, difference = self.paper_difference, self.difference
        if effect is None or difference is None or difference.low is None or difference.high is None:
            return "-"
        if difference.low <= effect <= difference.high:
            return "yes" if difference.sign else "cannot tell"
        if difference.sign * effect <= 0:
            return "no" if difference.sign == 0 else "no: the opposite"
        return "in part: " + ("smaller" if abs(difference.mean) < abs(effect) else "larger")


def spread(accuracies: Sequence[float]) -> Spread | None:
    """Summarise the accuracies of one recipe; None if there are none."""
    if not accuracies:
        return None
    std = statistics.stdev(accuracies) if len(accuracies) > 1 else None
    return Spread(len(accuracies), statistics.fmean(accuracies), std)


def paired_difference(with_mfd: Mapping[Hashable, float], without: Mapping[Hashable, float]) -> Difference | None:
    """Compare runs that have the same key, such as the seed.

    The interval is `mean ± t sd / sqrt(n)` with Student's t for n - 1 degrees of freedom.

    Args:
        with_mfd: Accuracy for each key.
        without: The same without MFD.

    Returns:
        The difference over the keys that both have; None if there are none.

    Example:
        >>> print(paired_difference({0: 50.0, 1: 52.0, 2: 51.0}, {0: 48.0, 1: 49.0, 2: 47.0}))
        +3.00 [+0.52, +5.48]
    """
    differences = [accuracy - without[key] for key, accuracy in with_mfd.items() if key in without]
    if not differences:
        return None
    n, mean = len(differences), statistics.fmean(differences)
    deviation = statistics.stdev(differences) if n > 1 else 0.0
    # Accuracies are multiples of 100 / images: equal differences are a coincidence, not certainty.
    if deviation <= 1e-9:
        return Difference(n, mean, None, None)
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, n - 1)) * deviation / math.sqrt(n)
    return Difference(n, mean, mean - half, mean + half)


def rows_of(table: str, results: Iterable[Result]) -> list[Row]:
    """Pair the recipes of a table that have results.

    Args:
        table: Key of `recipes.TABLES`.
        results: Results of one protocol.
    """
    accuracies: dict[str, dict[Hashable, float]] = {}
    for result in results:
        # Only what differs in MFD alone is paired: the same seed, images and precision.
        key = (result.seed, result.data, result.arithmetic["mixed_precision"])
        accuracies.setdefault(result.recipe, {})[key] = result.top1
    rows = []
    for recipe in (r for r in RECIPES.values() if table in r.tables and r.mfd_weight):
        ours, without = accuracies.get(recipe.id, {}), accuracies.get(recipe.baseline, {})
        # A baseline alone asks for the paper's MFD, and for no other reading or weight beside the paper.
        if ours or (without and (recipe in PAPER_RECIPES or not recipe.variant)):
            spreads = spread(list(ours.values())), spread(list(without.values()))
            rows.append(Row(recipe, RECIPES[recipe.baseline], *spreads, paired_difference(ours, without)))
    # A table of ours may hold rows of the paper's, to compare its own with: alone they say nothing new.
    ours_only = any(table in r.tables for r in RECIPES.values() if r not in PAPER_RECIPES)
    return rows if not ours_only or any(row.recipe not in PAPER_RECIPES for row in rows) else []


def plain(text: str, sign: int) -> str:
    """Leave a difference without a colour."""
    return text


def with_sign(text: str, sign: int) -> str:
    """Colour a significant difference where only characters have colours, as on a page of Markdown."""
    return f"{text} {('🔴 ▼', '', '🟢 ▲')[sign + 1]}".strip()


def accuracy_tables(results: Sequence[Result], paint: Callable[[str, int], str] = plain) -> str:
    """Format the tables of one protocol as Markdown.

    Args:
        results: Results of one protocol.
        paint: Colours a difference by its sign.
    """
    parts = []
    for table, title in TABLES.items():
        if not (rows := rows_of(table, results)):
            continue
        heading = ["network", "data set", "loss", "paper", "paper + MFD", "paper diff.", "ours", "ours + MFD"]
        cells = [[*heading, f"our difference [{CONFIDENCE:.0%} interval]", "paper's effect found?"]]
        for row in rows:
            loss = row.recipe.criterion + row.recipe.variant
            paper = [_number(row.baseline.accuracy), _number(row.recipe.accuracy), _number(row.paper_difference, "+")]
            ours = [str(value) if value else "-" for value in (row.ours_baseline, row.ours)]
            painted = "-" if row.difference is None else paint(str(row.difference), row.difference.sign)
            cells.append([row.recipe.backbone, row.recipe.dataset, loss, *paper, *ours, painted, row.verdict])
        parts.append(f"### {title}\n\n{_table(cells)}")
    return "\n\n".join(parts)


def markdown(results: Sequence[Result], pictures: Mapping[str, Mapping[str, str]]) -> str:
    """Write the report.

    Args:
        results: All results.
        pictures: For each protocol: title and file of each picture.

    Returns:
        Markdown.
    """
    parts = [
        "# Results",
        "Made by `train_scripts/reproduce.py report` from the JSON files in this folder and nothing else. Accuracies "
        "are top-1 in percent on the held-out images after the last epoch, mean ± standard deviation over n seeds. A "
        "difference is the mean over pairs of runs with the same seed, images and precision, with its confidence "
        "interval (Student's t). 🟢 ▲ and 🔴 ▼ stand only where the interval leaves out 0; of twenty rows without any "
        "effect one would still get one. The paper gives means of three runs without a spread; its effect counts as "
        "found if our interval holds it and leaves out 0.",
    ]
    for protocol in [name for name in PROTOCOLS if any(r.protocol == name for r in results)]:
        ours = [result for result in results if result.protocol == protocol]
        how = PROTOCOLS[protocol]
        rates = how.rates
        parts.append(f"## Protocol `{protocol}`: {how.summary}")
        rest = f"batch {how.batch_size}, weight decay {how.weight_decay:g}"
        parts.append(f"{how.epochs} epochs, {rates}, {rest}. {_coverage(ours)}")
        parts.append(accuracy_tables(ours, with_sign))
        parts += [f"![{title}]({file})" for title, file in pictures.get(protocol, {}).items()]
        parts.append(f"### Correlation between channels (Tables I and III)\n\n{_correlations(ours)}")
        parts.append(f"<details><summary>All runs</summary>\n\n{_runs(ours)}\n\n</details>")
    if any(RECIPES[result.recipe] in PAPER_RECIPES for result in results):
        parts.append("## What the paper leaves open, and our choice")
        parts.append("\n".join(f"- {question}: {choice}." for question, choice in OPEN_CHOICES.items()))
    return "\n\n".join(parts) + "\n"


def short(results: Sequence[Result]) -> str:
    """Write the tables of accuracy alone, with what they stand on, for the README.

    Args:
        results: All results.

    Returns:
        Markdown.
    """
    parts = []
    for protocol in [name for name in PROTOCOLS if any(r.protocol == name for r in results)]:
        ours = [result for result in results if result.protocol == protocol]
        how = PROTOCOLS[protocol]
        parts += [f"Protocol `{protocol}` ({how.summary}, {how.epochs} epochs). {_coverage(ours)}"]
        parts += [accuracy_tables(ours, with_sign)]
    return "\n\n".join(parts) + "\n"


def to_csv(results: Sequence[Result]) -> str:
    """Write one line per protocol, table and recipe with MFD; `difference_sign` is 0 where the interval holds 0."""
    file = io.StringIO()
    columns = ("n", "mean", "std")
    writer = csv.writer(file, lineterminator="\n")
    names = [f"{what}_{column}" for what in ("ours_baseline", "ours_mfd", "difference") for column in columns]
    names[-1:] = ["difference_low", "difference_high", "difference_sign"]
    writer.writerow(["protocol", "table", "recipe", "paper_baseline", "paper_mfd", "paper_difference", *names])
    for protocol in PROTOCOLS:
        ours = [result for result in results if result.protocol == protocol]
        for table in TABLES:
            for row in rows_of(table, ours):
                paper = (row.baseline.accuracy, row.recipe.accuracy, row.paper_difference)
                spreads = (value for part in (row.ours_baseline, row.ours) for value in part or (0, None, None))
                difference = (*row.difference, row.difference.sign) if row.difference else (0, *[None] * 4)
                numbers = ("" if v is None else round(v, 4) for v in (*paper, *spreads, *difference))
                writer.writerow([protocol, table, row.recipe.id, *numbers])
    return file.getvalue()


def _coverage(results: Sequence[Result]) -> str:
    ids = {result.recipe for result in results}
    paper = sum(recipe.id in ids for recipe in PAPER_RECIPES)
    devices = Counter(result.device + ", shared with other work" * result.shared_machine for result in results)
    where = "; ".join(f"{count} on {device}" for device, count in devices.items())
    covered = f"{paper} of the paper's {len(PAPER_RECIPES)} recipes have a result."
    runs = f"{len(results)} run{'s' * (len(results) != 1)}"
    hours = f" in {sum(result.wall_seconds for result in results) / 3600:.2f} hours"
    if any(result.shared_machine for result in results):
        hours = ""
    return f"{covered} {runs}{hours}: {where}."


def _correlations(results: Sequence[Result]) -> str:
    ids = [recipe for recipe in RECIPES if any(result.recipe == recipe for result in results)]
    count = max(len(result.correlation_after) for result in results)
    cells = [["run", "mean \\|r\\|", *(f"stage {number}" for number in range(count))]]
    for recipe in ids:
        of_runs = [result.correlation_after for result in results if result.recipe == recipe]
        means = [f"{statistics.fmean(stage):.3f}" for stage in zip(*of_runs, strict=False)]
        cells.append([recipe, f"ours (n={len(of_runs)})", *means, *[""] * (count - len(means))])
        if recipe in CORRELATIONS:
            cells.append([recipe, "paper", *(f"{value:.3f}" for value in CORRELATIONS[recipe])])
    return _table(cells)


def _runs(results: Sequence[Result]) -> str:
    cells = [["run", "seed", "top-1", "best epoch", "minutes", "images/s", "device", "commit"]]
    for result in results:
        best = max(result.curve["top1"])
        commit = (result.environment["git_commit"] or "-")[:10] + "+" * bool(result.environment["git_modified"])
        numbers = [str(result.seed), f"{result.top1:.2f}", f"{best:.2f} ({result.curve['top1'].index(best) + 1})"]
        speed = ["-", "-"]
        if not result.shared_machine:
            speed = [f"{result.wall_seconds / 60:.1f}", f"{result.images_per_second:,.0f}"]
        cells.append([result.recipe, *numbers, *speed, result.device, commit])
    warnings = [f"- {result.recipe}, seed {result.seed}: {text}" for result in results for text in result.warnings]
    shared = " No speed is given of a run that shared its machine with other work."
    parts = [
        _table(cells),
        "A + after a commit: the code was modified." + shared * any(result.shared_machine for result in results),
    ]
    return "\n\n".join(parts + (["Warnings of the runs:", "\n".join(warnings)] if warnings else []))


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.2f}"


def _table(cells: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table whose columns also line up as text."""
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)
