"""Arguments: defaults and learning rates, and the way to a record and back."""

import json
from dataclasses import asdict, replace

from timm_mfd.arguments import Args


def test_default_milestones_are_the_papers_at_100_epochs():
    assert Args(epochs=100).checked().milestones == (30, 60, 90)
    assert Args(epochs=2).checked().milestones == (1, 2)
    assert Args(epochs=1).checked().milestones == (1,)


def test_the_learning_rate_drops_to_a_tenth_at_each_milestone():
    args = Args(epochs=10, lr=0.1, milestones=(3, 6)).checked()
    assert [args.learning_rate(epoch) for epoch in (0, 2, 3, 5, 6, 9)] == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]


def test_the_arguments_of_a_run_come_back_from_json_without_its_folder():
    before = replace(Args(epochs=10).checked(), stages=(0, 2), output_dir="runs/x", resume="auto", lr=0.3)
    recorded = json.loads(json.dumps(asdict(before))) | {"of_a_later_version": 1}
    assert Args.of_run(recorded) == replace(before, output_dir=None, resume=None)
