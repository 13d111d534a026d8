"""Shows what training did, in words, tables and curves: one run, or several overlaid.

    python report.py out-quickstart                  # out-quickstart/report.md, with loss.png, bpb.png and training.png beside it
    python report.py out-a out-b --out=comparison    # both runs in each curve, and the settings in which they differ

It reads what a run writes as it goes, so an unfinished run has a report too: metrics.jsonl, run.json (settings, environment), and where
they are there eval.json (evaluate.py) and samples.md. train.py calls it at its end.
"""

import argparse
import json
import math
import subprocess
import textwrap
import warnings
from pathlib import Path

import numpy as np

from files import one_line_errors, write_atomically

# Okabe and Ito's palette, told apart by colour-blind eyes too (https://jfly.uni-koeln.de/color/); its yellow is too faint on white
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
CHINESE_FONTS = {'Noto Sans CJK SC', 'Noto Sans SC', 'Source Han Sans SC', 'WenQuanYi Micro Hei', 'WenQuanYi Zen Hei', 'Droid Sans Fallback',
                 'PingFang SC', 'Hiragino Sans GB', 'Arial Unicode MS', 'Microsoft YaHei', 'SimHei'}
PICTURES = {  # file -> panels: what is on the x axis, its scale, the words on the y axis, its scale, and the curves
    'loss.png': [('tokens', 'log', 'loss (nats per token)', 'log', ('loss', 'loss_smoothed', 'val_loss')),
                 ('time', 'linear', 'loss (nats per token)', 'log', ('loss', 'loss_smoothed', 'val_loss'))],
    'bpb.png': [('tokens', 'log', 'validation loss (bits per byte)', 'log', ('val_bpb',)),
                ('time', 'linear', 'validation loss (bits per byte)', 'log', ('val_bpb',))],
    'training.png': [('tokens', 'linear', 'learning rate', 'linear', ('lr',)),
                     ('tokens', 'linear', 'gradient norm', 'log', ('grad_norm',)),
                     ('tokens', 'linear', 'tokens per second', 'linear', ('tok_per_s',))],
}
STYLES = {  # curve -> what it is called, and how it is drawn
    'loss': ('training, each logged step', dict(alpha=0.3, linewidth=0.8)),
    'loss_smoothed': ('training, smoothed', dict(linewidth=1.8)),
    'val_loss': ('validation', dict(linewidth=1.2, linestyle='--', marker='o', markersize=5)),
    'val_bpb': ('validation', dict(linewidth=1.2, linestyle='--', marker='o', markersize=5)),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', metavar='OUT_DIR')
    parser.add_argument('--out', help='folder for the report (default: the first OUT_DIR)')
    args = parser.parse_args()
    print(f'{write_report(args.runs, args.out)}: {len(args.runs)} run{"s" * (len(args.runs) > 1)}')


def write_report(folders, out=None):
    """Writes report.md and its pictures, without pictures where matplotlib is missing.

    folders  out_dirs of train.py, the curves' colours in their order
    out      folder to write to; None = the first of them
    returns  the path of report.md
    raises   FileNotFoundError, ValueError for a folder that holds no run
    """
    runs, out = [read_run(folder) for folder in folders], Path(out or folders[0])
    out.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for run in runs for name in run['benchmarks'] if name not in ('iter', 'tokens', 'time')))
    benchmarks = [('tokens', 'log', name, 'linear', (name,)) for name in names[:4]]  # more would be too small to read
    pictures = []
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        print(f'the report has no curves: matplotlib cannot be imported ({error}): pip install matplotlib')
    else:
        every = PICTURES | ({'benchmarks.png': benchmarks} if benchmarks else {})
        pictures = [name for name, panels in every.items() if draw(runs, panels, out / name)]
    sections = [summary(runs), *(f'![{Path(name).stem}]({name})' for name in pictures), evaluations(runs), samples(runs), settings(runs), environments(runs)]
    text = '# ' + ' and '.join(code(run['name']) for run in runs) + '\n\n' + '\n\n'.join(filter(None, sections)) + '\n'
    write_atomically(out / 'report.md', lambda f: f.write(text.encode('utf-8')))
    return out / 'report.md'


# -----------------------------------------------------------------------------
# what a run leaves in its folder


