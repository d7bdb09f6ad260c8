"Runs and what belongs to them, as files."

import json
from tasks import HERE

OUT = HERE.parent / 'results' / 'quality'


def read(path):
    "The finished runs of a file; a line that an interrupt cut off is none"
    runs = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return runs


def append(path, run):
    "One whole line in one write, after whatever an interrupt left"
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and path.stat().st_size and path.read_bytes()[-1:] != b'\n'
    with open(path, 'ab', buffering=0) as f:
        f.write((('\n' if cut else '') + json.dumps(run) + '\n').encode())


def read_json(path):
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path, found):
    "The whole file at once"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix('.part')
    part.write_text(json.dumps(found, indent=1) + '\n')
    part.replace(path)
