"""The page of `report.py --watch`: runs as they train, in one HTML file that needs nothing else.

It only reads the folders of runs, apart from report.html. The page reloads itself; colours follow the system.
"""

import contextlib
import html
import io
import math
import time
from base64 import b64encode
from pathlib import Path

from files import print0, printable, write_text
from report import Picture, Section, contents, formatted, read_run, side_by_side

PAUSE_S = 3
HEAD = '''<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
img { width: 100%; border-radius: 6px; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid #8884; }
h1, td, pre { overflow-wrap: anywhere; } pre, td { white-space: pre-wrap; }
th { min-width: 5em; overflow-wrap: anywhere; }
footer, th, td:first-child { opacity: .7; } td:first-child { overflow-wrap: normal; }
</style>
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
    page += f'<footer>written {time.strftime("%Y-%m-%d %H:%M:%S")}'
    if renewed:
        page = f'<meta http-equiv="refresh" content="{PAUSE_S}">{page}'
    else:
        page += ', no longer renewed'
    try:
        write_text(out / 'report.html', f'{HEAD}{page}\n')
    except FileNotFoundError:
        return problem  # the trainer removes temporary files when it starts and saves
    except OSError as error:
        if error.strerror != problem:
            print0(f'{out / "report.html"}: {error.strerror}: trying again')
        return error.strerror
    return None


def make_page(folders) -> str:
    """Return the page without its head and its footer."""
    runs, problems = [], []
    for folder in folders:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # an incomplete line is not an error
                runs.append(read_run(folder))
        except (ValueError, OSError) as error:
            problems.append(f'<p>{text_of(error)}</p>')
    title = text_of(' and '.join(run.name for run in runs) or 'waiting for a run')
    page = [f'<title>{title}</title></head><body><h1>{title}</h1>', *problems]
    if runs:
        summary, *others = contents(runs)
        summary = summary._replace(rows=side_by_side([progress_of(run) for run in runs]) + summary.rows)
        page += [as_html(part) for part in (summary, *others)]
    return '\n'.join(page)


def as_html(part) -> str:
    if isinstance(part, Picture):
        return f'<img alt="{part.name}" src="data:image/png;base64,{b64encode(part.png).decode()}">'
    if isinstance(part, Section):
        return f'<h2>{text_of(part.title)}</h2><pre>{text_of(part.text)}</pre>'
    rows = []
    for tag, cells in [('th', part.heads), *(('td', row) for row in part.rows)]:
        rows.append('<tr>' + ''.join(f'<{tag}>{text_of(cell)}</{tag}>' for cell in cells))
    return f'<h2>{text_of(part.title)}</h2><div><table>{"".join(rows)}</table></div>'


def text_of(value) -> str:
    return html.escape(printable(str(value)))


def progress_of(run) -> dict[str, str]:
    """Return the rows of a run that show whether it still trains, and for how long."""
    return formatted([
        ('minutes since the last line', '{:,.1f}', (time.time() - run.latest.get('time', math.nan)) / 60),
        ('minutes left in training then', '{:,.1f}', run.latest.get('eta_s', math.nan) / 60)])
