"""Say in words which models are better, and what the numbers do not show."""

from typing import Any

from .number_format import estimate_text, p_text, percent_text, recovered_text
from .report_data import Comparison, ReportData


def verdict_of(c: Comparison, report: ReportData, measure: str | None = None) -> str:
    """Return 'better', 'worse' or 'not significant'.

    Args:
        c: The comparison.
        report: Report with the comparison.
        measure: Name of a measure. None for the headline measure.
    """
    k = measure or report.headline
    return c.differences[k].verdict(report.info[k].higher)


def verdicts(report: ReportData) -> list[tuple[str, str]]:
    """Describe how each student compares with the baseline, or with the teacher if there is no
    baseline.

    Returns:
        List of (verdict, sentences). The verdict is 'better', 'worse', 'not significant', or 'mixed'
        if the student is better in the headline measure and worse in a different one.
    """
    against = report.baseline or report.teacher
    several = [over_seeds(report)] if len(report.seeds.seeds) > 1 else []
    return several + [
        ('mixed' if worse_measures(c, report) else verdict_of(c, report), sentences(c, report))
        for c in report.comparisons
        if c.against == against
    ]


def worse_measures(c: Comparison, report: ReportData) -> list[str]:
    """Return the labels of measures in which a model is significantly worse although it is better
    in the headline measure.
    """
    if verdict_of(c, report) != 'better':
        return []
    return [report.info[k].label for k in c.differences if verdict_of(c, report, k) == 'worse']


def sentences(c: Comparison, report: ReportData) -> str:
    """Describe a comparison of two models with numbers."""
    k, info, d = report.headline, report.info[report.headline], c.differences[report.headline]
    a, b = (info.text(report.models[n].measures[k].value) + info.unit for n in (c.model, c.against))
    between = (
        ''
        if d.low is None
        else f'95% interval {info.text(d.low, True)} to {info.text(d.high, True)}; '
    )
    numbers = f'{info.label} {a} and {b}, a difference of {info.text(d.value, True)}{info.points}'
    tested = f'({between}{d.test}, {p_text(d.p)}; {report.n:,} {report.unit})'
    verdict, worse = verdict_of(c, report), worse_measures(c, report)
    if verdict == 'not significant':
        first = f'The difference between {c.model} and {c.against} is not significant: {numbers} {tested}.'
    else:
        but = f' in {info.label}, but worse in {" and ".join(worse)}' if worse else ''
        first = f'{c.model} is {verdict} than {c.against}{but}: {numbers} {tested}.'
    more = lead(c, report), worse_probabilities(c, report), uselessness(c, report)
    return first + one_training(c, report) + ''.join(more)


def one_training(c: Comparison, report: ReportData) -> str:
    """Return a sentence if each model was trained with only one seed, or if these are the models of
    the first of several seeds. Otherwise return ''.
    """
    seeds = report.seeds.seeds
    if not {c.model, c.against} <= {*report.seeds.values}:
        return ''
    if len(seeds) > 1:
        return f' These are the models of seed {seeds[0]}.'
    return (
        ' Each was trained once. Results vary with the seed: fastdistill train --seeds 3 shows by '
        'how much.'
    )


def over_seeds(report: ReportData) -> tuple[str, str]:
    """Return (verdict, sentence) about the difference between two students over several seeds."""
    info, d = report.info[report.headline], report.seeds.difference
    (against, a), (model, b) = report.seeds.values.items()
    n, better = len(a), sum((y > x) if info.higher else (y < x) for x, y in zip(a, b))
    verdict = d.verdict(info.higher)
    between = estimate_text(d, info, True).small
    tested = f'{f"95% interval {between}; " if between else ""}{d.test}, {p_text(d.p)}'
    if verdict == 'not significant':
        how = verdict if d.test else 'not tested'
        first = f'the difference between {model} and {against} is {how}'
    else:
        first = f'{model} is {verdict} than {against}'
    return verdict, (
        f'Over {n} seeds, {first}: {info.label} {info.text(d.value, True)}{info.points} on average '
        f'({tested if d.test else "two seeds are too few for a test"}). {model} was better in '
        f'{better} of {n} seeds.'
    )


