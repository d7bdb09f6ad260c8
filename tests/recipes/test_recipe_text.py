"Recipes as text: the same as in Python, without running it."

import inspect, random, sys
import pytest
from fastdistill import DistillError, Recipe, Term, auto, losses, recipes
from fastdistill.cli.recipe_names import names_in_source
from fastdistill.fastai import KnowledgeDistillation
from fastdistill.recipes.recipe_text import recipe_from_text


def test_whatever_a_recipe_is_given_as_becomes_one():
    from fastdistill.fastai import kd
    from fastdistill.search.candidates import given_candidates

    made = given_candidates(dict(a='kd(T=2)', b=kd(T=2), c=lambda: kd(T=2)))
    assert len({repr(c.recipe({})) for c in made}) == 1
    with pytest.raises(DistillError, match='omit recipes='):
        given_candidates(dict(a='auto'))


GOOD = [
    'kd()',
    'kd(T=4, alpha=.9)',
    'kd(2, .5) + at()',
    "kd(T=('cosine', 8, 1), alpha=('linear', .9, .1))",
    'kd(class_mean=True)',
    "at(layers={'1': 'layer2', '2': 'layer3'})",
    "hint(layers=[('a', 'b')], projector='conv_bn', stop_at=.5)",
    'dkd(weight=None)',
    'kd() + at() + recipes.dist(beta=2)',
    'soft_labels(temperature=3)',
    'logit_std(kd(T=2) + at(), )',
    '(kd() + at()) + dkd()',
    'Term(losses.binary_kl, grad_ratio=3, T=1)',
    'Term(losses.hint, layers="auto", projector="linear") + kd()',
    'fsp(weight=+1.5)',
    'kd(T=1e0)',
]
BAD = [
    ('', 'this is not a recipe'),
    ('kd', r'write kd\(\), with parentheses'),
    ('kdd()', "no recipe 'kdd' \\(did you mean 'kd'\\?\\). It must be one of ab, abkd, at"),
    ('kd(Temp=4)', "kd has no option 'Temp'. It has T, alpha, class_mean, temperature"),
    ('kd(T=-1)', 'a temperature must be a number above 0'),
    ('kd(T=4, T=5)', 'T is given twice'),
    ('kd() + at(weight=1, grad_ratio=1)', r"at 'at\(weight=1, grad_ratio=1\)'"),
    ('kd(*[1])', 'an argument must be a number'),
    ('kd(**{})', r'\*\* is not supported'),
    ('labels', 'labels only is not a recipe'),
    ('kd() - at()', 'a recipe must be a sum of calls'),
    ("kd(T=open('x'))", 'at "open\\(\'x\'\\)": an argument must be a number'),
    ("__import__('os').getcwd()", 'only recipes can be called'),
    ('kd.__class__()', 'only recipes can be called'),
    ('recipes.Term()', 'first argument of a term|needs a loss'),
    ('Term(losses.__name__)', 'first argument of a term'),
    ('Term(losses.loss)', 'first argument of a term'),
    ('(lambda: 1)()', 'only recipes'),
    ('kd(T=f"{1}")', 'an argument must be a number'),
    ('kd(T=1e999)', 'too large'),
    ('kd(T=10**9)', 'an argument must be a number'),
    ('kd(T=' + '9' * 99 + ')', 'too large'),
    ('(' * 999, 'this is not a recipe'),
    ('kd(' * 150 + ')' * 150, 'this is not|an argument'),
    ('\0', 'null byte'),
    ('+'.join(['kd()'] * 30), 'at most 20 parts'),
    ('kd()' + ' ' * 3000, 'at most 2000'),
    ('[kd() for _ in (1,)]', 'a recipe must be a sum'),
    ('logit_std(3)', 'a recipe must be a sum'),
    ('kd()\nat()', 'this is not a recipe'),
    ('kd(T:=3)', 'this is not|an argument'),
    ('auto + kd()', 'a recipe must be a sum of calls'),
    ('kdd', r"there is no recipe 'kdd' \(did you mean 'kd'\?\)"),
]


