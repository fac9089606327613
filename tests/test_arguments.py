"""Arguments: defaults, learning rates, and under which of them a run may go on."""

import json
from dataclasses import asdict, replace

import pytest

from timm_mfd.arguments import Args


def test_default_milestones_are_the_papers_at_100_epochs():
    assert Args(epochs=100).checked().milestones == (30, 60, 90)
    assert Args(epochs=2).checked().milestones == (1, 2)
    assert Args(epochs=1).checked().milestones == (1,)


def test_the_learning_rate_drops_to_a_tenth_at_each_milestone():
    args = Args(epochs=10, lr=0.1, milestones=(3, 6)).checked()
    assert [args.learning_rate(epoch) for epoch in (0, 2, 3, 5, 6, 9)] == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]


BEGUN = Args(epochs=10).checked()  # milestones 3, 6, 9


@pytest.mark.parametrize(
    ("change", "epochs_begun"),
    [
        ({"data_dir": "moved", "loader": "workers", "workers": 7, "cache_dir": "x", "tracker": "wandb"}, 10),
        ({"output_dir": "x", "resume": "auto", "nan": "skip", "checkpoint_minutes": 0.0}, 1),
        ({"epochs": 20}, 10),
        ({"milestones": (3, 6, 12), "epochs": 20}, 9),
        ({"milestones": (8,), "epochs": 20}, 3),
        ({"epochs": 5}, 5),
    ],
)
def test_what_leaves_the_past_as_it_was_may_change(change, epochs_begun):
    replace(BEGUN, **change).check_resumable(asdict(BEGUN), epochs_begun)


@pytest.mark.parametrize(
    ("change", "epochs_begun", "words"),
    [
        ({"lr": 0.2}, 1, "--lr 0.2 (was 0.1) would change the result"),
        ({"seed": 1, "batch_size": 64}, 1, "--batch-size 64 (was 128), --seed 1 (was 0)"),
        ({"model": "resnet50_mfd"}, 1, "--model resnet50_mfd (was resnet18_mfd)"),
        ({"stages": (0, 1)}, 1, "--stages 0 1 (was None)"),
        ({"compile": True}, 1, "--compile True (was False)"),
        ({"compile": True, "compile_mode": "reduce-overhead"}, 1, "--compile-mode reduce-overhead (was default)"),
        ({"mixed_precision": "bf16", "deterministic": True}, 1, "--deterministic True (was False), --mixed-precision"),
        ({"sync_batch_norm": False, "ema_decay": 0.5}, 1, "--ema-decay 0.5 (was 0.0), --sync-batch-norm False"),
    ],
)
def test_what_would_change_the_result_is_refused_and_named(change, epochs_begun, words):
    with pytest.raises(ValueError, match="cannot resume with other arguments") as error:
        replace(BEGUN, **change).check_resumable(asdict(BEGUN), epochs_begun)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("change", "epochs_begun", "words"),
    [
        ({"milestones": (3, 6, 12), "epochs": 20}, 10, "10 epochs are begun, with milestones 3 6 9; --epochs must be"),
        (
            {"milestones": (2, 6, 9)},
            3,
            "3 epochs are begun, with no milestone yet; --epochs must be",
        ),
        ({"epochs": 4}, 5, "5 epochs are begun, with milestones 3; --epochs must be at least that many"),
    ],
)
def test_a_schedule_that_changes_the_past_is_refused_with_what_it_must_keep(change, epochs_begun, words):
    with pytest.raises(ValueError, match="cannot resume") as error:
        replace(BEGUN, **change).check_resumable(asdict(BEGUN), epochs_begun)
    assert words in str(error.value)


def test_the_arguments_of_a_run_come_back_from_json_without_its_folder():
    before = replace(BEGUN, stages=(0, 2), output_dir="runs/x", resume="auto", lr=0.3)
    recorded = json.loads(json.dumps(asdict(before))) | {"of_a_later_version": 1}
    assert Args.of_run(recorded) == replace(before, output_dir=None, resume=None)


def test_every_argument_either_may_change_or_is_refused():
    """A new argument has to be thought about: by default it is refused."""
    other = {
        bool: lambda value: not value, int: lambda value: value + 1, float: lambda value: value + 0.125,
        str: lambda value: value + "x", tuple: lambda value: (*value, 99), type(None): lambda _: 1,
    }  # fmt: skip
    free = set()
    for name, value in asdict(BEGUN).items():
        try:
            replace(BEGUN, **{name: other[type(value)](value)}).check_resumable(asdict(BEGUN), 1)
            free.add(name)
        except ValueError:
            pass
    assert free == {
        "output_dir", "resume", "data_dir", "loader", "cache_dir", "workers", "tracker", "nan", "checkpoint_minutes",
        "epochs", "milestones",
    }  # fmt: skip
