"""The fold of Lift: the same classifier in the student's own width, at the cost of a student without a lift.

A LayerNorm behind a linear map without bias is a function of the map's input. With P_c the projector whose rows have
lost their mean over the D_T lifted channels, and L any root of ``P_c P_c^T / D_T = L L^T``, a token x has the lifted
variance ``||x L||^2``, so that::

    LayerNorm(x P) = (x P_c) / sqrt(||x L||^2 + eps) * gamma + beta

and, as pooling and head are linear, with head W and bias b::

    logits = mean_n[ x_n / sqrt(||x_n L||^2 + eps) ] (P_c diag(gamma) W^T) + (b + W beta)

A DeiT with distillation token has two heads, each on a token of its own: both fold like this, without the mean.

So for classification a trained Lift is a plain vision transformer with a Mahalanobis norm of its tokens and a head of
rank at most D_S: what it brings, it brings through training, its parametrisation and its feature loss, and not through
capacity at inference. (kdvit's own; it is not in the paper.) WideLast cannot be folded: its wide block is not linear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdvit.structures import at_least_float32


class MahalanobisNorm(nn.Module):
    """``x / sqrt(||x L||^2 + eps)`` of each token, L lower triangular and stored as the vector of its entries.

    Args:
        width: Channels D.
        eps: That of the LayerNorm that was folded.

    Examples:
        >>> norm = MahalanobisNorm(2, eps=0.0)
        >>> norm(torch.tensor([[3.0, 4.0]])).tolist()
        [[0.6000000238418579, 0.800000011920929]]
    """

    places: Tensor

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        rows, columns = torch.tril_indices(width, width)
        places = torch.zeros(width, width, dtype=torch.long)
        places[rows, columns] = torch.arange(1, len(rows) + 1)
        self.register_buffer("places", places, persistent=False)
        self.factor = nn.Parameter((rows == columns).float())

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns tokens ``[..., D]`` in the same shape."""
        root = torch.cat([self.factor.new_zeros(1), self.factor])[self.places]
        with torch.autocast(tokens.device.type, enabled=False):  # as LayerNorm: a square may be too large for half
            precise = at_least_float32(tokens)
            variance = (precise @ root.to(precise.dtype)).square().sum(-1, keepdim=True)
            return (precise * (variance + self.eps).rsqrt()).to(tokens.dtype)

    @torch.no_grad()
    def set_root(self, root: Tensor) -> None:
        """Takes L ``[D, D]``, lower triangular."""
        self.factor.copy_(root[self.places > 0])


@torch.no_grad()
def fold_lift(model: Any) -> None:
    """Folds the lift of a timm model into its final norm and head, in place and in float64.

    Args:
        model: As `LiftViT` builds it: norm is Linear and LayerNorm, heads are Linear, and read the mean of the patch
            tokens or a token each.

    Raises:
        ValueError: If norm or a head is another.
    """
    norm = model.norm
    lifts = isinstance(norm, nn.Sequential) and [type(each) for each in norm] == [nn.Linear, nn.LayerNorm]
    if not lifts or norm[0].bias is not None:
        raise ValueError(f"There is no lift to fold: expected Linear without bias and LayerNorm as norm, got {norm}.")
    heads = {name: getattr(model, name) for name in ("head", "head_dist") if hasattr(model, name)}
    for head in heads.values():
        if type(head) is not nn.Linear or head.out_features == 0:
            raise ValueError(f"A lift folds into a linear head, and this student has {head}.")
    project, layer_norm = norm
    projector = project.weight.double().T  # [D_S, D_T]
    width, wide = projector.shape
    centred = projector - projector.mean(dim=1, keepdim=True)
    upper = torch.linalg.qr(centred.T / wide**0.5, mode="r").R  # upper^T upper = P_c P_c^T / D_T, of any rank
    root = projector.new_zeros(width, width)
    root[:, : len(upper)] = upper.T
    dtype = torch.promote_types(model.head.weight.dtype, torch.float32)
    device = model.head.weight.device
    model.norm = MahalanobisNorm(width, layer_norm.eps).to(device, dtype)
    model.norm.set_root(root)
    for name, head in heads.items():
        weight, bias = head.weight.double(), 0.0 if head.bias is None else head.bias.double()
        folded = nn.Linear(width, head.out_features, device=device, dtype=dtype)
        folded.weight.copy_(weight * layer_norm.weight.double() @ centred.T)
        folded.bias.copy_(bias + weight @ layer_norm.bias.double())
        setattr(model, name, folded)
    model.to(dtype)  # from half precision the whole model becomes float32, so that nothing is rounded again
    model.num_features = model.head_hidden_size = width
    model.train(model.training)
