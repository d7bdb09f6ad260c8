"What comments say about parameters is in the docstrings too; fastcore, which reads such comments in its own way, agrees."
import importlib, inspect, pydoc
from functools import partial
import pytest
from fastai.basics import Learner
from fastcore.docments import docments
import fastdistill.fastai
from fastdistill.base.parameter_docs import comments, explain, parameter_comments

FACES = ['fastdistill', 'fastdistill.losses', 'fastdistill.recipes', 'fastdistill.fastai']
FUNCTIONS = {f'{m}.{n}': o for m in FACES for n in importlib.import_module(m).__all__ if inspect.isroutine(o := getattr(importlib.import_module(m), n))}
METHODS = {f'Learner.{n}': getattr(Learner, n) for n in ('distill', 'check_teacher', 'show_features')}


def args_of(o):
    "Name -> text, as the docstring of `o` has it"
    _,_,text = inspect.getdoc(o).partition('Args:\n')
    lines = (l.strip().partition(': ') for l in text.splitlines())
    return {n: said for names,_,said in lines for n in names.split(', ')}


@pytest.mark.parametrize('name', FUNCTIONS | METHODS)
def test_help_explains_the_parameters_that_have_a_comment(name):
    fn = (FUNCTIONS | METHODS)[name]
    mine = args_of(fn)
    for p,said in docments(inspect.unwrap(fn)).items():
        if not said or p == 'return': continue
        assert ' '.join(mine[p].split()).startswith(' '.join(said.split())), p       # a comment may go on in lines of its own


def test_help_of_distill_names_what_a_user_sets():
    text = pydoc.render_doc(Learner.distill)
    for p in ('teacher', 'recipe', 'alpha', 'T'): assert f'\n        {p}: ' in text or f'\n    {p}: ' in text


def test_classes_explain_what_they_are_made_with():
    assert 'layers:' in fastdistill.fastai.Term.__doc__ and 'teacher:' in fastdistill.Distiller.__doc__
    assert 'logits:' in fastdistill.Outputs.__doc__ and 'beta:' in fastdistill.losses.DKD.__doc__


def test_two_parameters_on_a_line_share_a_comment_and_a_comment_may_go_on():
    lines = ['a, # first', "b=('a', 2), c:int=1, # of both", '   # and more', 'd, # last', 'e', '# but one', '*', 'f', '# of it']
    assert comments(lines, [*'abcdef']) == {'a': 'first', 'b, c': 'of both and more', 'd': 'last', 'f': 'but one of it'}


def test_lines_before_a_parameter_without_a_comment_explain_it_as_in_fastcore():
    def fn(
        # of a long story,
        # the first part
        a,
        b, # short
        # and long
        # enough
        c=1,
        *,
        # the last
        d=2
    ): "Does it"
    want = dict(a='of a long story, the first part', b='short', c='and long enough', d='the last')
    assert parameter_comments(fn) == want
    assert {k: ' '.join(v.split()) for k,v in docments(fn).items() if v} == want


def test_a_second_explanation_changes_nothing_and_what_has_no_docstring_stays():
    def plain(
        x # of no one
    ): pass
    assert explain(plain).__doc__ is None
    plain.__doc__ = 'Does it'
    assert explain(explain(plain)).__doc__ == 'Does it\n\nArgs:\n    x: of no one'
    assert explain(partial(plain)).__doc__ == partial.__doc__
