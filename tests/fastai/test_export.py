"A student as a file: the same outputs in a process without fastai, any batch size, and everything a user must know inside."

import contextlib, copy, importlib, json, os, re, signal, subprocess, sys, warnings, zipfile
from pathlib import Path
import numpy as np, pandas as pd
import pytest, torch
import processes
from apps import (
    FASTAI_WARNINGS,
    Normalize,
    answers,
    image_dls,
    pair,
    plain,
    quiet,
    same,
    snapshot,
    vision,
)
from fastai.layers import AdaptiveConcatPool2d
from fastai.basics import BCEWithLogitsLossFlat, DataLoaders, Learner, accuracy, load_learner
from fastai.tabular.all import (
    Categorify,
    FillMissing,
    RegressionBlock,
    TabularDataLoaders,
    TabularProc,
    tabular_learner,
)
from fastai.text.all import BaseTokenizer, TextDataLoaders
from fastai.vision.all import (
    SegmentationDataLoaders,
    CategoryBlock,
    CrossEntropyLossFlat,
    DataBlock,
    Flip,
    Image,
    ImageBlock,
    IndexSplitter,
    ItemTransform,
    PILImageBW,
    RandomResizedCrop,
    Resize,
    aug_transforms,
    imagenet_stats,
)
from onnxruntime import InferenceSession
from fastdistill.base.outputs import as_plain
from fastdistill.fastai import (
    DistillError,
    DistillWarning,
    Report,
    Teacher,
    cache_teacher,
    compare,
    export_student,
    load_student,
    save_student,
    verify_cache,
)

pytest.importorskip('onnxscript')
pytestmark = [
    pytest.mark.filterwarnings(w)
    for w in [
        *FASTAI_WARNINGS,
        'ignore:.*LeafSpec:FutureWarning',
        'ignore:.*:DeprecationWarning:torch.*',
    ]
]


@pytest.fixture(scope='module')
def normalized():
    "A student on normalized images"
    torch.manual_seed(0)
    dls = image_dls(
        CategoryBlock(vocab=['red', '<b>"', 'blue'], sort=False),
        lambda x, at, k: ['red', '<b>"', 'blue'][k],
        batch_tfms=Normalize.from_stats(*imagenet_stats),
    )
    student, _ = quiet(*vision(dls, 3, metrics=accuracy))
    student.fit_one_cycle(3, 0.03)
    return student


@pytest.fixture(scope='module')
def onnx_file(normalized, tmp_path_factory):
    path = tmp_path_factory.mktemp('onnx') / 's.onnx'
    return export_student(normalized, path)


def batch(learn):
    return [o.numpy() for o in plain(learn.dls.valid.one_batch())[:-1]]