@pytest.mark.parametrize('text', GOOD + [f'{n}()' for n in recipes.__all__ if n != 'logit_std'])
def test_a_text_is_the_recipe_that_python_makes_of_it(text):
    names = {n: getattr(recipes, n) for n in recipes.__all__} | dict(
        recipes=recipes, losses=losses, Term=Term
    )
    made = eval(text, names)
    assert repr(recipe_from_text(text)) == repr(Recipe(made))


def test_what_distill_prints_can_be_given_as_text():
    parts = lambda recipe: [(t.name, t.weight, t.has_grad_ratio, t.options) for t in recipe.terms]
    for chosen in (
        auto(classes=10),
        auto(classes=2),
        auto('sigmoid'),
        auto('regression'),
        auto(labels=False),
        auto(dense=True),
    ):
        assert parts(recipe_from_text(chosen.text)) == parts(chosen)
    assert recipe_from_text(' auto ') == 'auto'


@pytest.mark.parametrize('text,says', BAD)
def test_a_mistake_is_named(text, says):
    with pytest.raises(DistillError, match=says):
        recipe_from_text(text)


EVENTS, WATCHED = (
    [],
    (
        'exec',
        'open',
        'import',
        'os.',
        'subprocess.',
        'socket.',
        'shutil.',
        'ctypes.',
        'pickle.',
        'code.',
        'glob.',
        'tempfile.',
    ),
)


def watch(name, args):
    if EVENTS and name.startswith(WATCHED):
        EVENTS.append(name)


def hostile(luck):
    "A text that is nearly a recipe, or nearly a program"
    parts = [
        *GOOD,
        *[b for b, _ in BAD if len(b) < 200],
        "__import__('os').system('touch x')",
        "open('x','w')",
        'exec("1")',
        'eval',
        'kd.__globals__',
        '().__class__.__bases__',
        'lambda: 0',
        '{**{}}',
        'x if y else z',
        '1/0',
        "'%s' % kd",
        '\\',
        '"""',
        '\u202e',
        '𝓀𝒹()',
        '1_000',
        '0x10',
        'ｋｄ()',
        ';',
        '#',
        '\t',
    ]
    text = luck.choice(parts)
    for _ in range(luck.randint(0, 4)):
        i, j = sorted(luck.choices(range(len(text) + 1), k=2))
        text = luck.choice(
            [
                text[:i] + luck.choice(parts) + text[i:],
                text[:i] + text[j:],
                text[:i] + luck.choice('()[]{}+-*.,=\'"_~:') + text[j:],
                f'{text} + {luck.choice(parts)}',
                f'kd(T={text})',
                f'at(layers={text})',
            ]
        )
    return text


def test_hostile_texts_are_refused_and_nothing_is_run():
    "Python's audit hooks see code that runs, files that are opened and processes that are started"
    luck, good = random.Random(0), 0
    texts = [hostile(luck) for _ in range(1500)]
    sys.addaudithook(watch)
    EVENTS[:] = ['on']
    try:
        for text in texts:
            try:
                good += recipe_from_text(text) is not None
            except DistillError as e:
                assert str(e)
        seen = [*EVENTS]
        eval('1')
        assert seen == ['on'] and len(EVENTS) > 1
    finally:
        EVENTS.clear()
    assert 50 < good < 1400


def test_the_callback_takes_a_text():
    kd = KnowledgeDistillation(None, 'kd(T=2) + at()')
    assert repr(kd.recipe) == repr(recipes.kd(T=2) + recipes.at())
    with pytest.raises(DistillError, match="no recipe 'kdd'"):
        KnowledgeDistillation(None, 'kdd()')


def test_the_command_reads_the_same_names_from_the_source():
    "So that it reports mistakes before it imports PyTorch"
    have = {k: [*inspect.signature(getattr(recipes, k)).parameters] for k in recipes.__all__}
    assert names_in_source() == (have, [*losses.LOSSES])
