"""Pictures of training: the curves of one run or several, as PNG files or as SVG within a page.

    names = draw_all(runs, Path('out'))     # ['loss.png', 'training.png']
    drawings = as_svg(runs)                 # ['<svg ...', '<svg ...']

A run is a report.Run.
"""

import io
import warnings
from typing import NamedTuple

from files import printable, write_atomically

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
STYLES = {'loss': dict(alpha=0.3, linewidth=0.8), 'val_loss': dict(linestyle='--'),
          'val_bpb': dict(linestyle='--')}


def draw_all(runs, folder) -> list[str]:
    """Draw every picture that has something to show; return their names."""
    names = []
    for name, figure in figures(runs):
        write_atomically(folder / name, lambda f, figure=figure: save(figure, f, 'png'))
        names.append(name)
    return names


def as_svg(runs) -> list[str]:
    """Return every picture as SVG without a background, its text and its black lines in the page's colour."""
    drawings = []
    for _, figure in figures(runs):
        f = io.StringIO()
        save(figure, f, 'svg')
        svg = f.getvalue()
        drawings.append(svg[svg.index('<svg'):].replace('#000000', 'currentColor'))
    return drawings


def save(figure, f, kind):
    from matplotlib import rc_context
    metadata = dict.fromkeys(('Creator', 'Date', 'Format', 'Type')) if kind == 'svg' else None  # none at all
    with warnings.catch_warnings(), rc_context({'svg.fonttype': 'none'}):  # text stays text
        warnings.filterwarnings('ignore', 'Glyph .* missing')  # the page has the names
        figure.savefig(f, format=kind, transparent=kind == 'svg', metadata=metadata)


def figures(runs):
    """Yield (name, figure) of each picture that has something to show."""
    names = dict.fromkeys(name for run in runs for name in run.benchmark_names)
    # more than four would be too small to read
    benchmarks = [Panel('tokens', 'log', name, 'linear', (name,)) for name in list(names)[:4]]
    pictures = PICTURES | {'benchmarks.png': benchmarks}
    for name, panels in pictures.items():
        if any(run.values(curve) for run in runs for panel in panels for curve in panel.curves):
            yield name, draw(runs, panels)


def draw(runs, panels):
    """Draw panels side by side."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    figure = Figure(figsize=(11, 4.2 + 0.2 * len(runs)), layout='constrained')
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw_panel(axes, runs, panel)

    # a row of the legend for each run; 120 characters are as wide as the picture
    handles = []
    for i, run in enumerate(runs):
        label = printable(run.name)[-120:].replace('$', r'\$')  # a $ would begin a formula
        handles.append(Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=3, label=label))
    # each character is taken from the first font that has it
    fonts = ['DejaVu Sans', *chinese_fonts()]
    figure.legend(handles=handles, loc='outside upper left', frameon=False, prop=dict(family=fonts))
    return figure


def chinese_fonts() -> list[str]:
    """Return the names of the installed fonts that have Chinese characters."""
    from matplotlib.font_manager import get_font_names
    installed = set(get_font_names())
    return [name for name in CHINESE_FONTS if name in installed]


def draw_panel(axes, runs, panel):
    from matplotlib.ticker import LogFormatter
    for i, run in enumerate(runs):
        for curve in panel.curves:
            points = zip(run.values(panel.x, where=curve), run.values(curve), strict=True)
            # a logarithmic axis has no place for the evaluation before the first step
            points = [(x, y) for x, y in points if x > 0 or panel.x_scale == 'linear']
            marker = 'o' if len(points) < 20 else None  # a single point makes no line
            axes.plot(*zip(*points, strict=True), color=COLOURS[i % len(COLOURS)], marker=marker,
                      markersize=4, **STYLES.get(curve, {}))
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
    blocks = [(i, row.name) for i, row in enumerate(rows) if row.name.endswith(('.in', '.in.grad'))
              and row.name.count('.') == 2 + row.name.endswith('.grad')]
    axes.set_xticks([i for i, _ in blocks], [name.split('.in')[0] for _, name in blocks], rotation=90)
    axes.set(yscale='log', ylabel='relative error', xlabel='order of execution: forward, then backward')
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    write_atomically(path, lambda f: figure.savefig(f, format='png'))
