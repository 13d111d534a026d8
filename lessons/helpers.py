"""Shared by the chapters: reduced size, a folder for files, pictures, commands of this repository, Chinese text.

LESSON_SMALL=1 reduces every chapter to a few seconds; LESSON_WORK moves the folder of files from lessons/work.
"""

import contextlib
import io
import itertools
import os
import random
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from training.pictures import COLOURS as COLOURS  # for the chapters
from training.pictures import chinese_fonts

SMALL = os.environ.get('LESSON_SMALL', '0') not in ('', '0')
WORK = Path(os.environ.get('LESSON_WORK', 'lessons/work'))
WORK.mkdir(parents=True, exist_ok=True)
NUMBERS = itertools.count(1)  # of a script's pictures

FONTS = chinese_fonts()[:1]
matplotlib.rcParams['font.family'] = ['DejaVu Sans', *FONTS]
# the Python package's dialogues, BSD licence
DIALOGUE = ('pip:chatterbot-corpus==1.3.3#86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154'
            '!chatterbot_corpus/data/chinese/conversations.yml')


def labels(texts):
    """Return texts as labels of a picture: numbers stand in where no font has Chinese characters."""
    return list(texts) if FONTS else [text if text.isascii() else f'({i})' for i, text in enumerate(texts)]


def picture(width=8.0, height=3.5):
    """Return an empty figure; figure.subplots() makes its axes, show() shows it."""
    return Figure(figsize=(width, height), dpi=80, layout='constrained')


def show(figure):
    """Display a figure in a notebook; write it to WORK in a script."""
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing')
        figure.savefig(png, format='png')
    if 'ipykernel' in sys.modules:
        from IPython.display import Image, display
        display(Image(data=png.getvalue()))
    else:
        path = WORK / f'{Path(sys.argv[0]).stem}-{next(NUMBERS)}.png'
        path.write_bytes(png.getvalue())
        print(f'picture: {path}')


def run(*words, n_lines=8):
    """Run a script of the repository, print the last lines of what it printed, and return all of it.

    words   as on the command line: 'train.py', '--max_iters=10'
    raises  RuntimeError with the end of its messages if it fails
    """
    print('$ python', *words)
    exit_code, output = (run_here if SMALL else run_process)([str(word) for word in words])
    output = output.replace(os.getcwd() + os.sep, '')
    if exit_code:
        raise RuntimeError(f'exit code {exit_code}\n{output[-3000:]}')
    print('\n'.join(output.splitlines()[-n_lines:]))
    return output


def run_process(words):
    ended = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8',
                           errors='replace', env={**os.environ, 'PYTHONIOENCODING': 'utf-8'})
    return ended.returncode, ended.stdout


def run_here(words):
    """Run a script in this process: most of the time of a reduced one would be the import of torch."""
    output, argv, exit_code = io.StringIO(), sys.argv, 0
    module = words[1] if words[0] == '-m' else None
    sys.argv = words[1:] if module else words
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            if module:
                runpy.run_module(module, run_name='__main__')
            else:
                runpy.run_path(words[0], run_name='__main__')
    except SystemExit as stop:
        exit_code = stop.code or 0
    finally:
        sys.argv = argv
    return exit_code, output.getvalue()


def quiet():
    """Keep the addresses that fetch() prints out of notebooks."""
    output = io.StringIO()
    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.redirect_stdout(output))
    stack.enter_context(contextlib.redirect_stderr(output))
    return stack


def english_text():
    """Return the text of data/shakespeare_char, or sentences of a small grammar without a network."""
    from data.shakespeare_char.prepare import find_text
    try:
        with quiet():
            return find_text(WORK / 'shakespeare')[0]
    except OSError:
        print('Shakespeare is out of reach; sentences of a small grammar stand in for him.')
    who, did, where = ['The miller', 'A ferryman', 'My sister', 'Old Tom'], ['slept', 'sang', 'waited'], ['here', 'by the sea', 'at home']
    return made_up([who, [' '], did, [' '], where, ['.\n']], 20_000)


def chinese_text():
    """Return Chinese text: that of data/chinese, or sentences of a small grammar without a network."""
    from data.chinese.prepare import fetch_text
    folder = WORK / 'chinese'
    folder.mkdir(exist_ok=True)
    try:
        with quiet():
            return fetch_text(folder).read_text(encoding='utf-8')
    except OSError:
        print('The texts of data/chinese are out of reach; sentences of a small grammar stand in for them.')
        return made_up_chinese()


def chinese_kinds():
    """Return {kind: Chinese text}: poems, and if they are in reach dialogue and the prose of a handbook."""
    from corpus.fetch import fetch
    from data.chinese.prepare import REFERENCE, REFERENCE_SHA256, read_reference
    kinds = {'poems': chinese_text()}
    try:
        with quiet():
            turns = fetch('chatterbot-chinese.yml', [DIALOGUE]).read_text(encoding='utf-8')
            handbook = fetch('debian-reference-zh-cn_2.100_all.deb', [REFERENCE], REFERENCE_SHA256)
        kinds['dialogue'] = re.sub(r'^(- - |  - )', '', turns.partition('conversations:\n')[2], flags=re.M)
        kinds['prose'] = read_reference(handbook)
    except OSError:
        print('Other kinds of text are out of reach: a package mirror is needed once, then they are cached.')
    return kinds


def made_up_chinese():
    when, who = ['清晨', '傍晚', '雨后', '昨天夜里'], ['老船工', '小姑娘', '邮递员', '我的祖父', '两只燕子']
    what = ['沿着河岸慢慢走', '在桥头等人', '看远处的山', '望着天边的云', '听见了钟声']
    return made_up([when, ['，'], who, what, ['。\n\n']], 4000)


def made_up(parts, n_sentences):
    """Return sentences that take one word of each part."""
    draw = random.Random(0)
    return ''.join(draw.choice(words) for _ in range(n_sentences) for words in parts)
