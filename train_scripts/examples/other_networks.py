"""Networks that are not timm's: feature maps from hooks of torchvision, and MFDLoss alone.

python train_scripts/examples/other_networks.py OUTPUT_FOLDER
"""

import sys
from pathlib import Path

import torch
from digits import digits
from safetensors.torch import save_model
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.models import resnet18
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.models.feature_extraction import create_feature_extractor

import timm_mfd  # MFD

STAGES = ["relu", "layer1", "layer2", "layer3", "layer4"]


def main(folder: str) -> None:
    """Train torchvision's ResNet-18 on some handwritten digits, then take one step of a detector."""
    torch.manual_seed(0)
    mfd = timm_mfd.MFDLoss(weight=1.0)  # MFD
    model = resnet18(num_classes=10)
    net = create_feature_extractor(model, [*STAGES, "fc"])  # MFD: the logits and the maps of one forward pass
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for images, labels in DataLoader(digits(train=True), batch_size=64, shuffle=True, drop_last=True):
        out = net(images)
        loss = cross_entropy(out["fc"], labels) + mfd([out[stage] for stage in STAGES]).loss  # MFD
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"ResNet-18: loss {loss.item():.3f}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_model(model, f"{folder}/model.safetensors")

    detector = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=2)
    maps: list[torch.Tensor] = []
    hook = detector.backbone.register_forward_hook(lambda *call: maps.extend(call[-1].values()))  # MFD: the pyramid
    box = {"boxes": torch.tensor([[20.0, 20.0, 90.0, 90.0]]), "labels": torch.tensor([1])}
    losses = detector([torch.rand(3, 128, 128) for _ in range(2)], [box, box])
    loss = sum(losses.values()) + mfd(maps).loss  # MFD
    loss.backward()
    hook.remove()
    print(f"detector: loss {loss.item():.3f}, {len(maps)} maps")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/other_networks")
