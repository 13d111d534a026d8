"""Show the course of training in words, tables and curves: of one run, or of several in the same pictures.

    python report.py out-quickstart                  # report.md and its pictures in out-quickstart
    python report.py out-a out-b --out=comparison    # both runs in each picture, and settings that differ

It reads the files that a run writes while it trains, so an unfinished run has a report too: metrics.jsonl,
and if they exist run.json, samples.md and eval.json (evaluate.py). train.py calls it at the end.
"""

import argparse
import contextlib
import json
import math
import shlex
import subprocess
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from files import one_line_errors, printable, read_json, write_atomically

FACTS = dict(settings=dict, defaults=dict, environment=dict, starts=list)  # parts of run.json


@dataclass
class Columns:
    """Lines of metrics.jsonl as columns of floats, nan for null, and where each line stands in training."""

    values: dict[str, np.ndarray]  # by the names in the lines, (n,) each
    tokens: np.ndarray  # (n,)
    seconds: np.ndarray  # (n,) in training, without evaluation and saving

    def __getitem__(self, name):
        return self.values.get(name, np.full(len(self.tokens), np.nan))


@dataclass
class Curves:
    steps: Columns
    evaluations: Columns
    benchmarks: Columns
    n_updates: int
    tokens: float
    seconds: float


@dataclass
class Run:
    name: str
    curves: Curves
    facts: dict  # run.json
    evals: dict  # eval.json
    samples: list[tuple[int, str]]  # iteration, Markdown


def main():
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument('runs', nargs='+', metavar='OUT_DIR')
    parser.add_argument('--out', help='folder for the report (default: the first OUT_DIR)')
    args = parser.parse_args()
    path = write_report(args.runs, args.out)
    print(f'{printable(str(path))}: {len(args.runs)} run{"s" * (len(args.runs) > 1)}')


def write_report(folders: list, out=None) -> Path:
    """Write report.md and its pictures; without matplotlib, report.md alone.

    folders  out_dirs of train.py
    out      folder to write to; None = the first of folders
    returns  the path of report.md
    raises   OSError, ValueError for a folder without a run, or with files of another form
    """
    runs, out = [read_run(folder) for folder in folders], Path(out or folders[0])
    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        print(f'the report has no curves: matplotlib cannot be imported ({error}): pip install matplotlib')
    else:
        from pictures import draw_all
        pictures = draw_all(runs, out)
    title = '# ' + ' and '.join(code(run.name) for run in runs)
    links = [f'![{Path(name).stem}]({name})' for name in pictures]
    sections = [title, summary(runs), *links, evaluations(runs), samples(runs), starts(runs), settings(runs),
                environments(runs)]
    text = '\n\n'.join(filter(None, sections)) + '\n'
    write_atomically(out / 'report.md', lambda f: f.write(text.encode('utf-8')))
    return out / 'report.md'


# -----------------------------------------------------------------------------
# what a run leaves in its folder


def environment() -> dict:
    """Describe the code: its git commit, with -dirty if files were changed; None without git."""
    command = ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*']
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, encoding='utf-8', timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return dict(git=None)
    return dict(git=done.stdout.strip() or None)


def read_run(folder) -> Run:
    folder = Path(folder)
    path = folder / 'metrics.jsonl'
    if not path.exists():
        raise FileNotFoundError(f'{path} does not exist: name the out_dir of a run that has begun to train')
    lines = read_metrics(path)
    if not lines:
        raise ValueError(f'{path} has no line yet: wait until the run has logged a step')
    facts = read_dict(folder / 'run.json', FACTS)
    evals = read_dict(folder / 'eval.json', dict(results=dict))
    results = evals.get('results', {})
    check_types(results, dict.fromkeys(results, dict), folder / 'eval.json')
    return Run(str(folder), curves(lines), facts, evals, read_samples(folder / 'samples.md'))


