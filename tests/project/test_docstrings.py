"Public docstrings are in Google style and say what each parameter is."

import importlib, inspect
import pytest
import fastdistill.fastai
from fastai.basics import Learner
from fastdistill.recipes.catalog import parameter_texts

FACES = ['fastdistill', 'fastdistill.losses', 'fastdistill.recipes', 'fastdistill.fastai']
PUBLIC = {
    f'{m}.{n}': getattr(importlib.import_module(m), n)
    for m in FACES
    for n in importlib.import_module(m).__all__
}
PUBLIC |= {
    f'Learner.{n}': getattr(Learner, n)
    for n in ('distill', 'distill_find', 'check_teacher', 'explain', 'show_features')
}
CALLABLE = {
    k: o
    for k, o in PUBLIC.items()
    if callable(o) and not (isinstance(o, type) and issubclass(o, (Exception, Warning)))
}


@pytest.mark.parametrize('name', CALLABLE)
def test_documented_parameters_exist(name):
    o = CALLABLE[name]
    if isinstance(o, type) and hasattr(o, 'fn'):
        o = o.fn
    names = set(inspect.signature(o).parameters)
    assert set(parameter_texts(o)) <= names | {'temperature'}


def test_help_of_distill_names_what_a_user_sets():
    assert {'teacher', 'recipe', 'alpha', 'T'} <= set(parameter_texts(Learner.distill))


def test_classes_explain_what_they_are_made_with():
    assert {'layers', 'weight', 'loss'} <= set(parameter_texts(fastdistill.fastai.Term))
    assert {'student', 'teacher', 'recipe'} <= set(parameter_texts(fastdistill.Distiller))
    assert 'beta' in parameter_texts(fastdistill.losses.dkd)


def test_a_text_may_continue_on_further_lines_and_belong_to_two_parameters():
    def fn(a, b, c=1, *more):
        """Add.

        Args:
            a: The first,
                and more.
            b, c: Both.
            *more: The rest.

        Returns:
            The sum: a number.
        """

    assert parameter_texts(fn) == {
        'a': 'The first, and more.',
        'b': 'Both.',
        'c': 'Both.',
        'more': 'The rest.',
    }
