"The house: who may import whom, and which names are public."

import ast, importlib, itertools, re, runpy, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[2]
SRC = ROOT / 'src' / 'fastdistill'
FILES = sorted(SRC.rglob('*.py'))
FACES = [
    'fastdistill',
    'fastdistill.losses',
    'fastdistill.recipes',
    'fastdistill.fastai',
    'fastdistill.huggingface',
    'fastdistill.lightning',
    'fastdistill.detection',
]

# package: which packages it may import, all of them above it; which other packages at the top of its files, and which only inside functions
LAW = dict(
    base=('', 'torch numpy', 'fcntl msvcrt rich'),
    losses=('base', 'torch', ''),
    features=('base', 'torch numpy', ''),
    teachers=('base features', 'torch numpy', 'onnxruntime pandas joblib'),
    cache=('base losses features teachers', 'torch numpy', 'fsspec rich pyarrow yaml'),
    recipes=('base losses features', 'torch', ''),
    checks=('base losses features teachers cache', 'torch', 'scipy'),
    distiller=('base features teachers recipes checks', 'torch', ''),
    evaluation=(
        'base losses features teachers checks',
        'torch numpy',
        'scipy matplotlib rich jinja2 IPython',
    ),
    search=('base losses recipes evaluation', 'torch numpy', 'optuna scipy matplotlib rich jinja2'),
    detection=(
        'base losses features teachers cache recipes checks distiller evaluation search',
        'torch torchvision numpy safetensors',
        'torchmetrics matplotlib',
    ),
    __init__=('base', 'lazy_loader', ''),
    fastai=(
        'base losses features teachers cache recipes checks distiller evaluation search detection',
        'torch numpy fastai safetensors',
        'pandas rich IPython matplotlib onnx onnxscript onnxruntime torchao',
    ),
    huggingface=(
        'base features teachers recipes checks distiller',
        'torch transformers accelerate',
        '',
    ),
    lightning=(
        'base features teachers recipes checks distiller detection',
        'torch lightning',
        '',
    ),
    cli=(
        'base teachers cache recipes evaluation search fastai __init__',
        'typer rich torch torchvision numpy pandas fastai safetensors PIL lazy_loader',
        'timm datasets matplotlib sklearn',
    ),
)
# the same inside a package: a file may import those of its package that stand before it
ORDER = dict(
    base='errors docstrings text_table recipe_grammar content atomic_files folder_lock outputs batch_samples output_source mixup distributed progress_bar task class_mapping transform_random_state random_state model_state sample_seeds',
    losses='_base chunks correlations response divergence transformed_teacher decoupled feature relation dense detection',
    features='layer_names model_call probe maps_and_tokens layer_hooks projectors model_stages layer_pairs',
    teachers='members image_normalization probabilities estimator model_loading hidden_state frozen batch_slices batch_norm_folding compiled_module copy_plan fast_copy raw_items teacher_inputs runner ensemble options teacher',
    cache='per_sample keys digests file_store sample_files json_checks row_layout output_layer manifest reader teacher_description store_choice shard_notes head_file rounding verify_rows writer write_progress dataset stream_writer stream_sealing stream_join imported_files other_tools cache_importers http_teacher pack',
    recipes='schedule teacher_gain batch_tensors token_labels gradient_norms gradient_shares gradient_balance layer_link recipe_loss term zoo recipe_text default catalog',
    checks='findings shared_parameters stored_outputs batch_scores class_order shapes forward normalization recipe task_loss teacher_confidence teacher_scores teacher_outputs explain',
    distiller='loader_batches layer_links task_loss head head_checks recipe_choice heads head_state weight_changes distiller trainer_integration',
    evaluation='report_data number_format verdicts report_tables text_report plot_style feature_plots report_plots mask_plots html_report checks_table report run_table metrics calibration agreement paired_tests cost model_comparison',
    search='candidates text_table significance run_folder resumable_runs optuna_proposals search_result recipe_search recipe_report',
    fastai='task language_model learner_notes transforms teacher_targets patches teacher_block class_names held_outputs sampled_batches sample_keys raw_items perturbed_rows tables teachers probe_batches learner_heads metrics compare interpret student_export saved_student default_recipe costs teacher_check cache_data cache_feed finite_check trend_check training_step unlabeled projector_opt callback_arguments detector multi_head fit_distiller fit_log fit_state callback learner trial_scores trial_clock trials training_setup recipe_find recipe_runs',
    detection='torchvision_detectors inherited_head stored_detections pyramid_levels recipes target_checks validation_loss metrics box_matches pseudo_labels detection_plots compare check distiller',
    huggingface='student_from_layers transformers_models trainer',
    cli='recipe_names training arguments named_objects demo commands app',
)
ORDER |= {
    'cli.demo': 'tasks results picture',
    'cli.training': 'config start_or_resume data_files data_fingerprint validation_split data_checks dataloaders architectures teachers distributed_fit resumable_fit rate_finder exported_student valid_predictions mask_examples time_estimate run_data trainings run_results train_run',
    'cli.commands': 'cache demo find check compare methods train',
}


