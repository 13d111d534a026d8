"""Report on training runs in tables and curves: on one run, or on several in the same pictures.

    python report.py out-quickstart                  # report.md and its pictures in out-quickstart
    python report.py out-a out-b --out=comparison    # both runs in each picture, and settings that differ
    python report.py --watch out-quickstart          # report.html there, renewed until Ctrl-C

It reads metrics.jsonl and, if they exist, run.json, samples.md and eval.json (evaluate.py), so an unfinished
run has a report too. A damaged line or field is skipped with a warning. train.py calls it at the end.
"""

import argparse
import contextlib
import json
import math
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from files import one_line_errors, print0, printable, read_json, write_atomically


class Run(NamedTuple):
    name: str
    lines: list[dict]  # metrics.jsonl, with the updates, tokens and minutes of training before each line
    facts: dict  # run.json
    evals: dict  # eval.json
    samples: str  # the last section of samples.md

    def values(self, name, where=None) -> list:
        """Return a number of each line whose number `where` (default: the same one) is finite."""
        return [line[name] for line in self.lines if math.isfinite(line.get(where or name, math.nan))]

    @property
    def benchmark_names(self):
        own = 'iter', 'time', 'updates', 'tokens', 'minutes'
        lines = [line for line in self.lines if 'loss' not in line and 'val_loss' not in line]
        return [name for line in lines for name in line if name not in own]


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
    pictures = []
    try:
        from training.pictures import draw_all
        pictures = draw_all(runs, out)
    except ImportError as error:
        print(f'the report has no curves: matplotlib cannot be imported ({error}): pip install matplotlib')
    heads = ['', *(code(run.name) for run in runs)]
    sections = [
        '# ' + ' and '.join(heads[1:]),
        table('', heads, side_by_side([summary(run) for run in runs])),
        *(f'![{Path(name).stem}]({name})' for name in pictures),
        table('Evaluation', heads, side_by_side([evaluation(run) for run in runs])),
        *(f'## Samples of {code(run.name)}, iteration {run.samples}' for run in runs if run.samples),
        *(starts(run) for run in runs), settings(runs),
        table('Environment', heads, side_by_side([run.facts['environment'] for run in runs]))]
    page = printable('\n\n'.join(filter(None, sections)) + '\n')
    write_atomically(out / 'report.md', lambda f: f.write(page.encode('utf-8', 'backslashreplace')))
    return out / 'report.md'


# -----------------------------------------------------------------------------
# what a run leaves in its folder


def read_run(folder: Path) -> Run:
    """Return what the folder of a run holds. Raises ValueError if it has no line of metrics yet."""
    path = folder / 'metrics.jsonl'
    lines = [{name: number(value) for name, value in line.items()} for line in read_metrics(path)]
    if not lines:
        raise ValueError(f'{path} has no line yet: name the out_dir of a run that has begun to train')
    add_totals(lines)
    facts = read_record(folder / 'run.json', settings=dict, defaults=dict, environment=dict, starts=list,
                        ended=dict)
    evals = read_record(folder / 'eval.json', results=dict)
    path = folder / 'samples.md'
    samples = path.read_bytes().decode('utf-8', 'replace') if path.is_file() else ''
    return Run(str(folder), lines, facts, evals, f'\n{samples}'.rpartition('\n## Iteration ')[2].strip())


def read_metrics(path: Path) -> list[dict]:
    """Read metrics.jsonl without damaged lines, such as one torn by a crash; [] if there is no file."""
    texts = path.read_bytes().splitlines() if path.is_file() else []  # a pipe is no file
    lines = []
    for text in texts:
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and type(line.get('iter')) is int and 0 <= line['iter'] < 2**53:
                lines.append(line)
    if len(lines) < len(texts):
        print0(printable(f'{path}: damaged lines skipped: {len(texts) - len(lines)}'))
    return lines


def read_record(path: Path, **types) -> dict:
    """Read an object from a JSON file. A field of another type, or without a value, is an empty one."""
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


def number(value):
    """Return the value if it is a number that fits a float, else nan."""
    return value if type(value) in (int, float) and abs(value) < 1e300 else math.nan


def add_totals(lines: list[dict]):
    """Add the updates, tokens and minutes of training before each line to it.

    A logged step carries the mean rate and time of the n_steps updates since the previous line. Other updates
    between two lines were done by a process that ended before it logged them: they count as the previous line
    says, whatever the first update of the new process cost. Before the first line no time is known.
    """
    for line in lines:
        line['updates'] = line['iter'] + ('loss' in line)  # a step is logged under the updates before it
    # updates after the last logged step cost what it cost
    steps = [line for line in lines if 'loss' in line] + [dict(updates=lines[-1]['updates'], n_steps=0)]
    names = 'updates', 'n_steps', 'tok_per_s', 'dt_s'
    updates, n_timed, tok_per_s, dt_s = np.nan_to_num(
        [[line.get(name, math.nan) for line in steps] for name in names])
    n_other = np.diff(updates, prepend=0) - n_timed
    per_step = tok_per_s * dt_s
    tokens = np.cumsum(n_timed * per_step + n_other * np.append(per_step[0], per_step[:-1]))
    seconds = np.cumsum(n_timed * dt_s + n_other * np.append(0, dt_s[:-1]))
    # before the first step, nothing
    updates, tokens, seconds = (np.append(0, values) for values in (updates, tokens, seconds))
    for line in lines:
        line['tokens'] = float(np.interp(line['updates'], updates, tokens))
        line['minutes'] = float(np.interp(line['updates'], updates, seconds)) / 60


