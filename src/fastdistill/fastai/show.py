"`Learner.show_features`."
from fastai.basics import Learner, patch
from ..plots import show_features as show
from ..replay import untouched
from .check import sample, split
from .teachers import image_stats, teacher_of

__all__ = []


@patch
def show_features(
    self:Learner, # the student
    teacher, # what `KnowledgeDistillation` takes
    layers='auto', # as in `Term`: {'student.layer': 'teacher.layer'}, pairs of names, 'auto' or 'last'; their outputs are maps or tokens
    n:int=4, # pictures of the validation set
    p:float=2 # exponent of the activations
):
    "Where student and teacher look, side by side, in `n` pictures of the validation set; returns the figure, which notebooks show"
    with untouched(): b = next(iter(sample(self.dls.valid)))
    x,_ = split(self, b)
    x = tuple(o[:n] for o in x)
    mean,std = [o.to(x[0]) if hasattr(o, 'to') else o for o in image_stats(self.dls)]
    return show(self.model, teacher_of(teacher, self), x, layers, images=(x[0]*std + mean).clamp(0, 1), n=n, p=p)
