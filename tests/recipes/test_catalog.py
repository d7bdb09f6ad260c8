"The list of methods is what the code and the cards say."

import inspect, re, sys
from pathlib import Path
import pytest, torch
from fastdistill import DistillError, Distiller, Recipe, Term, losses, recipes
from fastdistill.recipes import zoo
from fastdistill.recipes.catalog import card_section, find_methods, method, methods
from fastdistill.cli import main

ROOT = Path(__file__).parents[2]
METHODS = methods()
ids = lambda m: m.name


def test_every_loss_and_every_recipe_is_there_once():
    names = [m.name for m in METHODS]
    made = list(losses.LOSSES)
    assert sorted(names) == sorted({*made, *recipes.__all__})
    assert {m.name for m in METHODS if m.loss is not None} == set(made)
    assert {m.name for m in METHODS if m.recipe is not None} == set(recipes.__all__)


def test_every_function_that_returns_a_recipe_is_public():
    fns = {n: inspect.unwrap(f) for n, f in vars(zoo).items() if inspect.isfunction(f)}
    made = {n for n, f in fns.items() if inspect.get_annotations(f).get('return') is Recipe}
    made.remove('layer_recipe')  # builds the recipes between layers
    assert made == set(recipes.__all__)


@pytest.mark.parametrize('m', METHODS, ids=ids)
def test_its_page_is_there_and_names_the_same_paper(m):
    text = (ROOT / m.page).read_text()
    assert re.search(rf'\b{m.name}\b', text) and m.line
    for arxiv in re.findall(r'arXiv:[\d.]+\d', m.paper):
        assert arxiv in text
    assert card_section(m.card, 'Suggested values') and '](' not in card_section(
        m.card, 'When it helps'
    )


def test_families_are_those_of_the_page_with_all_methods():
    text = (ROOT / 'docs' / 'methods.md').read_text()
    heads = {
        'Outputs': 'outputs',
        'Features of layers': 'features',
        'Relations of samples or channels': 'relations',
        'Dense prediction': 'dense maps',
    }
    for head, family in heads.items():
        part = re.search(rf'## {head}\n(.*?)(?=##|\Z)', text, re.S)[1]
        for card in re.findall(r'\[\w+\]\(methods/(\w+)\.md\)', part):
            assert any(m.family == family or card == 'kl' for m in METHODS if m.card == card), card


@pytest.mark.parametrize(
    'm',
    [m for m in METHODS if m.loss is not None and 'logits' in m.needs and m.family == 'outputs'],
    ids=ids,
)
def test_what_a_loss_needs_is_what_it_asks_for(m):
    s, t, y = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    fn = getattr(losses, m.name)
    if 'labels' not in m.needs:
        assert fn(s, t).dim() == 0
    else:
        with pytest.raises(TypeError, match='y'):
            fn(s, t)
        assert fn(s, t, y).dim() == 0


@pytest.mark.parametrize('m', METHODS, ids=ids)
def test_its_use_can_be_pasted(m):
    d = Distiller(
        torch.nn.Linear(2, 3),
        None,
        eval(m.use, dict(recipes=recipes, losses=losses, Term=Term, kd=recipes.kd)),
        kind=dict(zip(('several labels', 'numbers'), ('sigmoid', 'regression'))).get(
            m.needs[-1], 'softmax'
        ),
    )
    assert d.recipe.terms


def test_parameters_have_their_defaults_and_comments():
    T, alpha, _ = method('kd').recipe
    assert (T.name, T.default, T.says.split(',')[0]) == (
        'T',
        '4.0',
        'Temperature',
    ) and alpha.default == '0.9'
    assert [p.default for p in method('kl').loss][:2] == ['', '']


def test_searching():
    assert {'at', 'ofd'} <= {m.name for m in find_methods(needs=['features'])} and 'kl' not in {
        m.name for m in find_methods(needs=['features'])
    }
    assert [m.name for m in find_methods('neighbors')] == ['pkt']
    assert {m.name for m in find_methods(needs=['relations', 'classes'])} == {'dist'}
    with pytest.raises(DistillError, match="needs='color': must be one of 'logits'"):
        find_methods(needs=['color'])
    with pytest.raises(DistillError, match="no method 'dk'. Similar methods: dkd"):
        method('dk')


def test_the_command(monkeypatch, capsys):
    def call(*args):
        monkeypatch.setattr(sys, 'argv', ['fastdistill', 'methods', *args])
        with pytest.raises(SystemExit) as e:
            main()
        return e.value.code, *capsys.readouterr()

    code, out, _ = call('kd')
    assert code == 0 and 'class_mean' in out and '70.66' in out and 'arXiv:1503.02531' in out
    code, out, _ = call('--needs', 'features', '--needs', 'relations')
    assert code == 0 and 'docs/methods/rkd.md' in out and 'docs/methods/kl.md' not in out
    assert 'docs/methods/kl.md' in call()[1]
    assert call('nothing', 'here')[0] == 2 and call('nothing', '--needs', 'logits')[0] == 2
