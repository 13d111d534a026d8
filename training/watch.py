"""The page of `report.py --watch`: runs as they train, in one HTML file that needs nothing else.

It only reads the folders of runs, apart from report.html. The page reloads itself; colours follow the system.
"""

import contextlib
import html
import io
import math
import os
import re
import socket
import time
from datetime import timedelta
from itertools import groupby
from pathlib import Path

from files import print0, printable, write_atomically
from report import number, read_run, settings_rows, side_by_side, summary

PAUSE_S = 3.0
LATEST = (('last validation loss', 'val_loss', '{:.4f}'), ('learning rate', 'lr', '{:.3g}'),
          ('tokens per second', 'tok_per_s', '{:,.0f}'), ('steps skipped', 'skipped', '{:.0f}'))
QUIET_S = 300.0  # a run elsewhere without a line for so long may have crashed
STYLE = '''
:root { color-scheme: light dark; --ink: #1c2126; --faint: #66707a; --paper: #ffffff; --line: #d9dee3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe4e8; --faint: #98a2ac; --paper: #14181c; --line: #343c44; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1100px; margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
svg { width: 100%; height: auto; } svg text { fill: currentColor; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid var(--line); }
td { white-space: pre-wrap; overflow-wrap: anywhere; } th:first-child, td:first-child { color: var(--faint); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--line); padding-left: .8rem;
  margin: .4rem 0; }
footer, .faint { color: var(--faint); font-size: .85rem; }
.running { color: #0b8a5c; } .crashed { color: #d1440c; }
'''


def watch(folders: list, out=None):
    """Write report.html until Ctrl-C.

    out     folder to write to; None = the first of folders
    raises  ValueError for a folder that does not exist
    """
    folders, out = [Path(folder) for folder in folders], Path(out or folders[0])
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f'{folder}: no such folder: name the out_dir of a run that has begun')
    out.mkdir(parents=True, exist_ok=True)
    print0(printable(f'watching: open {out.absolute() / "report.html"} in a browser, Ctrl-C ends'))
    page, problem = '', None
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            begun_s = time.monotonic()
            page = make_page(folders)
            problem = write_page(out, page, problem, renewed=True)
            # a long metrics.jsonl takes seconds to draw: leave four fifths of a core to training
            time.sleep(max(PAUSE_S, 4 * (time.monotonic() - begun_s)))
    if page:
        write_page(out, page, problem, renewed=False)


def write_page(out, page, problem, renewed: bool) -> str | None:
    """Write report.html. Return the problem, which is printed once: the next attempt may succeed."""
    head = f'<meta http-equiv="refresh" content="{PAUSE_S:.0f}">' if renewed else ''
    note = '' if renewed else ', no longer renewed'
    text = page.replace('<!--refresh-->', head, 1) + f'{note}</footer>\n'
    try:
        write_atomically(out / 'report.html', lambda f: f.write(text.encode('utf-8', 'replace')))
    except FileNotFoundError:
        return problem  # the trainer removes temporary files when it starts and saves
    except OSError as error:
        if error.strerror != problem:
            print0(f'{out / "report.html"}: {error.strerror}: trying again')
        return error.strerror
    return None


# -----------------------------------------------------------------------------
# the page


def make_page(folders) -> str:
    """Return the page but for the end of its footer."""
    runs, waiting = [], []
    for folder in folders:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # a line that is half written is no news
                runs.append(read_run(folder))
        except (ValueError, OSError) as error:
            waiting.append(f'<p class="faint">{text_of(error)}</p>')
    states = [state_of(run) for run in runs]
    names = [run.name for run in runs]
    title = ' and '.join(f'{name}: {state}' for name, state in zip(names, states, strict=True))
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><!--refresh-->',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" '
        'content="default-src \'none\'; style-src \'unsafe-inline\'">',
        f'<title>{text_of(title or "waiting for a run")}</title><style>{STYLE}</style></head><body>',
        f'<h1>{" and ".join(map(text_of, names)) or "waiting for a run"}</h1>', *waiting]
    if runs:
        columns = [dict(state=state) | progress_of(run, state) | summary(run)
                   for run, state in zip(runs, states, strict=True)]
        parts += [html_table(['', *names], side_by_side(columns)), *drawings(runs)]
        parts += [samples(run) for run in runs if run.samples]
        if rows := settings_rows(runs):
            parts.append('<h2>Settings that differ between the runs or from the defaults</h2>')
            parts.append(html_table(['', *names, 'default'], rows))
    return '\n'.join([*parts, f'<footer>written {time.strftime("%Y-%m-%d %H:%M:%S")}'])


