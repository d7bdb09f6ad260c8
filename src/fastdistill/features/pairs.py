"Which layer of the student learns from which layer of the teacher: as asked, or proposed from one look at each model."
import math
from collections.abc import Mapping
from dataclasses import dataclass
from torch import Tensor, nn
from ..outputs import DistillError, Outputs
from .names import named, resolve, split_suffixes, text_table
from .probe import dry_run, probe, series_layers
from .projectors import describe_projector
from .shapes import grid
from .stages import check_visible, image_size, is_picture, stages
from .taps import Taps

__all__ = ['Pair', 'PairTable', 'check_names', 'checked_layers', 'inputs', 'pair']

MAX_BLOCKS = 6 # pairs of blocks at one resolution; where there are more, four at the quarters of the depth


@dataclass
class Pair:
    "A student's layer and the teacher's layer that it learns from"
    student:str
    s_shape:tuple
    teacher:str
    t_shape:tuple
    projector:str='' # in words
    picture:bool=True # tokens are those of a picture; False: of a sequence, such as a text


class PairTable(list):
    "Pairs as a list of `Pair`; printed, a table"
    def __str__(self):
        rows = [(p.student, p.s_shape, p.teacher, p.t_shape, p.projector) for p in self]
        return text_table(('student', 'shape', 'teacher', 'shape', 'projector'), rows)
    __repr__ = __str__


def pair(
    student:nn.Module,
    teacher, # a module, or a `Teacher`
    x_student, # a batch of inputs: a tensor, a tuple of several, or a dict of keyword arguments
    layers='auto', # {'student.layer': 'teacher.layer' or a list}, pairs of names, names or globs for both, 'auto', or
    # 'last' of these
    *,
    x_teacher=None, # the teacher's inputs, if it takes others
    match:str='shape', # what the loss needs of the teacher's shape, and
    projector='auto' # with what it is made, as in `projectors.projector`: here for the table alone
) -> PairTable:
    """The pairs of layers with their shapes, in the order asked, from one evaluation-mode probe of each model that
    changes nothing.

    'auto' takes the last layer of each stage (resolution) of convolutional nets and U-Nets. Two nets pair by resolution
    where that includes the last stages of both, else by relative depth; a U-Net and another net pair by resolution on
    the U-Net's way down. Of transformers, LSTM stacks and MLPs it takes blocks at equal relative depth: all of the
    shorter one's up to 6, else those at the quarters. The layer that makes a model's output is never among them. 'auto'
    and 'last' take a suffix for all names: 'last@mean'."""
    x_s,x_t = inputs(x_student),inputs(x_student if x_teacher is None else x_teacher)
    word,*how = _word_of(checked_layers(layers))
    if word:
        found = _pairs_proposed(student, teacher, x_s, x_t)[-1 if word == 'last' else 0:]
        layers = [('@'.join([s, *how]), '@'.join([t, *how])) for s,_,t,_ in found]
    if not word or how: found = _pairs_asked(student, teacher, x_s, x_t, layers)
    picture = is_picture(x_s) and is_picture(x_t)
    return PairTable(Pair(s, a, t, b, describe_projector(a, b, projector, match), picture) for s,a,t,b in found)


def checked_layers(layers):
    "`layers`, if it has a meaning whatever the models are"
    word,*_ = _word_of(layers)
    names = [layers] if word else [n for names in _name_pairs(layers) for n in names]
    if not names:
        raise DistillError(f"layers={layers!r} names no layers: give {{'student.layer': 'teacher.layer'}}, or 'auto'")
    for n in names: split_suffixes(n)
    return layers


def check_names(student, teacher, layers):
    "Refuse layers that these models don't have; no batch is needed for it"
    if not _word_of(layers)[0]: return _names_asked(student, teacher, layers)
    for who,model in (('student', student), ('teacher', teacher)):
        with _InModel(who): check_visible(model)


def _word_of(layers):
    "['auto' or 'last', *suffixes], or [None] where layers are named"
    word,*how = split_suffixes(layers) if isinstance(layers, str) else [None]
    return [word, *how] if word in ('auto', 'last') else [None]


def inputs(x): return tuple(x) if isinstance(x, (tuple, list)) else (x,)