def environment():
    """What a run.json says of the code that wrote it: the git commit, with -dirty behind it where files were changed; None without git."""
    command = ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*']
    try:
        done = subprocess.run(command, cwd=Path(__file__).resolve().parent, capture_output=True, text=True, encoding='utf-8', timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return dict(git=None)
    return dict(git=done.stdout.strip() or None)


def read_run(folder):
    """Everything that the report says of a run: the lines of metrics.jsonl as curves, and its other files as they are."""
    folder = Path(folder)
    path = folder / 'metrics.jsonl'
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist: name the out_dir of a run that has begun to train')
    lines = list(filter(None, map(parse, path.read_text(encoding='utf-8', errors='replace').splitlines())))
    if not lines:
        raise ValueError(f'{path} has no line yet: wait until the run has logged a step')
    run, evals = (read_json(folder / name) for name in ('run.json', 'eval.json'))
    text = folder / 'samples.md'
    return dict(name=str(folder), **curves(lines), run=run, evals=evals, samples=split_samples(text.read_bytes().decode('utf-8', 'replace'))
                if text.exists() else [])


def parse(line):
    """A line of metrics.jsonl, or None for one that a crash has torn."""
    try:
        line = json.loads(line)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get('iter'), int) else None


def read_metrics(path):
    lines = Path(path).read_text(encoding='utf-8', errors='replace').splitlines()
    return [line for line in map(parse, lines) if line]


