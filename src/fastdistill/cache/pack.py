"""Pack a cache for sharing, as one file or as a folder with a README.

All files are compared with their checksums before packing and after unpacking.
"""

import shutil
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ..base.atomic_files import file_errors, new_file
from ..base.outputs import DistillError
from .file_store import Folder, open_folder
from .manifest import MAX_MANIFEST, Manifest, parse_manifest
from .reader import TeacherCache
from .sample_files import record_size
from .shard_notes import notes

CARD = 'README.md'
HEADER = 30  # size of the header before each file in a zip archive, without its name


def cache_facts(where: Folder, m: Manifest) -> Iterator[tuple[str, str]]:
    """Yield (label, text) for each fact about a cache.

    Control characters are removed, because anyone may have written the manifest.
    """
    for k, v in facts_of_cache(where, m):
        yield k, ''.join(c if c.isprintable() else ' ' for c in str(v))


def facts_of_cache(where: Folder, m: Manifest) -> Iterator[tuple[str, Any]]:
    yield 'samples', f'{m.count:,}'
    yield 'views', f'{m.views} of each, augmented' if m.views else 'one of each, not augmented'
    parts = [f'{f.name} {f.dtype} {"x".join(map(str, f.shape)) or 1}' for f in m.layout.fields]
    yield 'a row', f'{m.layout.bytes} bytes: {", ".join(parts)}'
    if m.layout.kind == 'pca':
        n, k = m.layout.shapes_of_head['weight']
        yield 'components', f'{k}, from which the logits of {n} classes are approximated'
    elif m.layout.head is not None:
        n, width = m.layout.shapes_of_head['weight']
        yield 'hidden states', f'{width} numbers, from which an output layer gives {n} logits'
    elif m.layout.draws is not None:
        draws = m.layout.draws
        yield 'draws', f'{draws["number"]} of {m.layout.n} classes at T={draws["T"]:g}'
    elif m.layout.n:
        k = m.layout.fields[0].shape[-1]
        yield 'classes stored', f'{k} of {m.layout.n}, tail {m.layout.tail!r}'
    for o in m.lost:
        text = f"{100 * o['share']:.1f}% of the teacher's information, KL {o['kl']:.2g} nats"
        yield f'lost at T={o["T"]:g}', text
    shards = list(m.all_shards())
    done = len(shards) if m.complete else len(notes(where, shards))
    resume = '' if m.complete else ' in total: `fastdistill cache write` resumes'
    yield 'files', f'{done} of {len(shards)} written, {m.bytes / 1e6:.1f} MB{resume}'
    yield 'teacher', ', '.join(f'{k} {v}' for k, v in m.teacher.items() if v not in (None, [], ''))
    if m.vocab:
        more = f' ... ({len(m.vocab)})' if len(m.vocab) > 10 else ''
        yield 'classes', ', '.join(map(str, m.vocab[:10])) + more
    yield from m.transforms.items()
    yield 'written with', ', '.join(f'{k} {v}' for k, v in m.versions.items())
    if where.sub('valid').size('manifest.json') is not None:
        yield 'validation set', 'included'


def pack_cache(
    cache: TeacherCache | Path | str,
    path: Path | str,
    *,
    title: str | None = None,
    data: str | None = None,
    note: str = '',
    license: str | None = None,
    teacher_license: str | None = None,
    data_license: str | None = None,
    force: bool = False,
) -> Path:
    """Copy a complete cache and add a README for its users.

    All files are compared with their checksums first.

    Args:
        cache: A `TeacherCache`, or the folder or URL of a cache.
        path: A name that ends in '.zip' for one uncompressed file. Any other name creates a folder,
            which can be used as a cache directly.
        title: Title of the README. If None, derive it from the teacher's name.
        data: Description of the dataset, with its source.
        note: Additional text for the README.
        license: License of the stored outputs, such as 'cc-by-4.0'.
        teacher_license, data_license: Licenses of the teacher and the dataset.
        force: If True, overwrite an existing file.
    """
    where = cache.folder if isinstance(cache, TeacherCache) else open_folder(cache)
    valid = where.sub('valid')
    parts = {'': where} | ({'valid/': valid} if valid.size('manifest.json') is not None else {})
    for p in parts.values():
        TeacherCache(p).check()
    licenses = {
        'license of the outputs': license,
        'license of the teacher': teacher_license,
        'license of the data': data_license,
    }
    card = card_of(where, title, data, note, licenses, license)
    files = {at + n: (p, n) for at, p in parts.items() for n in files_of_cache(p)}
    path = local_path(path)
    if path.suffix == '.zip':
        return write_zip(path, files, card, force)
    to = Folder(path)
    if to.names():
        raise DistillError(f'{path} is not empty: choose a different folder.')
    with removed_after_error(to) as written:
        to.write(CARD, card.encode())
        written.append(CARD)
        for name, (p, n) in manifest_last(files):
            to.write(name, p.read(n))
            written.append(name)
    return path


