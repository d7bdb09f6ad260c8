"""Build the site into out/site/html: gather the pages, write the reference, build, check the sizes.

The gathered pages keep their places in the repository, so relative links work both there and on the site."""

import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / 'out' / 'site'
LINK = re.compile(r'\]\((?!https?:|#|mailto:)([^)#\s]+)')
MAX_BYTES = 500_000  # of a page
# pages of records, which would hide the answers in the site's search
NOT_SEARCHED = 'CHANGELOG.md', 'benchmarks/LOG.md'
# what fastdistill.fastai adds to every Learner
LEARNER = (
    'recipe_find.distill_find learner.calibrate learner.check_teacher learner.distill learner.explain '
    'learner.show_features'
)
# modules whose names are described on the page of another one, if that has them
ELSEWHERE = {
    'fastdistill': ['fastdistill.recipes'],
    'fastdistill.fastai': ['fastdistill.recipes', 'fastdistill'],
}


def pages():
    "All Markdown pages of the repository that the site shows"
    yield from (ROOT / name for name in ('README.md', 'CHANGELOG.md', 'CONTRIBUTING.md'))
    for folder in ('docs', 'examples', 'benchmarks'):
        yield from sorted((ROOT / folder).rglob('*.md'))


def gather(pages, into):
    "Copy the pages, and the files to which they link"
    for page in pages:
        linked = [(page.parent / link).resolve() for link in LINK.findall(page.read_text())]
        if missing := [str(o) for o in linked if not o.exists()]:
            raise SystemExit(f'{page.relative_to(ROOT)} links to what does not exist: {missing}')
        for file in [page, *(o for o in linked if o.is_file())]:
            target = into / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def missing_from_the_menu(pages):
    menu = (ROOT / 'mkdocs.yml').read_text()
    return [o for page in pages if (o := str(page.relative_to(ROOT))) + '\n' not in menu]


def write_reference(names, into):
    "Write a page for each public module: the docstrings of its names, and links to those that another page has"
    modules = {}
    for name in names:
        module, _, attribute = name.rpartition('.')
        modules.setdefault(module, []).append(attribute)
    into.mkdir(parents=True, exist_ok=True)
    for module in modules:
        homes = ELSEWHERE.get(module, ())
        parts, links = [f'# {module}'], []
        for attribute in modules[module]:
            home = next((o for o in homes if attribute in modules[o]), None)
            if f'fastdistill.{attribute}' in modules:  # a module, which has its own page
                links.append(f'[{attribute}](fastdistill.{attribute}.md)')
            elif home:
                links.append(f'[{attribute}]({home}.md#{home}.{attribute})')
            else:
                parts.append(f'::: {module}.{attribute}')
        if module == 'fastdistill.fastai':
            parts.append('## Methods of Learner')
            parts += [
                f'::: {module}.{o}\n    options: {{heading_level: 3}}' for o in LEARNER.split()
            ]
        if links:
            parts.insert(1, 'Described on other pages: ' + ', '.join(links) + '.')
        (into / f'{module}.md').write_text('\n\n'.join(parts) + '\n')


def add_measurements(cards):
    "At the end of a method's card: what its recipes gained in the benchmark"
    sys.path.insert(0, str(ROOT / 'benchmarks'))
    import leaderboard

    of_card = defaultdict(list)
    for r in leaderboard.rows():
        loss = leaderboard.loss_of(r.method)
        of_card['standardize' if loss == 'standardized kl' else loss].append(r)
    for card in cards.glob('*.md'):
        if those := of_card[card.stem]:
            table = leaderboard.overall(those)
            text = f'\n## Measured here\n\n{table}\n\n[What the columns mean, and each cell](../leaderboard.md).\n'
            with open(card, 'a') as file:
                file.write(text)


def first_sentence(text):
    "Of the first paragraph, without links"
    text = re.sub(r'<!--.*?-->|^```.*?^```$', '', text, flags=re.M | re.S)
    text = re.sub(r'^(#|\||!\[|<).*$', '', text, flags=re.M)
    paragraph = next((o for o in text.split('\n\n') if o.strip()), '').replace('\n', ' ').strip()
    paragraph = re.sub(r'\[(.+?)\]\(.+?\)', r'\1', paragraph)
    return re.split(r'(?<=[.:?]) (?=[A-Z`])', paragraph)[0].rstrip(':')


def llms_text(menu, folder):
    "The menu as text for language models: each page with its first sentence, and the calls to know"
    lines = ['# fastdistill', '', '> ' + first_sentence((folder / 'README.md').read_text()), '']
    lines += ['Read docs/assistants.md first: the main calls, and the mistakes to avoid.', '']
    for head, title, page in re.findall(r'^  - (.+?):$|^ +- (?:(.+): )?(\S+\.md)$', menu, re.M):
        if head:
            lines += ['', f'## {head}', '']
        elif page:
            text = (folder / page).read_text()
            title = title or re.search(r'^# (.+)$', text, re.M)[1]
            about = first_sentence(text) if not text.startswith('# fastdistill') else ''
            lines.append(f'- [{title}]({page})' + (f': {about}' if about else ''))
    return '\n'.join(lines) + '\n'


def too_large(html):
    return [str(o) for o in html.rglob('*.html') if o.stat().st_size > MAX_BYTES]


def write_pages(into):
    "All pages from which the site is built"
    gather(pages(), into)
    for name in ('site.css', 'site.js'):
        shutil.copyfile(ROOT / 'docs' / name, into / 'docs' / name)
    for name in NOT_SEARCHED:
        text = (into / name).read_text()
        (into / name).write_text(f'---\nsearch:\n  exclude: true\n---\n\n{text}')
    add_measurements(into / 'docs' / 'methods')
    names = (ROOT / 'tests' / 'api.txt').read_text().split()
    write_reference(names, into / 'docs' / 'reference')


def main():
    shutil.rmtree(SITE, ignore_errors=True)
    if missing := missing_from_the_menu(pages()):
        raise SystemExit(f'not in the nav of mkdocs.yml: {missing}')
    write_pages(SITE / 'pages')
    command = [sys.executable, '-m', 'zensical', 'build', '--clean', '--strict']
    if code := subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(code)
    # the pages as Markdown, for those who read text
    shutil.copytree(SITE / 'pages', SITE / 'html', dirs_exist_ok=True)
    menu = (ROOT / 'mkdocs.yml').read_text().split('\nnav:\n')[1]
    (SITE / 'html' / 'llms.txt').write_text(llms_text(menu, SITE / 'pages'))
    if found := too_large(SITE / 'html'):
        raise SystemExit(f'pages above {MAX_BYTES:,} bytes: {found}')


if __name__ == '__main__':
    main()
