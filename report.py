"""Report on training runs in tables and curves: on one run, or on several in the same pictures.

    python report.py out-quickstart                  # report.md and its pictures in out-quickstart
    python report.py out-a out-b --out=comparison    # both runs in each picture, and settings that differ
    python report.py --watch out-quickstart          # report.html there, renewed until Ctrl-C

It reads metrics.jsonl and, if they exist, run.json, samples.md and eval.json, so an unfinished run has a
report too. A damaged line or field is skipped with a warning. train.py calls it at the end.
"""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from files import one_line_errors, print0, printable, read_json, write_atomically, write_text
from training.pictures import draw_all


class Run(NamedTuple):
    name: str
    lines: list[dict]  # numbers of metrics.jsonl, and the updates, tokens and minutes before each line
    latest: dict  # the latest of each number
    facts: dict  # run.json
    evals: dict  # eval.json
    samples: str  # the last section of samples.md

    def values(self, name) -> list:
        return [line[name] for line in self.lines if name in line]


class Table(NamedTuple):
    title: str
    heads: list[str]
    rows: list[list[str]]
    is_code: bool = False  # cells of report.md


class Picture(NamedTuple):
    name: str  # of its file
    png: bytes


class Section(NamedTuple):
    title: str
    text: str


def main():
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument('runs', nargs='+', metavar='OUT_DIR')
    parser.add_argument('--out', help='folder for the report (default: the first OUT_DIR)')
    parser.add_argument('--watch', action='store_true', help='renew report.html every few seconds')
    args = parser.parse_args()
    if args.watch:
        from training.watch import watch
        return watch(args.runs, args.out)
    print(printable(f'report: {write_report(args.runs, args.out)}'))


def write_report(folders: list, out=None) -> Path:
    """Write report.md and its pictures on the runs in folders. Return its path.

    out     folder to write to; None = the first of folders
    raises  OSError, ValueError for a folder without a run
    """
    runs, out = [read_run(Path(folder)) for folder in folders], Path(out or folders[0])
    out.mkdir(parents=True, exist_ok=True)
    sections = ['# ' + ' and '.join(code(run.name) for run in runs)]
    for part in contents(runs):
        if isinstance(part, Picture):
            write_atomically(out / part.name, lambda f, png=part.png: f.write(png))
        sections.append(markdown(part))
    write_text(out / 'report.md', printable('\n\n'.join(sections) + '\n'))
    return out / 'report.md'


def contents(runs: list[Run]) -> list:
    """Return the parts of a report, each a Table, a Picture or a Section, the summary first."""
    first, *others = tables(runs)
    pictures, sections = [], []
    try:
        pictures = [Picture(name, png) for name, png in draw_all(runs).items()]
    except ImportError as error:
        reason = f'matplotlib cannot be imported ({error}): pip install matplotlib'
        sections.append(Section('No curves', reason))
    for run in runs:
        iteration, _, text = run.samples.partition('\n')
        if text:
            sections.append(Section(f'Samples of {run.name}, iteration {iteration}', text.strip('\n')))
    return [first, *pictures, *sections, *others]


def markdown(part) -> str:
    if isinstance(part, Picture):
        return f'![{Path(part.name).stem}]({part.name})'
    if isinstance(part, Section):
        return f'## {part.title}\n\n{part.text}'
    rows = part.rows
    if part.is_code:
        rows = [[code(cell) for cell in row] for row in rows]
    lines = [f'## {part.title}\n'] if part.title else []
    for cells in ([code(head) for head in part.heads], ['---'] * len(part.heads), *rows):
        cells = [str(cell).replace('|', '\\|').replace('\n', ' ') for cell in cells]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def code(text):
    if '`' in text:
        return f'`` {text} ``'
    return f'`{text}`' if text else ''


# -----------------------------------------------------------------------------
# what a run leaves in its folder


def read_run(folder: Path) -> Run:
    """Return what the folder of a run holds. Raises ValueError if it has no line of metrics yet."""
    path = folder / 'metrics.jsonl'
    lines = read_metrics(path)
    if not lines:
        raise ValueError(f'{path} has no line yet: name the out_dir of a run that has begun to train')
    add_totals(lines)
    lines = [{name: value for name, value in line.items() if math.isfinite(number(value))} for line in lines]
    latest = {name: value for line in lines for name, value in line.items()}
    facts = read_record(folder / 'run.json', settings=dict, defaults=dict, environment=dict, starts=list)
    evals = read_record(folder / 'eval.json', results=dict)
    samples = '\n' + read_text(folder / 'samples.md')
    return Run(str(folder), lines, latest, facts, evals, samples.rpartition('\n## Iteration ')[2].strip())