def read_json(path):
    """The dict in the file, {} where there is no file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is no JSON ({error}): delete it, or write it anew') from None
    if not isinstance(value, dict):
        raise ValueError(f'{path} holds a {type(value).__name__}, expected is a dict: delete it, or write it anew')
    return value


def curves(lines):
    """The columns of metrics.jsonl, over tokens and over seconds in training, which do not count evaluation and saving.

    returns  dict(steps, evaluations, benchmarks, iters, tokens, seconds): the first three are columns by name, each (n,) float64 with nan
             for null; benchmarks are the lines without a loss; iters = updates done

    A logged step carries the mean rate and time of n_steps steps, those since the one before it, so both add up. Steps before it that are
    not among them were done by a process that ended before it logged them: they count as the line before says, whatever the new one costs.
    """
    steps, evaluations = ([line for line in lines if key in line] for key in ('loss', 'val_loss'))
    benchmarks = [line for line in lines if 'loss' not in line and 'val_loss' not in line]
    steps, evaluations, benchmarks = (
        {name: column(rows, name) for name in sorted({k for row in rows for k in row})} for rows in (steps, evaluations, benchmarks))
    iters = np.array([line['iter'] + ('loss' in line) for line in lines]).max()
    done, tokens, seconds = np.zeros(1), np.zeros(1), np.zeros(1)  # after so many updates, from the start
    if steps:
        done = np.append(0, steps['iter'] + 1)
        dt_s, per_step = steps['dt_s'], steps['tok_per_s'] * steps['dt_s']
        timed = steps.get('n_steps', np.append(1, np.diff(done)[1:]))
        before = np.diff(done) - timed
        tokens = np.append(0, np.cumsum(timed * per_step + before * np.append(per_step[0], per_step[:-1])))
        # of a run that goes on with another folder's checkpoint, the time before is not known
        seconds = np.append(0, np.cumsum(timed * dt_s + before * np.append(0, dt_s[:-1])))
        more = max(iters - done[-1], 0)  # updates since the last logged one
        done, tokens, seconds = np.append(done, done[-1] + more), np.append(tokens, tokens[-1] + more * per_step[-1]), np.append(seconds, seconds[-1] + more * dt_s[-1])
    for part, logged in ((steps, 1), (evaluations, 0), (benchmarks, 0)):  # a step is logged under the number of updates before it
        at = part.get('iter', np.zeros(0)) + logged
        part['tokens'], part['time'] = np.interp(at, done, tokens), np.interp(at, done, seconds)
    return dict(steps=steps, evaluations=evaluations, benchmarks=benchmarks, iters=int(iters), tokens=float(tokens[-1]), seconds=float(seconds[-1]))


def column(rows, name):
    values = [row.get(name) for row in rows]
    return np.array([value if isinstance(value, (int, float)) else math.nan for value in values], dtype=float)


# -----------------------------------------------------------------------------
# samples.md: a heading for each iteration, below it the prompts and what the model makes of them, indented


def write_samples(folder, iter_num, samples):
    """Adds what the model wrote after iter_num updates to folder/samples.md, in place of what it held of this iteration and later ones.

    samples  [(prompt, text)]
    """
    path = Path(folder) / 'samples.md'
    sections = split_samples(path.read_bytes().decode('utf-8', 'replace')) if iter_num and path.exists() else []
    new = '\n\n'.join('\n'.join((f'**{i + 1}.** after the prompt', '', indented(prompt), '', 'comes', '', indented(text)))
                      for i, (prompt, text) in enumerate(samples))
    sections = [(at, body) for at, body in sections if at < iter_num] + [(iter_num, new)]
    text = '\n\n'.join(f'## Iteration {at}\n\n{body}' for at, body in sections) + '\n'
    write_atomically(path, lambda f: f.write(text.encode('utf-8')))


def split_samples(text):
    """samples.md -> [(iteration, what stands below it)]"""
    parts = ('\n' + text).split('\n## Iteration ')[1:]
    return [(int(part.partition('\n')[0]), part.partition('\n')[2].strip('\n')) for part in parts if part.partition('\n')[0].isdecimal()]


def indented(text):
    """As a block of code in Markdown, which nothing in the text can end."""
    return textwrap.indent(text, '    ', lambda line: True)


# -----------------------------------------------------------------------------
# the sections of report.md, each a string, '' where there is nothing to say


def summary(runs):
    rows = {'updates': [], 'tokens': [], 'time in training': [], 'parameters': [], 'last training loss, smoothed': [], 'best validation loss': [],
            'bits per byte then': [], 'tokens per second (median)': [], 'model FLOPs utilisation (median)': [], 'cost in training': [], 'peak memory': []}
    for run in runs:
        steps, at, facts = run['steps'], run['evaluations'], run['run']
        limit = facts.get('settings', {}).get('max_iters')
        best = int(np.nanargmin(at['val_loss'])) if np.isfinite(at.get('val_loss', [math.nan])).any() else None
        flops = facts.get('flops_per_token')
        values = (
            f'{run["iters"]:,}' + (f' of {limit:,}' + ', unfinished' * (run['iters'] < limit) if limit else ''),
            f'{run["tokens"]:,.0f}' + (f' ({run["tokens"] / facts["dataset_tokens"]:.2f} epochs)' if facts.get('dataset_tokens') else ''),
            duration(run['seconds']), f'{facts["parameters"]:,}' if 'parameters' in facts else '',
            shown(last(steps.get('loss_smoothed', []))), f'{at["val_loss"][best]:.4f} (after {at["iter"][best]:,.0f} updates)' if best is not None else '',
            shown(at['val_bpb'][best]) if best is not None and 'val_bpb' in at else '',
            shown(middle(steps.get('tok_per_s', [])), ',.0f'), shown(middle(steps.get('mfu', [])), '.1%'),
            f'{run["tokens"] * flops:.3g} FLOPs ({flops:.3g} a token, forward and backward)' if flops else '',
            shown(last(steps.get('peak_memory_bytes', [])) / 1e9, '.2f', ' GB'))
        for name, value in zip(rows, values, strict=True):
            rows[name].append(value)
    return table(['', *(code(run['name']) for run in runs)], [[name, *values] for name, values in rows.items() if any(values)])


def evaluations(runs):
    """The table of evaluate.py: a row for each measure of each task, with its standard error where there is one."""
    cells = {}
    for i, run in enumerate(runs):
        for task, measures in run['evals'].get('results', {}).items():
            for name, value in measures.items():
                if isinstance(value, (int, float)) and not name.endswith('stderr'):
                    error = measures.get(f'{name}_stderr')
                    said = f'{value:,}' if isinstance(value, int) else f'{value:.4f}' + (f' ± {error:.4f}' if error is not None else '')
                    cells.setdefault((task, name), [''] * len(runs))[i] = said
    rows = [[code(task), code(name), *values] for (task, name), values in cells.items()]
    at = ', '.join(f'{code(run["name"])} after {run["evals"]["iter"]:,} updates' for run in runs if run['evals'].get('iter') is not None)
    return f'## Evaluation\n\n{at}\n\n' + table(['task', 'measure', *(code(run['name']) for run in runs)], rows) if rows else ''


def samples(runs):
    """What each run wrote last."""
    parts = [f'### {code(run["name"])}, after {run["samples"][-1][0]:,} updates\n\n{run["samples"][-1][1]}' for run in runs if run['samples']]
    return '\n\n'.join(['## Samples', *parts]) if parts else ''


def settings(runs):
    """The settings in which the runs differ, and those that are not the defaults."""
    known = [run['run'].get('settings', {}) for run in runs]
    defaults = next((run['run']['defaults'] for run in runs if run['run'].get('defaults')), {})
    names = [name for name in dict.fromkeys(name for each in known for name in each) if name != 'out_dir']
    said = {name: [repr(each[name]) if name in each else '' for each in known] for name in names}
    differ = [name for name in names if len(set(said[name])) > 1]
    changed = [name for name in names if name not in differ and said[name][0] != repr(defaults.get(name))]
    heads, parts = [code(run['name']) for run in runs], []
    if differ:
        parts += ['## Settings that differ', table(['setting', *heads, 'default'], [[code(n), *map(code, said[n]), code(repr(defaults.get(n)))] for n in differ])]
    if changed:
        parts += ['## Settings other than the defaults' + ', the same in all runs' * (len(runs) > 1),
                  table(['setting', 'value', 'default'], [[code(n), code(said[n][0]), code(repr(defaults.get(n)))] for n in changed])]
    return '\n\n'.join(parts)


def environments(runs):
    names = list(dict.fromkeys(name for run in runs for name in run['run'].get('environment', {})))
    rows = [[name, *(str(run['run'].get('environment', {}).get(name, '')) for run in runs)] for name in names]
    return '## Environment\n\n' + table(['', *(code(run['name']) for run in runs)], rows) if rows else ''


def table(head, rows):
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(cell.replace('|', '\\|').replace('\n', ' ') for cell in line) + ' |' for line in lines)


def code(text):
    mark, space = ('``', ' ') if '`' in text else ('`', '')
    return f'{mark}{space}{text}{space}{mark}' if text else ''


def shown(value, form='.4f', unit=''):
    return format(value, form) + unit if math.isfinite(value) else ''


def last(values):
    return values[-1] if len(values) else math.nan


def middle(values):
    values = np.asarray(values)[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


def duration(seconds):
    return f'{seconds:.1f} s' if seconds < 120 else f'{seconds / 60:.1f} min' if seconds < 7200 else f'{seconds / 3600:.2f} h'


# -----------------------------------------------------------------------------
# pictures


def draw(runs, panels, path):
    """Writes the panels side by side as a PNG; False where no run has anything to show in them."""
    from matplotlib.figure import Figure
    from matplotlib.font_manager import get_font_names
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(11, 4.4), dpi=100, layout='constrained')
    unit_s, unit = next((u for u in ((3600, 'h'), (60, 'min')) if max(run['seconds'] for run in runs) >= 2 * u[0]), (1, 's'))
    drawn = set()
    for axes, (x, x_scale, words, y_scale, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        heights = []
        for i, run in enumerate(runs):
            for name in names:
                part = next((run[kind] for kind in ('steps', 'evaluations', 'benchmarks') if name in run[kind]), None)
                if part is None:
                    continue
                xs, ys = part[x] / (unit_s if x == 'time' else 1), part[name]
                visible = np.isfinite(ys) & ((ys > 0) | (y_scale == 'linear')) & ((xs > 0) | (x_scale == 'linear'))
                if visible.any():
                    style = STYLES[name][1] if name in STYLES else {}
                    points = dict(marker='o', markersize=5) if visible.sum() == 1 or part is run['benchmarks'] else {}  # one point makes no line
                    axes.plot(xs[visible], ys[visible], color=COLOURS[i % len(COLOURS)], **points | style)
                    heights.extend(ys[visible])
                    drawn.add(name)
        axes.set(xlabel='training tokens' if x == 'tokens' else f'training time ({unit})', ylabel=words)
        axes.grid(alpha=0.25)
        set_scales(axes, x, x_scale, y_scale, heights)
    if not drawn:
        return False
    names = [run['name'] if len(run['name']) <= 120 else '…' + run['name'][-119:] for run in runs]  # 120 are as wide as the picture
    handles = [Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=3, label=name) for i, name in enumerate(names)]
    styles = dict(STYLES[name] for name in STYLES if name in drawn)  # by what they are called
    handles += [Line2D([], [], color='#555555', label=label, **style) for label, style in styles.items()]
    widest = max(len(handle.get_label()) for handle in handles)
    legend = figure.legend(handles=handles, loc='outside upper center', ncols=min(4, max(1, 135 // (widest + 7))), frameon=False)
    fonts = ['DejaVu Sans', *sorted(CHINESE_FONTS & set(get_font_names()))]  # each character from the first that has it
    for text in legend.get_texts():
        text.set(parse_math=False, fontfamily=fonts)  # a $ in a folder's name is a $
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing')  # the page itself has the names
        write_atomically(path, lambda f: figure.savefig(f, format='png', pil_kwargs=dict(optimize=True)))
    return True


def set_scales(axes, x, x_scale, y_scale, heights):
    """Scales, with ticks that read as plain numbers where a logarithmic axis spans little more than a decade."""
    from matplotlib.ticker import (
        EngFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
        NullLocator,
        ScalarFormatter,
    )

    axes.set_xscale(x_scale)
    if x_scale == 'log':
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if x == 'tokens':
        axes.xaxis.set_major_formatter(EngFormatter(sep=''))
    if y_scale == 'linear':
        low, high = min(heights, default=0), max(heights, default=0)
        if low or high:
            axes.set_ylim(1.05 * min(low, 0), 1.05 * max(high, 0))  # with zero, and room for a marker; CORE may be below it
        if high >= 1000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=''))
    elif heights:
        axes.set_yscale('log')
        if max(heights) < 20 * min(heights):
            axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_locator(NullLocator())


if __name__ == '__main__':
    with one_line_errors():
        main()
