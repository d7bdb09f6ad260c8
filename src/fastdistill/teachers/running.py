"Which module a teacher runs: the model itself, or a faster copy of it."

from collections.abc import Mapping

from torch import Tensor, nn

from ..base.distributed import rank
from ..base.outputs import DistillError, Outputs, as_plain
from ..features.probe import untouched
from .fast_copy import OPTIONS, Speed
from .forms import is_graph
from .frozen import Guest
from .input_aliasing import input_marks, inputs_kept, may_be_lent, shares_memory
from .items import items_beside

__all__ = ['Running']


class Running:
    """The part of `Teacher` that knows how its module runs."""

    @property
    def _speed_options(self):
        return {k: getattr(self, k) for k in (*OPTIONS, 'device')}

    @property
    def _speed(self):
        """How the module runs, which variations with the same options share; None for other forms
        of teachers.
        """
        if not isinstance(self.model, nn.Module) or is_graph(self.model):
            return None
        all_of_them, key = (
            self._found.setdefault('speed', {}),
            (self.mode, *map(str, self._speed_options.values())),
        )
        if key not in all_of_them:
            all_of_them[key] = Speed(self.model, self.mode, self._speed_options, self._say)
        return all_of_them[key]

    def say_with(self, fn):
        """Where messages about the speed go.

        Args:
            fn: fn(text); None: print.
        """
        self._found['say'] = fn
        for m in self.members:
            m.say_with(fn)

    def _say(self, text):
        if rank() == 0:
            (self._found.get('say') or print)(f'fastdistill: the teacher {self.name} {text}')

    @property
    def half(self):
        """Name of the dtype in which a copy computes, where that is not the model's own; else
        empty.
        """
        return '' if self._speed is None else self._speed.half

    @property
    def runs(self):
        """The nn.Module that runs: `module`, or a faster copy of it."""
        return self.module if self._speed is None else self._speed.module

    @property
    def copy_bytes(self):
        """Bytes of the weights that faster copies have for themselves."""
        return (0 if self._speed is None else self._speed.bytes) + sum(
            m.copy_bytes for m in self.members
        )

    def own_inputs(self, x: tuple, kw=None) -> tuple:
        """(inputs, inputs by name) of the model: the batch's, or what `inputs=` or `items=` made.

        Args:
            x: The batch's inputs.
            kw: And those by name.
        """
        kw = kw or {}
        if self.members or self.inputs is None and self.items is None:
            return x, kw
        own = (
            self.inputs(*x, **kw)
            if self.items is None
            else self.items(items_beside((x, kw), self.name))
        )
        lists = isinstance(own, Mapping) and any(isinstance(v, list) for v in own.values())
        if isinstance(own, Mapping) and not lists:
            return (dict(own),), {}
        if isinstance(own, (Tensor, tuple)):
            return own if isinstance(own, tuple) else (own,), {}
        option = 'inputs' if self.items is None else 'items'
        raise DistillError(
            f'{option}= of the teacher {self.name} returned a {type(own).__name__}'
            f'{" of lists" if lists else ""}: must be a tensor, a tuple of several, or a dict of '
            "tensors by name (of a tokenizer of Hugging Face: return_tensors='pt', padding=True)."
        )

    def _check_own_inputs(self):
        given = {k: fn for k in ('inputs', 'items') if (fn := getattr(self, k)) is not None}
        if len(given) > 1:
            raise DistillError(
                "inputs= makes the teacher's inputs from the batch, items= from the raw items: give one "
                'of them.'
            )
        for k, fn in given.items():
            if not callable(fn):
                raise DistillError(
                    f"{k}={fn!r}: give a function that returns the teacher's inputs."
                )

    @property
    def reads_items(self):
        "Does it, or a member of it, read the raw items instead of the batch's inputs?"
        return (
            any(m.reads_items for m in self.members) or not self.members and self.items is not None
        )

    def expect(self, batches: int):
        """After `start`: the length of this run. A long run is worth compiling for.

        Args:
            batches: That will come before `stop`
        """
        self._batches = batches
        for m in self.members:
            m.expect(batches)

    def _choose_speed(self, x, kw, layers, device):
        """Before a batch: the module that runs."""
        s = self._speed
        if s.is_stale(thorough=False):
            s.run_as_it_is('its weights change while it teaches')
        if s.undecided_for(x, kw):
            s.decide(x, kw, device, layers, lambda m: self._trial(m, x, kw, device))
        s.for_layers(layers)
        if s.module is not self._guest.model:
            self._guest = self._stack.enter_context(self._new_guest())

    def _keeps_inputs(self, layers):
        """Did the module leave its inputs as they were, in its first batch with these layers? None:
        not known.
        """
        return False if self._speed is None else self._found.get(('keeps inputs', *layers))

    def _lent(self, x, kw, device, layers):
        """(inputs, inputs by name) for a run, and what will show whether it changed them."""
        known = self._keeps_inputs(layers)
        own = self._prepare(x, kw, device, lend=known)
        return *own, [] if known is False else input_marks(
            (x, kw), False
        ) if known else input_marks(own, True)

    def _may_lend(self, t):
        return may_be_lent(t) and not t.requires_grad

    def _judge(self, marks, layers, outs):
        """After a run: a module that changes its inputs, or returns views of them, gets copies."""
        known = self._keeps_inputs(layers)
        if known is False:
            return
        kept = inputs_kept(marks)
        self._found['keeps inputs', *layers] = kept and (known or not shares_memory(marks, outs))
        if known and not kept:
            raise DistillError(
                f'The teacher {self.name} changed its input in this batch, and not in its first one. So '
                "the student's batch was changed too. Train again: now the teacher gets copies."
            )

    def _new_guest(self):
        return Guest(self.runs, self.mode, ours=self.runs is not self.module)

    def _trial(self, module, x, kw, device):
        """The logits of a module for a batch. Nothing is changed by it."""
        was = self._guest
        with untouched(module), Guest(module, self.mode) as self._guest:
            try:
                x, kw = self._prepare(x, kw, device)
                return as_plain(Outputs.of(module(*x, **kw), output=self.output).logits)
            finally:
                self._guest = was
