"""Whatever wraps the model wraps the MFD loss too: gradients, precision and compilation are those of a plain loop."""

import os
from contextlib import nullcontext
from functools import partial

import pytest
import timm
import torch
import torch._dynamo as dynamo
import torch.nn.functional as F
from processes import run_processes
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from timm_mfd import MFDClassificationTask, MFDLoss, with_stages
from timm_mfd.sync_batch_norm import synchronize_batch_norm

LR, STEPS, CLASSES, BATCH = 0.5, 3, 5, 8
WAYS = ("stages", "loss", "task")
BF16 = partial(torch.autocast, "cpu", torch.bfloat16)


class Net:
    """A network without batch norm in one of three ways, and how its loss is taken; `share` of the images are here."""

    def __init__(self, way, share=1.0):
        torch.manual_seed(0)
        self.way = way
        self.model = timm.create_model("test_convnext", num_classes=CLASSES, depths=(1, 1, 1, 1))
        # The mean over uneven shares is to count every image alike; MFD goes over all images anyway.
        self.criterion = lambda logits, y: share * F.cross_entropy(logits, y)
        if way == "task":
            self.net = MFDClassificationTask(self.model, self.criterion, verbose=False)
        else:
            self.net = with_stages(self.model, mfd=MFDLoss() if way == "loss" else None)
        self.dtypes = []
        convolution = next(module for module in self.model.modules() if isinstance(module, nn.Conv2d))
        convolution.register_forward_hook(lambda _, __, out: self.dtypes.append(out.dtype))

    def loss(self, net, x, y):
        if self.way == "task":
            return net(x, y)["loss"]
        out = net(x)
        return self.criterion(out.logits, y) + (out.mfd.loss if self.way == "loss" else MFDLoss()(out.stages).loss)

    def optimizer(self):
        return torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], LR)

    def weights(self):
        """All weights in one row, put together where they are in parts."""
        whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in self.model.parameters()]
        return torch.cat([p.detach().double().flatten() for p in whole])


def images(step, shares=(BATCH,), rank=0):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(BATCH, 3, 32, 32, generator=generator), torch.arange(BATCH) % CLASSES
    return x.split(shares)[rank], y.split(shares)[rank]


def loop(net, wrapped, *, context=nullcontext, backward=torch.Tensor.backward, optimizer=None, shares=(BATCH,), rank=0):
    """Three steps; returns the gradient of the first, as SGD took it, and the weights at the end."""
    optimizer = optimizer or net.optimizer()
    states = [net.weights()]
    for step in range(STEPS):
        with context():
            loss = net.loss(wrapped, *images(step, shares, rank))
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        states.append(net.weights())
    return (states[0] - states[1]) / LR, states[-1]


def plain(way, context=nullcontext):
    net = Net(way)
    return loop(net, net.net, context=context)


def check(found, expected, tolerance):
    """Compare the first gradient with the plain loop's, and the ranks with each other."""
    for gradient, last in found:
        assert (gradient - expected[0]).norm() <= tolerance * expected[0].norm()
        assert torch.equal(last, found[0][1])
    assert expected[0].norm() > 0.1


def compile_by(net, wrapped, how):
    """Compile in one of the ways there are, and return what is called, and a function that says what Dynamo saw."""
    dynamo.reset()
    dynamo.utils.counters.clear()
    if how == "function":
        wrapped = torch.compile(wrapped, backend="aot_eager")
    else:
        wrapped.compile(backend="aot_eager")
    return wrapped, lambda: (dynamo.utils.counters["frames"]["ok"], dict(dynamo.utils.counters["graph_break"]))


@pytest.mark.parametrize(
    ("way", "how"),
    [
        pytest.param(way, how, marks=() if (way, how) == ("loss", "in place") else pytest.mark.slow)
        for way in WAYS
        for how in ("function", "in place")
    ],
)
def test_a_compiled_model_is_compiled_whole(way, how):
    net = Net(way)
    wrapped, seen = compile_by(net, net.net, how)
    check([loop(net, wrapped)], plain(way), 1e-5)
    frames, breaks = seen()
    assert frames >= 1
    assert breaks == {}


