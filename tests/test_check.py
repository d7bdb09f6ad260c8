"Mistakes that training would not have shown speak up before it."
import copy, re
import pytest, torch
import torch.nn.functional as F
from torch import nn
import apps
from apps import APPS, pair, toy
from fastai.basics import BCEWithLogitsLossFlat, Callback, CancelFitException, DataLoaders, set_seed
from fastai.vision.all import Normalize
from fastdistill.fastai import DistillError, DistillWarning, KnowledgeDistillation, Teacher, check_teacher, dkd
from fastdistill.doctor import Findings

pytestmark = pytest.mark.filterwarnings(*apps.FASTAI_WARNINGS)
KD = KnowledgeDistillation


def refuses(student, teacher, says, **kwargs):
    with pytest.raises(DistillError, match=says): student.fit(1, .01, cbs=KD(teacher, **kwargs))
    assert not [c for c in student.cbs if isinstance(c, KD)]

def warns(student, teacher, says, **kwargs):
    with pytest.warns(DistillWarning, match=says): student.fit(1, .01, cbs=KD(teacher, **kwargs))

def found(student, teacher): return [(f.level, f.what) for f in check_teacher(student, teacher)]

def first_loss(student, *cbs):
    "The loss of the first training batch, and the batch"
    class First(Callback):
        order = 8
        def after_loss(self):
            if not self.training: return
            self.seen = self.learn.loss.item(),self.x,self.y,self.pred.detach()
            raise CancelFitException
    first = First()
    student.fit(1, cbs=[*cbs, first])
    return first.seen

def kl(s, t): return F.kl_div(s.log_softmax(1), t.log_softmax(1), log_target=True, reduction='batchmean').item()


@pytest.mark.parametrize('app', APPS, ids=lambda a: a.name)
def test_a_teacher_that_fits_is_left_in_peace(app):
    student,teacher = pair(app)
    assert found(student, teacher) == [] and repr(student.check_teacher(teacher)) == 'Nothing found: the teacher fits.'


# classes

def other_order(vocab=('blue', 'red', 'green')):
    "The trained teacher of the images, its classes in another order"
    _,old = pair('image')
    _,teacher = apps.quiet(*apps.image(vocab))
    state = old.model.state_dict()
    mine = ['red', 'green', 'blue']
    rows = [mine.index(c) if c in mine else 0 for c in vocab]
    teacher.model.load_state_dict({k: v[rows] if k.startswith('1.1') else v for k,v in state.items()})
    return teacher,old

@pytest.mark.parametrize('check', [True, False])
def test_another_order_of_labels_is_mapped_by_name_and_said(check, capsys):
    student,_ = pair('image')
    teacher,right = other_order()
    loss,x,_,s = first_loss(student, KD(teacher, T=1., alpha=1., check=check))
    assert loss == pytest.approx(kl(s, right.model.eval()(x)), rel=1e-4)
    assert ("the student's classes in another order. Its outputs are mapped by name" in capsys.readouterr().out) is check

def test_members_of_an_ensemble_are_mapped_one_by_one():
    student,_ = pair('image')
    teacher,right = other_order()
    loss,x,_,s = first_loss(student, KD([teacher, right], T=1., alpha=1.))
    assert loss == pytest.approx(kl(s, right.model.eval()(x)), rel=1e-4)

def test_classes_of_texts_are_mapped_too():
    student,right = pair('text_classifier')
    _,teacher = apps.quiet(*apps.text_classifier(classes=['yes', 'no']))
    state = right.model.state_dict()
    teacher.model.load_state_dict({k: v.flip(0) if k.startswith('1.') and v.shape[:1] == (2,) else v for k,v in state.items()})
    assert found(student, teacher) == [('note', "The teacher has the student's classes in another order")]

def test_classes_that_only_the_teacher_knows_are_left_out(capsys):
    student,_ = pair('image')
    teacher,right = other_order(('blue', 'red', 'pink', 'green'))
    loss,x,_,s = first_loss(student, KD(teacher, T=1., alpha=1.))
    assert loss == pytest.approx(kl(s, right.model.eval()(x)), rel=1e-4)
    assert 'in another order, and 1 more that are left out' in capsys.readouterr().out