@pytest.mark.parametrize(
    'name, module, function',
    [('s.onnx', 'onnx', 'save'), ('s.pt2', 'torch.export', 'save')],
    ids=['onnx', 'pt2'],
)
def test_an_interrupted_export_keeps_the_file_that_was_there(
    normalized, tmp_path, monkeypatch, name, module, function
):
    "And leaves no part of the new one behind"
    (tmp_path / name).write_bytes(b'before')

    def half(program, file, *args, **kwargs):
        if hasattr(file, 'write'):
            file.write(b'half')
        else:
            Path(file).write_bytes(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module(module), function, half)
    with pytest.raises(KeyboardInterrupt):
        export_student(normalized, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b'before'


def test_an_onnx_file_runs_in_a_process_that_knows_only_onnxruntime(normalized, onnx_file):
    (x,) = batch(normalized)
    np.save(onnx_file.path.parent / 'x.npy', x)
    code = f"""
import sys, json, numpy as np, onnxruntime as ort
s = ort.InferenceSession({str(onnx_file.path)!r})
x = np.load({str(onnx_file.path.parent / 'x.npy')!r})
outs = [s.run(['logits'], {{'x': x[:n]}})[0] for n in (1, 5, 16)]
print(json.dumps([o.tolist() for o in outs]))
print(json.dumps(dict(s.get_modelmeta().custom_metadata_map)))
print({{'torch', 'fastai', 'fastdistill'}} & set(sys.modules))
"""
    outs, meta, loaded = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    wanted = answers(normalized.model, normalized.dls.valid)[0][0]
    for o, n in zip(json.loads(outs), (1, 5, 16)):
        assert torch.allclose(torch.tensor(o), wanted[:n], atol=1e-4)
    facts = json.loads(json.loads(meta)['fastdistill'])
    assert loaded == 'set()' and facts == onnx_file.facts
    assert facts['classes'] == ['red', '<b>"', 'blue'] and facts['inputs'] == [
        dict(name='x', shape=['batch', 3, 16, 16], dtype='float32')
    ]
    assert facts['normalization'] == dict(
        mean=pytest.approx(imagenet_stats[0]), std=pytest.approx(imagenet_stats[1])
    )


@pytest.mark.parametrize('form', ['s.onnx', 's.pt2', 'folder'])
@pytest.mark.filterwarnings('ignore:.*contains pickles')
def test_a_file_is_compared_with_its_own_normalization_and_classes(normalized, tmp_path, form):
    "On data with a different normalization and order of the classes; other classes are refused"
    if form == 'folder':
        student = load_student(save_student(normalized, tmp_path / form))
    else:
        student = export_student(normalized, tmp_path / form).path
    names = ['blue', 'red', '<b>"']
    block = CategoryBlock(vocab=names, sort=False)
    own = ['red', '<b>"', 'blue']
    stats = Normalize.from_stats([0.3] * 3, [0.4] * 3)
    dls = image_dls(block, lambda x, at, k: own[k], batch_tfms=stats)
    wanted = compare(dict(a=normalized), seconds=0, progress=False).models['a']
    for o in (student, Teacher(student)):
        got = compare(dict(a=o), dls, seconds=0, progress=False).models['a']
        assert got.loss == pytest.approx(wanted.loss, rel=1e-4)
        assert got.classes['recall'] == [wanted.classes['recall'][i] for i in (2, 0, 1)]
    block = CategoryBlock(vocab=['red', 'green', 'blue'], sort=False)
    dls = image_dls(block, lambda x, at, k: ['red', 'green', 'blue'][k])
    with pytest.raises(DistillError, match=r'does not have 1 of the classes .* \(green\)'):
        compare(dict(a=student), dls, seconds=0, progress=False)


@pytest.mark.filterwarnings('ignore:.*contains pickles')
def test_members_of_an_ensemble_keep_their_own_normalization_and_order_of_classes(
    normalized, tmp_path
):
    "As a list, and as a `Teacher` of exported files: training, check and cache read them alike"
    a = export_student(normalized, tmp_path / 'a.onnx').path
    b = export_student(normalized, tmp_path / 'b.pt2').path
    own = ['red', '<b>"', 'blue']
    block = CategoryBlock(vocab=['blue', 'red', '<b>"'], sort=False)
    stats = Normalize.from_stats([0.3] * 3, [0.4] * 3)
    dls = image_dls(block, lambda x, at, k: own[k], batch_tfms=stats)
    wanted = compare(dict(a=normalized), seconds=0, progress=False).models['a']
    same_order = normalized.dls.train.new(shuffle=False, drop_last=False)
    probs, _ = normalized.get_preds(dl=same_order)
    weighted = dict(weights=[0.9, 0.1])
    for i, o in enumerate(([a, normalized], Teacher([a, b]), Teacher([a, b], ensemble=weighted))):
        got = compare(dict(a=o), dls, seconds=0, progress=False).models['a']
        assert got.loss == pytest.approx(wanted.loss, rel=1e-4)
        assert got.classes['recall'] == [wanted.classes['recall'][i] for i in (2, 0, 1)]
        cache = cache_teacher(o, dls, tmp_path / f'cache{i}', store='float32', progress=False)
        assert cache.manifest.vocab == ['blue', 'red', '<b>"']
        assert verify_cache(cache, o, dls, n=4).worst < 1e-4
        stored = cache.outputs(range(len(cache))).logits.softmax(1)
        torch.testing.assert_close(stored, probs[:, [2, 0, 1]], rtol=1e-3, atol=1e-4)
    # classes that are chosen for the whole ensemble are those of the members, in their order
    chosen = compare(dict(a=Teacher([a, b], select=[2, 0, 1])), dls, seconds=0, progress=False)
    assert chosen.models['a'].loss == pytest.approx(wanted.loss, rel=1e-4)


def test_what_is_reported_is_what_was_measured(normalized, onnx_file):
    with Teacher(onnx_file.path) as t:
        difference = max(
            (t(*plain(b)[:-1]).logits - o).abs().max().item()
            for b, (o, _) in zip(
                normalized.dls.valid, answers(normalized.model, normalized.dls.valid)
            )
        )
    assert (
        onnx_file.difference == pytest.approx(difference, abs=1e-6) and onnx_file.difference < 1e-4
    )
    assert onnx_file.samples == 32 and onnx_file.bytes == onnx_file.path.stat().st_size
    assert 'largest difference' in str(onnx_file)


def test_a_program_of_torch_export_needs_only_torch(normalized, tmp_path):
    was = snapshot(normalized.model)
    with warnings.catch_warnings():
        warnings.simplefilter('error', DistillWarning)
        e = export_student(normalized, tmp_path / 's.pt2')
    assert same(was, snapshot(normalized.model))
    (x,) = batch(normalized)
    extra = {'fastdistill.json': ''}
    run = torch.export.load(e.path, extra_files=extra).module()
    assert json.loads(extra['fastdistill.json']) == e.facts
    wanted = answers(normalized.model, normalized.dls.valid)[0][0]
    for n in (1, 3, 16):
        assert torch.allclose(run(torch.tensor(x[:n])), wanted[:n], atol=1e-6)


@pytest.mark.parametrize(
    'name, int8', [('s.pt2', False), ('s.onnx', False), ('s.onnx', True)], ids=str
)
def test_a_file_holds_no_samples_of_the_data(normalized, tmp_path, name, int8):
    content = export_student(normalized, tmp_path / name, int8=int8).path.read_bytes()
    for x in normalized.dls.valid:
        for image in as_plain(x[0]).numpy():
            assert image[0, 0].tobytes() not in content
    weights = sum(p.numel() * p.element_size() for p in normalized.model.parameters())
    assert len(content) < weights + 100_000


@pytest.mark.parametrize('name', ['unet', 'tabular'])
def test_other_applications(name, tmp_path):
    student, _ = pair(name)
    was = snapshot(student.model)
    e = export_student(student, tmp_path / 's.pt2')
    assert same(was, snapshot(student.model)) and e.difference < 1e-5
    assert type(student.model(*student.dls.valid.one_batch()[:-1])).__name__ == (
        'TensorBase' if name == 'unet' else 'Tensor'
    )


def test_int8_is_smaller_and_its_cost_is_measured(normalized, onnx_file, tmp_path):
    e = export_student(normalized, tmp_path / 's.onnx', int8=True)
    import onnx

    types = {n.op_type for n in onnx.load(e.path).graph.node}
    assert {'QuantizeLinear', 'DequantizeLinear'} <= types
    assert (
        e.facts['int8']
        and json.loads({p.key: p.value for p in onnx.load(e.path).metadata_props}['fastdistill'])
        == e.facts
    )
    assert e.difference > onnx_file.difference
    again = compare({'float32': normalized, 'int8': str(e.path)}, seconds=0, progress=False)
    assert (
        e.report.models['int8'].measures == again.models['int8'].measures
        and e.report.comparison('int8', 'float32') is not None
    )
    assert 'accuracy' in str(e) and 'significant' in str(e)


def test_int8_with_a_temperature_is_compared_with_the_same_temperature(normalized, tmp_path):
    e = export_student(normalized, tmp_path / 's.onnx', int8=True, temperature=5.0)
    o, y = map(torch.cat, zip(*answers(normalized.model, normalized.dls.valid)))
    nll = torch.nn.functional.cross_entropy(o / 5, y).item()
    assert e.report.models['float32'].measures['nll'].value == pytest.approx(nll, rel=1e-4)
    assert e.report.models['int8'].measures['nll'].value == pytest.approx(nll, rel=0.02)
    assert e.report.models['float32'].metrics.keys() == {'accuracy'}


def bag_student(lengths):
    "An untrained student on token ids; the texts of each batch have one of these lengths"
    torch.manual_seed(0)
    pairs = [(torch.randint(2, 50, (n,)), i % 3) for i, n in enumerate(lengths)]
    dls = DataLoaders.from_dsets(pairs, pairs, bs=4, shuffle=False, device='cpu', num_workers=0)
    net = torch.nn.Sequential(torch.nn.EmbeddingBag(50, 8, padding_idx=1), torch.nn.Linear(8, 3))
    return Learner(dls, net, loss_func=CrossEntropyLossFlat())


@pytest.mark.parametrize('name, int8', [('s.pt2', False), ('s.onnx', False), ('s.onnx', True)])
def test_a_student_of_texts_is_exported_for_any_length(tmp_path, name, int8):
    learn = bag_student([9] * 4 + [5] * 4 + [12] * 4)
    e = export_student(learn, tmp_path / name, int8=int8)
    assert e.facts['inputs'] == [dict(name='x', shape=['batch', 'length'], dtype='int64')]
    exported = Teacher(str(e.path))
    for shape in (1, 1), (1, 30), (7, 3):
        x = torch.randint(1, 50, shape)  # 1 is padding
        x[0, 0] = 1
        with torch.no_grad():
            wanted = learn.model.eval()(x)
        assert torch.allclose(exported(x).logits, wanted, atol=0.3 if int8 else 1e-6)
    assert 'forward' not in vars(learn.model[0])
    if name == 's.onnx' and not int8:
        with pytest.raises(DistillError, match=r'batch x length\).*of shape \(2, 3, 4, 5\)'):
            exported(torch.zeros(2, 3, 4, 5))
        with pytest.raises(DistillError) as error:
            exported(torch.zeros(2, 3))
        assert 'images' not in str(error.value)


def test_a_student_of_texts_of_one_length_is_exported_for_this_length(tmp_path):
    learn = bag_student([9] * 8)
    learn.model = torch.nn.Sequential(
        torch.nn.Embedding(50, 4), torch.nn.Flatten(), torch.nn.Linear(36, 3)
    )
    e = export_student(learn, tmp_path / 's.onnx')
    assert e.facts['inputs'][0]['shape'] == ['batch', 9]
    with pytest.raises(DistillError) as error:
        Teacher(str(e.path))(torch.zeros(2, 5, dtype=torch.long))
    assert 'int64: batch x 9' in str(error.value) and 'images' not in str(error.value)


@pytest.mark.parametrize('tok', [None, BaseTokenizer('/')], ids=['spacy', 'split'])
def test_the_cards_code_predicts_a_text_as_the_learner(tmp_path, monkeypatch, tok):
    texts = [f'{w}/{what}, It is {w}' for what in 'ABC' for w in ('GOOD', 'bad') for _ in 'ab']
    df = pd.DataFrame(dict(text=texts, label=['yes', 'yes', 'no', 'no'] * 3))
    df['is_valid'] = df.index % 2 == 1
    options = dict(text_col='text', label_col='label', valid_col='is_valid', tok_tfm=tok)
    dls = TextDataLoaders.from_df(df, bs=2, num_workers=0, **options)
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.EmbeddingBag(len(dls.vocab[0]), 8, padding_idx=dls.vocab[0].index('xxpad')),
        torch.nn.Linear(8, 2),
    )
    student = Learner(dls, net, loss_func=CrossEntropyLossFlat())
    folder = save_student(student, tmp_path / 'out', onnx=True)
    monkeypatch.chdir(folder)
    for text in ('bad/A, it is, UNKNOWN', 'GOOD GOOD/B is is is'):
        exec(code_of(folder).replace('a text', text), space := {})
        with student.no_bar():
            _, _, wanted = student.predict(text)
        assert torch.allclose(torch.tensor(space['logits'][0]).softmax(0), wanted, atol=1e-6)


