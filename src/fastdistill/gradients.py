"How long the gradients of a batch's parts are, measured at a place that all of them reach."
import torch

__all__ = ['norms_at_layer', 'norms_at_logits', 'shares_in_words', 'swamped']


def norms_at(
    values, # part -> its value
    tensors, # where
    scale # what the gradient is multiplied by, so that it does not vanish in half precision
):
    "Part -> the length of its gradient at each of these tensors; 0 where it does not reach one. Nothing else changes"
    norms = {}
    for k,v in values.items():
        grads = torch.autograd.grad(v, tensors, torch.full_like(v, scale), retain_graph=True, allow_unused=True)
        norms[k] = [0. if g is None else g.float().norm().item() for g in grads]
    return norms


def norms_at_logits(values, logits):
    "Part -> the length of its gradient at the student's logits; None if not all reach them"
    if logits is None or not logits.requires_grad: return None
    norms = {k: n for k,(n,) in norms_at(values, [logits], logits.numel()).items()}
    return norms if all(norms.values()) else None


def norms_at_layer(values, student, logits=None):
    "Part -> the length of its gradient at the last parameter of the student that all reach; None if there is none"
    # subtle: of matrices and kernels where there are any; a bias in front of a batch-norm has a gradient of rounding
    # errors
    params = [p for p in student.parameters() if p.requires_grad]
    params = [p for p in params if p.dim() > 1] or params
    buffers = [(b, b.clone()) for b in student.buffers()]
    norms = norms_at(values, params, 1 if logits is None else logits.numel())
    with torch.no_grad():
        # a checkpointed part runs again in its backward pass, and its batch-norm counts that batch again
        for b,before in buffers:
            if not torch.equal(b, before): b.copy_(before)
    shared = [i for i in range(len(params)) if all(n[i] > 0 for n in norms.values())]
    return {k: n[shared[-1]] for k,n in norms.items()} if shared else None


def shares_in_words(shares): return ', '.join(f"{'labels' if k == 'task' else k} {v:.0%}".replace('%', ' %') for k,
                                              v in shares.items())


def swamped(
    shares, # part -> its share of the gradient; the labels' is 'task'
    weights # part -> its weight
):
    "What to say of a part that leaves the labels next to nothing of the gradient; None if there is none"
    if not weights.get('task') or 'task' not in shares: return None
    part = max(shares, key=lambda k: 0. if k == 'task' else shares[k])
    # subtle: labels with the weight .1, as in kd(), have a small share by intention, some .05 at T=4; a fifth of the
    # weight is too little
    if part == 'task' or shares[part] <= .9 or shares['task'] >= weights['task']/5: return None
    equal = f"{weights[part]*shares['task']/shares[part]:.2g} would give it as much as the labels"
    shared = abs(weights[part] + weights['task'] - 1) < 1e-6       # as alpha and 1-alpha
    how = "alpha, or T" if shared else f"the weight of {part}, now {weights[part]:.4g}: {equal}"
    return (f"{part} has {shares[part]:.2%} of the gradient of the first batch, the labels have {shares['task']:.2%}, "
            f"so the student hardly learns from them. Lower {how}.")
