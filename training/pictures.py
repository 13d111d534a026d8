"""Pictures of training: the curves of one run or several (report.Run), as PNG files."""

import io
import re
import warnings
from typing import NamedTuple

from files import printable, write_atomically

BENCHMARKS = ('core', '_acc', '_acc_norm', '_perplexity')  # endings of their names in metrics.jsonl
# Okabe and Ito's palette for colour-blind readers, without its faint yellow: https://jfly.uni-koeln.de/color/
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
# by their names on Linux, macOS and Windows
CHINESE_FONTS = ('Noto Sans CJK SC', 'Noto Sans CJK JP', 'Noto Sans SC', 'WenQuanYi Micro Hei',
                 'WenQuanYi Zen Hei', 'Droid Sans Fallback', 'PingFang SC', 'Microsoft YaHei', 'SimHei')


class Panel(NamedTuple):
    x: str  # tokens or minutes
    x_scale: str
    label: str  # of the y axis
    y_scale: str
    curves: tuple[str, ...]  # names in metrics.jsonl


LOSS = 'loss (nats per token)', 'log', ('loss', 'loss_smoothed', 'val_loss')
BITS = 'validation loss (bits per byte)', 'linear', ('val_bpb',)
PICTURES = {
    'loss.png': [Panel('tokens', 'log', *LOSS), Panel('minutes', 'linear', *LOSS)],
    'bpb.png': [Panel('tokens', 'log', *BITS), Panel('minutes', 'linear', *BITS)],
    'training.png': [Panel('tokens', 'linear', 'learning rate', 'linear', ('lr',)),
                     Panel('tokens', 'linear', 'gradient norm', 'log', ('grad_norm',)),
                     Panel('tokens', 'linear', 'tokens per second', 'linear', ('tok_per_s',))],
}
BLOCK_INPUT = re.compile(r'(h[.][0-9]+)[.]in([.]grad)?')
LINE_STYLES = {'loss': dict(alpha=0.3, linewidth=0.8), 'val_loss': dict(linestyle='--'),
               'val_bpb': dict(linestyle='--')}


def draw_all(runs) -> dict[str, bytes]:
    """Return each picture that has something to show, a PNG file by its name."""
    names = dict.fromkeys(name for run in runs for name in run.latest if name.endswith(BENCHMARKS))
    # more than four would be too small to read
    benchmarks = [Panel('tokens', 'log', name, 'linear', (name,)) for name in list(names)[:4]]
    drawn = {}
    for name, panels in (PICTURES | {'benchmarks.png': benchmarks}).items():
        if any(curve in run.latest for run in runs for panel in panels for curve in panel.curves):
            drawn[name] = as_png(draw(runs, panels))
    return drawn


def as_png(figure) -> bytes:
    f = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing')  # the page has the names
        figure.savefig(f, format='png')
    return f.getvalue()


def draw(runs, panels):
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    figure = Figure(figsize=(11, 4.2 + 0.2 * len(runs)), layout='constrained')
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw_panel(axes, runs, panel)

    # a row of the legend for each run
    handles = []
    for i, run in enumerate(runs):
        label = printable(run.name)[-120:].replace('$', r'\$')  # as wide as the picture; $ begins a formula
        handles.append(Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=3, label=label))
    fonts = ['DejaVu Sans', *chinese_fonts()]  # each character is taken from the first font that has it
    figure.legend(handles=handles, loc='outside upper left', frameon=False, prop=dict(family=fonts))
    return figure


def chinese_fonts() -> list[str]:
    from matplotlib.font_manager import get_font_names
    installed = set(get_font_names())
    return [name for name in CHINESE_FONTS if name in installed]


def draw_panel(axes, runs, panel):
    from matplotlib.ticker import LogFormatter
    for i, run in enumerate(runs):
        for curve in panel.curves:
            points = [(line[panel.x], line[curve]) for line in run.lines if curve in line]
            if panel.x_scale == 'log':  # has no place for the evaluation before the first step
                points = [(x, y) for x, y in points if x > 0]
            marker = 'o' if len(points) < 20 else None  # a single point makes no line
            axes.plot(*zip(*points, strict=True), color=COLOURS[i % len(COLOURS)], marker=marker,
                      markersize=4, **LINE_STYLES.get(curve, {}))
    if not any(len(line.get_xdata()) for line in axes.lines):
        return  # a logarithmic axis cannot be empty
    axes.set(xscale=panel.x_scale, xlabel=f'{panel.x} of training', yscale=panel.y_scale, ylabel=panel.label)
    axes.grid(alpha=0.25)
    if panel.y_scale == 'log':
        axes.yaxis.set_minor_formatter(LogFormatter())  # 3 instead of 3 x 10^0
    if 'val_loss' in panel.curves:
        axes.set_title('training: each step faint, smoothed solid; validation: dashed', fontsize='small')


def draw_errors(rows, tolerance: float, path):
    """Draw the relative error of each tensor of two dumps (numerics.Row) in the order of execution."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 5), layout='constrained')
    axes = figure.subplots()
    kinds = {'weights': ('.weight', '.bias'), 'inputs and outputs': ('.in', '.out', 'loss'),
             'their gradients': ('.in.grad', '.out.grad'),
             'gradients of weights': ('.weight.grad', '.bias.grad')}
    for colour, (label, ends) in zip(COLOURS, kinds.items(), strict=False):
        points = [(i, row.error) for i, row in enumerate(rows) if row.name.endswith(ends) and row.error > 0]
        if points:
            axes.plot(*zip(*points, strict=True), '.-', color=colour, label=label, linewidth=0.8)
    axes.axhline(tolerance, color='black', linestyle=':', label='tolerance')
    blocks = {i: row.name.split('.in')[0] for i, row in enumerate(rows) if BLOCK_INPUT.fullmatch(row.name)}
    axes.set_xticks(list(blocks), blocks.values(), rotation=90)
    axes.set(yscale='log', ylabel='relative error', xlabel='order of execution: forward, then backward')
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    write_atomically(path, lambda f: f.write(as_png(figure)))
