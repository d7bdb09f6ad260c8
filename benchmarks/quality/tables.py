"""Draw the tables of README.md and the picture from the runs.

    python benchmarks/quality/tables.py"""
import json
import numpy as np
from candidates import CANDIDATES
from measures import MAIN
from rule import default, gains, group, left_out, results
from run import OUT
from stats import by_seed, paired, significant
from tasks import HERE, cells

PEERS = dict(fasterai=['fasterai', 'mse(.5)'], torchdistill=['kd(1,.5)'], timm=['timm'], keras=['keras'])    # the first is for classes
UNSEEN = 'fashion imagenette trec50 polarity occupation person cancer diabetes digit_pixels'.split() # tasks that were added after the rule was fixed
SHOWN = ['dist(auto)x3', 'kd(4,.9)', 'kd(1,.9)', 'soft(1)', 'kl(1)x3', 'kl(2)x3', 'kl(4)x3', 'dist(4)x3', 'dist(4)x1', 'ttm(4)x1', 'dkdx.3', 'logit_std(2)x3', 'smoothing']
KINDS = {'two classes': 'two classes', 'classes': 'many classes', 'pixels': 'segmentation', 'tokens': 'language model', 'labels': 'multi-label', 'numbers': 'regression'}
START,END = '<!-- tables -->\n','<!-- end of tables -->\n'


def table(head, rows):
    return '\n'.join(['| ' + ' | '.join(map(str, r)) + ' |' for r in (head, ['---']*len(head), *rows)]) + '\n'


def said(g):
    "A gain; bold where it is more than luck at the 5 % level, with ' worse' where it is a loss"
    text = f'{g[0]:+.2f}'
    if significant(g): return f'**{text}**'
    return f'**{text} worse**' if significant(g, -1) else text


def mean_of(runs, key): return np.mean([r['test'][key] for r in runs]) if runs and key in runs[0]['test'] else None

def number(v, form='.3f'): return '' if v is None else format(v, form)


class Results:
    "All that is known of the cells where labels alone and the default ran"
    def __init__(self):
        self.facts = {n: f for n,f in json.loads((OUT/'facts.json').read_text()).items()}
        self.cells = {n: c for n,c in cells().items() if n in self.facts and {'labels', default(self.facts[n])} <= results(c).keys()}
        self.facts = {n: self.facts[n] for n in self.cells}
        self.runs = {n: results(c) for n,c in self.cells.items()}
        self.gains = {n: gains(c) for n,c in self.cells.items()}
        self.peers = {n: {p: k for p,ks in PEERS.items() for k in ks if k in g} for n,g in self.gains.items()}
        self.default = {n: default(f) for n,f in self.facts.items()}
        self.left_out = left_out(self.facts, self.gains)

    def best(self, n):
        "The recipe with the largest mean gain on the test split, of all but labels alone"
        return max((k for k in self.gains[n] if k not in ('labels', 'smoothing')), key=lambda k: self.gains[n][k][0])

    def peer(self, n):
        "The best default of other tools in this cell; None where none ran"
        return max(self.peers[n].values(), key=lambda k: self.gains[n][k][0], default=None)


def of_cells(r):
    rows = []
    for n,f in r.facts.items():
        base = r.runs[n]['labels']
        top = f"{f['top_prob_train']:.3f} / {f['top_prob_valid']:.3f}" if 'top_prob_train' in f else ''
        scores = list(by_seed(base, r.cells[n].output).values())
        rows.append([n, KINDS[group(f)], f['classes'], f"{f['rows']:,}", f"{f['steps']:,} ({f['epochs']:g})", f"{f['parameters']:,}",
                     f"{100*f['teacher_train']:.1f} / {100*f['teacher_valid']:.1f} / {100*f['teacher_test']:.1f}", top,
                     f"{np.mean(scores):.2f} ± {np.std(scores, ddof=1):.2f}", len(scores), f"{base[0]['lr']:g}"])
    return table(['cell', 'kind', 'outputs', 'training items', 'steps (epochs)', 'parameters of the student', 'teacher: train / valid / test',
                  'its top probability: train / valid', 'labels alone, test', 'seeds', 'rate'], rows)


def of_default(r):
    rows = []
    for n in r.cells:
        d,b,l,g = r.default[n],r.best(n),r.left_out.get(n),r.gains[n]
        rows.append([n, d, said(g[d]) if d in g else 'not run', *(said(g[r.peers[n][p]]) if p in r.peers[n] else '' for p in PEERS), f'{b} {said(g[b])}',
                     f'{l} {said(g[l])}' if l else '', f'{g[b][0]-g[l][0]:.2f}' if l else ''])
    return table(['cell', 'default', 'its gain', *PEERS, 'best of all', 'chosen without this task', 'its regret'], rows)


