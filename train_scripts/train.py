"""Train any timm backbone with multi-stage feature decorrelation.

accelerate launch train_scripts/train.py   (handwritten digits, about a minute on a CPU)

accelerate launch train_scripts/train.py --dataset tiny_imagenet --data-dir DIR --model mobilenetv2_100_mfd --epochs 100

accelerate launch train_scripts/train.py --recipe resnet50/cifar100/softmax+mfd --data-dir DIR

accelerate launch train_scripts/train.py --resume RUN
"""

import _extra  # noqa: F401, before what it looks for

# isort: split

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import tyro
from accelerate.utils import set_seed
from torch import nn

from timm_mfd import MFDClassificationTask, MFDLoss, checkpoint, create_model, recipes
from timm_mfd.arguments import Args
from timm_mfd.criteria import create_criterion
from timm_mfd.data import EvalLoader, ImageDecodeError, TrainLoader, place
from timm_mfd.data.mixing import Mixing
from timm_mfd.data.timm_augmentation import AugmentedImages
from timm_mfd.evaluation import evaluate
from timm_mfd.launch import one_line_errors, start_all_processes
from timm_mfd.models import arguments_for
from timm_mfd.sources import source_of
from timm_mfd.stages import stage_shapes
from timm_mfd.sync_batch_norm import synchronize_batch_norm
from timm_mfd.training.optimizer import create_optimizer, set_learning_rate
from timm_mfd.training.preprocessing import load_data
from timm_mfd.training.run import Run
from timm_mfd.training.run_folder import RunFolder
from timm_mfd.training.session import Session
from timm_mfd.training.start import start
from timm_mfd.training.stop_mark import marking_a_stop


@marking_a_stop  # for schedulers, which start it again
def main(args: Args) -> None:
    """Train, evaluate after each epoch, and leave a run folder with a model that loads."""
    with one_line_errors(ValueError, OSError):  # all that can be wrong is found before anything is written
        # 1. What was asked for, on which data and devices, and what is resumed, if anything.
        args = replace(args, model=source_of(args.model)).checked()
        args, data, preprocessing = load_data(args)
        accelerator = start(args)
        device = accelerator.device
        model_arguments = arguments_for(args.model, data.image_size, None if args.stem == "auto" else args.stem)
        args = replace(args, stem=model_arguments.get("stem", "auto"))
        run = Run(args, data, accelerator)
        if run.is_finished:
            accelerator.print(f"{run.folder} is finished")
            return

        # 2. A plain timm model; around it the task, whose forward reads the stages and adds the loss. Every process
        #    starts from the same weights.
        set_seed(args.seed)
        if args.drop_path:
            model_arguments["drop_path_rate"] = args.drop_path
        model = create_model(args.model, args.pretrained, num_classes=data.num_classes, **model_arguments)
        model = model.to(device, memory_format=torch.channels_last)
        shapes = stage_shapes(model, torch.zeros(1, 3, *data.image_size, device=device), args.stages)
        task = build_task(args, model, device)
        if args.sync_batch_norm:
            synchronize_batch_norm(task)  # so that N processes train as one
        optimizer = create_optimizer(args, model)
        if args.ema_decay:
            task.setup_ema(decay=args.ema_decay)
        run.restore(task, optimizer)  # nothing to do for a new run

        # 3. Batches on the device. Order, crops and flips are functions of (seed, epoch), whatever the processes.
        with accelerator.local_main_process_first():  # the others read the cache that the first one wrote
            share = {"workers": args.workers, "cache_dir": args.cache_dir, "processes": accelerator.num_processes}
            share["quiet"] = not accelerator.is_local_main_process
            data = place(data, args.loader, device, train=args.augment == "paper", **share)
        shard = {"rank": accelerator.process_index, "processes": accelerator.num_processes, "device": device}
        by_timm = partial(AugmentedImages, data, seed=args.seed, aa=args.aa, random_erasing=args.random_erasing)
        augmented = by_timm() if args.augment == "timm" else None
        train_loader = TrainLoader(
            data, args.batch_size, seed=args.seed, augmented=augmented, workers=args.workers, **shard
        )
        test_loader = EvalLoader(data, 256, workers=args.workers, **shard)
        mixing = Mixing(data.num_classes, mixup=args.mixup, cutmix=args.cutmix, seed=args.seed)
        run.begin(task, shapes, train_loader, preprocessing)  # makes the folder, says what is going to be done

    # 4. Train. Between two steps, inside `session.steps`, the loss is watched, a checkpoint is written when it is due,
    #    and on Ctrl-C or SIGTERM it is written once more and the run ends there. There is no scheduler: the learning
    #    rate is a function of the position in the run.
    if args.compile:
        task.compile(mode=args.compile_mode, dynamic=False)  # two shapes: a whole batch and the last held-out one
    net, net_optimizer = accelerator.prepare(task, optimizer)
    with (
        one_line_errors(ImageDecodeError, FloatingPointError, OSError),
        Session(run, task, net, optimizer, train_loader) as session,
    ):
        for epoch in session.epochs():
            net.train()
            for images, labels in session.steps():
                set_learning_rate(optimizer, args.learning_rate(session.position))
                images, labels = mixing(images, labels, epoch, session.step)
                for part, targets in session.parts(images, labels):  # one, unless --accumulate says more
                    out = net(part, targets)  # loss = criterion + weight * sum of Eq. 5 over the stages
                    accelerator.backward(out["loss"] / args.accumulate)
                    session.log(out)
                if args.clip_grad:
                    accelerator.clip_grad_norm_(model.parameters(), args.clip_grad)
                net_optimizer.step()
                net_optimizer.zero_grad()
                task.update_ema()
            trained = task.get_eval_model(ema=bool(args.ema_decay))
            batches = session.interruptible(test_loader)
            accuracy = evaluate(trained, batches, data.num_classes, accelerator.autocast)
            session.end_epoch(accuracy, run.correlations(trained) if accelerator.is_main_process else [])

    # 5. Export model and curves, and last the summary, by which a run is known to be finished.
    if accelerator.is_main_process:
        with one_line_errors(OSError):
            run.finish(session.metrics, trained, accuracy)