def package_of(file):
    return file.relative_to(SRC).parts[0].removesuffix('.py')


def imports(file):
    "(level, module, names, whether inside a function) of each import"
    tree = ast.parse(file.read_text())
    inner = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.Lambda))
        for n in ast.walk(f)
    }
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            yield from ((0, a.name, [], id(n) in inner) for a in n.names)
        if isinstance(n, ast.ImportFrom):
            yield n.level, n.module or '', [a.name for a in n.names], id(n) in inner


def targets(file, level, module, names):
    "What a relative import enters, as parts below the package: ('features', 'taps')"
    at = [*file.relative_to(SRC).parts][:-level]
    path = [*at, *module.split('.')] if module else at
    here = SRC.joinpath(*path)
    if here.is_dir():
        return [
            (*path, n)
            if (here / n).is_dir() or (here / f'{n}.py').exists()
            else tuple(path) or ('__init__',)
            for n in names
        ]
    return [tuple(path)]


def test_the_law_has_no_circle():
    for i, (package, (may, *_)) in enumerate(LAW.items()):
        assert set(may.split()) <= set([*LAW][:i]) | {'__init__'}, package
    assert {package_of(f) for f in FILES} <= set(LAW), 'a new package needs a line in LAW'
    for folder, order in ORDER.items():
        here = SRC.joinpath(*folder.split('.'))
        have = {
            f.stem for f in here.iterdir() if f.suffix == '.py' or (f / '__init__.py').exists()
        } - {'__init__'}
        assert set(order.split()) == have, (
            f'the files of {folder}, in the order in which they import each other'
        )


def upward(file, entered):
    "Which of these imports lead to a file of the same package that does not stand before this one"
    here = (*file.relative_to(SRC).parts[:-1], file.stem)
    for path in entered:
        same = len([*itertools.takewhile(lambda o: o[0] == o[1], zip(here, path))])
        if same == 0 or same == len(path):
            continue  # a different package, or its __init__
        order = ORDER['.'.join(here[:same])].split()
        if here[same] != '__init__' and order.index(path[same]) >= order.index(here[same]):
            yield '.'.join(path)


@pytest.mark.parametrize('file', FILES, ids=lambda f: str(f.relative_to(SRC)))
def test_imports_keep_to_the_law(file):
    package = package_of(file)
    may, top, inside = (set(o.split()) for o in LAW[package])
    for level, module, names, inner in imports(file):
        if level:
            entered = targets(file, level, module, names)
            new = {o[0] for o in entered} - {package} - may
            up = [*upward(file, entered)]
            assert not up, (
                f'{file.relative_to(SRC)} may not import {", ".join(up)}, which stands after it'
            )
        else:
            new = (
                {module.split('.')[0]}
                - set(sys.stdlib_module_names)
                - top
                - (inside if inner else set())
            )
        assert not new, (
            f'{package} may not import {", ".join(new)} {"inside a function" if inner else "at the top"} (from {module or "."})'
        )
        assert '*' not in names or file.name == '__init__.py', (
            f'import * from {module}: name what you import'
        )


