"Terms with a share: the weight that keeps a term's gradient as long as a share of the other gradients."
import torch
from torch import Tensor
from .gradients import gradient_norm
from .outputs import DistillError
from .ranks import length_over_ranks

__all__ = ['GradientRatio', 'GradientRatios']


class GradientRatio:
    """The weight that keeps a term's gradient as long as that of the labels and of all terms with a weight, where the
    term compares: at the student's logits, or at its layers. Both lengths are running means, measured in the first
    batches and then in one of `EVERY`. They stay on the device, so that no step waits for them."""
    FIRST,EVERY,NEW = 16,32,.2 # batches that are all measured; then one in so many; what a new one counts in the mean

    def __init__(self): self.batches,self.measured,self.norms = 0,0,None

    def due(self):
        "Is this batch measured? Counts it"
        self.batches += 1
        return self.batches <= self.FIRST or self.batches % self.EVERY == 0

    def add(
        self, norms:Tensor # (2,) of what has a weight, and of the term; over all processes
    ):
        self.measured += 1
        before = torch.zeros_like(norms) if self.norms is None else self.norms
        norms = norms.where(norms.isfinite().all(), before)     # an overflow in half precision says nothing
        self.norms = before.lerp(norms, max(1/self.measured, self.NEW))

    @property
    def factor(self):
        "0-dim; 0 as long as the term has no gradient"
        return (self.norms[0]/self.norms[1]).where(self.norms[1] > 0, 0.)

    def state_dict(self): return dict(batches=self.batches, measured=self.measured, norms=self.norms)

    def load_state_dict(self, state): self.batches,self.measured,self.norms = state.values()


class GradientRatios(dict):
    "Term -> its `GradientRatio`, for the terms with a share"
    def __init__(self, recipe): super().__init__({t.name: GradientRatio() for t in recipe.terms if t.is_share})

    def weights(
        self,
        weights, # part -> its weight, or its share; the labels' is 'task'
        values, # part -> its value, of the parts that count and have a gradient
        tensors # fn(term name): the student's logits or features that this term compares
    ):
        "The weights, those of terms with a share multiplied by what was measured"
        fixed = [weights[k]*v for k,v in values.items() if k not in self]
        base,out = sum(fixed[1:], fixed[0]) if fixed else None,dict(weights)
        for k,ratio in self.items():
            # without labels, what was measured before counts
            if k in values and base is not None and ratio.due(): self._measure(k, base, values[k], tensors(k))
            if ratio.norms is not None: out[k] = weights[k]*ratio.factor
            elif k in values and base is None:
                raise DistillError(f"{k} has a share of the gradient beside the labels and the terms with a weight, "
                                   "and there are none in this batch. Give it weight= in place of share=.")
        return out

    def _measure(self, name, base, value, tensors):
        tensors = [x for x in tensors if x.requires_grad]
        if not tensors: return      # frozen layers: the term trains its projector alone
        try: norms = [gradient_norm(v, tensors) for v in (base, value)]
        except RuntimeError as e:
            raise DistillError(f"The gradient of {name} can't be measured inside a part of the student that allows one "
                               f"backward pass alone, as compiled parts do ({e}). Give it weight= in place of "
                               "share=.") from e
        if None in norms:
            raise DistillError(f"The labels' loss does not depend on what {name} compares, so that it can have no "
                               "share of the gradient there. Give it weight= in place of share=, or compare another "
                               "output (output=) or layer.")
        self[name].add(length_over_ranks(torch.stack(norms)))

    def state_dict(self): return {k: r.state_dict() for k,r in self.items()}

    def load_state_dict(self, state):
        for k,s in state.items():
            if k in self: self[k].load_state_dict(s)