def build_task(args: Args, model: nn.Module, device: torch.device) -> MFDClassificationTask:
    """Put model, criterion and MFD into one `forward`."""
    criterion = create_criterion(
        args.criterion,
        model,
        label_smoothing=args.label_smoothing,
        margin=args.margin,
        scale=args.scale,
        center_weight=args.center_weight,
    )
    mfd = MFDLoss(args.mfd_weight, center=args.mfd_center, max_samples=args.mfd_max_samples)
    return MFDClassificationTask(model, criterion, mfd, stage_indices=args.stages, device=device, verbose=False)


def parse(words: Sequence[str] | None = None) -> Args:
    """Read the command line; what it leaves out is as in the recipe, or as in the run that is resumed.

    Args:
        words: The command line without the script. Default: that of this process.
    """
    cli = partial(tyro.cli, Args, description=__doc__, args=words)
    args, name = cli(), None
    if args.recipe is not None:
        recipe, protocol = recipes.find(args.recipe)
        name = recipe.name(protocol)  # one name for a recipe, however it was written
        args = replace(cli(default=recipe.arguments(protocol)), recipe=name)
    called = replace(args, model=source_of(args.model)).name
    source = RunFolder.to_resume(args.resume, args.output_dir, called) if args.resume else None
    if source is not None:
        begun_with = checkpoint.read_record(source.checkpoint)["args"] if source.checkpoint.is_file() else source.args
        args = cli(default=Args.of_run(begun_with))
        args = replace(args, recipe=name) if name else args
    return args


if __name__ == "__main__":
    with one_line_errors(ValueError):
        parsed = parse()
        start_all_processes()
    with one_line_errors():  # an interruption anywhere is one line
        main(parsed)