@contextmanager
def removed_after_error(where: Folder) -> Iterator[list[str]]:
    """Context manager that yields a list for the names of files that were written. After an error,
    these files and new, empty folders are removed, so that the same call can be repeated.
    """
    written: list[str] = []
    before = {*where.path.rglob('*')}
    try:
        yield written
    except BaseException:
        for name in reversed(written):
            where.remove(name)
        for folder in sorted({*where.path.rglob('*')} - before, reverse=True):
            with suppress(OSError):
                folder.rmdir()
        raise


def local_path(path: Any) -> Path:
    if '://' in str(path):
        raise DistillError(f'{path} is a URL: pass a local path, and copy the files from there.')
    return Path(path).expanduser()


def files_of_cache(where: Folder) -> list[str]:
    """Return the names of the files of a complete cache."""
    m = Manifest.read(where)
    optional = ['files.bin'] if where.size('files.bin') is not None else []
    return ['manifest.json', *optional, *(name for name, _ in m.all_files())]


def manifest_last(files: Mapping) -> list:
    """Sort the files so that the manifest is last.

    A folder without a manifest is not a cache, so an interrupted copy can't be mistaken for a
    cache.
    """
    return sorted(files.items(), key=lambda o: (o[0].endswith('manifest.json'), -len(o[0]), o[0]))


def write_zip(path: Path, files: Mapping, card: str, force: bool) -> Path:
    if path.exists() and not force:
        raise DistillError(
            f'There is already a file {path}: choose a different name, or pass force=True.'
        )
    with file_errors(f"Can't write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as tmp, zipfile.ZipFile(tmp, 'w', zipfile.ZIP_STORED) as z:
            z.writestr(entry(CARD), card)
            for name, (p, n) in manifest_last(files):
                z.writestr(entry(name), p.read(n))
    return path


def entry(name: str) -> zipfile.ZipInfo:
    """Create a zip entry with a fixed date, so that packing the same cache gives the same bytes."""
    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))


def unpack_cache(path: Path | str, to: Path | str) -> TeacherCache:
    """Unpack a cache into a folder, compare the files with their checksums, and open the cache.

    The packed file must contain exactly the files that its manifest lists.

    Args:
        path: File written by `pack_cache`.
        to: A new or empty folder for the cache.
    """
    where, path = Folder(local_path(to)), local_path(path)
    if where.names():
        raise DistillError(f'{where} is not empty: choose a different folder.')
    if not path.is_file():
        raise DistillError(f'There is no file {str(path)!r}.')
    # subtle: for damaged files, zipfile raises many kinds of errors
    with (
        file_errors(f"{path} can't be read as a packed cache", Exception),
        zipfile.ZipFile(path) as z,
    ):
        files = packed_files(z, path)
        size, free = sum(o.file_size for o in files.values()), where.free()
        if free is not None and size > free:
            raise DistillError(
                f'{path} needs {size / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free.'
            )
        with removed_after_error(where) as written:
            for name, o in manifest_last(files):
                with z.open(o) as source:
                    where.write(name, partial(shutil.copyfileobj, source, length=2**20))
                written.append(name)
            if 'valid/manifest.json' in files:
                TeacherCache(where.sub('valid')).check()
            return TeacherCache(where).check()


