"""What would make another run of a resumed one is refused; what may change its last bits is named."""

from dataclasses import asdict, replace

import pytest
import timm
import torch

from timm_mfd.arguments import Args
from timm_mfd.training.environment import environment
from timm_mfd.training.resume import RESUMABLE_WITH_OTHER_VALUE, changes, check_arguments, check_same

BEGUN = Args(epochs=10).checked()  # milestones 3, 6, 9


@pytest.mark.parametrize(
    ("change", "epochs_begun"),
    [
        ({"data_dir": "moved", "loader": "workers", "workers": 7, "cache_dir": "x", "tracker": "wandb"}, 10),
        ({"output_dir": "x", "resume": "auto", "slim": True, "checkpoint_minutes": 0.0}, 1),
        ({"epochs": 20}, 10),
        ({"milestones": (3, 6, 12), "epochs": 20}, 9),
        ({"milestones": (8,), "epochs": 20}, 3),
        ({"epochs": 5}, 5),
    ],
)
def test_what_leaves_the_past_as_it_was_may_change(change, epochs_begun):
    check_arguments(replace(BEGUN, **change), asdict(BEGUN), epochs_begun)


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
        check_arguments(replace(BEGUN, **change), asdict(BEGUN), epochs_begun)
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
        check_arguments(replace(BEGUN, **change), asdict(BEGUN), epochs_begun)
    assert words in str(error.value)


def test_a_cosine_ends_where_it_was_to_end():
    begun = Args(epochs=10, lr=0.05, schedule="cosine").checked()
    check_arguments(begun, asdict(begun), 1)
    with pytest.raises(ValueError, match="with --schedule cosine, --epochs 20 .was 10. changes"):
        check_arguments(replace(begun, epochs=20), asdict(begun), 1)


def test_every_argument_either_may_change_or_is_refused():
    """A new argument has to be thought about: by default it is refused."""
    other = {
        bool: lambda value: not value, int: lambda value: value + 1, float: lambda value: value + 0.125,
        str: lambda value: value + "x", tuple: lambda value: (*value, 99), type(None): lambda _: 1,
    }  # fmt: skip
    free = set()
    for name, value in asdict(BEGUN).items():
        try:
            check_arguments(replace(BEGUN, **{name: other[type(value)](value)}), asdict(BEGUN), 1)
            free.add(name)
        except ValueError:
            pass
    assert free == {*RESUMABLE_WITH_OTHER_VALUE, "epochs", "milestones"}
    assert not {"lr", "seed", "batch_size", "mfd_weight", "stages", "model", "dataset"} & free


def test_changes_name_the_flag_and_both_values():
    now, before = {"lr": 0.1, "stages": (0, 1), "seed": 3, "new": 1}, {"lr": 0.2, "stages": [0, 1], "seed": 4, "old": 1}
    assert changes(now, before, ignore={"seed"}) == {"lr": "--lr 0.1 (was 0.2)"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"processes": 4}, "cannot resume on another number of processes: 4 now, 2 when the run began"),
        ({"device_type": "cuda"}, "cannot resume on another kind of device: cuda now, cpu when the run began"),
    ],
)
def test_another_number_of_processes_or_kind_of_device_is_refused(change, message):
    was = environment(torch.device("cpu"), 2)
    assert check_same(was, "d", {"environment": was, "data": "d"}) == ""
    with pytest.raises(ValueError, match=message):
        check_same(was | change, "d", {"environment": was, "data": "d"})
    with pytest.raises(ValueError, match="the data set is not the one that the run began with"):
        check_same(was, "d", {"environment": was, "data": "e"})


def test_another_version_is_named():
    was = environment(torch.device("cpu"), 1)
    now = was | {"packages": was["packages"] | {"timm": "9.9"}, "cpu_threads": 77}
    differs = check_same(now, "d", {"environment": was, "data": "d"})
    assert differs == f"cpu_threads 77 (was {torch.get_num_threads()}), timm 9.9 (was {timm.__version__})"