def test_a_users_own_selection_of_classes_is_kept():
    student,_ = pair('image')
    teacher,right = other_order()
    t = Teacher(teacher.model, select=[1, 2, 0])
    loss,x,_,s = first_loss(student, KD(t, T=1., alpha=1.))
    assert loss == pytest.approx(kl(s, right.model.eval()(x)), rel=1e-4)

def test_a_class_that_the_teacher_does_not_know_is_an_error():
    student,_ = pair('image')
    teacher,_ = other_order(('yellow', 'red', 'green'))
    refuses(student, teacher, r"does not know 1 of the student's classes \(blue\); it knows yellow, red, green")


# codings

@pytest.mark.parametrize('make', [apps.text_classifier, apps.language_model], ids=lambda f: f.__name__)
def test_another_vocabulary_is_an_error(make):
    student,_ = pair(make.__name__)
    _,teacher = apps.quiet(*make(vocab=apps.WORDS[:2] + apps.WORDS[:1:-1]))
    refuses(student, teacher, r"code their tokens differently \(first 'good' and 'is'\)")
    _,teacher = apps.quiet(*make(vocab=apps.WORDS + ['more']))
    refuses(student, teacher, r'code their tokens differently \(12 and 13 of them\)')

def test_other_categories_are_an_error():
    student,_ = pair('tabular')
    df = apps.table(96)
    _,teacher = apps.quiet(*apps.tabular(df.replace('red', 'yellow')))
    refuses(student, teacher, r'code their categories differently \(in colour\).*teacher.dls.train_ds.new')

def test_other_statistics_of_columns_are_an_error():
    student,_ = pair('tabular')
    df = apps.table(96)
    _,teacher = apps.quiet(*apps.tabular(df.assign(length=df.length*2)))
    refuses(student, teacher, r'code their columns of numbers differently \(in length\)')

def test_other_users_and_items_are_an_error():
    student,_ = pair('collab')
    df = apps.ratings(96)
    _,teacher = apps.quiet(*apps.collab(df=df.replace('u3', 'v3')))
    refuses(student, teacher, r'code their categories differently \(in user\)')


# inputs and outputs

def test_another_normalisation_of_images_is_mended_and_said(capsys):
    student,_ = pair('image')
    mean,std = torch.tensor([.4, .5, .6]),torch.tensor([.2, .3, .25])
    _,teacher = apps.quiet(*apps.image(batch_tfms=Normalize.from_stats(mean, std)))
    teacher.model.load_state_dict(apps.trained('image'))
    loss,x,_,s = first_loss(student, KD(teacher, T=1., alpha=1.))
    assert loss == pytest.approx(kl(s, teacher.model.eval()((x-mean.view(3, 1, 1))/std.view(3, 1, 1))), rel=1e-4)
    said = capsys.readouterr().out
    assert 'trained with another normalisation (mean 0, std 1 -> mean 0.4 0.5 0.6, std 0.2 0.3 0.25). Its input is re-normalised' in said

def test_another_shape_of_output_is_an_error():
    student,_ = toy()
    refuses(student, nn.Linear(8, 5), r"student's output has shape \(16, 4\), the teacher's \(16, 5\).*same classes.*Teacher\(teacher, select=")
    student,_ = pair('unet')
    refuses(student, lambda x: torch.randn(len(x), 4, 8, 8), r"\(16, 4, 16, 16\), the teacher's \(16, 4, 8, 8\).*same resolution")
    student,_ = pair('points')
    refuses(student, lambda x: torch.randn(len(x), 1), r"\(16, 4\), the teacher's \(16, 1\)")

def test_probabilities_in_place_of_logits_are_an_error():
    student,teacher = toy()
    refuses(student, nn.Sequential(teacher, nn.Softmax(1)), r'outputs are probabilities \(each sums to 1\).*teacher\(x\).log\(\)')
    student.fit(1, .01, cbs=KD(lambda x: teacher(x).softmax(1).log()))       # what the message says

def test_probabilities_of_labels_are_a_warning():
    student,teacher = pair('multi_label')
    warns(student, nn.Sequential(teacher.model, nn.Sigmoid()), r'lie between 0 and 1: they look like probabilities.*torch.logit')