CHANGES = {'append', 'extend', 'insert', 'add', 'update', 'setdefault', 'pop', 'clear', 'remove'}


def changes_of_imports(tree):
    """Places that change what another file of the package defines: an attribute of it, or the
    content of a list or dict
    """
    names = {
        a.asname or a.name
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and n.level
        for a in n.names
    }
    own = {}  # node -> names that a function around it binds itself
    for f in ast.walk(tree):
        if isinstance(f, (ast.FunctionDef, ast.Lambda)):
            inside = [*ast.walk(f)]
            bound = {o.arg for o in inside if isinstance(o, ast.arg)}
            bound |= {
                o.id for o in inside if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store)
            }
            for n in inside:
                own.setdefault(id(n), set()).update(bound)
    imported = lambda o: isinstance(o, ast.Name) and o.id in names - own.get(id(o), set())
    for n in ast.walk(tree):
        if isinstance(n, (ast.Attribute, ast.Subscript)) and not isinstance(n.ctx, ast.Load):
            if imported(n.value):
                yield n
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute):
            if n.func.attr in CHANGES and imported(n.func.value):
                yield n
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name):
            if n.func.id in ('setattr', 'delattr') and imported(n.args[0]):
                yield n


@pytest.mark.parametrize(
    'code',
    ['Thing.made = 1', 'thing.Thing, x = 1, 2', 'del Thing.x', 'Thing[0] = 1', 'Thing.append(1)']
    + ["setattr(Thing, 'made', 1)"],
)
def test_changes_of_imports_are_found(code):
    tree = ast.parse(f'from .a import Thing\nfrom . import thing\ndef f():\n    {code}')
    assert len([*changes_of_imports(tree)]) == 1


@pytest.mark.parametrize('file', FILES, ids=lambda f: str(f.relative_to(SRC)))
def test_no_file_changes_what_another_one_defines(file):
    "Such a change is an import in disguise, in the opposite direction"
    found = changes_of_imports(ast.parse(file.read_text()))
    assert not [f'{n.lineno}: {ast.unparse(n)}' for n in found]


def test_only_distributed_knows_torch_distributed():
    for f in FILES:
        assert f.stem == 'distributed' or 'torch.distributed.' not in f.read_text().replace(
            '`torch.distributed', ''
        ), f


def defined(file):
    "Names that a file defines at its top level; methods that are patched into another class are not among them"
    for d in ast.parse(file.read_text()).body:
        if isinstance(d, ast.ClassDef):
            yield d.name
        if isinstance(d, ast.FunctionDef) and not any(
            ast.unparse(o) == 'patch' for o in d.decorator_list
        ):
            yield d.name
        if isinstance(d, ast.Assign):
            yield from (
                n.id
                for t in d.targets
                for n in ast.walk(t)
                if isinstance(n, ast.Name)
                and isinstance(n.ctx, ast.Store)
                and not n.id.startswith('__')
            )


def test_a_name_has_one_meaning():
    where = {}
    for f in FILES:
        for n in defined(f):
            where.setdefault(n, []).append(f.relative_to(SRC))
    # a recipe has the name of the method whose loss it uses
    twice = {
        n: fs
        for n, fs in where.items()
        if len(fs) > 1
        and not (
            len(fs) == 2
            and {f.parts[0] for f in fs} in ({'losses', 'recipes'}, {'losses', 'detection'})
        )
    }
    assert not twice


