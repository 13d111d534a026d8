"""Make the notebooks: run every chapter once, and write it with Chinese and with English text.

    python lessons/build.py              # lessons/zh/*.ipynb and lessons/en/*.ipynb
    python lessons/build.py ch01 ch03    # these chapters alone
    python lessons/build.py --text       # new text around the existing outputs, without running code

A chapter is a Python script, lessons/ch01.py, of cells in the percent format that editors know:

    # %% [markdown] lang=en
    # Text in English, as comments. Every cell of text comes twice,
    #
    # %% [markdown] lang=zh
    # 中文写一遍，不是逐字翻译。一段可以分成几行写，
    # 中文的换行在笔记本里不留空格。
    #
    # %%
    print('code, for both languages: comments, prints and pictures in English')

    # %% solution
    print('a solution of an exercise: run too, folded away in the notebook')

A chapter ends with a cell of text that begins with `## Exercises` or `## 练习`, three numbered exercises, and
three cells of solutions. The prose of a solution goes into <details> in a cell of text.

The notebooks are for reading; the chapters are the source. Both READMEs name lines of the code, as
[model.py:1](../model.py#L1) `class GPT(`, and their numbers are renewed. Needs nbclient and ipykernel.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from files import one_line_errors, write_atomically

LANGUAGES = 'zh', 'en'
# a line break between two Chinese characters or punctuation marks
CHINESE = '\u2014\u2018-\u201d\u2026\u3000-\u9fff\uff00-\uffef'
CHINESE_BREAK = re.compile(rf'([{CHINESE}]\**)\n *(?=\**[{CHINESE}])')

# [model.py:12](../model.py#L12) `class GPT(`
REFERENCE = re.compile(r'\[(?P<name>[\w/]+\.py):(?P<number>\d+)\]\(\.\./[\w/.]+#L\d+\) `(?P<text>[^`]+)`')


class Cell(NamedTuple):
    kind: str  # '' for code, 'solution', 'zh' or 'en' for text
    source: str


def parse(text: str) -> list[Cell]:
    """Split the source of a chapter into cells."""
    parts = re.split(r'^# %%(.*)\n', text, flags=re.MULTILINE)
    cells = []
    for mark, body in zip(parts[1::2], parts[2::2], strict=True):
        kind = mark.replace('[markdown] lang=', '').strip()
        if kind not in ('', 'solution', *LANGUAGES):
            raise ValueError(f'# %%{mark}: accepted are "", " solution" and " [markdown] lang=zh" or "en"')
        if kind in LANGUAGES:
            body = re.sub('^# ?', '', body, flags=re.MULTILINE)
            body = CHINESE_BREAK.sub(r'\1', body)
        cells.append(Cell(kind, body.strip()))
    return cells


def notebook(cells, language):
    """Return the cells of one language as a notebook without outputs."""
    from nbformat import v4
    nb = v4.new_notebook(metadata={'kernelspec': dict(name='python3', display_name='Python 3', language='python')})
    for cell in cells:
        if cell.kind == language:
            nb.cells.append(v4.new_markdown_cell(cell.source))
        elif cell.kind not in LANGUAGES:
            nb.cells.append(v4.new_code_cell(cell.source))
        if cell.kind == 'solution':
            nb.cells[-1].metadata = dict(tags=['solution'], jupyter=dict(source_hidden=True))
    for number, cell in enumerate(nb.cells):
        cell.id = f'cell-{number}'  # the same in every build
    return nb


def run(nb):
    from nbclient import NotebookClient
    client = NotebookClient(nb, timeout=600, record_timing=False, coalesce_streams=True,
                            extra_arguments=['--log-level=ERROR'], resources={'metadata': {'path': HERE.parent}})
    client.execute()


def copy_outputs(nb, from_cells):
    """Give the code cells of a notebook the outputs of others, one after another."""
    code = [cell for cell in nb.cells if cell.cell_type == 'code']
    others = [cell for cell in from_cells if cell.cell_type == 'code']
    if [cell.source for cell in code] != [cell.source for cell in others]:
        raise ValueError('the code has changed: run python lessons/build.py without --text')
    for cell, other in zip(code, others, strict=True):
        cell.outputs, cell.execution_count = other.outputs, other.execution_count


def build(path, text_only):
    """Write one chapter in each language."""
    import nbformat
    cells = parse(path.read_text(encoding='utf-8'))
    executed = notebook(cells, None)  # code alone
    if text_only:
        copy_outputs(executed, nbformat.read(HERE / 'zh' / f'{path.stem}.ipynb', as_version=4).cells)
    else:
        run(executed)
    for language in LANGUAGES:
        nb = notebook(cells, language)
        copy_outputs(nb, executed.cells)
        target = HERE / language / f'{path.stem}.ipynb'
        target.parent.mkdir(exist_ok=True)
        data = nbformat.writes(nb).encode('utf-8')
        write_atomically(target, lambda f, data=data: f.write(data))
        print(f'{target.relative_to(HERE.parent)}: {len(nb.cells)} cells, {len(data):,} bytes')


def renew_line(match):
    """Return a reference to a line of the code with the number of the line that begins with its text."""
    name, text = match['name'], match['text']
    lines = (HERE.parent / name).read_text(encoding='utf-8').splitlines()
    numbers = [number for number, line in enumerate(lines, 1) if line.strip().startswith(text)]
    if not numbers:
        raise ValueError(f'lessons/README: {name} has no line that begins with {text}: name another one')
    return f'[{name}:{numbers[0]}](../{name}#L{numbers[0]}) `{text}`'


def main():
    names = {name for name in sys.argv[1:] if name != '--text'}
    for path in sorted(HERE.glob('ch[0-9][0-9].py')):
        if not names or path.stem in names:
            build(path, '--text' in sys.argv)
    for path in HERE.glob('README*.md'):
        data = REFERENCE.sub(renew_line, path.read_text(encoding='utf-8')).encode('utf-8')
        write_atomically(path, lambda f, data=data: f.write(data))


if __name__ == '__main__':
    with one_line_errors():
        main()