def test_the_card_of_a_tokenizer_of_ones_own_names_it(tmp_path):
    class Letters:
        def __call__(self, texts):
            return map(list, texts)

    df = pd.DataFrame(dict(text=['ab', 'ba'] * 4, label=['yes', 'no'] * 4))
    df['is_valid'] = df.index > 3
    options = dict(text_col='text', label_col='label', valid_col='is_valid', tok_tfm=Letters())
    dls = TextDataLoaders.from_df(df, bs=2, num_workers=0, **options)
    net = torch.nn.Sequential(
        torch.nn.EmbeddingBag(len(dls.vocab[0]), 8, padding_idx=1), torch.nn.Linear(8, 2)
    )
    student = Learner(dls, net, loss_func=CrossEntropyLossFlat())
    folder = save_student(student, tmp_path / 'out', onnx=True)
    text = json.loads((folder / 'config.json').read_text())['text']
    assert text['tokenizer'] == 'Letters'
    assert text['vocab'] == list(dls.vocab[0])
    assert 'core.Tokenizer' not in (folder / 'README.md').read_text()


def test_a_recurrent_student_is_refused_and_as_before(tmp_path, caplog, capsys):
    student, _ = pair('text_classifier')
    was = snapshot(student.model)
    caplog.set_level('INFO')
    with pytest.raises(DistillError, match="can't export SequentialRNN.*learn.export"):
        export_student(student, tmp_path / 's.pt2')
    assert same(was, snapshot(student.model)) and not (tmp_path / 's.pt2').exists()
    assert caplog.messages == [] and capsys.readouterr().err == ''


