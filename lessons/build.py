"""Make the notebooks: run every chapter once, and write it with Chinese and with English text.

    python lessons/build.py              # lessons/zh/*.ipynb and lessons/en/*.ipynb
    python lessons/build.py ch01 ch03    # these chapters alone

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

The notebooks are for reading; the chapters are the source. Needs nbclient and ipykernel.
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
CHINESE_BREAK = re.compile(f'(?<=[{CHINESE}])\n(?=[{CHINESE}])')


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
            body = CHINESE_BREAK.sub('', body)
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


def build(path):
    """Run one chapter, and write it in each language."""
    import nbformat
    from nbclient import NotebookClient
    cells = parse(path.read_text(encoding='utf-8'))
    executed = notebook(cells, None)  # code alone
    client = NotebookClient(executed, timeout=600, record_timing=False, extra_arguments=['--log-level=ERROR'],
                            resources={'metadata': {'path': HERE.parent}})
    client.execute()
    for language in LANGUAGES:
        nb, outputs = notebook(cells, language), iter(executed.cells)
        for cell in nb.cells:
            if cell.cell_type == 'code':
                ran = next(outputs)
                cell.outputs, cell.execution_count = ran.outputs, ran.execution_count
        target = HERE / language / f'{path.stem}.ipynb'
        target.parent.mkdir(exist_ok=True)
        data = nbformat.writes(nb).encode('utf-8')
        write_atomically(target, lambda f, data=data: f.write(data))
        print(f'{target.relative_to(HERE.parent)}: {len(nb.cells)} cells, {len(data):,} bytes')


def main():
    chapters = sorted(HERE.glob('ch[0-9][0-9].py'))
    for path in chapters:
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            build(path)


if __name__ == '__main__':
    with one_line_errors():
        main()
