"""Settings of a script: its module-level names, overridden by config files, overridden by flags.

    python train.py config/train_shakespeare_char.py --batch_size=32 --compile=False
    python train.py --help

A script calls this before it binds other plain names at module level:

    with one_line_errors():
        explicit = configure(globals())

A setting is a module-level name, lower case and without leading underscore, that holds a bool, int, float or
str. It accepts the type of its default, or of its annotation. None needs an annotation:

    top_k: int | None = 200
    compile: bool | Literal['auto'] = 'auto'

A config file that computes settings from others defines a function, called after the flags are read:

    def derive(depth: int = 12, head_dim: int = 128, max_iters=None):
        return dict(n_layer=depth, n_head=depth * 64 // head_dim, ...)

An annotated parameter is a setting of this file, which flags may also give. Any other is a setting of the
script. Its value comes from a flag, a file, its default here or the script, in this order. What derive()
returns overrides the files, and flags override that.
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


def configure(settings: dict, argv: list[str] | None = None) -> set[str]:
    """Override settings by config files in order, then by flags. Print the changes.

    settings  the script's globals(), changed in place only if all arguments are valid
    argv      None = sys.argv[1:]
    returns   names of the settings given by a file or flag, even with the default value
    raises    ValueError, FileNotFoundError: one line with source, name, value and what is accepted
    """
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print(help_text(settings), flush=True)
        raise SystemExit(0)
    accepted, defaults, given = accepted_by(settings), config_of(settings), {}
    all_accepted = dict(accepted)  # plus the files' own settings
    for file in parse(argv, all_accepted, strict=False)[0]:
        values, derive = read_config(file, settings.get('__file__', ''), {**defaults, **given}, accepted)
        given.update(values)
        all_accepted = {**own_settings(derive), **all_accepted}
        _, flags = parse(argv, all_accepted, strict=False)
        given.update(call_derive(file, derive, given, flags, defaults, accepted))
    _, flags = parse(argv, all_accepted)
    given.update((name, value) for name, value in flags.items() if name in accepted)
    settings.update(given)
    changed = [f'{name} = {settings[name]!r}' for name in defaults if settings[name] != defaults[name]]
    if changed and os.environ.get('RANK', '0') == '0':
        print('overrides: ' + ', '.join(changed))
    return set(given)


def config_of(settings: dict) -> dict:
    """Return the values of all settings by name."""
    return {name: settings[name] for name in accepted_by(settings)}


# -----------------------------------------------------------------------------
# accepted values


def accepted_by(settings: dict) -> dict[str, list]:
    """Return the types and literal strings that each setting in a script's globals() accepts."""
    annotated = types.SimpleNamespace(__annotations__=settings.get('__annotations__', {}))
    hints = typing.get_type_hints(annotated, settings)  # resolves `from __future__ import annotations`
    accepted = {}
    for name, value in settings.items():
        is_setting = type(value) in WORDS and (value is not None or name in hints)
        if is_setting and not name.startswith('_') and not name.isupper():
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
    """Parse the text of a flag. Return the text itself if it is no bool, None or number."""
    if bool in options and text in BOOLS:
        return BOOLS[text]
    if types.NoneType in options and text == 'None':
        return None
    if int in options or float in options:
        for number in (int, float):
            with contextlib.suppress(ValueError):
                return number(text)
    return text


def checked(value, options: list, source: str):
    """Convert a value to the type of its setting: 1 to 1.0 for a float, 1e3 to 1000 for an int.

    source  for the error: '--dtype=bf16' or "config/x.py: dtype = 'bf16'"
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
    words = [option for option in options if isinstance(option, str)]
    near = nearest(str(value), words, '; did you mean {}?')
    raise ValueError(f'{source}: accepted {phrase(options)}{near}')


def nearest(word, choices, remedy, otherwise=''):
    """Format the remedy with the choice spelled most like the word; return `otherwise` if none is close."""
    near = difflib.get_close_matches(word, choices, n=1)
    return remedy.format(near[0]) if near else otherwise


# -----------------------------------------------------------------------------
# flags and config files


def parse(argv, accepted, strict=True):
    """Split the command line into config files, in order, and flags by name. A later flag wins.

    strict  False: skip unknown flags, which may belong to config files
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
            near = nearest(name, accepted, ', did you mean --{}?', ', --help lists all')
            raise ValueError(f'{key}: unknown setting{near}')
        options = accepted[name]
        if not equals:
            following = rest[0] if rest and not rest[0].startswith('--') else None
            if bool in options and following not in (*BOOLS, 'None', *options):
                text = 'True'  # a bare --flag
            elif following is None:
                raise ValueError(f'{key}: no value, write {key}=VALUE: accepted {phrase(options)}')
            else:
                text = rest.pop(0)
        flags[name] = checked(from_text(text, options), options, f'{key}={text}')
    return files, flags


