"""Both READMEs say the same commands, and every script, config file, setting and link that they and docs/ name exists."""

import functools
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, train_settings

from configurator import config_of, configure
from corpus.options import OPTIONS

READMES = [ROOT / 'README.md', ROOT / 'README.zh-CN.md']
CONTRIBUTING = [ROOT / 'CONTRIBUTING.md', ROOT / 'CONTRIBUTING.zh-CN.md']
LESSONS = [ROOT / 'lessons/README.md', ROOT / 'lessons/README.zh-CN.md']
TRANSLATED = [READMES, CONTRIBUTING, LESSONS, *((ROOT / f'docs/{path.name}', path) for path in sorted(ROOT.glob('docs/zh/*.md')))]
PAGES = [*READMES, *CONTRIBUTING, *LESSONS, *sorted(ROOT.glob('docs/*.md')), *sorted(ROOT.glob('docs/zh/*.md'))]
RUN = ['python data/shakespeare_char/prepare.py', 'python train.py config/quickstart.py', 'python sample.py --out_dir=out-quickstart']
TEST = ['python -m pytest']
INSTALL = ['python3 -m venv .venv', '. .venv/bin/activate', 'pip install -r requirements.txt']


def blocks(page, language='sh'):
    """The fenced blocks of a page in one language."""
    fenced = re.findall(r'^```(\w*)\n(.*?)^```$', page.read_text(encoding='utf-8'), re.MULTILINE | re.DOTALL)
    return [block for kind, block in fenced if kind == language]


def commands(text):
    """'a && b  # why' -> [['a'], ['b']]: the words of each command, comments left out."""
    lines = text.replace('\\\n', ' ').splitlines()
    return [shlex.split(part, comments=True) for line in lines for part in line.split('&&') if shlex.split(part, comments=True)]


def named_commands(page):
    """Every command of a page, in a block or in the middle of a sentence."""
    spans = re.findall(r'`((?:python|torchrun) [^`\n]+)`', page.read_text(encoding='utf-8'))
    return [command for text in [*blocks(page), *spans] for command in commands(text)]


def split_command(words):
    """(script, its arguments) of python or torchrun with a script; (None, []) for any other command."""
    scripts = [i for i, word in enumerate(words) if word.endswith('.py')]
    if words[0] not in ('python', 'torchrun') or '-m' in words or not scripts:
        return None, []
    return words[scripts[0]], words[scripts[0] + 1:]


SCRIPTS = sorted({(script, *arguments) for page in PAGES for script, arguments in map(split_command, named_commands(page)) if script})


def settings_of(script):
    """The settings of a script, as its globals() hold them. chat.py has those of sample.py."""
    return train_settings() if script == 'train' else dict(vars(importlib.import_module(script.replace('chat', 'sample'))))


def test_the_pages_hold_what_is_checked():
    assert commands('python a.py --start="x y" \\\n  --b=1 && c  # why\n\n# only this') == [['python', 'a.py', '--start=x y', '--b=1'], ['c']]
    assert split_command(['torchrun', '--nnodes=2', 'train.py', 'config/x.py']) == ('train.py', ['config/x.py'])
    assert {command[0] for command in SCRIPTS} >= {'train.py', 'sample.py', 'bench.py', 'data/text/prepare.py'}


@pytest.mark.parametrize('pages', TRANSLATED, ids=lambda pages: str(pages[0].relative_to(ROOT)))
def test_both_languages_have_the_same_commands(pages):
    english, chinese = ([commands(block) for block in blocks(page)] for page in pages)
    assert english == chinese and blocks(pages[0], '') == blocks(pages[1], '')


def rows(page):
    """The rows of all tables of a page, and the numbers in each."""
    lines = re.findall(r'^\|.*\|$', page.read_text(encoding='utf-8'), re.MULTILINE)
    return [(line, sorted(re.findall(r'\d+(?:[.,]\d+)*(?:e-?\d+)?', line))) for line in lines]


@pytest.mark.parametrize('pages', [pages for pages in TRANSLATED if pages != LESSONS], ids=lambda pages: str(pages[0].relative_to(ROOT)))
def test_both_languages_have_the_same_numbers_in_their_tables(pages):
    english, chinese = map(rows, pages)
    assert len(english) == len(chinese)
    assert not [(a, b) for (a, numbers), (b, others) in zip(english, chinese) if numbers != others]


@pytest.mark.parametrize('pages', TRANSLATED, ids=lambda pages: str(pages[0].relative_to(ROOT)))
def test_a_chinese_page_leads_to_chinese_pages(pages):
    english = {path.resolve() for path, _ in TRANSLATED}
    links = re.findall(r'\[([^\]]+)\]\(([^)#\s]+)', pages[1].read_text(encoding='utf-8'))
    assert [name for name, path in links if (pages[1].parent / path).resolve() in english] == ['English']


def test_every_page_has_a_chinese_one():
    assert {path.name for path in ROOT.glob('docs/*.md')} == {path.name for path in ROOT.glob('docs/zh/*.md')}


def test_the_readme_is_short():
    assert len(READMES[0].read_text(encoding='utf-8').split()) <= 1200
    sizes = {name: len((ROOT / name).read_text(encoding='utf-8').splitlines()) for name in ('model.py', 'train.py')}
    for page in READMES:
        text = page.read_text(encoding='utf-8')
        assert all(re.search(rf'\({name}\)[ （(]*{size}\b', text) for name, size in sizes.items()), sizes


@pytest.mark.parametrize('page', READMES, ids=lambda page: page.name)
def test_run_and_test_are_one_line_each_on_the_first_screen(page):
    run, test = blocks(page)[:2]
    assert run == ' && '.join([*INSTALL, *RUN]) + '\n' and test == ' && '.join([*INSTALL, *TEST]) + '\n'
    assert page.read_text(encoding='utf-8').split(test)[0].count('\n') < 25


