"""Every chapter of lessons/ runs, and the notebooks are those of today's chapters."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from lessons.build import LANGUAGES, REFERENCE, parse

CHAPTERS = sorted(path.stem for path in (ROOT / 'lessons').glob('ch[0-9][0-9].py'))
NOTEBOOKS = [f'{language}/{chapter}' for language in LANGUAGES for chapter in CHAPTERS]
MAX_NOTEBOOK_BYTES = 300_000
by_chapter = pytest.mark.parametrize('chapter', CHAPTERS)
by_notebook = pytest.mark.parametrize('name', NOTEBOOKS)


def cells_of(chapter):
    return parse((ROOT / f'lessons/{chapter}.py').read_text(encoding='utf-8'))


def text_of(name):
    return (ROOT / f'lessons/{name}.ipynb').read_text(encoding='utf-8')


@by_chapter
def test_a_chapter_runs_without_a_network(chapter, tmp_path):
    pytest.importorskip('matplotlib')
    env = {**os.environ, 'LESSON_SMALL': '1', 'LESSON_WORK': str(tmp_path), 'FLATGPT_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}
    ran = subprocess.run([sys.executable, f'lessons/{chapter}.py'], cwd=ROOT, env=env, capture_output=True, text=True, encoding='utf-8')
    assert ran.returncode == 0, ran.stderr[-3000:]


@by_chapter
def test_a_chapter_says_everything_in_both_languages(chapter):
    kinds = [cell.kind for cell in cells_of(chapter) if cell.kind in LANGUAGES]
    assert kinds and kinds == ['en', 'zh'] * (len(kinds) // 2)


@by_chapter
def test_a_chapter_ends_with_three_exercises_and_their_solutions(chapter):
    cells = cells_of(chapter)
    exercises = [cell.source for cell in cells if re.match('## (Exercises|练习)', cell.source)]
    assert [len(re.findall(r'^\d\. ', text.partition('<details>')[0], re.MULTILINE)) for text in exercises] == [3, 3]
    assert [cell.kind for cell in cells].count('solution') == 3


@by_notebook
def test_a_notebook_is_that_of_the_chapter(name):
    language, chapter = name.split('/')
    kept = [cell.source for cell in cells_of(chapter) if cell.kind not in LANGUAGES or cell.kind == language]
    assert [''.join(cell['source']) for cell in json.loads(text_of(name))['cells']] == kept, 'run python lessons/build.py'


@by_notebook
def test_a_notebook_was_run_and_is_small(name):
    text = text_of(name)
    code = [cell for cell in json.loads(text)['cells'] if cell['cell_type'] == 'code']
    assert [cell['execution_count'] for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell['outputs'] if output['output_type'] == 'error']
    assert len(text) <= MAX_NOTEBOOK_BYTES


@by_notebook
def test_a_notebook_names_no_machine(name):
    for cell in json.loads(text_of(name))['cells']:
        printed = json.dumps([output.get('text', '') for output in cell.get('outputs', [])])
        assert not re.search(r'(?<![\w.~-])/(tmp|work|root|home|Users)/|\b[A-Z]:\\\\|https?://', printed)


@pytest.mark.parametrize('name', ['README.md', 'README.zh-CN.md'])
def test_the_readme_points_to_the_code(name):
    text = (ROOT / 'lessons' / name).read_text(encoding='utf-8')
    references = list(REFERENCE.finditer(text))
    assert len(references) >= len(CHAPTERS)
    for match in references:
        line = int(match['number']) - 1
        near = (ROOT / match['name']).read_text(encoding='utf-8').splitlines()[max(line - 15, 0):line + 15]  # an editor shows these
        assert any(text.strip().startswith(match['text']) for text in near), f'{match[0]}: run python lessons/build.py --text'
