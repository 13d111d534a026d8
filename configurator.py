"""Settings of a script: its module-level names, overridden by config files, overridden by flags.

    python train.py config/train_shakespeare_char.py --batch_size=32 --compile=False
    python train.py --help

A script calls this under its __main__ guard, before it binds other plain names at module level:

    with one_line_errors():
        explicit = configure(globals())

A setting is a module-level name, without leading underscore and not ALL_CAPS, that holds a bool, int, float or str.
The default's type is what it accepts, unless an annotation says more; None needs one:

    top_k: int | None = 200
    compile: bool | Literal['auto'] = 'auto'

A config file whose settings follow from others has a function for that, which is called once the flags are known:

    def derive(depth: int = 12, head_dim: int = 128, max_iters=None):
        return dict(n_layer=depth, n_head=depth * 64 // head_dim, ...)

Its parameters are settings of the script, or with an annotation settings of the file's own that flags may give as well. Each gets what a
flag or a file says, else its default here, else the script's. What it returns wins over the files so far, and flags win over that.
"""

import ast
import contextlib
import difflib
import inspect
import io
import numbers
import os
import runpy
import symtable
import sys
import tokenize
import traceback
import types
import typing
from pathlib import Path

WORDS = {bool: 'True, False', int: 'a whole number', float: 'a number', str: 'text', types.NoneType: 'None'}
BOOLS = {'True': True, 'true': True, '1': True, 'False': False, 'false': False, '0': False}


def configure(settings, argv=None):
    """Override settings from the command line, by its config files in their order and then by its flags; print what changed.

    settings  the script's globals(), changed in place, and only if all of argv is right
    argv      the arguments, sys.argv[1:] if None
    returns   set of the names that a file or flag gave, even where it gave the default
    raises    ValueError, FileNotFoundError: one line with source, name, value and what is accepted
    """
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print(help_text(settings), flush=True)
        raise SystemExit(0)
    accepted, defaults, given = accepted_by(settings), config_of(settings), {}
    known = dict(accepted)  # and what the files add for their own use
    for file in parse(argv, known, strict=False)[0]:
        values, derive = read_config(file, settings.get('__file__', ''), {**defaults, **given}, accepted)
        given.update(values)
        known = {**own_settings(derive), **known}
        given.update(call_derive(file, derive, given, parse(argv, known, strict=False)[1], defaults, accepted))
    _, flags = parse(argv, known)
    given.update((name, value) for name, value in flags.items() if name in accepted)
    settings.update(given)
    changed = [f'{name} = {settings[name]!r}' for name in defaults if settings[name] != defaults[name]]
    if changed and os.environ.get('RANK', '0') == '0':
        print('overrides: ' + ', '.join(changed))
    return set(given)


def config_of(settings):
    """The plain name -> value dict of all settings, to print or to store."""
    return {name: settings[name] for name in accepted_by(settings)}


# -----------------------------------------------------------------------------
# what a setting accepts


def accepted_by(settings):
    """name -> list of the types and literal strings that it accepts, for every setting in a script's globals()."""
    annotated = types.SimpleNamespace(__annotations__=settings.get('__annotations__', {}))
    hints = typing.get_type_hints(annotated, settings)  # they are strings under `from __future__ import annotations`
    accepted = {}
    for name, value in settings.items():
        if name.startswith('_') or name.isupper() or type(value) not in WORDS or (value is None and name not in hints):
            continue
        accepted[name] = options_of(hints.get(name, type(value)))
    return accepted


def options_of(hint):
    """bool | Literal['auto'] -> [bool, 'auto']"""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]
    return [option for member in members for option in typing.get_args(member) or [member]]


def phrase(options):
    """'is a whole number or None', 'are auto, float32, bfloat16, float16'"""
    words = [WORDS.get(option, option) for option in options]
    return 'is ' + ' or '.join(words) if len(words) < 3 and bool not in options else 'are ' + ', '.join(words)


def from_text(text, options):
    """The value that a flag's text stands for; the text itself where it stands for no other."""
    if bool in options and text in BOOLS:
        return BOOLS[text]
    if types.NoneType in options and text == 'None':
        return None
    if int in options or float in options:
        for number in (int, float):
            with contextlib.suppress(ValueError):
                return number(text)
    return text


def checked(value, options, source):
    """The value as the setting holds it, a plain one: 1 as 1.0 where a float is due, 1e3 as 1000 where an int is.

    source  names it in the error: '--dtype=bf16' or "config/x.py: dtype = 'bf16'"
    """
    if isinstance(value, str) and (str in options or value in options):
        return str(value)
    if type(value) in (bool, types.NoneType) and type(value) in options:
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, bool):  # NumPy's too
        whole = isinstance(value, numbers.Integral) or (abs(value) <= 2**53 and value == int(value))
        if int in options and whole:
            return int(value)
        if float in options and value == value:  # nan is not
            with contextlib.suppress(OverflowError):
                return float(value)
    near = nearest(str(value), [option for option in options if isinstance(option, str)], '; did you mean {}?')
    raise ValueError(f'{source}: accepted {phrase(options)}{near}')


def nearest(word, choices, remedy, otherwise=''):
    """The remedy with the choice that looks most like the word in it."""
    near = difflib.get_close_matches(word, choices, n=1)
    return remedy.format(near[0]) if near else otherwise


# -----------------------------------------------------------------------------
# where settings are given