def read_text(path: Path) -> str:
    if not path.is_file():  # a pipe is no file
        return ''
    return path.read_bytes().decode('utf-8', 'replace')


def read_metrics(path: Path) -> list[dict]:
    """Read metrics.jsonl without damaged lines; [] if there is no file."""
    # a name of its own for each number would take half of the memory
    return [{sys.intern(name): value for name, value in line.items()} for _, line in sound_lines(path)]


def sound_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield each line of metrics.jsonl as text and numbers, but none that is damaged, as by a crash."""
    n_damaged = 0
    if not path.is_file():  # a pipe is no file
        return
    with open(path, encoding='utf-8', errors='replace', newline='\n') as f:
        for text in filter(None, map(str.strip, f)):
            line = None
            with contextlib.suppress(ValueError, RecursionError):
                line = json.loads(text)
            if isinstance(line, dict) and type(line.get('iter')) is int and 0 <= line['iter'] < 2**53:
                yield text, line
            else:
                n_damaged += 1
    if n_damaged:
        print0(printable(f'{path}: damaged lines skipped: {n_damaged}'))


def read_record(path: Path, **types) -> dict:
    """Read an object from a JSON file. Fields that are missing or of another type are empty."""
    record = {}
    if path.is_file():
        try:
            record = read_json(path)
        except ValueError as error:
            print0(printable(f'{error}: ignored'))
    record = expect(record, dict, path)
    return record | {name: expect(record.get(name), kind, f'{path}: {name}') for name, kind in types.items()}


def expect(value, kind, source):
    if isinstance(value, kind):
        return value
    if value is not None:
        print0(printable(f'{source} is of type {type(value).__name__}, expected is {kind.__name__}: ignored'))
    return kind()


def number(value, default=math.nan):
    """Return the value if it is a number that fits a float."""
    if type(value) in (int, float) and abs(value) < 1e300:
        return value
    return default


def add_totals(lines: list[dict]):
    """Add the updates, tokens and minutes of training before each line to it.

    A logged step carries the mean rate and time of the n_steps updates since the previous line. A process
    may end before it logs its last updates; these count with the rate of the previous line.
    """
    for line in lines:
        line['updates'] = line['iter'] + ('loss' in line)  # a step is logged under the updates before it
    steps = [line for line in lines if 'loss' in line] + [dict(updates=lines[-1]['updates'])]
    points = [(0, 0.0, 0.0)]  # updates, and tokens and seconds up to there
    earlier_tokens, earlier_s = None, 0.0  # of an update before the step's; at first no time is known
    for step in steps:
        updates, tokens, seconds = points[-1]
        tok_per_s, dt_s, n_steps = (number(step.get(name), 0) for name in ('tok_per_s', 'dt_s', 'n_steps'))
        n_tokens = tok_per_s * dt_s
        if earlier_tokens is None:
            earlier_tokens = n_tokens
        n_other = step['updates'] - updates - n_steps
        tokens += n_other * earlier_tokens + n_steps * n_tokens
        seconds += n_other * earlier_s + n_steps * dt_s
        points.append((step['updates'], tokens, seconds))
        earlier_tokens, earlier_s = n_tokens, dt_s
    updates, tokens, seconds = zip(*points, strict=True)
    updates_of_lines = [line['updates'] for line in lines]
    tokens = np.interp(updates_of_lines, updates, tokens).tolist()
    seconds = np.interp(updates_of_lines, updates, seconds).tolist()
    for line, line_tokens, line_s in zip(lines, tokens, seconds, strict=True):
        line['tokens'], line['minutes'] = line_tokens, line_s / 60


# -----------------------------------------------------------------------------
# tables


def tables(runs: list[Run]) -> list[Table]:
    """Return the tables of a report that have rows, the summary first."""
    heads = ['', *(run.name for run in runs)]
    every = [Table('', heads, side_by_side([summary(run) for run in runs])),
             Table('Evaluation', heads, side_by_side([evaluation(run) for run in runs])),
             *(starts(run) for run in runs),
             Table('Settings that differ between the runs or from the defaults', [*heads, 'default'],
                   settings(runs), is_code=True),
             Table('Environment', heads, side_by_side([run.facts['environment'] for run in runs]))]
    return [table for table in every if table.rows]


def side_by_side(columns: list[dict]) -> list[list]:
    """Return a row for each key: the key, and its value in each column."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [[name, *(column.get(name, '') for column in columns)] for name in names]