@functools.cache
def help_of(script):
    return subprocess.run([sys.executable, ROOT / script, '--help'], capture_output=True, text=True, encoding='utf-8').stdout


@pytest.mark.parametrize('command', SCRIPTS, ids=' '.join)
def test_commands_name_what_exists(command, tiny, capsys):
    script, *arguments = command
    assert (ROOT / script).is_file()
    if script.startswith('lessons/'):
        return
    if script.startswith('data/') or script == 'report.py':
        assert not [flag for flag in arguments if flag.startswith('--') and flag.split('=')[0] not in help_of(script)]
        return
    settings = settings_of(script.removesuffix('.py'))
    if script == 'numerics.py':
        arguments = arguments[3 if arguments[0] == 'compare' else 1:]  # after the subcommand and its folders
    if '--help' in arguments:
        with pytest.raises(SystemExit, match='0'):
            configure(settings, arguments)
    else:
        dataset = [f'--dataset={tiny}'] * ('config/depth.py' in arguments)  # its vocabulary is asked for
        given = configure(settings, arguments + dataset)
        assert len(given) >= sum(argument.startswith('--') for argument in arguments)


def test_git_ignores_what_the_commands_write():
    if subprocess.run(['git', 'rev-parse'], cwd=ROOT, capture_output=True).returncode:
        pytest.skip('needs a git repository')
    text = ' '.join(word for page in PAGES for command in named_commands(page) if 'numerics.py' not in command for word in command)
    written = re.findall(r'--(?:out|out_dir|export|answers|results)[= ]([\w./-]+)', text)
    files = {path if '.' in path else f'{path}/train.bin' for path in written if not path.startswith('/')}
    assert files >= {'exported/train.bin', 'weights.npz', 'comparison/train.bin', 'answers.jsonl', 'data/corpus/train.bin'}
    ignored = subprocess.run(['git', 'check-ignore', *files], cwd=ROOT, capture_output=True, text=True)
    assert set(ignored.stdout.split()) == files


def test_the_error_shown_is_the_one_that_comes():
    for page in (ROOT / 'docs/TRAIN.md', ROOT / 'docs/zh/TRAIN.md'):
        [shown] = [line for block in blocks(page, '') for line in block.splitlines() if 'unknown setting' in line]
        with pytest.raises(ValueError) as error:
            configure(settings_of('train'), [shown.split(':')[0] + '=1'])
        assert str(error.value) == shown


def anchors(page):
    """The anchors that a code host gives to the headings of a page."""
    headings = re.findall(r'^#+ (.+)$', page.read_text(encoding='utf-8'), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_settings_exist(page):
    text = page.read_text(encoding='utf-8')
    links = [link.partition('#') for link in re.findall(r'\]\(([^)\s]+)\)', text) if '://' not in link]
    for path, _, anchor in links:
        target = page.parent / path if path else page
        assert target.exists(), path
        is_line = target.suffix == '.py' and re.fullmatch(r'L\d+', anchor)  # tests/test_lessons.py checks the line
        assert not anchor or is_line or anchor in anchors(target), (path, anchor)
    known = {name for script in ('train', 'sample', 'evaluate', 'bench', 'serve', 'numerics') for name in config_of(settings_of(script))}
    known.update(OPTIONS)
    for path in ROOT.glob('corpus/*.py'):
        known.update(re.findall(r"'--(\w+)'", path.read_text(encoding='utf-8')))
    for path in (ROOT / 'bench.py', ROOT / 'weights/architectures.py', *ROOT.glob('serving/*.py')):  # fields of JSON, weights
        known.update(re.findall(r'\w+', path.read_text(encoding='utf-8')))
    known.update(re.findall(r'--(\w+)=', (ROOT / 'launch/slurm.sbatch').read_text(encoding='utf-8')))
    known.update(re.findall(r'\w+', ' '.join(blocks(page, 'python'))))  # examples explain their own names
    named = re.findall(r'`(?:--)?([a-z]\w*)=[^`\n]*`', text) + re.findall(r'`([a-z]+_[a-z_]+)`', text)
    assert not [name for name in named if name not in known]
    assert not [name for name in re.findall(r'\bconfig/\w+\.py', text) if not (ROOT / name).is_file()]


def test_requirements_bound_torch_and_the_rest():
    lines = [line for line in Path(ROOT / 'requirements.txt').read_text(encoding='utf-8').splitlines() if line and not line.startswith('#')]
    assert lines[0] == 'torch>=2.10' and all(re.fullmatch(r'[\w]+>=[\d.]+', line) for line in lines)


def test_the_groups_of_pyproject_are_the_requirements():
    text = (ROOT / 'pyproject.toml').read_text(encoding='utf-8').partition('[dependency-groups]')[2].partition('\n[')[0]
    grouped = re.findall(r'"([^"]+)"', text)
    lines = (ROOT / 'requirements.txt').read_text(encoding='utf-8').splitlines()
    assert sorted(grouped) == sorted(line for line in lines if line and not line.startswith('#'))
    assert all(name in text for name in ('core', 'data', 'serve', 'lessons', 'dev'))


def test_help_names_the_version(capsys):
    with pytest.raises(SystemExit, match='0'):
        configure(settings_of('train'), ['--help'])
    version = re.search(r'^version = "(.+)"', (ROOT / 'pyproject.toml').read_text(encoding='utf-8'), re.MULTILINE)[1]
    assert capsys.readouterr().out.startswith(f'flatGPT {version}\n') and f'## {version}' in (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