def test_mistakes_are_named(normalized, tmp_path):
    with pytest.raises(DistillError, match='the suffix must be .onnx or .pt2'):
        export_student(normalized, tmp_path / 's.pth')
    with pytest.raises(DistillError, match='such as TFLite or Core ML, export one of these'):
        export_student(normalized, tmp_path / 's.tflite')
    with pytest.raises(DistillError, match='int8=True needs an .onnx'):
        export_student(normalized, tmp_path / 's.pt2', int8=True)


def test_a_file_that_predicts_something_else_is_refused(normalized, tmp_path, monkeypatch):
    import fastdistill.fastai.student_export as export

    write = export.WRITERS['.pt2']
    monkeypatch.setitem(
        export.WRITERS,
        '.pt2',
        lambda m, x, p, f: write(type(m)(torch.nn.Sequential(m.model, torch.nn.ReLU())), x, p, f),
    )
    (tmp_path / 's.pt2').write_bytes(b'before')
    with pytest.raises(DistillError, match='predictions differ from the Learner'):
        export_student(normalized, tmp_path / 's.pt2')
    assert (tmp_path / 's.pt2').read_bytes() == b'before'


@pytest.mark.parametrize('name, int8', [('s.pt2', False), ('s.onnx', False), ('s.onnx', True)])
def test_a_file_that_predicts_nan_is_refused(normalized, tmp_path, monkeypatch, name, int8):
    import fastdistill.fastai.student_export as export

    class Log(torch.nn.Module):
        def forward(self, x):
            return (x - 1e9).log()

    suffix = name[1:]
    write = export.WRITERS[suffix]
    monkeypatch.setitem(
        export.WRITERS,
        suffix,
        lambda m, x, p, f: write(type(m)(torch.nn.Sequential(m.model, Log())), x, p, f),
    )
    with pytest.raises(DistillError, match='are nan or infinite'):
        export_student(normalized, tmp_path / name, int8=int8)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings('ignore:.*contains pickles')
def test_outputs_that_exclude_a_class_are_equal(normalized, tmp_path):
    "Both the Learner and the file predict -inf"

    class First(torch.nn.Module):
        def forward(self, x):
            return torch.cat([x[:, :1] * 0 - torch.inf, x[:, 1:]], 1)

    learn = copy.copy(normalized)
    learn.model = torch.nn.Sequential(normalized.model, First())
    e = export_student(learn, tmp_path / 's.pt2')
    assert e.difference < 1e-4
    with Teacher(tmp_path / 's.pt2') as t:
        assert (t(torch.from_numpy(batch(normalized)[0])).logits[:, 0] == -torch.inf).all()


@pytest.fixture(scope='module')
def saved(normalized, tmp_path_factory):
    "(folder, report) of a student"
    r = compare(
        {'teacher': normalized, 'student': normalized}, seconds=0, repeats=50, progress=False
    )
    return save_student(
        normalized, tmp_path_factory.mktemp('saved') / 'out', r, title='A <student>'
    ), r


def test_a_folder_holds_no_pickle_and_loads_again(normalized, saved):
    folder, r = saved
    assert sorted(p.name for p in folder.iterdir()) == [
        'README.md',
        'config.json',
        'model.safetensors',
        'report.json',
        'student.onnx',
    ]
    assert not any(zipfile.is_zipfile(p) for p in folder.iterdir())
    (x,) = batch(normalized)
    wanted = answers(normalized.model, normalized.dls.valid)[0][0]
    net = load_student(folder)
    assert torch.allclose(net(torch.tensor(x)), wanted, atol=1e-4) and net.facts['classes'] == [
        'red',
        '<b>"',
        'blue',
    ]
    torch.manual_seed(9)
    other, _ = vision(normalized.dls, 3)
    loaded = load_student(folder, other.model)
    assert not loaded.training and torch.equal(loaded(torch.tensor(x)), wanted)
    text = (folder / 'README.md').read_text()
    assert (
        'Scores' in text
        and f'{normalized.model.state_dict()["1.1.weight"].numel()}'
        and 'onnxruntime.InferenceSession' in text
    )
    assert Report.from_json(folder / 'report.json') == r


@pytest.mark.parametrize(
    'name', ['README.md', 'config.json', 'model.safetensors', 'report.json', 'student.onnx']
)
def test_files_of_something_else_are_not_overwritten_or_removed(name, normalized, tmp_path):
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(DistillError, match=f'has a {name} that does not belong to a saved student'):
        save_student(normalized, tmp_path, onnx=False)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == '{"mine": 1}'


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
@pytest.mark.parametrize('content', [b'', b'{', None])
def test_a_damaged_file_of_a_saved_student_is_named(name, content, normalized, tmp_path):
    save_student(normalized, tmp_path, onnx=False)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DistillError, match=name):
        load_student(tmp_path, normalized.model)


def test_a_report_of_a_different_type_is_refused(normalized, tmp_path):
    with pytest.raises(DistillError, match='report is of type str: it must be a Report'):
        save_student(normalized, tmp_path / 'a', 'report')
    assert not (tmp_path / 'a').exists()


def test_a_student_without_data_is_refused_and_leaves_no_folder(normalized, tmp_path):
    normalized.export(tmp_path / 'student.pkl')
    with pytest.raises(DistillError):
        save_student(load_learner(tmp_path / 'student.pkl'), tmp_path / 'a')
    assert not (tmp_path / 'a').exists()


