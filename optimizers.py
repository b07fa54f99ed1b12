"""The optimizers: AdamW, or Muon on the matrices of blocks and AdamW on the rest. Both skip a non-finite step, weights
and moments unchanged, without a host sync: `found_inf`, a () tensor on the device, is then 1."""
import torch
from torch import Tensor

import model


def made(cfg, decoder: model.Decoder) -> torch.optim.AdamW:
    """The optimizer of all weights that are trained; weight decay applies to matrices and embeddings only."""
    groups = {}
    for name, parameter in decoder.named_parameters():
        if parameter.requires_grad:
            matrix, in_block = parameter.dim() > 1, ".layers." in name
            kind = matrix, model.of_critic(name), cfg.optimizer == "muon" and matrix and in_block
            groups.setdefault(kind, []).append(parameter)
    given = [{"params": group, "weight_decay": cfg.weight_decay * matrix, "muon": muon,
              "peak": of_critic and cfg.critic_lr or cfg.lr}  # learning rate
             for (matrix, of_critic, muon), group in sorted(groups.items(), reverse=True)]
    return Muon(given, lr=cfg.lr, betas=cfg.betas, fused=True)


class Muon(torch.optim.AdamW):
    """AdamW, except for groups with "muon" set: these use orthogonalized Nesterov momentum, arXiv:2502.16982, with updates scaled
    to the size of AdamW's, so that one learning rate serves both."""

    @torch.no_grad()
    def step(self):
        bad = self.found_inf.bool()
        for group in [group for group in self.param_groups if group["muon"]]:
            for p in [p for p in group["params"] if p.grad is not None]:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"]
                ahead = momentum.lerp(p.grad, 0.05)
                update = orthogonal(p.grad.lerp(ahead, 0.95)).to(p) * (0.2 * max(p.shape) ** 0.5) + group["weight_decay"] * p
                momentum.copy_(torch.where(bad, momentum, ahead))
                p.sub_(torch.where(bad, 0, group["lr"] * update))
                p.grad = None  # so that AdamW skips it
        super().step()


def orthogonal(matrix: Tensor) -> Tensor:
    """Approximately U V^T of the matrix's SVD: five Newton-Schulz iterations in bf16, with Keller Jordan's coefficients."""
    x = matrix.bfloat16()
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