def packed_files(z: zipfile.ZipFile, path: Any) -> dict[str, zipfile.ZipInfo]:
    """Return {name: zip entry} for all files in a packed cache.

    Raise a DistillError if names or sizes differ from those in the manifest.
    """

    def refuse(what: str) -> NoReturn:
        raise DistillError(
            f'{path} is not a packed cache: {what}. `fastdistill cache pack` writes one.'
        )

    have: dict[str, zipfile.ZipInfo] = {}
    for o in z.infolist():
        if why := unusual(o):
            refuse(f'{o.orig_filename!r} {why}')
        if have.setdefault(o.filename, o) is not o:
            refuse(f'it contains {o.filename!r} twice')
    # subtle: files that overlap would need more disk space than the archive
    end = z.start_dir
    for o in sorted(have.values(), key=lambda o: o.header_offset, reverse=True):
        if o.header_offset + HEADER + o.compress_size > end:
            refuse(f'{o.filename!r} overlaps with what follows')
        end = o.header_offset
    if 'manifest.json' not in have:
        refuse('it has no manifest.json')
    # {name: size in bytes}. A size of None allows any size
    needed: dict[str, int] = {}
    optional: dict[str, int | None] = {CARD: None}
    for at in ('', 'valid/'):
        if (file := have.get(at + 'manifest.json')) is None:
            continue
        if file.file_size > MAX_MANIFEST:
            refuse(f'{file.filename} has {file.file_size} bytes')
        m = parse_manifest(z.read(file), path / at)
        if not m.complete:
            refuse(f'{file.filename} belongs to an unfinished cache')
        needed |= {at + n: size for n, size in m.all_files()} | {file.filename: file.file_size}
        optional[at + 'files.bin'] = record_size(m.count)
    for name, o in have.items():
        if name not in needed and name not in optional:
            refuse(f'it contains {name!r}, which its manifest does not list')
        size = needed.get(name, optional.get(name))
        if size not in (None, o.file_size):
            refuse(f'{name} has {o.file_size} bytes, but {size} in the manifest')
    if missing := [n for n in needed if n not in have]:
        refuse(f'it has no {missing[0]}, which its manifest lists')
    return have


def unusual(o: zipfile.ZipInfo) -> str:
    """Return why `pack_cache` can't have written a zip entry, or '' if it can."""
    kind = stat.S_IFMT(o.external_attr >> 16)
    if o.orig_filename != o.filename:
        return 'has a name with special characters'
    if o.flag_bits & 0x2041:
        return 'is encrypted: decrypt the archive first'
    if o.is_dir() or kind not in (0, stat.S_IFREG):
        return 'is a link, a folder or a device'
    if o.volume:
        return 'is in a different part of a multi-part archive: join the parts first'
    packed = o.compress_type != zipfile.ZIP_STORED or o.compress_size != o.file_size
    if packed or o.flag_bits & 0x20:
        return (
            f'is compressed (method {o.compress_type}): files of a packed cache are not compressed'
        )
    return ''


def card_of(where: Folder, title: Any, data: Any, note: str, licenses: Any, license: Any) -> str:
    """Return the text of README.md: a header for model hubs, facts about the cache, and usage."""
    m = Manifest.read(where)
    rows = dict(data=data or 'not stated') | {
        k: v for k, v in cache_facts(where, m) if k != 'files'
    }
    rows['size'] = f'{m.bytes / 1e6:.1f} MB in {len(list(m.all_shards()))} file(s)'
    rows |= {k: v or 'not stated' for k, v in licenses.items()}
    of_license = [f'license: {license}'] if license else []
    head = ['---', *of_license, 'tags:', '- knowledge-distillation', '- fastdistill', '---']
    cell = lambda v: ' '.join(str(v).split()).replace('|', '\\|')
    table = ['| | |', '|---|---|', *(f'| {cell(k)} | {cell(v)} |' for k, v in rows.items())]
    title = title or f'Outputs of {m.teacher.get("name", "a teacher")}'
    text = [f'# {cell(title)}', '', *([note, ''] if note else []), INTRO]
    return '\n'.join([*head, '', *text, '', *table, '', HOW_TO_USE])


INTRO = """The outputs of a teacher for each sample of a training set. Students can be trained from them by knowledge
distillation, without running the teacher. The samples themselves are not included: you need the same data."""

HOW_TO_USE = """## How to use

```python
from fastdistill.fastai import *

student.distill('targets', 10, 1e-3)    # a fastai Learner on the same data; 'targets' is this folder
```

Data, transforms and files are compared before the first batch. In a plain PyTorch loop, use
`fastdistill.cache.TeacherCache` and `Replayed`. To unpack a zip file, run
`fastdistill cache unpack targets.zip targets`. To compare every file with its checksum, run
`fastdistill cache info targets --check`.
"""