@pytest.mark.parametrize('n', range(1, 5))
def test_a_student_may_be_saved_again_after_an_interrupt_at_any_file(
    n, normalized, saved, tmp_path, monkeypatch
):
    renamed, rename = [], os.replace

    def interrupted(*args):
        if len(renamed) == n:
            raise KeyboardInterrupt
        renamed.append(args)
        rename(*args)

    with monkeypatch.context() as m, contextlib.suppress(KeyboardInterrupt):
        m.setattr(os, 'replace', interrupted)
        save_student(normalized, tmp_path, saved[1], onnx=False)
    assert len(renamed) == n
    save_student(normalized, tmp_path, onnx=False)
    assert load_student(tmp_path, normalized.model) is normalized.model


def test_a_student_whose_network_cannot_be_saved_changes_nothing(
    normalized, saved, tmp_path, monkeypatch
):
    "Neither a new folder nor that of a former student"
    import fastdistill.fastai.student_export as export

    folder = save_student(normalized, tmp_path / 'out', saved[1])
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert {'student.onnx', 'report.json', 'README.md'} <= set(before)
    learn = copy.copy(normalized)
    learn.model = copy.deepcopy(normalized.model)
    torch.nn.init.zeros_(learn.model[1][1].bias)
    refused = lambda *a: (_ for _ in ()).throw(DistillError("can't be exported"))
    monkeypatch.setitem(export.WRITERS, '.onnx', refused)
    for where in (folder, tmp_path / 'new'):
        with pytest.raises(DistillError, match="can't be exported"):
            save_student(learn, where, onnx=True, temperature=2.0)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('onnx', [False, None])
def test_no_network_or_report_of_a_former_student_stays_beside_new_weights(
    normalized, saved, tmp_path, monkeypatch, onnx
):
    "Neither if the network is left out, nor if it can't be exported"
    import fastdistill.fastai.student_export as export

    folder = save_student(normalized, tmp_path / 'out', saved[1])
    learn = copy.copy(normalized)
    learn.model = copy.deepcopy(normalized.model)
    torch.nn.init.zeros_(learn.model[1][1].bias)
    if onnx is not False:
        refused = lambda *a: (_ for _ in ()).throw(DistillError("can't be exported"))
        monkeypatch.setitem(export.WRITERS, '.onnx', refused)
    if onnx is None:
        with pytest.warns(DistillWarning, match="^no ONNX file: can't be exported$"):
            save_student(learn, folder, temperature=2.0)
    else:
        save_student(learn, folder, onnx=False, temperature=2.0)
    assert not (folder / 'student.onnx').exists()
    assert not (folder / 'report.json').exists()
    x = torch.from_numpy(batch(normalized)[0])
    with torch.no_grad():
        again = load_student(folder, model=copy.deepcopy(learn.model))
        assert torch.allclose(again(x), learn.model.eval()(x) / 2, atol=1e-6)


class Squared(TabularProc):
    "A user's own transform of tables"

    def encodes(self, to):
        to['length'] = to['length'] ** 2


def people(n=120):
    "Rows with numbers, some of them missing, text, and numbers as categories"
    g = np.random.default_rng(0)
    df = pd.DataFrame(
        dict(
            age=g.integers(18, 80, n),
            job=g.choice(['cook', 'clerk', 'smith'], n),
            length=g.normal(40, 9, n),
            floor=g.integers(1, 4, n),
            member=g.random(n) > 0.5,
        )
    )
    df.loc[::7, 'length'] = np.nan
    df.loc[::9, 'job'] = None
    df['pay'] = np.where((df.age > 40) ^ (df.job == 'cook'), 'high', 'low')
    return df


def table_student(
    procs=(), cats=('job', 'floor', 'member'), conts=('age', 'length'), df=None, **options
):
    df = people() if df is None else df
    options = dict(y_names='pay', y_block=CategoryBlock()) | options
    dls = TabularDataLoaders.from_df(
        df,
        procs=[*procs, Categorify, FillMissing, Normalize],
        cat_names=list(cats),
        cont_names=list(conts),
        valid_idx=range(80, 120),
        bs=40,
        num_workers=0,
        **options,
    )
    student = tabular_learner(dls, layers=[8])
    with student.no_bar(), student.no_logging():
        student.fit(2, 0.05)
    return df, student


def code_of(folder):
    return (folder / 'README.md').read_text().split('```python\n')[1].split('```')[0]


@pytest.mark.filterwarnings('ignore:The given NumPy array is not writable')
def test_the_cards_code_for_other_samples_runs(tmp_path, monkeypatch):
    _, student = table_student([Squared])
    folder = save_student(student, tmp_path / 'out')
    assert json.loads((folder / 'config.json').read_text())['table']['unknown'] == ['Squared']
    monkeypatch.chdir(folder)
    space = {f'x{i}': x for i, x in enumerate(batch(student))}
    exec(code_of(folder), space)
    wanted = answers(student.model, student.dls.valid)[0][0]
    assert np.allclose(space['logits'], wanted, atol=1e-4)


def raw_rows(df, y='pay', conts=('age', 'length'), **_):
    "Rows with a missing number, an unknown category, and a missing category"
    rows = df.iloc[80:84].drop(columns=y).astype(object)
    if 'length' in conts:
        rows.loc[80, 'length'] = np.nan
    rows.loc[81, ['job', 'floor']] = ['pilot', 9]
    rows.loc[82, 'job'] = None
    return rows


TABLES = [
    dict(),
    dict(conts=()),
    dict(cats=()),
    dict(cats=('job',), conts=('age',)),
    dict(y_names='age', y_block=RegressionBlock(), conts=('length',)),
]