# -----------------------------------------------------------------------------
# the sections of report.md


def summary(run) -> dict[str, str]:
    last, steps = run.lines[-1], [line for line in run.lines if 'loss' in line]
    tokens, flops = last['tokens'], number(run.facts.get('flops_per_token'))
    dataset_tokens = number(run.facts.get('dataset_tokens')) or math.nan
    evaluations = [line for line in run.lines if math.isfinite(line.get('val_loss', math.nan))]
    trained = [line for line in evaluations if line['iter']]  # best.pt is never the model before training
    best = min(trained or evaluations, key=lambda line: line['val_loss'], default={})
    last_step = steps[-1] if steps else {}
    unit, per_minute = ('hours', 1 / 60) if last['minutes'] >= 120 else ('seconds', 60)
    return formatted([
        ('updates', '{:,}', last['updates']),
        ('max_iters', '{:,}', run.facts['settings'].get('max_iters')),
        ('tokens', '{:,.0f}', tokens),
        ('epochs', '{:.2f}', tokens / dataset_tokens),
        (f'{unit} in training', '{:,.1f}', last['minutes'] * per_minute),
        ('parameters', '{:,}', run.facts.get('parameters')),
        ('last training loss, smoothed', '{:.4f}', last_step.get('loss_smoothed')),
        ('best validation loss', '{:.4f}', best.get('val_loss')),
        ('bits per byte then', '{:.4f}', best.get('val_bpb')),
        ('updates then', '{:,}', best.get('iter')),
        ('tokens per second (median)', '{:,.0f}', median(run.values('tok_per_s') or [math.nan])),
        ('model FLOPs utilisation (median)', '{:.1%}', median(run.values('mfu') or [math.nan])),
        ('FLOPs in training', '{:.3g}', tokens * flops),
        ('FLOPs per token, forward and backward', '{:.3g}', flops),
        ('peak memory in GB', '{:.2f}', last_step.get('peak_memory_bytes', math.nan) / 1e9)])


def evaluation(run) -> dict[str, str]:
    """The results of evaluate.py by task and measure."""
    rows = [('updates', '{:,}', run.evals.get('iter'))]
    for task, measures in run.evals['results'].items():
        measures = expect(measures, dict, f'{run.name}: eval.json: {task}')
        for name, value in measures.items():
            form = '{:,}' if isinstance(value, int) else '{:.4f}'
            error = number(measures.get(f'{name}_stderr'))
            if math.isfinite(error):
                form += f' ± {error:.4f}'
            if not name.endswith('_stderr'):
                rows.append((f'{code(task)} {name}', form, value))
    return formatted(rows)


def formatted(rows) -> dict[str, str]:
    """Format rows of (name, format, number); leave out those without a number."""
    return {name: form.format(value) for name, form, value in rows if math.isfinite(number(value))}


def starts(run) -> str:
    """When, where and how the run was started, and the settings that a resumed run changed: [old, new]."""
    records = [expect(start, dict, f'{run.name}: run.json: a start') for start in run.facts['starts']]
    names = list(dict.fromkeys(name for start in records for name in start))
    rows = [[code(str(start.get(name, ''))) for name in names] for start in records]
    return table(f'Starts of {code(run.name)}', names, rows)


def settings(runs) -> str:
    """The settings of the last start."""
    rows = [[code(cell) for cell in row] for row in settings_rows(runs)]
    heads = ['', *(code(run.name) for run in runs), 'default']
    return table('Settings that differ between the runs or from the defaults', heads, rows)


def settings_rows(runs) -> list[list[str]]:
    """Return name, values of each run, default: settings that differ between runs, then from the default."""
    columns = []
    for values in (*(run.facts['settings'] for run in runs), runs[0].facts['defaults']):
        columns.append({name: repr(value) for name, value in values.items() if name != 'out_dir'})
    rows = [row for row in side_by_side(columns) if len(set(row[1:])) > 1]
    return sorted(rows, key=lambda row: len(set(row[1:-1])) == 1)


def side_by_side(columns: list[dict]) -> list[list]:
    """Return a row for each key: the key, and its value in each column."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [[name, *(column.get(name, '') for column in columns)] for name in names]


def table(title, heads, rows) -> str:
    if not rows:
        return ''
    lines = [f'## {title}\n'] if title else []
    for cells in (heads, ['---'] * len(heads), *rows):
        cells = [str(cell).replace('|', '\\|').replace('\n', ' ') for cell in cells]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def code(text):
    if '`' in text:
        return f'`` {text} ``'
    return f'`{text}`' if text else ''


if __name__ == '__main__':
    with one_line_errors():
        main()