def drawings(runs):
    try:
        from training.pictures import as_svg
        return as_svg(runs)
    except ImportError as error:
        return [f'<p>no curves: matplotlib cannot be imported ({text_of(error)}): pip install matplotlib</p>']


def samples(run) -> str:
    """The last section of samples.md: its indented lines are text of the model."""
    iteration, _, body = run.samples.partition('\n')
    parts = [f'<h2>Samples of {text_of(run.name)}, iteration {text_of(iteration)}</h2>']
    for is_text, lines in groupby(body.splitlines(), lambda line: line.startswith('    ')):
        if is_text:
            text = '\n'.join(line[4:] for line in lines)
            parts.append(f'<pre>{text_of(text)}</pre>')
        elif words := ' '.join(lines).replace('**', '').strip():
            parts.append(f'<div class="faint">{text_of(words)}</div>')
    return '\n'.join(parts)


def text_of(value) -> str:
    return html.escape(printable(str(value)))


# -----------------------------------------------------------------------------
# how a run does


def state_of(run) -> str:
    """Return whether a run is running, finished, stopped or crashed, and for how long."""
    last, ended = run.lines[-1], run.facts['ended']
    quiet_s = time.time() - last.get('time', math.nan)
    if ended:
        reason = {'finished': 'finished', 'stopped': f'stopped by {ended.get("reason")}'}
        state = reason.get(ended.get('event'), f'ended: {ended.get("reason")}')
        return f'{state}{ago(time.time() - number(ended.get("time")))}'
    alive = is_alive(Path(run.name))
    if alive is False:
        is_done = 'val_loss' in last and last['iter'] == run.facts['settings'].get('max_iters')
        return ('finished' if is_done else 'crashed') + ago(quiet_s)
    if not quiet_s > QUIET_S:
        return 'running'
    return f'{"running" if alive else "crashed or busy"}, the last line came{ago(quiet_s)}'


def is_alive(folder) -> bool | None:
    """Whether the process that last trained in a folder exists; None if it was on another machine."""
    path = folder / '.lock'
    text = path.read_text(encoding='utf-8', errors='replace') if path.is_file() else ''
    match = re.match(r'process (\d{1,9}) on (\S+)', text)
    if os.name != 'posix' or match is None or match[2] != socket.gethostname():
        return None
    try:
        os.kill(int(match[1]), 0)  # no signal, only the check
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def ago(seconds: float) -> str:
    if not seconds >= 0:
        return ''
    if seconds < 120:
        return f' {seconds:.0f} seconds ago'
    if seconds < 7200:
        return f' {seconds / 60:.0f} minutes ago'
    return f' {seconds / 3600:,.1f} hours ago'


def progress_of(run, state: str) -> dict[str, str]:
    """Return the rows of a run that change from line to line."""
    steps = [line for line in run.lines if 'loss' in line]
    rows = {}
    if not steps:
        return rows
    last = steps[-1]
    done_at_s = last.get('time', math.nan) + last.get('eta_s', math.nan)
    if state.startswith('running') and math.isfinite(done_at_s):
        left = timedelta(seconds=max(0, round(done_at_s - time.time())))
        rows['training ends in'] = f'{left}, {time.strftime("%a %H:%M", time.localtime(done_at_s))}'
    for label, name, form in LATEST:
        values = run.values(name)
        if values and values[-1]:
            rows[label] = form.format(values[-1])
    return rows


def html_table(heads, rows) -> str:
    lines = []
    for tag, cells in [('th', heads), *(('td', row) for row in rows)]:
        lines.append('<tr>' + ''.join(f'<{tag}>{text_of(cell)}</{tag}>' for cell in cells) + '</tr>')
    return '<div class="wide"><table>' + '\n'.join(lines) + '</table></div>'