@pytest.mark.parametrize('options', TABLES, ids=['all', 'categories', 'numbers', 'two', 'target'])
@pytest.mark.filterwarnings('ignore:The given NumPy array is not writable')
@pytest.mark.filterwarnings('ignore:Constructing a Categorical')  # fastai, unknown categories
def test_the_cards_code_predicts_a_raw_row_as_the_learner(tmp_path, monkeypatch, options):
    df, student = table_student(**options)
    folder = save_student(student, tmp_path / 'out', onnx=True)
    monkeypatch.chdir(folder)
    exec(code_of(folder), space := {})  # with the row of the card
    card = (folder / 'README.md').read_text()
    (wanted,) = re.findall(r'For this row, the logits are `(.+)`', card)
    assert np.allclose(space['logits'][0], json.loads(wanted), atol=1e-4)
    for _, row in raw_rows(
        df, **{k: v for k, v in options.items() if k != 'y_names'}, y=options.get('y_names', 'pay')
    ).iterrows():
        names = {
            i.name: x for i, x in zip(space['session'].get_inputs(), space['encoded'](dict(row)))
        }
        (logits,) = space['session'].run(['logits'], names)
        with student.no_bar():
            _, _, outputs = student.predict(row)
        got = torch.from_numpy(logits[0])
        got = got if 'y_names' in options else got.softmax(0)
        assert torch.allclose(got, outputs.float(), atol=1e-5), row


def guides_code():
    page = Path(__file__).parents[2] / 'docs/guides/tables.md'
    code = [b.split('```')[0] for b in page.read_text().split('```python\n')]
    code = next(b for b in code if 'def encoded(' in b)
    return code[code.index("table = facts['table']") : code.index('print(')]


@pytest.mark.filterwarnings('ignore:The given NumPy array is not writable')
@pytest.mark.filterwarnings('ignore:Constructing a Categorical')
def test_the_guides_code_predicts_a_raw_row_as_the_learner(tmp_path):
    df, student = table_student()
    facts = export_student(student, tmp_path / 's.onnx').facts
    space = dict(facts=facts, np=np)
    exec(guides_code(), space)
    space['session'] = InferenceSession(tmp_path / 's.onnx')
    for _, row in raw_rows(df).iterrows():
        with student.no_bar():
            _, _, wanted = student.predict(row)
        got = eval('predict(row)', space, dict(row=dict(row)))
        assert list(got) == list(student.dls.vocab)
        assert np.allclose(list(got.values()), wanted, atol=1e-5)


@pytest.mark.parametrize('source', ['card', 'guide'])
@pytest.mark.filterwarnings('ignore:The given NumPy array is not writable')
def test_the_code_finds_a_category_as_a_number_and_as_text(tmp_path, monkeypatch, source):
    df = people().assign(
        code=[str(i % 3) for i in range(120)], version=['v1', 'v1.0', 'nan', 'v2.0'] * 30
    )
    names = ['floor', 'code', 'member', 'job', 'version']
    _, student = table_student(cats=names, conts=(), df=df)
    folder = save_student(student, tmp_path / 'out', onnx=True)
    monkeypatch.chdir(folder)
    if source == 'card':
        exec(code_of(folder), space := {})
    else:
        table = json.loads((folder / 'config.json').read_text())['table']
        exec(guides_code(), space := dict(facts=dict(table=table), np=np))
    encoded = lambda *values: space['encoded'](dict(zip(names, values)))[0][0].tolist()
    classes = [list(student.dls.classes[n]) for n in names]
    wanted = [c.index(v) for c, v in zip(classes, (2, '1', True, 'cook', 'v1.0'))]
    for floor in (2, 2.0, '2', '2.0', np.int64(2), np.float32(2)):
        for code in ('1', 1, 1.0):
            for member in (True, 'True', np.True_):
                assert encoded(floor, code, member, 'cook', 'v1.0') == wanted
    # unknown and missing
    assert encoded('22', 7, None, 'pilot', float('nan')) == [0] * 5
    assert encoded(2.5, '', float('nan'), None, 'v3') == [0] * 5


SIZES = (37, 53), (61, 29), (20, 20), (16, 90)  # of photos; most can't be cropped evenly


def photo_student(folder, item_tfms, block=ImageBlock, batch_tfms=None):
    "An untrained student on photos of several sizes in files, and their paths"
    g = np.random.default_rng(0)
    for i, (h, w) in enumerate(SIZES * 2):
        noise = Image.fromarray(g.integers(0, 256, (5, 7, 3), dtype='uint8'))
        noise.resize((w, h)).save(folder / f'{i}.png')
    dls = DataBlock(
        (block, CategoryBlock(vocab=['red', 'blue'])),
        get_y=lambda p: ['red', 'blue'][int(p.stem) % 2],
        splitter=IndexSplitter(range(4, 8)),
        item_tfms=item_tfms,
        batch_tfms=batch_tfms,
    ).dataloaders([folder / f'{i}.png' for i in range(8)], bs=4, num_workers=0)
    torch.manual_seed(0)
    channels = dls.one_batch()[0].shape[1]
    model = torch.nn.Sequential(
        torch.nn.Conv2d(channels, 8, 3, 2), torch.nn.Flatten(), torch.nn.LazyLinear(2)
    )
    model(dls.one_batch()[0])
    return Learner(dls, model, loss_func=CrossEntropyLossFlat()), list(dls.valid.items)