def read_metrics(path) -> list[dict]:
    """Read metrics.jsonl. Lines without an iteration, such as one torn by a crash, are passed over."""
    check_regular(path)
    lines = []
    for text in Path(path).read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and type(line.get('iter')) is int and 0 <= line['iter'] < 2**53:
                lines.append(line)
    return lines


def read_dict(path, types) -> dict:
    """Read a JSON file that holds a dict; {} if there is no file."""
    if not path.exists():
        return {}
    check_regular(path)
    value = read_json(path)
    check_types({path.name: value}, {path.name: dict}, path)
    check_types(value, types, path)
    return value


def check_regular(path):
    if not Path(path).is_file():  # a pipe would be waited for without end
        raise ValueError(f'{path} is not a regular file: remove it')


def check_types(values, types, path):
    for name, kind in types.items():
        value = values.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f'{path}: {name} is of type {type(value).__name__}, expected is '
                             f'{kind.__name__}: delete the file, or write it anew')


def curves(lines: list[dict]) -> Curves:
    """Place the lines of metrics.jsonl over tokens and over seconds in training.

    A logged step carries the mean rate and time of the n_steps updates since the previous line. Other updates
    between two lines were done by a process that ended before it logged them: they count as the previous line
    says, whatever the first update of the new process cost. Before the first line no time is known.
    """
    steps = [line for line in lines if 'loss' in line]
    points = [(0, 0.0, 0.0)]  # updates done, tokens, seconds
    tokens_per_step = dt_s = 0.0
    for line in steps:
        done, tokens, seconds = points[-1]
        n_new = line['iter'] + 1 - done
        n_timed = number(line.get('n_steps')) or (n_new if len(points) > 1 else 1)
        last_dt_s, dt_s = dt_s, number(line.get('dt_s')) or 0.0
        last_tokens_per_step, tokens_per_step = tokens_per_step, (number(line.get('tok_per_s')) or 0.0) * dt_s
        if len(points) == 1:
            last_tokens_per_step = tokens_per_step
        tokens += n_timed * tokens_per_step + (n_new - n_timed) * last_tokens_per_step
        seconds += n_timed * dt_s + (n_new - n_timed) * last_dt_s
        points.append((done + n_new, tokens, seconds))

    # updates after the last logged step cost what it cost
    done, tokens, seconds = points[-1]
    n_updates = max(line['iter'] + ('loss' in line) for line in lines)
    if n_updates > done:
        n_new = n_updates - done if steps else 0
        points.append((n_updates, tokens + n_new * tokens_per_step, seconds + n_new * dt_s))
    evaluations = [line for line in lines if 'val_loss' in line]
    benchmarks = [line for line in lines if 'loss' not in line and 'val_loss' not in line]
    columns = (columns_of(part, points) for part in (steps, evaluations, benchmarks))
    return Curves(*columns, n_updates, points[-1][1], points[-1][2])


def columns_of(lines, points) -> Columns:
    names = {name for line in lines for name in line} - {'time'}  # the clock's time, not that of training
    values = {}
    for name in sorted(names):
        values[name] = np.array([number(line.get(name), math.nan) for line in lines], dtype=float)
    # a step is logged under the number of updates before it
    done = np.array([line['iter'] + ('loss' in line) for line in lines], dtype=float)
    updates, tokens, seconds = zip(*points, strict=True)
    return Columns(values, np.interp(done, updates, tokens), np.interp(done, updates, seconds))


