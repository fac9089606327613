"""Arguments: defaults and learning rates, and the way to a record and back."""

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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"opt": "adamv"}, "--opt adamv is unknown; did you mean adam"),
        ({"opt": "adahessian"}, "--opt adahessian cannot be used: it needs second derivatives"),
        ({"opt": "kron"}, "--opt kron cannot be used: it draws random numbers of its own"),
        ({"layer_decay": 0.7}, "--layer-decay 0.7 must be in .0, 1., and needs an --opt of timm"),
        ({"opt": "adamw", "layer_decay": 1.5}, "--layer-decay 1.5 must be"),
        ({"schedule": "cosine", "milestones": (3,)}, "--milestones belong to --schedule step"),
        ({"warmup_epochs": 20}, "--warmup-epochs 20 must be from 0 to less than --epochs 20"),
        ({"clip_grad": 0.0}, "--clip-grad must be above 0, not 0.0"),
        ({"accumulate": 3}, "--accumulate 3 must divide --batch-size 128"),
        ({"drop_path": 1.0}, "--drop-path must be in .0, 1., not 1.0"),
        ({"mixup": -1.0}, "--mixup must be a finite number from 0, not -1.0"),
        ({"cutmix": 1.0, "criterion": "arcface"}, "--cutmix 1 mixes labels, which --criterion arcface cannot take"),
    ],
)
def test_what_timm_would_not_do_is_refused_by_flag_value_and_remedy(change, words):
    with pytest.raises(ValueError, match=words):
        Args(**change).checked()


def test_the_arguments_of_a_run_come_back_from_json_without_its_folder():
    before = replace(Args(epochs=10).checked(), stages=(0, 2), output_dir="runs/x", resume="auto", lr=0.3)
    recorded = json.loads(json.dumps(asdict(before))) | {"of_a_later_version": 1}
    assert Args.of_run(recorded) == replace(before, output_dir=None, resume=None)
