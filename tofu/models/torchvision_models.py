"""Models of torchvision for images of a given shape. torchvision is imported when one of them is built."""

from functools import partial

from torch import nn

from tofu.data import ImageShape
from tofu.models.small import ChannelsLast, enlarge_to, norm_layer, resize, sequential


def resnet18(shape: ImageShape, norm: str) -> nn.Module:
    """ResNet-18 (He et al. 2016). Images of up to 64 pixels get a 3x3 stem of stride 1, which keeps their size."""
    from tofu.models.torchvision_compat import torchvision

    model: nn.Module = torchvision.models.resnet18(num_classes=shape.classes, norm_layer=partial(norm_layer, norm))
    small = max(shape.height, shape.width) <= 64
    if small or shape.channels != 3:
        kernel, stride = (3, 1) if small else (7, 2)
        model.conv1 = nn.Conv2d(shape.channels, 64, kernel, stride, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if small:
        model.maxpool = nn.Identity()
    return model


def vgg(configuration: str, shape: ImageShape, norm: str) -> nn.Module:
    """VGG (Simonyan & Zisserman 2015) with one linear layer on globally averaged features instead of three layers."""
    from tofu.models.torchvision_compat import torchvision

    enlarge, _, _ = enlarge_to(shape, 32)
    layers: list[nn.Module] = []
    channels = shape.channels
    for out in torchvision.models.vgg.cfgs[configuration]:
        if out == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        conv = nn.Conv2d(channels, out, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        layers += [conv, nn.ReLU()] if norm == "none" else [conv, norm_layer(norm, out), nn.ReLU()]
        channels = out
    return sequential(
        enlarge
        | {
            "layout": ChannelsLast(),
            "features": nn.Sequential(*layers),
            "avgpool": nn.AdaptiveAvgPool2d(1),
            "flatten": nn.Flatten(),
            "classifier": nn.Linear(channels, shape.classes),
        }
    )


def vit(layers: int, heads: int, dim: int, mlp: int, shape: ImageShape, norm: str, *, patch: int = 0) -> nn.Module:
    """ViT (Dosovitskiy et al. 2021).

    Patches have 4 pixels a side for images of up to 32 pixels and 16 otherwise; images are scaled up to whole patches.
    """
    from tofu.models.torchvision_compat import torchvision

    side = max(shape.height, shape.width)
    patch = patch or (4 if side <= 32 else 16)
    side = -(-side // patch) * patch
    enlarge, _, _ = resize(shape, side, side)
    model = torchvision.models.vision_transformer.VisionTransformer(
        image_size=side,
        patch_size=patch,
        num_layers=layers,
        num_heads=heads,
        hidden_dim=dim,
        mlp_dim=mlp,
        num_classes=shape.classes,
    )
    if shape.channels != 3:
        model.conv_proj = nn.Conv2d(shape.channels, dim, patch, stride=patch)
        nn.init.trunc_normal_(model.conv_proj.weight, std=(shape.channels * patch * patch) ** -0.5)
        nn.init.zeros_(model.conv_proj.bias)
    # torchvision initializes the head to zeros, which blocks the gradient to all other layers.
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)
    return sequential(enlarge | {"vit": model}) if enlarge else model