def of_recipes(r):
    names = [k for k in SHOWN if any(k in g for g in r.gains.values())]
    rows = [[n, *(said(r.gains[n][k]) if k in r.gains[n] else '' for k in names)] for n in r.cells if group(r.facts[n]) in ('two classes', 'classes', 'pixels', 'tokens')]
    return table(['cell', *names], rows)


def of_groups(r):
    "Each recipe over the cells of a kind"
    rows = []
    for kind,title in KINDS.items():
        inside = [n for n,f in r.facts.items() if group(f) == kind]
        found = {k: [r.gains[n][k] for n in inside if k in r.gains[n]] for k in CANDIDATES}
        for k,gs in sorted(found.items(), key=lambda o: -np.mean([g[0] for g in o[1]]) if o[1] else 0):
            if not gs or k == 'labels' or len(gs) < .6*len(inside): continue
            rows.append([title, k, len(gs), f'{np.mean([g[0] for g in gs]):+.2f}', f'{min(g[0] for g in gs):+.2f}', sum(map(significant, gs)), sum(significant(g, -1) for g in gs)])
    return table(['kind', 'recipe', 'cells', 'mean gain', 'worst', 'better', 'worse'], rows)


def of_calibration(r):
    rows = []
    for n,c in r.cells.items():
        row = [n]
        for k in dict.fromkeys(['labels', r.default[n], 'kd(4,.9)', 'fasterai']):
            if k == r.default[n] or k in ('labels', 'kd(4,.9)', 'fasterai'):
                runs = r.runs[n].get(k)
                row.append(f"{number(mean_of(runs, 'nll'))} / {number(mean_of(runs, 'ece'))}" if mean_of(runs, 'nll') is not None else '')
        if c.output != 'numbers': rows.append(row + ['']*(5-len(row)))
    both = {k: np.array([[mean_of(r.runs[n][o], k) for o in ('labels', r.default[n])] for n,c in r.cells.items() if c.output != 'numbers']) for k in ('nll', 'ece')}
    (alone,ours),(a,b) = both['nll'].T,np.median(both['ece'], axis=0)
    return f'The NLL of the default is below that of labels alone in {(ours < alone).sum()} of {len(ours)} cells. Its median expected calibration error is {b:.3f}, that of labels alone {a:.3f}.\n\n' + table(['cell', 'labels alone', 'default', 'kd(4,.9)', 'fasterai'], rows)


def better_teacher(r, n):
    "Is the teacher better than the student that learns from the labels alone, on the validation split?"
    alone = np.mean([*by_seed(r.runs[n]['labels'], r.cells[n].output, 'valid').values()])
    f = r.facts[n]['teacher_valid']*100
    return (-f if r.cells[n].output == 'tokens' else f) > alone


def claims(r):
    "What the default promises, in all cells and where the teacher has something to teach"
    good = [n for n in r.cells if better_teacher(r, n)]
    rest,later = [n for n in r.cells if n not in good],[n for n,f in r.facts.items() if f['task'] in UNSEEN]
    return (f'**All {len(r.cells)} cells**\n\n' + claims_in(r, list(r.cells)) + f'\n**The {len(good)} cells whose teacher is better, on the validation split, than the student that learns '
            f'from labels alone** (without {", ".join(rest) or "none"})\n\n' + claims_in(r, good) + f'\n**The {len(later)} cells of tasks that were added after the rule was fixed** '
            f'({", ".join(later)})\n\n' + claims_in(r, later))


def claims_in(r, cells):
    gain = {n: r.gains[n][r.default[n]] for n in cells if r.default[n] in r.gains[n]}
    helped = [n for n in gain if any(significant(g) for k,g in r.gains[n].items() if k not in ('labels', 'smoothing'))]
    lines = [f'- The default: {verdict(r, gain, helped)}.']
    rivals = {}
    for n in gain:
        if (p := r.peer(n)) is None: continue
        rival = paired(*(by_seed(r.runs[n][k], r.cells[n].output) for k in (r.default[n], p)))
        rivals.setdefault(KINDS[group(r.facts[n])], []).append(rival[0])
    text = ', '.join(f'{k} {np.mean(v):+.2f}' for k,v in rivals.items())
    lines.append(f'- The default against the best default of another tool, which is chosen by the test scores of each cell; mean difference by kind: {text}.')
    for p in PEERS:
        both = {n: paired(*(by_seed(r.runs[n][o], r.cells[n].output) for o in (r.default[n], r.peers[n][p]))) for n in gain if r.peers[n].get(p, r.default[n]) != r.default[n]}
        if both: lines.append(f'- The default against {p} in {len(both)} cells: significantly better in {sum(map(significant, both.values()))}, worse in '
                              f'{sum(significant(g, -1) for g in both.values())}; mean difference {np.mean([g[0] for g in both.values()]):+.2f}.')
    left = {n: r.gains[n][k] for n,k in r.left_out.items() if n in cells}
    if left: lines.append(f'- The recipe that is best on the other tasks of the kind: {verdict(r, left, [n for n in helped if n in left])}.')
    return '\n'.join(lines) + '\n'