def read_config(file, script, current, accepted):
    """Run a config file that sees the current settings. Return its settings by name, and its derive().

    Unknown names are errors, except imports, functions, classes and names with a leading underscore.
    """
    folder = os.path.dirname(script)
    path = next(filter(os.path.isfile, (file, os.path.join(folder, file))), None)
    if path is None:
        stems = [p.stem for base in ('', folder) for p in Path(base, 'config').glob('*.py')]
        near = nearest(Path(file).stem, stems, ', did you mean config/{}.py?')
        raise FileNotFoundError(f'{file}: no such config file{near}')
    source = Path(path).read_bytes()
    try:
        symbols = symtable.symtable(source, path, 'exec').get_symbols()
        result = runpy.run_path(path, init_globals=current)
    except (Exception, SystemExit) as e:
        raise ValueError(where(file, path, e)) from e
    # a file gives the settings that it assigns, and those that an `import *` changed
    assigned = [symbol.get_name() for symbol in symbols if symbol.is_assigned()]
    for name in assigned:
        value = result.get(name)
        is_own = name.startswith('_') or name not in result or callable(value) or inspect.ismodule(value)
        if name not in accepted and not is_own:
            near = nearest(name, accepted, ', did you mean {}?', ' (a name of its own begins with _)')
            raise ValueError(f'{file}: unknown setting {name}{near}')
    values = {}
    for name in current.keys() & result.keys():
        value = result[name]
        if name in assigned or value is not current[name]:
            values[name] = checked(value, accepted[name], f'{file}: {name} = {value!r}')
    derive = result.get('derive')
    return values, derive if inspect.isfunction(derive) else None


def where(file, path, error):
    """'config/x.py:3: ZeroDivisionError: division by zero', for the innermost line of the file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = lines[-1] if lines else getattr(error, 'lineno', None)  # of a SyntaxError
    return f'{file}:{line or 1}: {type(error).__name__}: {getattr(error, "msg", error)}'


def own_settings(derive):
    """Return the accepted values of the annotated parameters of a file's derive()."""
    hints = typing.get_type_hints(derive) if derive else {}
    return {name: options_of(hint) for name, hint in hints.items()}


def call_derive(file, derive, given, flags, defaults, accepted):
    """Return the settings that derive() computes, by name."""
    if derive is None:
        return {}
    arguments = {}
    for name, parameter in inspect.signature(derive).parameters.items():
        chosen = [values[name] for values in (flags, given) if name in values]
        own = parameter.default if parameter.default is not parameter.empty else defaults.get(name)
        arguments[name] = chosen[0] if chosen else own
    try:
        values = derive(**arguments)
    except Exception as e:
        raise ValueError(where(file, derive.__code__.co_filename, e)) from e
    for name in values:
        if name not in accepted:
            near = nearest(name, accepted, ', did you mean {}?')
            raise ValueError(f'{file}: derive() gives {name}, an unknown setting{near}')
    return {name: checked(value, accepted[name], f'{file}: {name} = {value!r}')
            for name, value in values.items()}


# -----------------------------------------------------------------------------
# --help


def help_text(settings):
    """Return the script's docstring and its settings with headings, defaults, remarks and accepted values."""
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
    """Return {name: (comment lines above, comment after)} of a script's top-level assignments."""
    with tokenize.open(script) as f:
        source = f.read()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {}
    for token in tokens:
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip('#').strip()
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
