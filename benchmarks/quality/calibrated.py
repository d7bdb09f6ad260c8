"""Calibration after `fit_temperature`: how far are the students' probabilities from right, and how far would those of a calibrated model be?

    python benchmarks/quality/calibrated.py                        # all cells that are missing, quick ones first
    python benchmarks/quality/calibrated.py --cells sst2_short

Labels alone and the default train again, with the reported seeds, each at the rate that the choosing seeds of PROTOCOL.md chose. The temperature is
fitted on the validation split. A calibrated model is right with the probability that it states, so its calibration error is not zero on a test split
of finite size: it is simulated by drawing for each prediction whether it is right, with the student's own probabilities.

A cell is left out if its teacher or its default is no longer what the stored runs had. Each run is one line of JSON in
benchmarks/results/calibrated.jsonl, with the calibration error of the stored run beside the one of the repeated run."""

import time, warnings
from pathlib import Path
import numpy as np
import torch, typer
import protocol
from fastdistill import DistillWarning
from fastdistill.evaluation import fit_temperature
from judge import Judged
from loop import KINDS, predict, train
from measures import measure, right, rows
from run import commit, quick_first
from stored import OUT, append, read
from tables import number, table
from tasks import cells

FILE = OUT.parent / 'calibrated.jsonl'
NAMES = 'labels', 'default'
DRAWS = 300
MOST_LOGITS = 2**20


def of_calibrated_model(p, seed, bins=15):
    "95th percentile of the calibration error of a model that is right with the probabilities p, (N,)"
    # predictions with the same probability, to four decimals, are drawn together
    levels, n = np.unique(np.round(p.numpy(), 4), return_counts=True)
    hits = np.random.default_rng(seed).binomial(n, levels, (DRAWS, len(n)))
    at = np.minimum((levels * bins).astype(int), bins - 1)
    gaps = [np.abs(np.bincount(at, n * levels - h, bins)).sum() / len(p) for h in hits]
    return float(np.quantile(gaps, 0.95))


def temperature(cell, s, y):
    "Of validation logits; of pixels and tokens, every k-th is used, about a million logits"
    if cell.output in ('pixels', 'tokens'):
        s, y = rows(cell.output, s, y, cell.void)
        step = max(s.numel() // MOST_LOGITS, 1)
        s, y = s[::step], y[::step]
    return fit_temperature(s, y, kind=KINDS[cell.output])


def run_cell(judged, cell, path, code):
    have = {(r['recipe'], r['seed']) for r in read(path) if r['cell'] == cell.name}
    data = cell.data()
    planned, recipes = protocol.plan(cell, data)
    counts = lambda k: all(protocol.belongs(r, planned, k) for r in judged.finished[k])
    if not all(map(counts, NAMES)):
        print(
            f'{cell.name}: left out, its teacher or its default differs from that of the stored runs'
        )
        return
    void = dict(void=cell.void) if cell.output == 'pixels' else {}
    for name in NAMES:
        arm = judged.arm(name, 'ece')
        for seed, before in arm.test[arm.best].items():
            if (name, seed) in have:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter('ignore', DistillWarning)
                student, _ = train(cell, data, recipes[name], arm.best, seed)
            valid, test = (predict(student, o.x).float() for o in (data.valid, data.test))
            T = temperature(cell, valid, data.valid.y)
            raw, after = (
                measure(cell.output, o, data.test.y, **void) for o in (test, test / T.float())
            )
            p, _ = right(cell.output, test / T.float(), data.test.y, **void)
            r = dict(
                cell=cell.name,
                recipe=name,
                lr=arm.best,
                seed=seed,
                n=len(p),
                temperature=[round(o, 4) for o in T.flatten().tolist()],
                stored=round(-before, 6),
                **{
                    f'{k}_{when}': round(o[k], 6)
                    for when, o in (('before', raw), ('after', after))
                    for k in ('ece', 'nll')
                },
                limit=round(of_calibrated_model(p, seed), 6),
                commit=code,
                day=time.strftime('%Y-%m-%d'),
            )
            append(path, r)
            print(f'{time.strftime("%H:%M:%S")} {r}', flush=True)


def finished(path=FILE):
    "cell -> recipe -> its runs, of the cells in which both have as many"
    found = {}
    for r in read(path):
        found.setdefault(r['cell'], {k: [] for k in NAMES})[r['recipe']].append(r)
    return {n: own for n, own in sorted(found.items()) if len({*map(len, own.values())}) == 1}


def means(own, key):
    "(labels alone, the default)"
    return [np.mean([np.mean(r[key]) for r in own[k]]) for k in NAMES]


def medians(when, path=FILE):
    "Of the calibration error 'before' or 'after' the temperature: (the default, labels alone)"
    alone, ours = np.median([means(own, f'ece_{when}') for own in finished(path).values()], 0)
    return ours, alone


def within(runs):
    "How many of these runs have at most the calibration error of a calibrated model"
    return sum(r['ece_after'] <= r['limit'] for r in runs)


def all_within(name, path=FILE):
    "(how many of this recipe's runs are within the limit, all of them)"
    runs = [r for own in finished(path).values() for r in own[name]]
    return within(runs), len(runs)


def text(path=FILE):
    "A table of the stored runs"
    rows, found = [], finished(path)
    mean = lambda n, key: means(found[n], key)
    pair = lambda v, form: ', '.join(number(o, form) for o in v)
    for n, own in found.items():
        rows.append(
            [
                n,
                f'{own["default"][0]["n"]:,}',
                pair(mean(n, 'temperature'), '.2f'),
                *(pair(mean(n, k), '.3f') for k in ('ece_before', 'ece_after', 'limit')),
                f'{pair(map(within, map(own.get, NAMES)), "")} of {len(own["default"])}',
                pair(mean(n, 'nll_before'), '.3f'),
                pair(mean(n, 'nll_after'), '.3f'),
            ]
        )
    before, after = medians('before', path), medians('after', path)
    (alone, _), (ours, total) = (all_within(k, path) for k in NAMES)
    few = [n for n, own in found.items() if within(own['default']) < len(own['default']) / 2]
    return (
        f'Medians of {len(found)} cells: the calibration error is {before[0]:.4f} with the default and {before[1]:.4f} with labels alone; '
        f'with a temperature, {after[0]:.4f} and {after[1]:.4f}. Within the limit, which a calibrated model exceeds in 5% of its runs, are '
        f'{ours} of {total} runs of the default and {alone} of {total} of labels alone. Most runs of the default are above it in {", ".join(few) or "no cell"}.\n\n'
    ) + table(
        [
            'cell',
            'predictions',
            'temperature: labels alone, default',
            'calibration error',
            'with the temperature',
            'limit',
            'runs within',
            'NLL',
            'with the temperature',
        ],
        rows,
    )


def main(out: Path = FILE, cell_names: str = typer.Option('', '--cells')):
    torch.set_num_threads(1)
    have, judged, code = cells(), Judged().cells, commit()
    chosen = [have[n] for n in cell_names.split(',')] if cell_names else quick_first(have.values())
    for cell in chosen:
        j = judged.get(cell.name)
        if j is not None and 'ece' in j.measures and j.has('labels', 'default'):
            run_cell(j, cell, out, code)


if __name__ == '__main__':
    typer.run(main)
