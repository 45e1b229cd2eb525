"""Train a compressor by distillation: the short cache must make the frozen model answer as the long one does.

Part 5 of the method: the loss.  λ·KL(p‖q) + (1−λ)·KL(q‖p),  p the model with the whole cache, q with the short one.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from compress import Compressor, decay, kept_count, select, soft_decay
from data.samples import Batch
from model import Llama, attention_mask


class DistillKL(torch.autograd.Function):
    """λ·KL(p‖q) + (1−λ)·KL(q‖p) per row, from hidden states, with logits made a few hundred rows at a time.

    student, teacher: (R, D) hidden states after the last norm; head: (V, D). Returns fp32 (R,) each: loss, KL(p‖q) and
    whether both put the same token first (1 or 0). Only `loss` has a gradient, and only towards `student`:
        ∂KL(p‖q)/∂z = q − p        ∂KL(q‖p)/∂z = q·(log q − log p − KL(q‖p))        z the student's logits
    It is computed here, in the forward pass, while a chunk's logits exist; autograd would keep every chunk's.
    """

    @staticmethod
    def forward(ctx, student, teacher, head, lam, chunk):
        rows = student.shape[0]
        dtype = torch.promote_types(student.dtype, torch.float32)  # fp32; fp64 stays fp64
        loss, kl, agree = (torch.empty(rows, device=student.device, dtype=dtype) for _ in range(3))
        grad = torch.empty_like(student)
        for i in range(0, rows, chunk):
            part = slice(i, i + chunk)
            log_q = F.linear(student[part], head).to(dtype).log_softmax(-1)   # (chunk, V)
            log_p = F.linear(teacher[part], head).to(dtype).log_softmax(-1)
            agree[part] = (log_q.argmax(-1) == log_p.argmax(-1)).to(dtype)
            q, p = log_q.exp(), log_p.exp()
            gap = log_q.sub_(log_p)                                           # in place from here on: V is large
            forward, reverse = -torch.linalg.vecdot(p, gap), torch.linalg.vecdot(q, gap)
            loss[part], kl[part] = lam * forward + (1 - lam) * reverse, forward
            # dz = λ·(q − p) + (1−λ)·q·(gap − reverse)
            dz = q.mul_(gap.sub_(reverse[:, None]).mul_(1 - lam).add_(lam)).sub_(p, alpha=lam)
            grad[part] = dz.to(head.dtype) @ head
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(kl, agree)
        return loss, kl, agree

    @staticmethod
    def backward(ctx, d_loss, *_):
        grad, = ctx.saved_tensors
        return grad * d_loss[:, None].to(grad.dtype), None, None, None, None


class AttentionTarget:
    """How much attention each context token gets from the continuation in the teacher's own pass (METHOD.md, 3b).

    Mean over heads and over layers from `eta` on, maximum over the supervised positions. Given to the teacher as `watch`.
    """

    def __init__(self, mask, supervised, eta: int, n_context: int):
        self.mask, self.supervised, self.eta, self.n = mask, supervised, eta, n_context
        self.sum, self.layers = 0.0, 0

    def __call__(self, layer, q, k):
        if layer < self.eta:
            return
        B, H, T, d = q.shape
        q = q.view(B, k.shape[1], -1, d)                                     # (B, G, H/G·T, d)
        logits = (q @ k.transpose(2, 3)).view(B, H, T, -1).float() * d ** -0.5 + self.mask
        self.sum = self.sum + logits.softmax(-1)[..., :self.n].mean(1)       # (B, T, N)
        self.layers += 1

    def result(self):                                                        # (B, N)
        mean = self.sum / self.layers
        return mean.masked_fill(~self.supervised[..., None], 0).amax(1)


class Distiller(nn.Module):
    """One training step as one forward: teacher, scores, encoding, student, loss. Layers 1…η are run once for both."""

    def __init__(self, model: Llama, compressor: Compressor, lam: float = 0.6, chunk: int = 256, target: float = 0.0,
                 noise: float = 0.0, soft_tau: float = 0.15):
        super().__init__()
        self.compressor = compressor
        self.model = [model]  # in a list, so that the frozen model is no part of this module's parameters
        self.lam, self.chunk, self.target, self.noise, self.soft_tau = lam, chunk, target, noise, soft_tau

    def forward(self, b: Batch, keep: float, soft: bool = False):
        model, comp = self.model[0], self.compressor
        with torch.no_grad():
            ctx = comp.read(model, b.tokens, b.lengths, b.protect)
            full = comp.full(model, ctx)
            mask = attention_mask(b.cont, full, b.segments)
            watch = AttentionTarget(mask, b.supervised, comp.cfg.eta, b.tokens.shape[1]) if self.target else None
            teacher = model(b.cont, full, b.segments, watch=watch)[b.supervised]      # (R, D)
        scores = comp.scorer(ctx.h)
        n = ctx.candidates.sum(1)
        k = kept_count(n, keep)
        chosen = scores.detach()
        if self.noise:
            chosen = chosen - self.noise * torch.log(-torch.log(torch.rand_like(chosen).clamp(1e-9, 1 - 1e-7)))
        kept = select(chosen, ctx.candidates, k)
        if soft:
            beta = soft_decay(scores, ctx.candidates, k, self.soft_tau)
        else:
            beta = decay(scores, kept, n, comp.cfg.decay, comp.gamma)
        cache = comp.encode(model, ctx, kept, beta, everything=soft)
        student = model(b.cont, cache, b.segments)[b.supervised]
        loss, kl, agree = DistillKL.apply(student, teacher, model.head_weight, self.lam, self.chunk)
        out = {"loss": loss.mean(), "kl": kl, "agree": agree, "kinds": b.kinds[b.supervised]}
        if watch is not None:
            wanted = torch.where(ctx.candidates, watch.result(), 0)
            wanted = wanted / wanted.sum(1, keepdim=True)
            log_chosen = scores.masked_fill(~ctx.candidates, -1e9).log_softmax(1)
            out["target"] = -(wanted * log_chosen).sum(1).mean()
            out["loss"] = out["loss"] + self.target * out["target"]
        return out