def number(value, otherwise=None):
    """The value if it is a number that fits a float, else the other value."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) < 1e300 else otherwise


# -----------------------------------------------------------------------------
# samples.md: a heading for each iteration; below it, indented, the prompts and the model's continuations


def write_samples(folder, iter_num: int, samples: list[tuple[str, str]]):
    """Add the samples after iter_num updates to samples.md, in place of those of this and later iterations.

    samples  [(prompt, text)]
    """
    path = Path(folder) / 'samples.md'
    earlier = read_samples(path) if iter_num else []
    parts = []
    for i, (prompt, text) in enumerate(samples, 1):
        parts.append(f'**{i}.** after the prompt\n\n{indented(prompt)}\n\ncomes\n\n{indented(text)}')
    sections = [section for section in earlier if section[0] < iter_num] + [(iter_num, '\n\n'.join(parts))]
    page = '\n\n'.join(f'## Iteration {at}\n\n{body}' for at, body in sections) + '\n'
    write_atomically(path, lambda f: f.write(page.encode('utf-8')))


def read_samples(path) -> list[tuple[int, str]]:
    """Read samples.md as [(iteration, the Markdown below its heading)]; [] if there is no file."""
    if not path.exists():
        return []
    check_regular(path)
    sections = []
    for part in ('\n' + path.read_bytes().decode('utf-8', 'replace')).split('\n## Iteration ')[1:]:
        at, _, body = part.partition('\n')
        if at.isdecimal():
            sections.append((int(at), body.strip('\n')))
    return sections


def indented(text):
    # a block of code in Markdown, which nothing in the text can end
    return textwrap.indent(printable(text), '    ', lambda line: True)


# -----------------------------------------------------------------------------
# the sections of report.md, each a string; '' if there is nothing to say


def summary(runs) -> str:
    columns = [summary_of(run) for run in runs]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return table(['', *(code(run.name) for run in runs)], [row for row in rows if any(row[1:])])


def summary_of(run) -> dict[str, str]:
    steps, evaluations, facts = run.curves.steps, run.curves.evaluations, run.facts
    updates, tokens = f'{run.curves.n_updates:,}', f'{run.curves.tokens:,.0f}'
    max_iters = number(facts.get('settings', {}).get('max_iters'))
    if max_iters:
        updates += f' of {max_iters:,}' + ', unfinished' * (run.curves.n_updates < max_iters)
    if number(facts.get('dataset_tokens')):
        tokens += f' ({run.curves.tokens / facts["dataset_tokens"]:.2f} epochs)'
    best_loss = best_bpb = cost = ''
    if np.isfinite(evaluations['val_loss']).any():
        best = int(np.nanargmin(evaluations['val_loss']))
        best_loss = f'{evaluations["val_loss"][best]:.4f} (after {evaluations["iter"][best]:,.0f} updates)'
        best_bpb = shown(evaluations['val_bpb'][best])
    flops = number(facts.get('flops_per_token'))
    if flops:
        cost = f'{run.curves.tokens * flops:.3g} FLOPs ({flops:.3g} a token, forward and backward)'
    parameters = number(facts.get('parameters'))
    return {
        'updates': updates, 'tokens': tokens, 'time in training': duration(run.curves.seconds),
        'parameters': f'{parameters:,}' if parameters else '',
        'last training loss, smoothed': shown(last(steps['loss_smoothed'])),
        'best validation loss': best_loss, 'bits per byte then': best_bpb,
        'tokens per second (median)': shown(median(steps['tok_per_s']), ',.0f'),
        'model FLOPs utilisation (median)': shown(median(steps['mfu']), '.1%'), 'cost in training': cost,
        'peak memory': shown(last(steps['peak_memory_bytes']) / 1e9, '.2f', ' GB')}


def evaluations(runs) -> str:
    """The results of evaluate.py: a row for each measure of each task."""
    cells = {}
    for i, run in enumerate(runs):
        for task, measures in run.evals.get('results', {}).items():
            for name, value in measures.items():
                if number(value) is None or name.endswith('stderr'):
                    continue
                cell = f'{value:,}' if isinstance(value, int) else f'{value:.4f}'
                error = number(measures.get(f'{name}_stderr'))
                if error is not None:
                    cell += f' ± {error:.4f}'
                cells.setdefault((task, name), [''] * len(runs))[i] = cell
    if not cells:
        return ''
    at = [f'{code(run.name)} after {run.evals["iter"]:,} updates' for run in runs
          if number(run.evals.get('iter')) is not None]
    rows = [[code(task), code(name), *values] for (task, name), values in cells.items()]
    heads = ['task', 'measure', *(code(run.name) for run in runs)]
    return f'## Evaluation\n\n{", ".join(at)}\n\n{table(heads, rows)}'


def samples(runs) -> str:
    """The last samples of each run."""
    parts = []
    for run in runs:
        if run.samples:
            at, body = run.samples[-1]
            parts.append(f'### {code(run.name)}, after {at:,} updates\n\n{printable(body)}')
    return '\n\n'.join(['## Samples', *parts]) if parts else ''


def starts(runs) -> str:
    """When, where and how each run was started, and the settings that a resumed run changed."""
    rows = [[code(run.name), *start_cells(start)] for run in runs
            for start in run.facts.get('starts', []) if isinstance(start, dict)]
    heads = ['run', 'time', 'iteration', 'changed settings', 'git', 'host', 'torch', 'python', 'command']
    return '## Starts\n\n' + table(heads, rows) if rows else ''


def start_cells(start):
    changed, argv = start.get('changed'), start.get('argv')
    changes = []
    if isinstance(changed, dict):
        changes = [f'{name}: {values[0]!r} -> {values[1]!r}' for name, values in changed.items()
                   if isinstance(values, list) and len(values) == 2]
    command = shlex.join(map(str, argv)) if isinstance(argv, list) else ''
    time, iter_num, *facts = (str(start.get(name, ''))
                              for name in ('time', 'iter_num', 'git', 'host', 'torch', 'python'))
    return [time, iter_num, code(', '.join(changes)), *facts, code(command)]


def settings(runs) -> str:
    """The settings of the last start that differ between the runs, and those that are not the defaults."""
    of_runs = [run.facts.get('settings', {}) for run in runs]
    defaults = next((run.facts['defaults'] for run in runs if run.facts.get('defaults')), {})
    differ, changed = [], []
    for name in dict.fromkeys(name for each in of_runs for name in each):
        values = [repr(each[name]) if name in each else '' for each in of_runs]
        default = repr(defaults.get(name))
        if name == 'out_dir':
            continue
        if len(set(values)) > 1:
            differ.append([code(name), *map(code, values), code(default)])
        elif values[0] != default:
            changed.append([code(name), code(values[0]), code(default)])
    parts = []
    if differ:
        heads = ['setting', *(code(run.name) for run in runs), 'default']
        parts += ['## Settings that differ', table(heads, differ)]
    if changed:
        parts += ['## Settings other than the defaults' + ', the same in all runs' * (len(runs) > 1),
                  table(['setting', 'value', 'default'], changed)]
    return '\n\n'.join(parts)


def environments(runs) -> str:
    of_runs = [run.facts.get('environment', {}) for run in runs]
    names = dict.fromkeys(name for each in of_runs for name in each)
    rows = [[name, *(str(each.get(name, '')) for each in of_runs)] for name in names]
    return '## Environment\n\n' + table(['', *(code(run.name) for run in runs)], rows) if rows else ''


def table(heads, rows):
    lines = []
    for cells in (heads, ['---'] * len(heads), *rows):
        cells = [printable(cell).replace('|', '\\|').replace('\n', ' ') for cell in cells]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def code(text):
    text = printable(text)
    if '`' in text:
        return f'`` {text} ``'
    return f'`{text}`' if text else ''


def shown(value, form='.4f', unit=''):
    return format(value, form) + unit if math.isfinite(value) else ''


def last(values):
    return values[-1] if len(values) else math.nan


def median(values):
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


def duration(seconds):
    if seconds < 120:
        return f'{seconds:.1f} s'
    return f'{seconds / 60:.1f} min' if seconds < 7200 else f'{seconds / 3600:.2f} h'


if __name__ == '__main__':
    with one_line_errors():
        main()
