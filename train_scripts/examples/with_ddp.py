"""Several processes with DistributedDataParallel; the correlations go over the images of all of them.

torchrun --nproc-per-node 2 train_scripts/examples/with_ddp.py OUTPUT_FOLDER
"""

import os
import sys

import timm
import torch
import torch.distributed as dist
from digits import accuracy, digits
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import timm_mfd  # MFD


def main(folder: str) -> None:
    """Train on handwritten digits; the first process saves the model."""
    dist.init_process_group()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10).to(device)
    net = timm_mfd.with_stages(model, mfd=timm_mfd.MFDLoss(weight=1.0))  # MFD: wrap this instead of the model
    net = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    data = digits(train=True)
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=64 // dist.get_world_size(), sampler=sampler, drop_last=True)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        net.train()
        for images, labels in loader:
            out = net(images.to(device))
            loss = cross_entropy(out.logits, labels.to(device)) + out.mfd.loss  # MFD: + out.mfd.loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}, of which MFD {out.mfd.loss.item():.3f}")
    if dist.get_rank() == 0:
        print(f"{100 * accuracy(model.cpu()):.1f} % of the held-out digits")
        timm_mfd.save_pretrained(model, folder, image_size=(32, 32))
        print(f'timm.create_model("local-dir:{folder}", pretrained=True)')
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/with_ddp")