class _InModel:
    "Errors inside say which of the two models they are about"
    def __init__(self, who): self.who = who
    def __enter__(self): return self
    def __exit__(self, kind, e, _):
        if isinstance(e, DistillError): raise DistillError(f"In the {self.who}: {e}") from e.__cause__


def _pairs_asked(student, teacher, x_s, x_t, layers):
    names = _names_asked(student, teacher, layers)
    with _InModel('student'): a = _layer_shapes(student, x_s, [s for s,_ in names])
    with _InModel('teacher'): b = _layer_shapes(teacher, x_t, [t for _,t in names])
    if not _has_layers(teacher): _refuse_unknown_layout([(s, *a[s], *b[t]) for s,t in names])
    return [(*a[s], *b[t]) for s,t in names]


def _refuse_unknown_layout(pairs):
    "Features of three axes that a function or a cache brings have no layer to tell where their channels are"
    for asked,s,_,t,t_shape in pairs:
        if s != asked and len(t_shape) == 3 and '@' not in t:
            raise DistillError(f"The student's layer {asked!r} has its channels first, (B, C, L). The teacher's {t!r} "
                               f"of shape {t_shape} comes without its layer, so nothing tells whether it has them "
                               f"first too. Bring it as tokens (B, L, C) under the name '{t}@tokens' "
                               f"(cache_teacher(layers=['{t}@tokens']) stores it so), and pair with that name.")


def _names_asked(student, teacher, layers):
    return [n for s,t in _name_pairs(layers) for n in _matching_names(student, teacher, s, t)]


def _name_pairs(layers):
    "(student's pattern, teacher's pattern), many-to-many, in the order given"
    if isinstance(layers, Tensor):
        raise DistillError("layers= got a tensor. The teacher's own inputs go into x_teacher=.")
    if isinstance(layers, str): layers = [layers]
    if isinstance(layers, Mapping):
        layers = [(s, t) for s,ts in layers.items() for t in (ts if isinstance(ts, (tuple, list)) else [ts])]
    items = [(o, o) if isinstance(o, str) else o for o in (layers if isinstance(layers, (tuple, list)) else [layers])]
    if wrong := [o for o in items if not isinstance(o, (tuple, list)) or [type(n) for n in o] != [str, str]]:
        raise DistillError(f"layers={layers!r}: {wrong[0]!r} is no pair of names. Possible are {{'student.layer': "
                           "'teacher.layer'}, {'student.layer': ['teacher.layer', ...]}, a list of pairs, a list of "
                           "names "
                           "that both models have, 'auto' and 'last'")
    return items


def _matching_names(student, teacher, s, t):
    "Globs on both sides pair in order"
    with _InModel('student'): a = resolve(student, s)
    with _InModel('teacher'): b = resolve(teacher, t) if _has_layers(teacher) else [t]
    if len(a) != len(b):
        raise DistillError(f"{s!r} are {len(a)} layers of the student ({', '.join(a)}), {t!r} are {len(b)} of the "
                           f"teacher ({', '.join(b)}): they pair in order if they are as many. Name them one by one.")
    return zip(a, b)


def _has_layers(model): return isinstance(model, nn.Module) or bool(named(model))


def _layer_shapes(model, x, names):
    "Name asked -> (name, shape): the name says @tokens where a layer of three axes has its channels first"
    if not _has_layers(model): return _shapes_of_outputs(dry_run(model, *x), names)
    with Taps(model, names) as taps:
        ran = probe(model, *x)
        shapes = {n: tuple(y.shape) for n,y in taps.pop().items()}
    final = dict(zip(shapes, _with_tokens(named(model), ran, shapes)))
    if [*final] == [*final.values()]: return {n: (n, shape) for n,shape in shapes.items()}
    again = _layer_shapes(model, x, list(final.values()))
    return {n: again[f] for n,f in final.items()}


def _with_tokens(modules, ran, names):
    """Names with @tokens first where a layer's three axes are (B, C, L), and without it where they are (B, L, D) as
    they come"""
    first,fired = series_layers(ran),{f.module: f for f in ran}
    for name in names:
        base,*how = name.split('@')
        f = fired[modules[base]]
        shape = f.shape_in if 'in' in how else f.shape
        if shape is not None and len(shape) == 3:
            where,turns = [h for h in how if h in ('in', 'pre')],[h for h in how if h in ('map', 'mean')]
            how = [*where, *(['tokens'] if f.module in first else []), *turns]
        yield '@'.join([base, *how])


