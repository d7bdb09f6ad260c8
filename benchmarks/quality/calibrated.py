"""Calibration after `fit_temperature`: how far are the students' probabilities from right, and how far would those of a calibrated model be?

    python benchmarks/quality/calibrated.py                        # all cells that are missing, quick ones first
    python benchmarks/quality/calibrated.py --cells sst2_short

Labels alone and the default train again, with the reported seeds, each at the rate that the choosing seeds of PROTOCOL.md chose. The temperature is
fitted on the validation split. A calibrated model is right with the probability that it states, so its calibration error is not zero on a test split
of finite size: it is simulated by drawing for each prediction whether it is right, with the student's own probabilities.

A cell is left out if its teacher or its default is no longer what the stored runs had. Each run is one line of JSON in
benchmarks/results/quality/calibrated.jsonl, with the calibration error of the stored run beside the one of the repeated run."""

import time, warnings
from pathlib import Path
import numpy as np
import torch, typer
import protocol
from fastdistill import DistillWarning
from fastdistill.evaluation import fit_temperature
from judge import Judged
from loop import KINDS, predict, train
from measures import ece, measure, right
from run import commit, quick_first
from stored import OUT, append, read
from tasks import cells

FILE = OUT / 'calibrated.jsonl'
DRAWS = 300


def of_calibrated_model(p, seed):
    "95th percentile of the calibration error of a model that is right with the probabilities p, (N,)"
    g = torch.Generator().manual_seed(seed)
    return float(
        np.quantile([ece(p, torch.rand(len(p), generator=g) < p) for _ in range(DRAWS)], 0.95)
    )


def run_cell(judged, cell, path, code):
    data, have = (
        cell.data(),
        {(r['recipe'], r['seed']) for r in read(path) if r['cell'] == cell.name},
    )
    planned, recipes = protocol.plan(cell, data)
    names = 'labels', 'default'
    counts = lambda k: all(protocol.belongs(r, planned, k) for r in judged.finished[k])
    if not all(map(counts, names)):
        print(
            f'{cell.name}: left out, its teacher or its default differs from that of the stored runs'
        )
        return
    void = dict(void=cell.void) if cell.output == 'pixels' else {}
    options = dict(kind=KINDS[cell.output], axis=cell.axis, ignore_index=cell.void)
    for name in names:
        arm = judged.arm(name, 'ece')
        for seed, before in arm.test[arm.best].items():
            if (name, seed) in have:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter('ignore', DistillWarning)
                student, _ = train(cell, data, recipes[name], arm.best, seed)
            valid, test = (predict(student, o.x).float() for o in (data.valid, data.test))
            T = fit_temperature(valid, data.valid.y, **options)
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