def verdict(r, gain, helped):
    worse = [n for n,g in gain.items() if significant(g, -1)]
    better = [n for n in helped if significant(gain[n])]
    top = {n: r.gains[n][r.best(n)][0] for n in gain}
    share = np.median([g[0] for g in gain.values()])/np.median([*top.values()])
    names = lambda o: f' ({", ".join(sorted(o))})' if o else ''
    return (f'significantly worse than labels alone in {len(worse)} of {len(gain)} cells{names(worse)}; significantly better in {len(better)} of the {len(helped)} where any recipe is'
            f'{", not in" + names(set(helped)-set(better)) if len(better) < len(helped) else ""}; its median gain is {share:.0%} of the median of each cell\'s best recipe, which is chosen by the '
            f'test scores; mean regret against those {np.mean([top[n]-g[0] for n,g in gain.items()]):.2f} points')


def picture(r, path):
    "Each cell a line: the gain of the default, of what the library did before, of the best other tool, and of the best recipe"
    from matplotlib.figure import Figure
    order = [n for k in KINDS for n,f in r.facts.items() if group(f) == k]
    fig = Figure(figsize=(9, .28*len(order) + 1.2), layout='constrained')
    ax = fig.subplots()
    styles = dict(best=('.55', '|', 'best of all recipes, chosen by the test'), peer=('tab:orange', 'o', "best default of another tool"), before=('tab:blue', 'o', 'kd(T=4, alpha=.9)'),
                  default=('tab:red', 'o', 'the default'))
    for i,n in enumerate(order):
        g,p = r.gains[n],r.peer(n)
        chosen = dict(best=r.best(n), peer=p, before='kd(4,.9)', default=r.default[n])
        for what,k in chosen.items():
            if k not in g: continue
            c,m,_ = styles[what]
            if what == 'default': ax.plot([g[k][0]-2*g[k][1], g[k][0]+2*g[k][1]], [i, i], color=c, lw=1.2, alpha=.6)
            ax.plot(np.clip(g[k][0], -20, 40), i, m, color=c, ms=9 if m == '|' else 5, mew=2 if m == '|' else 0)
    for c,m,label in styles.values(): ax.plot([], [], m, color=c, label=label, mew=2 if m == '|' else 0)
    ax.axvline(0, color='.7', lw=.8, zorder=0)
    ax.set_yticks(range(len(order)), [f'{n}  ({KINDS[group(r.facts[n])]})' for n in order], fontsize=8)
    ax.set_ylim(len(order)-.4, -.6)
    ax.set_xscale('symlog', linthresh=1)
    ax.set_xticks([-10, -3, -1, -.5, 0, .5, 1, 3, 10, 30], ['-10', '-3', '-1', '-.5', '0', '.5', '1', '3', '10', '30'], fontsize=8)
    ax.set_xlabel('points over labels alone, each at its own best rate; line: two standard errors of the default', fontsize=8)
    for o in ('top', 'right'): ax.spines[o].set_visible(False)
    ax.legend(fontsize=7, loc='lower center', bbox_to_anchor=(.5, 1), ncols=4, frameon=False)
    fig.savefig(path, dpi=110)


def main():
    r = Results()
    text = '\n'.join(f'## {title}\n\n{about}\n\n{draw(r)}' for title,about,draw in PARTS)
    path = HERE/'README.md'
    before,rest = path.read_text().split(START)
    path.write_text(before + START + '\n' + text + END + rest.split(END)[1])
    picture(r, HERE/'gains.png')


PARTS = [
    ('What the default promises', 'Significant: a paired t test over the seeds, two-sided, 5 %. With four seeds it finds only clear differences.', claims),
    ('The default, other tools, and the best', "Gain over labels alone in points of the test split, each recipe at its own best rate. Bold: significant. The last two columns: the recipe that is best on average on the *other tasks* of its kind, and how much less than the best of all it gains.", of_default),
    ('Softmax recipes in each cell', 'Gain over labels alone.', of_recipes),
    ('Each recipe over the cells of a kind', 'Better, worse: in how many cells significantly. Recipes that ran in most of these cells.', of_groups),
    ('Probabilities', 'NLL / expected calibration error on the test split, at the same runs.', of_calibration),
    ('The cells', f"Main measures: {', '.join(f'{v} for {k}' for k,v in MAIN.items())}; in points.", of_cells),
]

if __name__ == '__main__': main()
