"""Settings of a script: its module-level names, overridden by config files, overridden by flags.

    explicit = configure(globals())    # in the script, before it binds other plain names

    python train.py config/train_shakespeare_char.py --batch_size=32 --compile=False

A setting is a lower-case name without leading underscore that holds a bool, int, float or str. It accepts
the type of its default, or of its annotation, as in `top_k: int | None = 200`.

A config file may compute settings in a function derive(), as config/depth.py does. Its parameters are
settings, annotated ones the file's own. Its result overrides the files.
"""

import contextlib
import difflib
import inspect
import numbers
import os
import re
import runpy
import symtable
import sys
import textwrap
import traceback
import types
import typing
from pathlib import Path

NoneType = type(None)
WORDS = {bool: 'True, False', int: 'a whole number', float: 'a number', str: 'text', NoneType: 'None'}
BOOLS = {'True': True, 'true': True, '1': True, 'False': False, 'false': False, '0': False}


def configure(settings: dict, argv: list[str] | None = None) -> set[str]:
    """Override settings by config files in order, then by flags. Print the changes.

    settings  the script's globals(), changed only if all arguments are valid
    returns   names of the settings given by a file or flag, even with the default value
    """
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print(help_text(settings), flush=True)
        raise SystemExit(0)
    defaults, accepted, given = config_of(settings), accepted_by(settings), {}
    files, _ = parse(argv, accepted, skip_unknown=True)
    for file in files:
        values, derive = run_config(file, settings.get('__file__', ''), {**defaults, **given}, accepted)
        given.update(values)
        if derive is not None:
            hints = typing.get_type_hints(derive)
            accepted = {name: options_of(hint) for name, hint in hints.items()} | accepted
            _, flags = parse(argv, accepted, skip_unknown=True)
            given.update(call_derive(file, derive, defaults, {**given, **flags}, accepted))
    _, flags = parse(argv, accepted)
    given = {name: value for name, value in (given | flags).items() if name in defaults}
    settings.update(given)
    changed = [f'{name} = {settings[name]!r}' for name in defaults if settings[name] != defaults[name]]
    if changed and os.environ.get('RANK', '0') == '0':
        print(textwrap.fill('overrides: ' + ', '.join(changed), 100, subsequent_indent='  ',
                            break_long_words=False, break_on_hyphens=False))
    return set(given)


def config_of(settings: dict) -> dict:
    """Return the values of all settings by name."""
    return {name: settings[name] for name in accepted_by(settings)}


# -----------------------------------------------------------------------------
# accepted values


def accepted_by(settings: dict) -> dict[str, list]:
    """Return the types and literal strings that each setting in a script's globals() accepts."""
    hints, accepted = settings.get('__annotations__', {}), {}
    for name, value in settings.items():
        is_setting = type(value) in WORDS and (value is not None or name in hints)
        if is_setting and not name.startswith('_') and not name.isupper():
            accepted[name] = options_of(hints.get(name, type(value)))
    return accepted


def options_of(hint):
    """bool | Literal['auto'] -> [bool, 'auto']"""
    members = [hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = typing.get_args(hint)
    return [option for member in members for option in typing.get_args(member) or [member]]


def phrase(options):
    """'is a whole number or None', 'are auto, float32, bfloat16, float16'"""
    words = [WORDS.get(option, option) for option in options]
    if bool in options or len(words) > 2:
        return 'are ' + ', '.join(words)
    return 'is ' + ' or '.join(words)


def checked(value, options: list, source: str):
    """Convert a value to the type of its setting: 1 to 1.0 for a float, 1e3 to 1000 for an int."""
    if isinstance(value, str) and (str in options or value in options):
        return str(value)
    if type(value) in (bool, NoneType) and type(value) in options:
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, bool):  # NumPy's too
        is_whole = isinstance(value, numbers.Integral) or (abs(value) <= 2**53 and value == int(value))
        if int in options and is_whole:
            return int(value)
        if float in options and value == value:  # nan is not
            with contextlib.suppress(OverflowError):
                return float(value)
    words = [option for option in options if isinstance(option, str)]
    near = nearest(str(value), words, '; did you mean {}?')
    raise ValueError(f'{source}: accepted {phrase(options)}{near}')


def nearest(word, choices, remedy, otherwise=''):
    """Return the remedy with the choice that is spelled most like the word, or `otherwise`."""
    near = difflib.get_close_matches(word, choices, n=1)
    return remedy.format(near[0]) if near else otherwise


# -----------------------------------------------------------------------------
# flags and config files


def parse(argv, accepted, skip_unknown=False):
    """Split the command line into config files and {name: value} of flags.

    skip_unknown  flags may belong to config files that have not been read
    """
    files, flags, rest = [], {}, list(argv)
    while rest:
        arg = rest.pop(0)
        flag, equals, text = arg.partition('=')
        name = flag.lstrip('-').replace('-', '_')
        options = accepted.get(name)
        if not flag.startswith('-') and not options:
            files.append(arg)
            continue
        if not equals:
            text = None
            if rest and not rest[0].startswith('--'):
                text = rest[0]
            if options and bool in options and text not in (*BOOLS, 'None', *options):
                text = 'True'  # a bare --flag
            elif text is not None:
                rest.pop(0)
        if not options and skip_unknown:
            continue
        if not options or not flag.startswith('--'):
            near = nearest(name, accepted, ', did you mean --{}?', ', --help lists all')
            raise ValueError(f'{flag}: unknown setting{near}')
        if text is None:
            raise ValueError(f'{flag}: no value, write {flag}=VALUE: accepted {phrase(options)}')
        flags[name] = checked(from_text(text, options), options, f'{flag}={text}')
    return files, flags