def worse_probabilities(c: Comparison, report: ReportData) -> str:
    """Return a sentence if the probabilities are worse although the predictions are not. Otherwise
    return ''.
    """
    d: Any = c.differences.get('nll')
    if report.headline == 'nll' or d is None or not d.significant or d.value <= 0:
        return ''
    if verdict_of(c, report) == 'worse':
        return ''
    a, b = (
        report.info['nll'].text(report.models[n].measures['nll'].value)
        for n in (c.model, c.against)
    )
    return (
        f' Its probabilities are worse: NLL {a} and {b}.{confidence(c.model, report)} If you use them, call '
        'calibrate() on its Learner (in a shell: fastdistill export --calibrate).'
    )


def confidence(model: str, report: ReportData) -> str:
    """Describe whether a model is overconfident or underconfident on average. Return '' if it does
    not predict one class.
    """
    b = report.models[model].reliability
    if report.task != 'softmax' or not b or not sum(b['count']):
        return ''
    top, right = (sum(b[k]) / sum(b['count']) for k in ('confidence', 'right'))
    return (
        f' On average, it is {"over" if top > right else "under"}confident: mean confidence '
        f'{percent_text(top)}, accuracy {percent_text(right)}.'
    )


def constant_score(report: ReportData) -> tuple[str, float, str] | None:
    """Return (measure, score of the best constant prediction, what it predicts). None if unknown."""
    total = sum(report.counts)
    if report.task == 'regression':
        return 'r2', 0.0, 'the mean of the targets'
    if report.task == 'softmax' and total:
        most = max(range(len(report.counts)), key=report.counts.__getitem__)
        named = repr(report.classes[most]) if report.classes else most
        return 'accuracy', report.counts[most] / total, f'class {named}'
    if report.task == 'sigmoid' and len(report.counts) == 1:
        n = sum(next(iter(report.models.values())).reliability['count'])
        present = total / n if n else 0.0
        return 'accuracy', max(present, 1 - present), 'yes' if present > 0.5 else 'no'
    return None


def uselessness(c: Comparison, report: ReportData) -> str:
    """Return a sentence if a constant prediction is at least as good as one or both models."""
    if (found := constant_score(report)) is None:
        return ''
    k, least, what = found
    scores = {n: report.models[n].measures[k].value for n in (c.model, c.against)}
    weak = [n for n, v in scores.items() if v is not None and v <= least]
    if not weak:
        return ''
    info = report.info[k]
    return (
        f' {"Neither is" if len(weak) == 2 else f"{weak[0]} is not"} better than always predicting '
        f'{what}: {info.label} {info.text(least)}{info.unit}.'
    )


def lead(c: Comparison, report: ReportData) -> str:
    """Describe how much of the teacher's lead over the baseline the student recovers. Return '' if
    the student is not significantly different from the baseline.
    """
    if report.teacher is None or c.against != report.baseline:
        return ''
    if (e := c.recovered.get(report.headline)) is None:
        none = f' {report.teacher} has no significant lead over {report.baseline}'
        if better := ', '.join(report.info[k].label for k in c.recovered):
            in_headline = f' in {report.info[report.headline].label}'
            return f'{none}{in_headline}, but it is significantly better in {better}.'
        return f'{none}, so there is nothing to recover.'
    if not c.differences[report.headline].significant:
        return ''
    share, between = recovered_text(e)
    return f" It recovers {share} of {report.teacher}'s lead{f' (95% interval {between})' if between else ''}."


def coverage(report: ReportData) -> str:
    """Describe which kinds of variation the intervals account for."""
    choice = f'the choice of these {report.n:,} {report.unit}'
    if len(report.seeds.seeds) > 2:
        return (
            'The interval of the mean over the seeds accounts for the variation between training '
            f'runs. All other intervals and tests account only for {choice}.'
        )
    return (
        f'Intervals and tests account for {choice}, but not for the variation between training '
        'runs with different seeds.'
    )


def caveat(report: ReportData) -> str:
    """Describe what the intervals and tests do not account for."""
    return f'{coverage(report)} Each comparison is tested separately.'
