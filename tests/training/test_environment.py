"""What a run ran on is on its record."""

import json
import subprocess
from pathlib import Path

import torch

from timm_mfd.training import environment


def test_the_environment_names_versions_device_and_commit():
    environment._commit.cache_clear()  # somebody may have committed since this process asked
    found = environment.environment(torch.device("cpu"), 2)
    assert found["packages"]["torch"] == torch.__version__.split("+")[0]
    assert (found["device_type"], found["processes"], found["cpu_threads"]) == ("cpu", 2, torch.get_num_threads())
    repository = Path(environment.__file__).parents[2]
    if (repository / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, check=True)
        assert found["git_commit"] == head.stdout.strip()
        assert found["git_modified"] in (True, False)
    json.dumps(found, allow_nan=False)