@pytest.mark.parametrize(
    'method, mode',
    [(m, mode) for m in ('crop', 'squish', 'pad') for mode in ('reflection', 'bw')]
    + [('pad', 'border'), ('pad', 'zeros')],
)
def test_the_cards_code_predicts_as_get_preds_from_photos(tmp_path, monkeypatch, method, mode):
    pad = 'reflection' if mode == 'bw' else mode
    learn, paths = photo_student(
        tmp_path,
        Resize((16, 24), method, pad_mode=pad, resamples=(Image.Resampling.BICUBIC, 0)),
        ImageBlock(PILImageBW) if mode == 'bw' else ImageBlock,
        [Flip(), Normalize.from_stats([0.4], [0.3])] if mode == 'bw' else [Flip()],
    )
    folder = save_student(learn, tmp_path / 'student')
    how = dict(size=[16, 24], method=method, filter='bicubic')
    assert json.loads((folder / 'config.json').read_text())['resize'] == (
        how | dict(pad_mode=pad) if method == 'pad' else how
    )
    assert (
        f'16 x 24 pixels (height, width; resize method: {method}'
        in (folder / 'README.md').read_text()
    )
    code = (folder / 'README.md').read_text().split('```python\n')[1].split('```')[0]
    monkeypatch.chdir(folder)
    wanted = learn.get_preds(act=lambda o: o)[0]
    for path, logits in zip(paths, wanted):
        (folder / 'photo.jpg').write_bytes(path.read_bytes())
        exec(code, space := {})
        assert np.allclose(space['logits'][0], logits, atol=1e-4)


def test_the_cards_code_writes_the_mask_that_the_learner_predicts(tmp_path, monkeypatch):
    "Void is a class that is ignored, and the untrained student predicts it for some pixels"
    g = np.random.default_rng(0)
    for i in range(4):
        for kind, values in (('photo', 256), ('mask', 3)):
            shape = (12, 16, 3) if kind == 'photo' else (12, 16)
            noise = Image.fromarray(g.integers(0, values, shape, dtype='uint8'))
            noise.save(tmp_path / f'{kind}{i}.png')
    dls = SegmentationDataLoaders.from_label_func(
        tmp_path,
        [tmp_path / f'photo{i}.png' for i in range(4)],
        lambda p: p.with_name(p.name.replace('photo', 'mask')),
        codes=['sky', 'road', 'void'],
        valid_pct=0.5,
        item_tfms=Resize((8, 8)),
        bs=2,
        num_workers=0,
    )
    torch.manual_seed(0)
    loss = CrossEntropyLossFlat(axis=1, ignore_index=2)
    learn = Learner(dls, torch.nn.Conv2d(3, 3, 3, padding=1), loss_func=loss)
    folder = save_student(learn, tmp_path / 'student')
    monkeypatch.chdir(folder)
    logits = learn.get_preds(act=lambda o: o)[0]
    assert (logits.argmax(1) == 2).any()
    for path, wanted in zip(dls.valid.items, logits[:, :2].argmax(1)):
        (folder / 'photo.jpg').write_bytes(path.read_bytes())
        exec(code_of(folder), {})
        assert (np.asarray(Image.open('mask.png')) == wanted.numpy()).all()


def test_the_guides_code_predicts_as_get_preds_from_photos(tmp_path, monkeypatch, capsys):
    learn, paths = photo_student(
        tmp_path, Resize((16, 24)), batch_tfms=Normalize.from_stats(*imagenet_stats)
    )
    page = Path(__file__).parents[2] / 'docs/guides/deployment.md'
    code = [b.split('```')[0] for b in page.read_text().split('```python\n')]
    code = next(b for b in code if 'def prepared(' in b)
    facts = export_student(learn, tmp_path / 's.onnx').facts
    space = dict(facts=facts, np=np, session=InferenceSession(tmp_path / 's.onnx'))
    exec(code, space)
    assert capsys.readouterr().out.strip() in ('red', 'blue')
    wanted = learn.get_preds(act=lambda o: o)[0]
    for path, logits in zip(paths, wanted):
        (got,) = space['session'].run(['logits'], {'x': space['prepared'](Image.open(path))})
        assert np.allclose(got[0], logits, atol=1e-4)


class Halved(ItemTransform):
    "A user's own transform"

    def encodes(self, o):
        return o


@pytest.mark.parametrize(
    'item_tfms, batch_tfms',
    [
        (RandomResizedCrop(16), None),
        (Resize(24), aug_transforms(size=16)),
        ([Resize(16), Halved()], None),
    ],
    ids=['random', 'twice', 'own'],
)
@pytest.mark.filterwarnings('ignore:.*contains pickles')
def test_an_unknown_way_of_resizing_is_called_unknown(tmp_path, item_tfms, batch_tfms):
    learn, _ = photo_student(tmp_path, item_tfms, batch_tfms=batch_tfms)
    resize = export_student(learn, tmp_path / 's.pt2').facts['resize']
    size = list(learn.dls.one_batch()[0].shape[2:])
    assert resize == dict(size=size, method='unknown', filter='unknown')


def test_a_student_that_can_not_be_exported_is_saved_as_weights(tmp_path):
    student, _ = pair('text_classifier')
    with pytest.warns(
        DistillWarning, match="no ONNX file: torch.export can't export SequentialRNN"
    ):
        folder = save_student(student, tmp_path / 'out')
    assert not (folder / 'student.onnx').exists()
    with pytest.raises(DistillError, match='no network: build the network'):
        load_student(folder)
    other, _ = pair('text_classifier', seed=4)
    load_student(folder, other.model)
    assert all(
        torch.equal(a, b)
        for a, b in zip(student.model.state_dict().values(), other.model.state_dict().values())
    )
    with pytest.raises(DistillError, match='belong to a different network'):
        load_student(folder, torch.nn.Linear(2, 2))
    with pytest.raises(DistillError, match='no student in'):
        load_student(tmp_path)


def test_the_free_axis_is_called_batch(onnx_file):
    g = pytest.importorskip('onnx').load(onnx_file.path).graph
    axes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*g.input, *g.output)
    }
    assert axes == dict(x=['batch', 3, 16, 16], logits=['batch', 3])
    assert {d.dim_param for v in g.value_info for d in v.type.tensor_type.shape.dim} <= {
        '',
        'batch',
    }