def test_shared_parameters_are_an_error():
    student,_ = toy()
    refuses(student, student.model, r'share 6 parameters \(0.weight, 0.bias, 2.weight ...\).*copy.deepcopy')
    refuses(student, nn.Sequential(student.model[:2], nn.Linear(6, 4)), r'share 2 parameters \(0.weight, 0.bias\)')
    class Holder:
        def __init__(self, model): self.model = model
        def ask(self, x): return self.model(x)
    refuses(student, student.model.forward, 'share 6 parameters')


# what the teacher is

def test_an_untrained_teacher_is_no_better_than_chance():
    set_seed(1)
    student,_ = toy()
    warns(student, lambda x: torch.zeros(len(x), 4), "no better than chance: it recognises 25.0% of a class's samples on average "
          r"\(32 validation labels, 4 classes\), a constant answer 25.0%")
    student,_ = pair('multi_label')
    warns(student, lambda x: torch.full((len(x), 3), 2.), 'no better than chance: on 32 validation items, it gives labels that are there '
          'the probability 0.881, labels that are not 0.881')
    student,_ = pair('image_regression')
    warns(student, lambda x: torch.full((len(x), 1), 9.), 'no better than chance: its squared error on 32 validation items is '
          r'\S+, the best constant answer has')

def test_a_teacher_with_a_new_models_batchnorm_seems_untrained():
    student,_ = pair('image')
    set_seed(1)
    teacher = apps.quiet(*apps.image())[1]
    with pytest.warns(DistillWarning) as w: student.fit(1, .01, cbs=KD(teacher))
    assert any('batch-norm statistics are those of a new model: it seems untrained' in str(o.message) for o in w)

def test_a_validation_set_may_be_sorted_by_class():
    student,teacher = toy()
    order = lambda ds: sorted(ds, key=lambda o: o[1].item())
    x,y = apps.rows(800)
    items = list(zip(x, y))
    student.dls = DataLoaders.from_dsets(items[:64], order(items[64:]), bs=8, num_workers=0, device='cpu')
    assert found(student, teacher) == []
    assert 'no better than chance' in found(student, lambda x: torch.zeros(len(x), 4))[0][1]

def test_a_teacher_that_finds_what_is_rare_is_better_than_chance():
    x = torch.randn(400, 8)
    x[::40, 0] += 6
    items = list(zip(x, (x[:, 0] > 4).long()))
    student,_ = toy()
    student.dls = DataLoaders.from_dsets(items, items, bs=50, num_workers=0, device='cpu')
    student.model = apps.mlp(4)
    student.model[4] = nn.Linear(4, 2)
    eager = lambda x: torch.stack([torch.zeros(len(x)), 4*(x[:, 0]-1.5)], 1)    # finds all rare ones, at the price of many false alarms
    assert found(student, eager) == []

def test_a_teacher_may_have_a_class_switched_off():
    student,teacher = toy()
    assert found(student, lambda x: teacher(x) + torch.tensor([0., 0., 0., -torch.inf])) == []

def test_dropout_in_a_function_that_teaches_is_noticed():
    student,teacher = toy()
    shaky = nn.Sequential(nn.Dropout(.5), teacher).train()
    warns(student, lambda x: shaky(x), r'answers the same batch differently each time \(is dropout on\?\).*call eval\(\)')
    assert shaky.training
    student,teacher = toy()
    student.fit(1, .01, cbs=KD(shaky))      # of a module we take care

def test_batchnorm_in_training_mode_in_a_function_is_noticed():
    student,_ = pair('image')
    model = pair('image')[1].model.train()
    warns(student, lambda x: model(x), r'answers a sample differently in another batch \(is batch-norm in training mode\?\)')

def test_batchnorm_in_training_mode_is_noticed_in_batches_that_are_dicts():
    class OfDict(nn.Sequential):
        def forward(self, batch): return super().forward(batch['x'])
    student,teacher = toy()
    items = [({'x': x}, y) for x,y in zip(*apps.rows())]
    student.dls,student.model = DataLoaders.from_dsets(items[:64], items[64:], bs=4, num_workers=0),OfDict(*student.model)
    norm = nn.BatchNorm1d(8).train()
    warns(student, lambda batch: teacher(norm(batch['x'])), 'answers a sample differently in another batch')