def summary(run) -> dict[str, str]:
    last, latest = run.lines[-1], run.latest
    flops = number(run.facts.get('flops_per_token'))
    dataset_tokens = number(run.facts.get('dataset_tokens')) or math.nan
    evaluations = [line for line in run.lines if 'val_loss' in line]
    trained = [line for line in evaluations if line['iter']]  # best.pt is never the model before training
    best = min(trained or evaluations, key=lambda line: line['val_loss'], default={})
    return formatted([
        ('updates', '{:,}', last['updates']),
        ('max_iters', '{:,}', run.facts['settings'].get('max_iters')),
        ('tokens', '{:,.0f}', last['tokens']),
        ('epochs', '{:.2f}', last['tokens'] / dataset_tokens),
        ('minutes in training', '{:,.2f}', last['minutes']),
        ('parameters', '{:,}', run.facts.get('parameters')),
        ('last training loss, smoothed', '{:.4f}', latest.get('loss_smoothed')),
        ('best validation loss', '{:.4f}', best.get('val_loss')),
        ('bits per byte then', '{:.4f}', best.get('val_bpb')),
        ('updates then', '{:,}', best.get('iter')),
        ('tokens per second (median)', '{:,.0f}', median(run.values('tok_per_s') or [math.nan])),
        ('model FLOPs utilisation (median)', '{:.1%}', median(run.values('mfu') or [math.nan])),
        ('FLOPs in training', '{:.3g}', last['tokens'] * flops),
        ('FLOPs per token, forward and backward', '{:.3g}', flops),
        ('peak memory in GB', '{:.2f}', latest.get('peak_memory_bytes', math.nan) / 1e9)])


def evaluation(run) -> dict[str, str]:
    """Return the results of evaluate.py by task."""
    rows = formatted([('updates', '{:,}', run.evals.get('iter'))])
    for task, numbers in run.evals['results'].items():
        rows[task] = measures(expect(numbers, dict, f'{run.name}: eval.json: {task}'))
    return rows


def measures(numbers: dict) -> str:
    """Format the numbers of a task, such as {'n': 10, 'acc': 0.5, 'acc_stderr': 0.1}."""
    cells = []
    for name, value in numbers.items():
        if name.endswith('_stderr') or not math.isfinite(number(value)):
            continue
        form = '{} {:.4f}'
        if isinstance(value, int):
            form = '{} {:>7,}'
        error = number(numbers.get(f'{name}_stderr'))
        if math.isfinite(error):
            form += f' ±{error:.4f}'
        cells.append(form.format(name, value))
    return '   '.join(cells)


def table_row(name: str, numbers: dict) -> str:
    return f'{printable(name):28} {measures(numbers)}'


def formatted(rows) -> dict[str, str]:
    """Format those rows of (name, format, number) that have a number."""
    return {name: form.format(value) for name, form, value in rows if math.isfinite(number(value))}


def starts(run) -> Table:
    """Return the starts of a run, with the settings that each of them changed: [old, new]."""
    records = [expect(start, dict, f'{run.name}: run.json: a start') for start in run.facts['starts']]
    names = list(dict.fromkeys(name for start in records for name in start))
    rows = [[str(start.get(name, '')) for name in names] for start in records]
    return Table(f'Starts of {run.name}', names, rows, is_code=True)


def settings(runs) -> list[list[str]]:
    """Return the settings that differ between runs, then those that differ from the default."""
    columns = []
    for values in (*(run.facts['settings'] for run in runs), runs[0].facts['defaults']):
        columns.append({name: repr(value) for name, value in values.items() if name != 'out_dir'})
    rows = [row for row in side_by_side(columns) if len(set(row[1:])) > 1]
    return sorted(rows, key=lambda row: len(set(row[1:-1])) == 1)


if __name__ == '__main__':
    with one_line_errors():
        main()