def accelerate_bf16(way):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    net = Net(way)
    wrapped, optimizer = accelerator.prepare(net.net, net.optimizer())
    shares, rank = (BATCH // accelerator.num_processes,) * accelerator.num_processes, accelerator.process_index
    found = loop(net, wrapped, backward=accelerator.backward, optimizer=optimizer, shares=shares, rank=rank)
    assert set(net.dtypes) == {torch.bfloat16}
    assert not isinstance(net.model.forward(images(0)[0][:1]), tuple)  # the model itself is as it was
    return found


@pytest.mark.parametrize(
    "way", [pytest.param("stages", marks=pytest.mark.slow), "loss", pytest.param("task", marks=pytest.mark.slow)]
)
def test_accelerate_trains_in_the_precision_it_was_asked_for(way):
    check([accelerate_bf16(way)], plain(way, BF16), 2e-2)


def trainer_bf16(way, folder):
    from transformers import Trainer, TrainingArguments

    net = Net(way)
    states = []

    class MFDTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            states.append(net.weights())
            return net.loss(model, inputs["images"], inputs["labels"])

    class Inputs(torch.utils.data.Dataset):
        def __len__(self):
            return STEPS * BATCH

        def __getitem__(self, index):
            x, y = images(index // BATCH)
            return {"images": x[index % BATCH], "labels": y[index % BATCH]}

        def __getitems__(self, indices):
            return [self[index] for index in sorted(indices)]

    arguments = TrainingArguments(
        str(folder), bf16=True, use_cpu=True, max_steps=STEPS, per_device_train_batch_size=BATCH, report_to=[],
        remove_unused_columns=False, lr_scheduler_type="constant", max_grad_norm=0, save_strategy="no",
        train_sampling_strategy="sequential", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = MFDTrainer(net.net, arguments, train_dataset=Inputs(), optimizers=(net.optimizer(), None))
    trainer.train()
    assert set(net.dtypes) == {torch.bfloat16}
    return (states[0] - states[1]) / LR, net.weights()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("way", [*(pytest.param(way, marks=pytest.mark.slow) for way in ("stages", "task")), "loss"])
def test_transformers_trainer_trains_in_the_precision_it_was_asked_for(way, tmp_path):
    check([trainer_bf16(way, tmp_path)], plain(way, BF16), 2e-2)


def ddp(rank, processes, way, shares=(5, 3)):
    net = Net(way, share=processes * shares[rank] / BATCH)
    return loop(net, DistributedDataParallel(net.net), shares=shares, rank=rank)


def compiled_ddp(rank, processes, way):
    net = Net(way)
    wrapped, seen = compile_by(net, net.net, "function")
    found = loop(net, DistributedDataParallel(wrapped), shares=(4, 4), rank=rank)
    assert seen()[0] >= 1
    return found


def ddp_compiled(rank, processes, way):
    net = Net(way)
    wrapped, seen = compile_by(net, DistributedDataParallel(net.net), "function")
    found = loop(net, wrapped, shares=(4, 4), rank=rank)
    assert seen()[0] >= 1
    return found


def accelerate_of_two(rank, processes, way):
    as_torchrun(rank, processes)
    return accelerate_bf16(way)


def fsdp2(rank, processes, way):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = Net(way)
    names = [name for name, _ in net.net.named_parameters()]
    mesh = init_device_mesh("cpu", (processes,))
    for stage in net.model.stages:
        fully_shard(stage, mesh=mesh)
    fully_shard(net.net, mesh=mesh)
    found = loop(net, net.net, shares=(4, 4), rank=rank)
    saved = get_model_state_dict(net.net, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        assert list(saved) == list(net.net.state_dict())
        assert set(names) <= set(saved)
        fresh = Net(way)
        fresh.net.load_state_dict(saved)
        assert torch.equal(fresh.weights(), found[1])
    return found


def lightning_ddp(rank, processes, way):
    import lightning

    as_torchrun(rank, processes)
    net = Net(way)
    states = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net.net

        def training_step(self, indices, _):
            states.append(net.weights())
            return net.loss(self.net, *images(int(indices[0]), (4, 4), rank))

        def configure_optimizers(self):
            return net.optimizer()

    trainer = lightning.Trainer(
        accelerator="cpu", devices=processes, strategy="ddp", max_steps=STEPS, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.arange(STEPS), batch_size=1))
    return (states[0] - states[1]) / LR, net.weights()


def as_torchrun(rank, processes):
    """Tell the frameworks what torchrun would; the group is there already."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500, "TORCHELASTIC_RUN_ID": "none"}
    os.environ.update({name: str(value) for name, value in names.items()})


def cell(function, way, tolerance=1e-5, context=nullcontext, fast=False):
    name = f"{function.__name__}-{way}"
    return pytest.param(function, way, tolerance, context, id=name, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(
    ("function", "way", "tolerance", "context"),
    [
        *(cell(ddp, way, fast=way == "task") for way in WAYS),
        *(cell(compiled_ddp, way) for way in WAYS),
        *(cell(ddp_compiled, way) for way in WAYS),
        *(cell(accelerate_of_two, way, 2e-2, BF16, fast=way == "task") for way in WAYS),
        *(cell(fsdp2, way, fast=way == "loss") for way in WAYS),
        *(cell(lightning_ddp, way, fast=way == "loss") for way in WAYS),
    ],
)
def test_two_processes_train_as_a_plain_loop_with_all_images(function, way, tolerance, context, tmp_path):
    check(run_processes(function, 2, tmp_path, way), plain(way, context), tolerance)


def gradients_with_batch_norm(rank, processes, shares=(5, 3)):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=CLASSES).double()
    share = processes * shares[rank] / BATCH
    task = MFDClassificationTask(model, lambda logits, y: share * F.cross_entropy(logits, y), verbose=False)
    synchronize_batch_norm(task)
    wrapped = DistributedDataParallel(task) if processes > 1 else task
    x, y = images(0, shares, rank)
    wrapped(x.double(), y)["loss"].backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.slow
def test_a_task_with_synchronised_batch_norm_equals_one_process(tmp_path):
    expected = gradients_with_batch_norm(0, 1, (BATCH,))
    for found in run_processes(gradients_with_batch_norm, 2, tmp_path):
        assert (found - expected).norm() <= 1e-9 * expected.norm()
