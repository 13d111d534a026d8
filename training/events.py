"""The command of on_event: it runs beside training, and no failure of it reaches the run."""

import contextlib
import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

from files import print0, printable

TIMEOUT_S = 30.0  # for one call, and at the end for all that wait
MAX_WAITING = 8
# of torchrun: a script of ours that the command starts must not join the ranks
RANK_VARIABLES = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'TORCHELASTIC_ERROR_FILE', 'TORCHELASTIC_RUN_ID')


class Hook:
    """Calls a shell command in the order of the events, one at a time.

        sh -c 'COMMAND "$@"' sh EVENT        with JSON on its input

    command  a command line for sh, which gets the name of the event as one more argument and as $1
    """

    def __init__(self, command: str):
        self.command = command
        self.waiting = []  # futures
        self.ends_s = float('inf')  # time.monotonic() after which no call may go on, but for the last
        self.pool = ThreadPoolExecutor(1)

    def send(self, event: str, facts: dict):
        """Call the command soon. After MAX_WAITING calls that have not ended, an event is dropped."""
        self.waiting = [call for call in self.waiting if not call.done()]
        if len(self.waiting) >= MAX_WAITING:
            print0(f'on_event: {event} dropped: {MAX_WAITING} earlier calls of the command have not ended')
            return
        self.waiting.append(self.pool.submit(self.call, event, json.dumps(facts) + '\n'))

    def call(self, event, text):
        """Run the command, and print its output or its failure as one line."""
        left_s = self.ends_s - time.monotonic()
        if left_s <= 0:
            print0(f'on_event: {event} dropped: the run has ended')
            return
        try:
            code, output = run(self.command, event, text, min(TIMEOUT_S, left_s))
        except Exception as error:  # no process can be started, for example
            code, output = type(error).__name__, str(error)
        output = printable(' '.join(output.split()))[:300]
        if code != 0:
            print0(f'on_event: {event} failed ({code}), training continues: {output}')
        elif output:
            print0(f'on_event: {event}: {output}')

    def close(self, event: str, facts: dict):
        """Wait for the calls, TIMEOUT_S in all, and make the last one, of the end of the run."""
        self.ends_s = time.monotonic() + TIMEOUT_S
        self.pool.shutdown()
        self.ends_s = float('inf')
        self.call(event, json.dumps(facts) + '\n')


def run(command: str, event: str, text: str, timeout_s: float) -> tuple[int | str, str]:
    """Return the exit code of a command, or how it ended, and its output."""
    env = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    # a session of its own: Ctrl-C does not reach it, and all of it can be ended
    process = subprocess.Popen(['sh', '-c', f'{command} "$@"', 'sh', event], env=env, start_new_session=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, encoding='utf-8', errors='replace')
    try:
        output, _ = process.communicate(text, timeout_s)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f'ended after {timeout_s:.0f} s', ''
