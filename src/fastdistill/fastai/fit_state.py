"""Save and restore the state of distillation in checkpoints.

The state consists of the projectors, their optimizer, the chosen recipes and the measured
gradients.
"""

import copy

from ..base.model_state import ModelState
from ..base.outputs import DistillError, as_plain
from ..distiller.head_state import random_state
from ..distiller.trainer_integration import build_links, load_state, training_state
from .default_recipe import example_of
from .learner_notes import notes_of
from .projector_opt import ProjectorOptimizer


class FitState:
    """Saves and loads the state that a checkpoint needs in addition to the student.

    Args:
        log: fn(text) that prints a message.

    Attributes:
        to_load: State that the next fit will load. None if there is no such state.
        optimizer: `ProjectorOptimizer`. None before the first fit, and without projectors.
    """

    def __init__(self, log):
        self.log, self.to_load, self.optimizer, self.before_finder = log, None, None, None
        self.begun = False

    def train_projectors(self, learn, d):
        """Add a callback to the Learner that trains the projectors of the `Distiller` in this fit."""
        if self.optimizer is None and (own := d.own_parameters()):
            self.optimizer = ProjectorOptimizer(learn, own)
        learn.add_cbs(self.optimizer)
        self.begun = True

    def begin(self, learn, d, output):
        """Load the state, and prepare the projectors for a fit that is about to start.

        For lr_find, which trains until the loss diverges, the projectors and the measured gradients
        are saved, and `end` restores them.

        Args:
            learn: The student's Learner.
            d: The `Distiller`.
            output: The option of `Distiller`.
        """
        finder = hasattr(learn, 'lr_finder')
        if d.ready:
            self.take(learn, d)
        if finder:
            links = ModelState(d.links.modules(), weights=True)
            ratios = copy.deepcopy({k: h.ratios for k, h in d.heads.items()})
            self.before_finder, self.optimizer = (
                (links, ratios, self.optimizer, d.changes.left),
                None,
            )
        for h in d.heads.values():
            h.measures = not finder
        if d.ready:
            self.train_projectors(learn, d)
        elif example := example_of(learn, output):
            self.build_projectors(learn, d, example.x)

    def build_projectors(self, learn, d, x):
        """Pair student and teacher layers, and build projectors. Called once per student."""
        build_links(d, map(as_plain, x))
        d.links.train(learn.training)
        self.take(learn, d)
        self.train_projectors(learn, d)
        if d.pairs and not hasattr(learn, 'lr_finder'):
            self.log(d.pairs)

    def end(self, learn, d):
        """Undo `begin` at the end of a fit. After a regular fit, `Learner.save` saves the resulting
        state.
        """
        if self.optimizer in learn.cbs:
            learn.remove_cb(self.optimizer)
        begun, self.begun = self.begun, False
        if self.before_finder is None:
            # subtle: an error at the start of the fit must not replace the state of an earlier fit
            if begun:
                notes_of(learn).last_state = self.state_dict(d)
            return
        links, ratios, self.optimizer, d.changes.left = self.before_finder
        links.restore()
        for k, h in d.heads.items():
            h.ratios = ratios[k]
        self.before_finder = None

    def state_dict(self, d) -> dict:
        """Return the state that a checkpoint needs in addition to the student.

        Args:
            d: The `Distiller`, or None before the first fit.
        """
        if self.to_load:
            return {k: v for k, v in self.to_load.items() if k != 'file'}
        if d is None:
            return {}
        state = training_state(d)
        if not has_state(d):
            state['distiller'] = None
        return state | dict(opt=None if self.optimizer is None else self.optimizer.state_dict())

    def take(self, learn, d):
        """Load the state passed to `load_state_dict`, or the state found next to the student's
        file.
        """
        state = self.to_load
        if state is None and self.optimizer is None:
            state = notes_of(learn).loaded_state
        finder = hasattr(learn, 'lr_finder')
        if not finder:
            self.to_load = None
        if state:
            self._load(learn, d, state)
        # subtle: after an error, the next fit loads the state of the file
        if not finder:
            notes_of(learn).loaded_state = None

    def _load(self, learn, d, state):
        if differs := what_differs(state['links'], d.links.state_dict()):
            if 'file' not in state:
                raise DistillError(
                    f'This state contains {differs}: load it into a callback with the recipe it '
                    'was saved with.'
                )
            return self.log(f'fastdistill: {state["file"]} contains {differs}, and was not loaded.')
        if 'file' in state:
            self.log(
                f'fastdistill: loaded the projectors and their optimizer from {state["file"]}.'
            )
        optimizer = None
        if state['opt'] is not None:
            optimizer = ProjectorOptimizer(learn, d.own_parameters())
            optimizer.load_state_dict(state['opt'])
        before = {k: h.chosen_text for k, h in d.heads.items()}
        load_state(d, state)
        for k, h in d.heads.items():
            if h.chosen_text != before[k]:
                self.log(f'fastdistill: {h.prefix}recipe {h.chosen_text}, as before')
        if in_fit := self.optimizer in learn.cbs:
            learn.remove_cb(self.optimizer)
        self.optimizer = optimizer
        if in_fit:
            self.train_projectors(learn, d)


def has_state(d) -> bool:
    """Return True if there are measured gradients, if `auto` chose a recipe, or if a teacher uses
    random numbers.
    """
    heads = d.heads.values()
    return bool(d.ratios) or any(h.chosen or random_state(h.teacher) for h in heads)


def what_differs(links, own) -> str:
    """Describe how the saved projectors differ from the current ones. Return '' if they are
    equal.
    """
    shapes = lambda tensors: {k: tuple(v.shape) for k, v in tensors.items()}
    if shapes(links) == shapes(own):
        return ''
    names = lambda links: ', '.join(links) or 'none'
    return f'projectors of different terms or layers ({names(links)}, now {names(own)})'