def test_the_names_of_the_package_are_those_of_its_rooms():
    import fastdistill

    for n in fastdistill.__all__:
        assert n in dir(fastdistill) and getattr(fastdistill, n) is not None


@pytest.fixture(scope='module')
def fresh():
    "What a new Python prints: the loss of a recipe called at once, then the frameworks that fastdistill has imported"
    code = """
from fastdistill import kd
import torch
print(kd(T=1, alpha=1.)(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1])).item())
import fastdistill, sys
fastdistill.Distiller, fastdistill.losses
names = 'fastai matplotlib timm transformers accelerate lightning pandas sklearn PIL rich typer'
print(*{m.split('.')[0] for m in sys.modules} & {*names.split()})
"""
    return subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    ).stdout.split('\n')


def test_a_recipe_can_be_called_in_a_process_that_imported_nothing_else(fresh):
    assert float(fresh[0]) == 0


def test_import_fastdistill_brings_no_framework(fresh):
    assert fresh[1:] == ['', '']


def test_help_loads_no_torch():
    code = "import fastdistill, fastdistill.cli, sys; print(*{m.split('.')[0] for m in sys.modules} & {'torch', 'numpy', 'fastai', 'matplotlib'})"
    assert (
        subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == ''
    )


def test_help_and_mistakes_in_a_command_load_no_torch(tmp_path):
    "PyTorch and fastai take seconds to import"
    (tmp_path / 'a.py').write_text('')
    mistakes = [
        ['train'],
        ['train', '--data', 'gone', '--teacher', 'a', '--student', 'b'],
        ['train', '--data', '.', '--teacher', 'gone.pkl', '--student', 'b'],
        ['train', '--data', '.', '--teacher', 'a', '--student', 'b', '--epochs', '-1'],
        ['train', '--data', '.', '--teacher', 'a', '--student', 'b', '--recipe', 'kdd(4)'],
        ['find', 'a.py:s', 'a.py:t', '--n-epoch', '1', '--recipe', 'Term(losses.klx)'],
        ['check', 'a.py:s', 'a.py:t', '--recipe', 'kd(tau=2)'],
        ['train', '--config', 'gone.toml'],
        ['train', '--resume', '--out', 'gone'],
        ['compare', 'a=gone.pkl'],
        ['compare', 'gone.pkl'],
        ['export', 'gone.pkl', 'x.onnx'],
        ['export', '.', 'x.exe'],
        ['check', 'gone.py:x', 'gone.pkl'],
        ['find', 'gone.pkl', 'gone.pkl', '--n-epoch', '1'],
        ['report', 'gone'],
        ['cache', 'info', 'gone'],
        ['cache', 'write', 'gone.pkl', 'gone.py:dls', 'x'],
        ['demo', '--nothing'],
    ]
    helps = [
        [*c.split(), '--help']
        for c in (
            '',
            'train',
            'compare',
            'export',
            'check',
            'find',
            'report',
            'cache',
            'cache write',
            'methods',
            'demo',
        )
    ]
    code = f"""
import sys
from fastdistill.cli import main
for args in {mistakes + helps}:
    sys.argv = ['fastdistill', *args]
    try: main()
    except SystemExit as e: code = e.code
    print('RESULT', *args, code, *sorted({{'torch', 'numpy', 'fastai'}} & set(sys.modules)))
"""
    out = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    said = [o.removeprefix('RESULT ') for o in out.splitlines() if o.startswith('RESULT ')]
    assert said == [' '.join([*o, '2']) for o in mistakes] + [' '.join([*o, '0']) for o in helps]


@pytest.mark.parametrize('file', FILES, ids=lambda f: str(f.relative_to(SRC)))
def test_a_file_catches_nothing_unnamed(file):
    assert not [
        n.lineno
        for n in ast.walk(ast.parse(file.read_text()))
        if isinstance(n, ast.ExceptHandler) and n.type is None
    ]