def from_text(text, options):
    """Return the bool, None, number or text that the text of a flag stands for."""
    if bool in options and text in BOOLS:
        return BOOLS[text]
    if NoneType in options and text == 'None':
        return None
    if int in options or float in options:
        for number in (int, float):
            with contextlib.suppress(ValueError):
                return number(text)
    return text


def run_config(file, script, current, accepted):
    """Run a config file that sees the current settings. Return its settings by name, and its derive()."""
    folder = os.path.dirname(script)
    path = next(filter(os.path.isfile, (file, os.path.join(folder, file))), None)
    if path is None:
        stems = [p.stem for base in ('', folder) for p in Path(base, 'config').glob('*.py')]
        near = nearest(Path(file).stem, stems, ', did you mean config/{}.py?')
        raise FileNotFoundError(f'{file}: no such config file{near}')
    try:
        symbols = symtable.symtable(Path(path).read_bytes(), path, 'exec').get_symbols()
        result = runpy.run_path(path, init_globals=current)
    except (Exception, SystemExit) as error:
        raise ValueError(where(file, path, error)) from error
    # a file gives the settings that it assigns, and those that an `import *` changed
    assigned = {symbol.get_name() for symbol in symbols if symbol.is_assigned()}
    values = {}
    for name, value in result.items():
        if name in assigned:
            is_own = name.startswith('_') or callable(value) or inspect.ismodule(value)
            is_given = name in accepted or not is_own  # an unknown setting is an error
        else:
            is_given = name in current and value is not current[name]
        if is_given:
            values[name] = value
    derive = result.get('derive')
    if not inspect.isfunction(derive):
        derive = None
    return check_values(values, accepted, file), derive


def call_derive(file, derive, defaults, given, accepted):
    """Return the settings that derive() computes, by name."""
    parameters = inspect.signature(derive).parameters.values()
    own = {p.name: p.default for p in parameters if p.default is not p.empty}
    chosen = {**defaults, **own, **given}
    try:
        values = derive(**{p.name: chosen[p.name] for p in parameters})
    except Exception as error:
        raise ValueError(where(file, derive.__code__.co_filename, error)) from error
    return check_values(values, accepted, f'{file}, derive()')


def check_values(values, accepted, source):
    """Convert the values that a config file gives to the types of their settings."""
    for name in values:
        if name not in accepted:
            near = nearest(name, accepted, ', did you mean {}?', ' (a name of its own begins with _)')
            raise ValueError(f'{source}: unknown setting {name}{near}')
    return {name: checked(value, accepted[name], f'{source}: {name} = {value!r}')
            for name, value in values.items()}


def where(file, path, error):
    """'config/x.py:3: ZeroDivisionError: division by zero', for the innermost line of the file."""
    line = getattr(error, 'lineno', None)  # of a SyntaxError
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == path:
            line = frame.lineno
    return f'{file}:{line or 1}: {type(error).__name__}: {getattr(error, "msg", error)}'


# -----------------------------------------------------------------------------
# --help

ASSIGNMENT = re.compile(r'(\w+)(?:: .+?)? = .+?(?:  # (.*))?\n')


def help_text(settings):
    """Return the script's docstring and its settings with headings, remarks and accepted values."""
    remarks = read_remarks(settings['__file__']) if '__file__' in settings else {}
    project = (Path(__file__).parent / 'pyproject.toml').read_text(encoding='utf-8')
    version = re.search(r'^version = "(.+)"', project, re.MULTILINE)[1]
    lines = [f'flatGPT {version}', '', (settings.get('__doc__') or '').strip(), '',
             'Settings, as flags or in a config file:']
    for name, options in accepted_by(settings).items():
        default, (heading, remark) = settings[name], remarks.get(name, ([], ''))
        if not isinstance(default, str) or not default.isprintable():
            default = repr(default)
        words = [f'  --{name}={default}'.ljust(38), remark]
        if options != [type(settings[name])]:
            words.append(f'[{phrase(options).partition(" ")[2]}]')
        if heading:
            lines += ['', *heading]
        lines.append(' '.join(filter(None, words)).rstrip())
    return '\n'.join(lines)


def read_remarks(script):
    """Return {name: (comment lines above, comment after)} of a script's settings."""
    remarks, heading = {}, []
    for line in Path(script).read_text(encoding='utf-8').splitlines(keepends=True):
        assignment = ASSIGNMENT.fullmatch(line)
        if assignment:
            remarks.setdefault(assignment[1], (heading, assignment[2] or ''))
        comment = line.strip('#- \n')
        if line.startswith('#') and comment:
            heading = [*heading, comment]
        elif comment:
            heading = []
    return remarks
