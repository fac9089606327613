"""The examples run as a user starts them and leave models that plain timm loads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from processes import run_python
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "train_scripts" / "examples"
LAUNCHERS = {
    "plain_loop": [sys.executable],
    "with_ddp": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "with_accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "bf16", "--cpu"],
    "with_lightning": [sys.executable],
    "with_trainer": [sys.executable],
    "other_networks": [sys.executable],
}


def test_every_example_is_tried_and_short():
    scripts = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() - {"digits", "timm_train"} == LAUNCHERS.keys()
    for name, text in scripts.items():
        assert len(text.splitlines()) <= 80, name
        assert name in ("digits", "timm_train") or "# MFD" in text, name


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_an_example_leaves_a_model_that_loads(name, tmp_path):
    done = subprocess.run(
        [*LAUNCHERS[name], EXAMPLES / f"{name}.py", tmp_path / "out"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if name == "other_networks":
        assert "conv1.weight" in load_file(tmp_path / "out" / "model.safetensors")
        return
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    accuracy = float(next(line for line in done.stdout.splitlines() if line.endswith("digits")).split()[0])
    assert accuracy > 40  # of ten classes: it has learned


STAND_IN = """
import sys
import timm, torch
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask

torch.manual_seed(0)
model = timm.create_model("test_convnext", num_classes=4)
task = ClassificationTask(model=model, criterion_kwargs=dict(smoothing=0.1), device=torch.device("cpu"), verbose=False)
evaluator = task.create_evaluator()
optimizer = create_optimizer_v2(task.get_trainable_module(), "adamw", lr=1e-3, layer_decay=0.5)
task.setup_ema(decay=0.5)
for step in range(2):
    with task.no_sync():
        result = task(torch.randn(6, 3, 32, 32), torch.arange(6) % 4)
    result["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    task.update_ema(step=step)
print(type(task).__name__, sys.argv[1:], type(evaluator).__name__)
print(sorted({group["lr_scale"] for group in optimizer.param_groups}))
state = task.get_checkpoint_state() | task.get_checkpoint_state(ema=True)
assert list(state["state_dict"]) == list(state["state_dict_ema"]) == list(model.state_dict())
logits = task.get_eval_model(ema=True)(torch.zeros(1, 3, 32, 32))
print(bool(result["mfd_loss"] > 0), task.criterion.smoothing, logits.shape)
"""


@pytest.mark.parametrize(("weight", "penalized"), [("0", "False"), ("0.5", "True")])
def test_timms_own_script_trains_with_mfd_by_one_word_before_it(weight, penalized, tmp_path):
    (tmp_path / "train.py").write_text(STAND_IN)
    command = [EXAMPLES / "timm_train.py", tmp_path / "train.py", "--model"]
    done = run_python(*command, env={**os.environ, "MFD_WEIGHT": weight})
    assert done.returncode == 0, done.stderr
    first, scales, last = done.stdout.splitlines()
    assert first == "MFDTask ['--model'] ClassificationEvaluator"
    assert len(eval(scales)) > 2  # layer decay has its groups
    assert last == f"{penalized} 0.1 torch.Size([1, 4])"


def test_timms_script_has_to_be_named():
    done = run_python(EXAMPLES / "timm_train.py", "--model", "resnet18")
    assert done.returncode == 1
    assert done.stderr.strip() == "timm_train.py: error: the first argument is the path of timm's train.py"
