"""Files and messages: atomic writes, locks, JSON lines, one-line errors.

    write_atomically('out/run.json', lambda f: f.write(data))
    with one_line_errors():
        main()
"""

import contextlib
import json
import os
import re
import socket
import sys
import time
from pathlib import Path

CONTROL = re.compile(r'[\x00-\x08\x0b-\x1f\x7f-\x9f]')  # all control characters except tab and line feed
UNDECODED = re.compile('[\udc80-\udcff]+')


# -----------------------------------------------------------------------------
# writing


def write_atomically(path, write):
    """Write a file completely or not at all, even if the process is killed or the disk fills up.

    write   called with the open binary file
    raises  OSError that names path; an earlier file is then unchanged
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.tmp{os.getpid()}')
    try:
        with open(temporary, 'w+b') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)
        raise
    sync_folder(path.parent)


def write_text(path, text):
    # a file name outside the locale's encoding has half surrogate pairs: they become \udc.., as JSON has them
    write_atomically(path, lambda f: f.write(text.encode('utf-8', 'backslashreplace')))


def write_json(path, value, indent=1):
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + '\n')


def sync_folder(folder):
    """Make renames in a folder survive a power cut."""
    if os.name == 'posix':  # Windows cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder):
    """Delete temporary files of killed processes. Only for the owner of the folder, under its lock."""
    for path in Path(folder).glob('.*.tmp[0-9]*'):
        path.unlink(missing_ok=True)


def lock(folder):
    """Claim a folder for this process until the returned file is closed or the process ends.

    raises  ValueError that names the process holding the lock
    """
    path = Path(folder) / '.lock'
    f = open(path, 'a+', encoding='utf-8', errors='replace')
    try:
        if os.name == 'posix':
            import fcntl
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt
            f.seek(1 << 30)  # past the text, which others read to name the holder
            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        f.seek(0)
        with f:
            raise ValueError(f'{folder}: another process is writing there, {f.read().strip()}: wait for it, '
                             'stop it, or use another folder') from None
    except OSError as error:
        print0(f'{path}: {error.strerror}: this file system has no locks, make sure that no other process '
               'writes there')
        return f
    f.truncate(0)
    f.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    f.flush()
    return f


# -----------------------------------------------------------------------------
# reading


def read_json(path):
    """Return the JSON value in a UTF-8 file, or raise ValueError that names the file."""
    try:
        return json.loads(Path(path).read_bytes().decode('utf-8-sig'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}: not JSON in UTF-8 ({error})') from None


# -----------------------------------------------------------------------------
# messages


def print0(*args, **kwargs):
    """Print on the first rank only. A log on a full disk does not end a run; a closed pipe does."""
    if (os.environ.get('RANK') or '0') != '0':
        return
    try:
        print(*args, **kwargs, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def as_utf8(text):
    """Decode the bytes that Python keeps as surrogates in a flag or file name if the locale is not UTF-8."""
    return UNDECODED.sub(lambda match: os.fsencode(match[0]).decode('utf-8', 'replace'), text)


def printable(text):
    """Escape control characters, so that a name or generated text cannot steer the terminal."""
    return CONTROL.sub(lambda match: f'\\x{ord(match[0]):02x}', as_utf8(text))


@contextlib.contextmanager
def one_line(where):
    """Turn the errors of damaged content, and panics of `tokenizers`, into a ValueError that says where."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != 'PanicException':
            raise
        raise ValueError(f'{where}: {error or type(error).__name__}') from None


@contextlib.contextmanager
def one_line_errors():
    """Turn a user's mistake into one line and exit code 2. FLATGPT_TRACEBACK=1 shows a traceback instead."""
    if hasattr(sys.stdout, 'reconfigure'):
        # a character that the terminal lacks must not end a run
        sys.stdout.reconfigure(errors='backslashreplace')
    if sys.stderr is None:
        # It was closed, and errors go to stdout. Descriptor 2 must not be given to the next file that is
        # opened, because libraries write warnings to it.
        while (null := os.open(os.devnull, os.O_WRONLY)) < 2:
            pass
        sys.stderr = sys.stdout or open(null, 'w')
    try:
        yield
        print(end='', flush=True)
        return
    except KeyboardInterrupt:
        code, message = 130, 'interrupted'
    except Exception as error:
        code, message = 2, message_of(error)
        if message is None or os.environ.get('FLATGPT_TRACEBACK'):
            raise
        if isinstance(error, BrokenPipeError) and stdout_is_closed():
            sys.exit(141)  # 128 + SIGPIPE, as `| head` ends any program
    message = printable(' '.join(map(str.strip, message.splitlines())))
    if (os.environ.get('WORLD_SIZE') or '1') != '1':
        message = f'rank {os.environ.get("RANK")}: {message}'
        tell_torchrun(message)
    print(message, file=sys.stderr)
    sys.exit(code)


def tell_torchrun(message):
    """Put the message into torchrun's closing report, and let the first rank that fails print alone."""
    report = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if not report:
        return
    if os.environ.get('RANK') != '0':  # most errors are the same on all ranks, and torchrun ends the others
        time.sleep(5 + int(os.environ.get('LOCAL_RANK') or 0))
    details = dict(message=message, extraInfo=dict(timestamp=str(int(time.time()))))
    with contextlib.suppress(OSError):
        write_json(report, dict(message=details))


def message_of(error):
    """Return the message for an error that a user can fix; None for any other."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f'{error.filename}: {error.strerror}'
    if isinstance(error, (ValueError, OSError)):
        return str(error) or type(error).__name__
    if isinstance(error, ModuleNotFoundError):  # packages are imported where they are used
        return f'{error}: pip install -r requirements.txt'
    # torch names its error so on a GPU, and raises RuntimeError on a CPU
    if type(error).__name__ in ('MemoryError', 'OutOfMemoryError') or "can't allocate memory" in str(error):
        return ('not enough memory: use a smaller model, batch or block_size '
                f'({str(error)[-150:] or "no details"})')
    return None


def stdout_is_closed():
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return True
    return False
