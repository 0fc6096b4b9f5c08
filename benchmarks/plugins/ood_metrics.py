"""How well a score tells images from outside the training data from those inside: AUROC, AUPR both ways, FPR95."""

import torch
from torch import Tensor


def ood_metrics(inside: Tensor, outside: Tensor) -> dict[str, float]:
    """pytorch-ood's metrics, each in 0..1.

    Args:
        inside: scores [n] of images like the training data.
        outside: scores [m] of others; higher scores count as further outside, and ties as half right.

    Returns:
        auroc; aupr_out and aupr_in (what is outside, or inside, being the positive class); fpr95, the fraction of
        images inside that are flagged where 95% of those outside are.
    """
    import tofu.models.torchvision_compat  # noqa: F401  before pytorch_ood, which imports torchvision

    from pytorch_ood.metrics import OODMetrics  # isort: skip

    metrics = OODMetrics()
    labels = torch.cat([torch.zeros(len(inside), dtype=torch.int64), -torch.ones(len(outside), dtype=torch.int64)])
    values = metrics.update(torch.cat([inside, outside]).detach(), labels).compute()
    return {
        "auroc": float(values["AUROC"]),
        "aupr_out": float(values["AUPR-OUT"]),
        "aupr_in": float(values["AUPR-IN"]),
        "fpr95": float(values["FPR95TPR"]),
    }
