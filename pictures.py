"""Pictures of training: the curves of one run or several as PNGs.

    names = draw_all(runs, Path('out'))     # ['loss.png', 'training.png']

A run is a report.Run.
"""

import warnings
from typing import NamedTuple

import numpy as np

from files import printable, write_atomically

# Okabe and Ito's palette for colour-blind readers, without its faint yellow: https://jfly.uni-koeln.de/color/
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
CHINESE_FONTS = {'Noto Sans CJK SC', 'Noto Sans SC', 'Source Han Sans SC', 'WenQuanYi Micro Hei',
                 'WenQuanYi Zen Hei', 'Droid Sans Fallback', 'PingFang SC', 'Hiragino Sans GB',
                 'Arial Unicode MS', 'Microsoft YaHei', 'SimHei'}


class Panel(NamedTuple):
    x: str  # tokens or seconds
    x_scale: str
    label: str  # of the y axis
    y_scale: str
    names: tuple[str, ...]  # curves


LOSSES = 'loss', 'loss_smoothed', 'val_loss'
PICTURES = {
    'loss.png': [Panel('tokens', 'log', 'loss (nats per token)', 'log', LOSSES),
                 Panel('seconds', 'linear', 'loss (nats per token)', 'log', LOSSES)],
    'bpb.png': [Panel('tokens', 'log', 'validation loss (bits per byte)', 'log', ('val_bpb',)),
                Panel('seconds', 'linear', 'validation loss (bits per byte)', 'log', ('val_bpb',))],
    'training.png': [Panel('tokens', 'linear', 'learning rate', 'linear', ('lr',)),
                     Panel('tokens', 'linear', 'gradient norm', 'log', ('grad_norm',)),
                     Panel('tokens', 'linear', 'tokens per second', 'linear', ('tok_per_s',))],
}
DASHED = dict(linewidth=1.2, linestyle='--', marker='o', markersize=5)
STYLES = {  # curve -> its name in the legend, and how it is drawn
    'loss': ('training, each logged step', dict(alpha=0.3, linewidth=0.8)),
    'loss_smoothed': ('training, smoothed', dict(linewidth=1.8)),
    'val_loss': ('validation', DASHED),
    'val_bpb': ('validation', DASHED),
}


def draw_all(runs, folder) -> list[str]:
    """Draw every picture that has something to show; return their names."""
    names = [name for run in runs for name in run.curves.benchmarks.values if name != 'iter']
    # more than four would be too small to read
    panels = [Panel('tokens', 'log', name, 'linear', (name,)) for name in list(dict.fromkeys(names))[:4]]
    pictures = PICTURES | ({'benchmarks.png': panels} if panels else {})
    return [name for name, panels in pictures.items() if draw(runs, panels, folder / name)]


def draw(runs, panels, path) -> bool:
    """Draw panels side by side into a PNG. False if no run has a value to show."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.4), dpi=100, layout='constrained')
    drawn = set()
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        drawn |= draw_panel(axes, runs, panel)
    if not drawn:
        return False
    add_legend(figure, [run.name for run in runs], drawn)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing')  # the page has the names
        write_atomically(path, lambda f: figure.savefig(f, format='png', pil_kwargs=dict(optimize=True)))
    return True


def draw_panel(axes, runs, panel) -> set[str]:
    """Draw the curves of all runs; return the names of those that have a visible value."""
    unit_s, unit = time_unit(max(run.curves.seconds for run in runs))
    drawn, heights = set(), []
    for i, run in enumerate(runs):
        parts = run.curves.steps, run.curves.evaluations, run.curves.benchmarks
        for name in panel.names:
            part = next((part for part in parts if name in part.values), None)
            if part is None:
                continue
            x, y = part.tokens, part[name]
            if panel.x == 'seconds':
                x = part.seconds / unit_s
            visible = np.isfinite(y)
            visible &= (x > 0) | (panel.x_scale == 'linear')
            visible &= (y > 0) | (panel.y_scale == 'linear')
            if not visible.any():
                continue
            style = {}
            if visible.sum() == 1 or part is run.curves.benchmarks:  # one point makes no line
                style.update(marker='o', markersize=5)
            if name in STYLES:
                style.update(STYLES[name][1])
            axes.plot(x[visible], y[visible], color=COLOURS[i % len(COLOURS)], **style)
            heights.extend(y[visible])
            drawn.add(name)
    xlabel = 'training tokens' if panel.x == 'tokens' else f'training time ({unit})'
    axes.set(xlabel=xlabel, ylabel=panel.label)
    axes.grid(alpha=0.25)
    set_x_scale(axes, panel)
    set_y_scale(axes, panel, heights)
    return drawn


def time_unit(seconds):
    for unit_s, unit in ((3600, 'h'), (60, 'min')):
        if seconds >= 2 * unit_s:
            return unit_s, unit
    return 1, 's'


def add_legend(figure, names, drawn):
    """A line for each run in its colour, and one for each kind of curve in its style."""
    from matplotlib.font_manager import get_font_names
    from matplotlib.lines import Line2D
    handles = []
    for i, name in enumerate(map(printable, names)):
        name = name if len(name) <= 120 else '…' + name[-119:]  # 120 characters are as wide as the picture
        handles.append(Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=3, label=name))
    styles = dict(STYLES[name] for name in STYLES if name in drawn)  # the two validation curves share a name
    handles += [Line2D([], [], color='#555555', label=label, **style) for label, style in styles.items()]
    widest = max(len(handle.get_label()) for handle in handles)
    n_columns = min(4, max(1, 135 // (widest + 7)))
    legend = figure.legend(handles=handles, loc='outside upper center', ncols=n_columns, frameon=False)
    # each character is taken from the first font that has it
    fonts = ['DejaVu Sans', *sorted(CHINESE_FONTS & set(get_font_names()))]
    for text in legend.get_texts():
        text.set(parse_math=False, fontfamily=fonts)  # a $ in a folder's name is a $


def set_x_scale(axes, panel):
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
    axes.set_xscale(panel.x_scale)
    if panel.x_scale == 'log':
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if panel.x == 'tokens':
        axes.xaxis.set_major_formatter(EngFormatter(sep=''))


def set_y_scale(axes, panel, heights):
    """A linear axis includes zero; a logarithmic one of little more than a decade has plain numbers."""
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator, ScalarFormatter
    if not heights:
        return
    low, high = min(heights), max(heights)
    if panel.y_scale == 'linear':
        if low or high:
            # with room for a marker; CORE may be below zero
            axes.set_ylim(1.05 * min(low, 0), 1.05 * max(high, 0))
        if high >= 1000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=''))
        return
    axes.set_yscale('log')
    if high < 20 * low:
        axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_locator(NullLocator())