def test_the_pooling_of_fastai_s_heads_is_exported(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(AdaptiveConcatPool2d(), torch.nn.Flatten(), torch.nn.Linear(6, 2))
    items = [(x, 0) for x in torch.randn(4, 3, 5, 6)]
    dls = DataLoaders.from_dsets(items, items, bs=4, num_workers=0, device='cpu')
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat())
    assert export_student(learn, tmp_path / 's.onnx').difference < 1e-6
    x = torch.randn(3, 3, 5, 6)
    maxima_and_means = torch.cat([x.flatten(2).amax(2), x.mean((2, 3))], 1)
    (logits,) = InferenceSession(tmp_path / 's.onnx').run(None, dict(x=x.numpy()))
    np.testing.assert_allclose(logits, net[2](maxima_and_means).detach(), atol=1e-6)


def test_a_model_in_place_of_its_learner_is_refused(tmp_path):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(
        DistillError,
        match='export_student got a Linear: pass the Learner, learn instead of learn.model',
    ):
        export_student(model, tmp_path / 's.onnx')


@pytest.mark.parametrize('T', [2.5, [1.0, 2.0, 4.0]])
def test_a_file_may_divide_its_logits_by_a_temperature(normalized, tmp_path, T):
    exported = export_student(normalized, tmp_path / 's.pt2', temperature=T)
    program = torch.export.load(tmp_path / 's.pt2').module()
    x = torch.from_numpy(batch(normalized)[0])
    with torch.no_grad():
        wanted = normalized.model.eval()(x) / torch.tensor(T)
        assert torch.allclose(program(x), wanted, atol=1e-4)
    assert exported.facts['temperature'] == T


def test_a_saved_student_names_its_temperature(normalized, tmp_path):
    folder = save_student(normalized, tmp_path / 's', onnx=False, temperature=1.5)
    assert json.loads((folder / 'config.json').read_text())['temperature'] == 1.5


@pytest.mark.parametrize('T', [2.5, [1.0, 2.0, 4.0]])
def test_saved_weights_predict_with_the_temperature_as_the_saved_network_does(
    normalized, tmp_path, T
):
    folder = save_student(normalized, tmp_path / 's', onnx=True, temperature=T)
    x = torch.from_numpy(batch(normalized)[0])
    weights = load_student(folder, model=copy.deepcopy(normalized.model))
    network = load_student(folder)
    with torch.no_grad():
        wanted = normalized.model.eval()(x) / torch.tensor(T)
        assert torch.allclose(weights(x), wanted, atol=1e-6)
        assert torch.allclose(network(x), wanted, atol=1e-4)
    assert weights.facts['temperature'] == T
    assert not weights.training


def test_each_label_of_masks_is_divided_by_its_temperature(tmp_path):
    "Also if there are as many labels as columns"
    x = torch.randn(8, 3, 6, 4)
    items = list(zip(x, (x.mean(1, keepdim=True) > 0).float().expand(-1, 4, -1, -1)))
    dls = DataLoaders.from_dsets(items, items, bs=4, device='cpu', num_workers=0)
    learn = Learner(dls, torch.nn.Conv2d(3, 4, 1), loss_func=BCEWithLogitsLossFlat())
    T = [1.0, 2.0, 4.0, 8.0]
    folder = save_student(learn, tmp_path / 's', onnx=True, temperature=T)
    wanted = learn.model.eval()(x) / torch.tensor(T)[:, None, None]
    for student in (load_student(folder), load_student(folder, copy.deepcopy(learn.model))):
        assert torch.allclose(student(x), wanted, atol=1e-5)


def test_a_wrong_temperature_saves_nothing(normalized, tmp_path):
    with pytest.raises(DistillError, match='must be a positive number'):
        save_student(normalized, tmp_path / 's', temperature=-1.0)
    assert not (tmp_path / 's').exists()


@pytest.mark.parametrize('T', [torch.tensor(1.5), np.float32(1.5), np.array(1.5)])
def test_a_temperature_of_a_tensor_or_numpy_is_saved_as_a_number(normalized, tmp_path, T):
    folder = save_student(normalized, tmp_path / 's', onnx=False, temperature=T)
    assert json.loads((folder / 'config.json').read_text())['temperature'] == 1.5


@pytest.mark.parametrize('T', [0, -1.0, float('inf'), [1.0, 0.0], [], '2'])
def test_a_temperature_is_positive(normalized, tmp_path, T):
    with pytest.raises(DistillError, match='must be a positive number'):
        export_student(normalized, tmp_path / 's.pt2', temperature=T)


def without_space(write, *args):
    "In a process that can't write a larger file, as if the disk were full"
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))
    with pytest.raises(DistillError, match='No space for'):
        write(*args)


def write_program(folder):
    export_student(pair('image')[0], folder / 'student.pt2')


def write_without_report(folder):
    save_student(pair('image')[0], folder, onnx=False)


@pytest.mark.parametrize('write', [write_program, write_without_report])
def test_a_full_disk_is_an_error_and_leaves_the_files_of_the_student_before(write, tmp_path):
    student, teacher = pair('image')
    report = compare({'teacher': teacher, 'student': student}, repeats=10, seconds=0)
    save_student(student, tmp_path / 'out', report, onnx=False)
    (tmp_path / 'out' / 'student.pt2').write_bytes(b'before')
    before = {p.name: p.read_bytes() for p in (tmp_path / 'out').iterdir()}
    p = processes.start(tmp_path / 'log', without_space, write, tmp_path / 'out')
    assert processes.ended(p) == [0], processes.said(tmp_path / 'log')
    assert {p.name: p.read_bytes() for p in (tmp_path / 'out').iterdir()} == before