def taught():
    "module -> names that the pages import from other modules than FACES"
    found = {}
    for page in (ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))):
        for code in re.findall(r'^```python\n(.*?)^```', page.read_text(), re.M | re.S):
            for n in ast.walk(ast.parse(code)):
                module = getattr(n, 'module', None) or ''
                if module.startswith('fastdistill.') and module not in FACES:
                    found.setdefault(module, set()).update(a.name for a in n.names)
    return found


def public():
    "module.name of all that users may rely on: of FACES everything, of other modules what the pages teach"
    names = {m: importlib.import_module(m).__all__ for m in FACES} | dict(sorted(taught().items()))
    return [f'{m}.{n}' for m in names for n in sorted(names[m])]


@pytest.mark.parametrize('module', sorted(taught()))
def test_the_pages_teach_only_names_that_their_module_lists(module):
    assert taught()[module] <= set(importlib.import_module(module).__all__)


def test_public_names_are_decided():
    assert public() == (ROOT / 'tests' / 'api.txt').read_text().split(), (
        'decide, then write them anew: make api'
    )


@pytest.mark.parametrize('face', FACES)
def test_public_names_exist_once_and_are_explained(face):
    m = importlib.import_module(face)
    assert len(set(m.__all__)) == len(m.__all__)
    for n in m.__all__:
        assert getattr(m, n).__doc__, f'{face}.{n} has no docstring'


def tracked():
    out = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
    if out.returncode:
        pytest.skip('no repository')
    return [ROOT / o for o in out.stdout.split('\0') if o and (ROOT / o).is_file()]


def test_no_path_of_one_machine():
    path = re.compile(r'(?<![\w.$~])/(home|root|work|opt|Users|mnt)/\w|\.\./(?=shared)')
    for f in tracked():
        if 'benchmarks' in f.parts or f.suffix in ('.png', '.safetensors', '.json'):
            continue
        assert not (found := path.search(f.read_text())), f'{f.relative_to(ROOT)}: {found}'


def test_the_paths_in_contributing_are_there():
    paths = re.findall(
        r'`((?:src|tests|docs|benchmarks|examples)/[^`]*)`', (ROOT / 'CONTRIBUTING.md').read_text()
    )
    assert len(paths) > 20
    assert not [p for p in paths if '*' not in p and not (ROOT / p).exists()]


def test_the_source_tree_says_what_each_file_holds():
    script = runpy.run_path(str(ROOT / 'scripts' / 'source_tree.py'))
    found = dict(script['source_tree']())
    assert set(found) == {
        str((f.parent if f.name == '__init__.py' else f).relative_to(SRC.parent)) for f in FILES
    }
    assert not [k for k, v in found.items() if not v]


def test_the_oldest_releases_are_the_lower_bounds():
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)', (ROOT / 'pyproject.toml').read_text()))
    oldest = dict(
        re.findall(r'^([\w-]+)==([\d.]+)', (ROOT / 'tests' / 'oldest.txt').read_text(), re.M)
    )
    parts = lambda v: [*map(int, v.split('.')), 0, 0, 0][:4]
    assert len(bounds) > 15
    assert not [k for k, v in bounds.items() if parts(v) != parts(oldest.get(k, '0'))], (
        'tests/oldest.txt has the lower bounds of pyproject.toml'
    )


def test_every_loss_says_at_its_definition_what_it_needs():
    for f in [*(SRC / 'losses').glob('*.py'), SRC / 'recipes' / 'zoo.py']:
        for d in ast.walk(ast.parse(f.read_text())):
            at = [
                o
                for o in getattr(d, 'decorator_list', [])
                if isinstance(o, ast.Call) and ast.unparse(o.func) == 'loss'
            ]
            for o in at:
                assert {'kind', 'match'} <= {k.arg for k in o.keywords}, (
                    f'{f.stem}.{d.name}: @loss(kind=..., match=...)'
                )


if __name__ == '__main__':
    print(*public(), sep='\n')