def test_a_student_whose_reset_reinitializes_is_an_error_before_it_is_trained():
    class Reinitializes(nn.Linear):
        def reset(self): self.reset_parameters()
    student,teacher = toy()
    student.model = Reinitializes(8, 4)
    was,rng = copy.deepcopy(student.model.state_dict()),torch.get_rng_state()
    says, = [f for f in check_teacher(student, teacher) if f.level == 'error']
    assert re.match(r"The student's method reset.. changes weights .weight, bias., and fastai calls it whenever it fits, validates", says.what)
    assert all(torch.equal(v, was[k]) for k,v in student.model.state_dict().items()) and torch.equal(torch.get_rng_state(), rng)


# kinds

def test_a_loss_over_classes_is_refused_where_there_are_none():
    student,teacher = pair('multi_label')
    refuses(student, teacher, 'dkd compares a softmax over classes, but this model predicts a sigmoid per label.*binary_kl', recipe=dkd())
    student,teacher = pair('points')
    refuses(student, teacher, 'dkd compares a softmax over classes, but this model predicts numbers', recipe=dkd())

def test_a_kind_that_contradicts_the_students_loss_is_an_error():
    student,teacher = pair('multi_label')
    refuses(student, teacher, "asked for kind='softmax', but the student's loss is one of a label or none, each for itself "
            r"\(sigmoid\).*kind='sigmoid'", kind='softmax', axis=1)

def test_a_teacher_of_another_kind_is_an_error():
    student,teacher = pair('image')
    teacher.loss_func = BCEWithLogitsLossFlat()
    refuses(student, teacher, r'trained to give a label or none, each for itself \(sigmoid\), the student gives one class of several')


# the check itself

def test_the_check_changes_nothing_in_training():
    def run(app, check):
        student,teacher = pair(app)
        set_seed(5)
        student.fit(2, .01, cbs=KD(teacher, check=check))
        return apps.snapshot(student.model),student.recorder.losses
    for app in ('image', 'text_classifier', 'language_model', 'tabular'):
        (a,losses_a),(b,losses_b) = run(app, True),run(app, False)
        assert apps.same(a, b) and losses_a == losses_b

def test_check_false_trains_all_the_same():
    student,_ = toy()
    student.fit(1, .01, cbs=KD(lambda x: torch.zeros(len(x), 4), check=False))

def test_the_check_is_made_once_for_each_student(capsys):
    teacher,_ = other_order()
    cb,student = KD(teacher),pair('image')[0]
    for _ in range(2): student.fit(1, .01, cbs=cb)
    assert capsys.readouterr().out.count('another order') == 1
    pair('image')[0].fit(1, .01, cbs=cb)
    assert capsys.readouterr().out.count('another order') == 1

def test_all_mistakes_are_told_at_once():
    student,_ = pair('tabular')
    df = apps.table(96)
    _,teacher = apps.quiet(*apps.tabular(df.replace('red', 'yellow').assign(length=df.length*2)))
    refuses(student, teacher, '(?s)mistakes were found .check=False trains all the same.:\n- .*categories.*\n- .*columns of numbers')

def test_without_a_validation_set_the_rest_is_checked():
    student,teacher = toy()
    items = list(zip(*apps.rows()))
    for dls in (DataLoaders(student.dls.train), DataLoaders.from_dsets(items, [], bs=8, num_workers=0, device='cpu')):
        student.dls = dls
        assert found(student, teacher) == []
        assert found(student, student.model)[0][0] == 'error'
    student.fit(1, .01, cbs=KD(teacher))

def test_pytorchs_own_data_loaders_will_do():
    student,teacher = toy()
    x,y = apps.rows()
    dl = torch.utils.data.DataLoader(list(zip(x, y)), batch_size=16)
    student.dls = DataLoaders(dl, dl)
    assert found(student, teacher) == []
    student.fit(1, .01, cbs=KD(teacher))

def test_findings_print_as_what_and_what_to_do():
    student,_ = toy()
    f = student.check_teacher(student.model)
    assert isinstance(f, Findings) and repr(f).startswith('error: Student and teacher share 6 parameters')