def parse(argv, accepted, strict=True):
    """The command line -> (config files in order, name -> value of each flag, the last of several winning).

    strict  False passes over flags that are not accepted: the files may add to what is
    """
    files, flags, rest = [], {}, list(argv)
    while rest:
        arg = rest.pop(0)
        key, equals, text = arg.partition('=')
        name = key.lstrip('-').replace('-', '_')
        if not key.startswith('-') and name not in accepted:
            files.append(arg)
            continue
        if not strict and name not in accepted:
            if not equals and rest and not rest[0].startswith('--'):
                rest.pop(0)
            continue
        if not key.startswith('--') or name not in accepted:
            raise ValueError(f'{key}: unknown setting' + nearest(name, accepted, ', did you mean --{}?', ', --help lists all'))
        options = accepted[name]
        if not equals:
            following = rest[0] if rest and not rest[0].startswith('--') else None
            if bool in options and following not in (*BOOLS, 'None', *options):
                text = 'True'  # a bare --flag, and what follows may be a config file
            elif following is None:
                raise ValueError(f'{key}: no value, write {key}=VALUE: accepted {phrase(options)}')
            else:
                text = rest.pop(0)
        flags[name] = checked(from_text(text, options), options, f'{key}={text}')
    return files, flags


def read_config(file, script, current, accepted):
    """Run a config file with the current settings in sight; returns name -> value of those that it gives, and its derive() or None.

    Its imports, functions, classes and names that begin with an underscore are its own; any other unknown name is an error.
    """
    folder = os.path.dirname(script)
    path = next(filter(os.path.isfile, (file, os.path.join(folder, file))), None)
    if path is None:
        stems = [p.stem for base in ('', folder) for p in Path(base, 'config').glob('*.py')]
        raise FileNotFoundError(f'{file}: no such config file' + nearest(Path(file).stem, stems, ', did you mean config/{}.py?'))
    source = Path(path).read_bytes()
    try:
        symbols = symtable.symtable(source, path, 'exec').get_symbols()
        result = runpy.run_path(path, init_globals=current)
    except (Exception, SystemExit) as e:
        raise ValueError(where(file, path, e)) from e
    # Given is what it assigns, be it the default, and what an `import *` changed.
    assigned = [symbol.get_name() for symbol in symbols if symbol.is_assigned()]
    for name in assigned:
        own = name.startswith('_') or name not in result or callable(result[name]) or isinstance(result[name], types.ModuleType)
        if name not in accepted and not own:
            near = nearest(name, accepted, ', did you mean {}?', ' (a name of its own begins with _)')
            raise ValueError(f'{file}: unknown setting {name}{near}')
    values = {name: checked(result[name], accepted[name], f'{file}: {name} = {result[name]!r}')
              for name in current if name in result and (name in assigned or result[name] is not current[name])}
    return values, result.get('derive') if inspect.isfunction(result.get('derive')) else None


def where(file, path, error):
    """'config/x.py:3: ZeroDivisionError: division by zero', with the last line of the file that had a part in it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = lines[-1] if lines else getattr(error, 'lineno', None)  # the latter of a SyntaxError
    return f'{file}:{line or 1}: {type(error).__name__}: {getattr(error, "msg", error)}'


def own_settings(derive):
    """name -> what it accepts, of the annotated parameters of a file's derive()."""
    return {name: options_of(hint) for name, hint in typing.get_type_hints(derive).items()} if derive else {}


def call_derive(file, derive, given, flags, defaults, accepted):
    """name -> value of the settings that follow from the others."""
    if derive is None:
        return {}
    arguments = {}
    for name, parameter in inspect.signature(derive).parameters.items():
        known = [values[name] for values in (flags, given) if name in values]
        own = parameter.default if parameter.default is not parameter.empty else defaults.get(name)
        arguments[name] = known[0] if known else own
    try:
        values = derive(**arguments)
    except Exception as e:
        raise ValueError(where(file, derive.__code__.co_filename, e)) from e
    for name in values:
        if name not in accepted:
            raise ValueError(f'{file}: derive() gives {name}, an unknown setting{nearest(name, accepted, ", did you mean {}?")}')
    return {name: checked(value, accepted[name], f'{file}: {name} = {value!r}') for name, value in values.items()}


# -----------------------------------------------------------------------------
# what the user sees


def help_text(settings):
    """The script's docstring, then its settings with default, comment and what they accept, under the comments above them."""
    remarks = read_remarks(settings['__file__']) if '__file__' in settings else {}
    lines = [(settings.get('__doc__') or '').strip(), '', 'Settings, as flags or in a config file:']
    for name, options in accepted_by(settings).items():
        default, (heading, remark) = settings[name], remarks.get(name, ([], ''))
        lines += ['', *heading] if heading else []
        shown = default if isinstance(default, str) and default.isprintable() else repr(default)
        limits = '' if options == [type(default)] else f'[{phrase(options).partition(" ")[2]}]'
        lines.append(' '.join([f'  --{name}={shown}'.ljust(38), *filter(None, (remark, limits))]))
    return '\n'.join(line.rstrip() for line in lines)


def read_remarks(script):
    """name -> (lines of the comment above it, the comment behind it) for every top-level assignment of a script."""
    with tokenize.open(script) as f:
        source = f.read()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip('#').strip() for token in tokens if token.type == tokenize.COMMENT}
    lines, remarks = source.split('\n'), {}
    for node in ast.parse(source).body:
        start = node.lineno
        while start > 1 and (lines[start - 2].startswith('#') or not lines[start - 2].strip()):
            start -= 1
        heading = [comments[line] for line in range(start, node.lineno) if comments.get(line, '').strip('-')]
        for target in getattr(node, 'targets', [getattr(node, 'target', None)]):
            if isinstance(target, ast.Name):
                remarks[target.id] = heading, comments.get(node.end_lineno, '')
    return remarks