def _shapes_of_outputs(out, names):
    "Of a teacher without layers, such as a function: the features that its answer brings along"
    feats = out.feats if isinstance(out, Outputs) else {}
    if wrong := [n for n in names if n not in feats]:
        raise DistillError(f"Its answers bring no {wrong[0]!r} along. They bring: {', '.join(feats) or 'no features'}.")
    return {n: (n, tuple(feats[n].shape)) for n in names}


def _pairs_proposed(student, teacher, x_s, x_t):
    with _InModel('student'): a = stages(student, x_s)
    with _InModel('teacher'): b = stages(teacher, x_t)
    if a[0].kind == 'vector' and b[0].kind != 'vector':
        raise DistillError(f"layers='auto' finds vectors in the student and {b[0].kind} in the teacher, which it can't "
                           "become. Pair by hand: layers={'student.layer': 'teacher.layer'}.")
    pairs = _pair_by_resolution(a, b, image_size(x_s), image_size(x_t)) or _pair_by_depth(a, b)
    return [(*_name_and_shape(s, t, x_s), *_name_and_shape(t, s, x_t)) for s,t in pairs]


def _name_and_shape(u, other, x):
    "Name and shape of a stage; a square picture's tokens opposite a map are taken as a map"
    square = is_picture(x) and len(set(image_size(x))) == 1
    g = grid(u.shape[1]) if square and u.kind == 'tokens' and other.kind == 'map' else None
    if g: return f'{u.name}@map', (u.shape[0], u.shape[2], *g[1:])
    if u.turn == '@tokens': return f'{u.name}@tokens', (u.shape[0], u.shape[2], u.shape[1])
    return u.name + u.turn, u.shape


def _pair_by_depth(a, b):
    "Equal relative depth, the last with the last"
    n = min(len(a), len(b))
    if n > MAX_BLOCKS and any(len({u.place for u in us}) == 1 for us in (a, b)): n = 4
    at = lambda us, k: us[int((k+1)*len(us)/n + .5) - 1]
    return [(at(a, k), at(b, k)) for k in range(n)]


def _pair_by_resolution(a, b, size_a, size_b):
    "Stages of equal resolution, each on the way down or each on the way up again; None where resolution is no guide"
    if not size_a or len(size_a) != len(size_b) or any(u.kind != 'map' for u in a+b): return None
    down_a,down_b = _going_down(a),_going_down(b)
    shrinks = lambda i, j: [(p/n)/(q/m) for n,p,m,q in zip(size_a, a[i].place, size_b, b[j].place)]
    equal = lambda i, j: all(.8 < r < 1.25 for r in shrinks(i, j))
    def ends(row): return row and row[-1] == (a[-1], b[-1]) and 2*len(row) >= min(len(a), len(b))
    row = _longest_row(a, b, lambda i, j: equal(i, j) and down_a[i] == down_b[j])
    if ends(row) or all(down_a + down_b): return row if ends(row) else None
    # one is a U-Net: a net of the output's resolution throughout has the U-Net's last stage as its counterpart; other
    # nets have
    # its way down, and its way up where they share no resolution on the way down
    anywhere = _longest_row(a, b, equal)
    return anywhere if ends(anywhere) else row or anywhere or None


def _longest_row(a, b, equal):
    "Pairs in the order of both models, as many as possible; where that leaves a choice, those that end later"
    best = {}
    for i in range(len(a)):
        for j in range(len(b)):
            if equal(i, j): best[i, j] = [*best.get((i-1, j-1), []), (i, j)]
            else: best[i, j] = max(best.get((i-1, j), []), best.get((i, j-1), []), key=lambda row: (len(row), row[-1:]))
    return [(a[i], b[j]) for i,j in best[len(a)-1, len(b)-1]]


def _going_down(us):
    "Is each stage on the way down, the first included? Stages as large as the one before go where that goes"
    down = [True]
    for u,before in zip(us[1:], us):
        now,was = math.prod(u.place),math.prod(before.place)
        down.append(now < was or now == was and down[-1])
    return down
